"""A seal fits its content and nothing else; the checksums of a folder are those of `sha256sum`."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from damage import mutations
from splitft.errors import DamagedError
from splitft.peft_folder import check_whole
from splitft.seals import BLANK, SUMS, changed_files, is_whole, seal, write_sums


@given(st.binary(max_size=200), st.binary(max_size=200), st.data())
def test_sealed_content_is_whole_until_it_changes(before, after, data):
    sealed = seal(before + BLANK.encode() + after)
    assert is_whole(sealed)
    assert not is_whole(data.draw(mutations(sealed)))


def test_a_seal_needs_one_place():
    for content in (b"", BLANK.encode() * 2):
        with pytest.raises(ValueError, match="one is needed"):
            seal(content)
    assert not is_whole(b"never sealed")
    assert not is_whole(BLANK.encode())


def test_the_sums_of_a_folder_are_those_that_sha256sum_checks(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "b.json").write_text("{}")
    assert changed_files(tmp_path) == []  # without sums nothing is known
    write_sums(tmp_path)
    assert changed_files(tmp_path) == []
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=tmp_path, check=True)
    (tmp_path / "a.bin").write_bytes(bytes(range(255)))
    assert changed_files(tmp_path) == ["a.bin"]
    (tmp_path / "b.json").unlink()
    with pytest.raises(DamagedError, match=r"a.bin, b.json differs .*--resume.*Remove SHA256SUMS"):
        check_whole(tmp_path)
