"""Names from data become files of their own, inside their folder, on every system."""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from splitft.names import file_safe, file_safe_name, is_file_safe, is_plain

ANY = st.text(st.characters(), max_size=300)  # lone surrogates too
HOSTILE = (
    "", ".", "..", "../../escaped", "a/../a", "/etc/passwd", "C:\\Windows", "\\\\host\\share", "a\0b", "con",
    "NUL", "lpt1", "COM0", "x.", "x ", " x", "-rf", "~root", "$HOME", "name~0123456789", "ü" * 200, "x" * 200,
    "\u202egnp.exe", "a\nb", "Klinik Süd/3", "plain\n",
)  # fmt: skip


@given(st.lists(ANY, max_size=8))
@example(list(HOSTILE))
@example(["North", "north", "NORTH", "north~0123456789"])
@example(["Straße", "strasse", "STRASSE"])
def test_every_name_gets_a_file_of_its_own_in_its_folder(names):
    files = file_safe(names)
    assert files.keys() == set(names)
    for file in files.values():
        assert is_file_safe(file)
        assert file.isascii()
        assert len(file) <= 255
        for kind in (PurePosixPath, PureWindowsPath):
            assert kind(file).parts == (file,)
            assert (kind("/run/personal") / file).parent == kind("/run/personal")
        assert not PureWindowsPath(file).is_reserved()
        assert file.rstrip(". ") == file
    folded = {unicodedata.normalize("NFC", file).casefold() for file in files.values()}
    assert len(folded) == len(files)


@given(st.lists(ANY, max_size=8), st.randoms())
def test_a_file_name_depends_on_the_names_alone_and_not_on_their_order(names, random):
    shuffled = list(names)
    random.shuffle(shuffled)
    assert file_safe(shuffled) == file_safe(names)


@given(st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,62}[A-Za-z0-9])?", fullmatch=True))
def test_ordinary_names_are_their_own_files(name):
    assert (
        file_safe_name(name) == name or name.casefold() in ("con", "prn", "aux", "nul") or name[-1].isdigit()
    )


@pytest.mark.parametrize("name", [name for name in HOSTILE if not name.startswith(("x" * 99, "name~"))])
def test_hostile_names_do_not_fit_the_rule(name):
    assert not is_plain(name)
    assert not is_file_safe(name)


@pytest.mark.parametrize("name", [None, 7, b"north", ["north"], True])
def test_what_is_no_text_is_no_name(name):
    assert not is_file_safe(name)


def test_the_readable_part_stays_readable():
    assert file_safe_name("Klinik Süd/3").startswith("klinik-sud-3~")
    assert file_safe_name("../../escaped").startswith("escaped~")
    assert file_safe_name("病院").startswith("name~")
