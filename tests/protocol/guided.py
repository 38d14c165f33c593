"""Frames made by libFuzzer, which keeps what reaches new code: `python tests/protocol/guided.py -runs=20000`.

It works on three pieces, the header, the table of tensors and the payload, and does not have to guess
lengths and checksums: they are computed around what it made. Needs atheris, the fuzzer's Python bindings.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports(include=["splitft.codecs", "splitft.protocol"]):
    from protocol.judge import fault_of, good_frames
    from protocol.mutations import forged, opened
    from splitft.errors import SplitftError

FRAMES = good_frames()
_LENGTHS = struct.Struct("<BHH")


def one_input(data: bytes) -> None:
    """Which terms, length of header and of table, then header, table and payload."""
    if len(data) < _LENGTHS.size:
        return
    which, header, table = _LENGTHS.unpack_from(data)
    rest = data[_LENGTHS.size :]
    terms = FRAMES[which % len(FRAMES)][0]
    try:
        message = terms.from_bytes(
            forged(rest[:header], rest[header : header + table], rest[header + table :])
        )
    except SplitftError:
        return
    fault = fault_of(message, terms)
    assert fault is None, fault


def main() -> None:
    with tempfile.TemporaryDirectory() as corpus:
        for index, (_, good) in enumerate(FRAMES):
            header, table, payload = opened(good)
            start = _LENGTHS.pack(index, len(header), len(table))
            (Path(corpus) / str(index)).write_bytes(start + header + table + payload)
        atheris.Setup([*sys.argv, "-max_len=8192", corpus], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
