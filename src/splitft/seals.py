"""Seal a file: let it carry the checksum of its own content, so that any later change is found.

    content with BLANK in it --seal--> content with sha256:<64 digits> in its place --is_whole--> True

The digest is the SHA-256 of the whole content with BLANK at the place of the seal. Whoever writes the file
chooses the place: a value in JSON, or in the metadata of safetensors. A folder whose files others read too
has `SHA256SUMS` instead, which `sha256sum --check` understands. A checksum finds damage, not forgery: whoever
can change a file can also seal it again.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from splitft.files import write_whole

BLANK = f"sha256:{'0' * 64}"
"""Stands where the seal will be."""
SUMS = "SHA256SUMS"
"""File with the checksums of a folder's other files, as `sha256sum` writes it."""
_SEAL = re.compile(rb"sha256:[0-9a-f]{64}")


def seal(content: bytes) -> bytes:
    """Return the content with its seal in place of BLANK, which must be in it once."""
    blank = BLANK.encode()
    if content.count(blank) != 1:
        raise ValueError(f"there are {content.count(blank)} places for a seal; one is needed")
    return content.replace(blank, b"sha256:" + hashlib.sha256(content).hexdigest().encode())


def is_whole(content: bytes) -> bool:
    """Return whether sealed content is as it was written; False without a seal."""
    found = list(_SEAL.finditer(content))
    if len(found) != 1:
        return False
    start, end = found[0].span()
    blank = content[:start] + BLANK.encode() + content[end:]
    return found[0][0] == b"sha256:" + hashlib.sha256(blank).hexdigest().encode()


def write_sums(folder: Path) -> None:
    """Write the checksums of a folder's files into it."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    write_whole(folder / SUMS, "".join(lines))


def changed_files(folder: Path) -> list[str]:
    """Return the files of a folder that differ from its checksums; none if it has no checksums."""
    sums = folder / SUMS
    if not sums.is_file():
        return []
    changed = []
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / Path(name or SUMS).name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            changed.append(path.name)
    return changed
