"""A data source: every paragraph of the text files in a folder.

data: {source: "folder:notes/"}
"""

from pathlib import Path

from splitft.errors import DataError
from splitft.specs.data import SOURCES


def folder(spec, columns):
    """Yield one row for each paragraph, with its file's name as the column `file`."""
    place = Path(spec.source_argument)
    files = sorted(place.glob("*.txt"))
    if not files:
        raise DataError(f"data.source: {place} holds no .txt files; write folder:PATH")
    for file in files:
        for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
            yield {"text": paragraph.strip(), "file": file.name}


SOURCES.add("folder", folder)
