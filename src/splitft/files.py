"""Write files and folders whole or not at all.

    write to a draft beside it --os.replace--> the file or folder

A reader, or a run that continues after a crash, finds the old content or the new, never a part of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write or replace a file, with its folder if that is missing; text becomes UTF-8.

    `mode` are its permissions, less those that the process masks. Threads and processes may write the same
    file at the same time: the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.draft")
    try:
        with open(draft, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a draft folder to fill, and put it in place of `path` at the end; an error deletes the draft.

    The draft of a process that was killed is deleted by the next one. With `shared`, several processes may
    make the folder at the same time: each has a draft of its own, and the first folder in place stays.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft" if shared else f".{path.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if shared and path.exists():
            return
        shutil.rmtree(path, ignore_errors=True)
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
