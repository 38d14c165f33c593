"""Files and folders are written whole or not at all, and cached values are made once."""

from __future__ import annotations

import json

import pytest

from splitft.cache import KeyedCache
from splitft.files import whole_folder, write_whole


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    file = tmp_path / "new" / "a.txt"
    write_whole(file, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(file, b"new")
    assert [(one.name, one.read_text()) for one in file.parent.iterdir()] == [("a.txt", "old")]


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path):
    def write(*names, fail=False):
        with whole_folder(tmp_path / "f") as draft:
            for name in names:
                (draft / name).touch()
            if fail:
                raise ValueError("no")

    write("a")
    with pytest.raises(ValueError, match="no"):
        write("b", fail=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["f", "a"]
    write("c")
    assert [path.name for path in tmp_path.rglob("*")] == ["f", "c"]


def test_of_processes_that_make_the_same_folder_the_first_one_stays(tmp_path):
    with whole_folder(tmp_path / "f", shared=True) as draft:
        (tmp_path / "f").mkdir()  # another process was first
        (draft / "late").touch()
    assert list(tmp_path.rglob("*")) == [tmp_path / "f"]


def test_a_cached_value_is_made_again_only_for_other_facts_or_from_a_damaged_file(tmp_path):
    cache, made = KeyedCache(tmp_path, lambda value: json.dumps(value).encode(), json.loads), []

    def value(facts):
        return cache.cached(facts, lambda: made.append(facts) or [facts])

    assert value("a") == value("a") == ["a"]
    assert value("b") == ["b"]
    assert made == ["a", "b"]
    for file in tmp_path.glob("*.json"):
        file.write_text("{")
    assert value("a") == ["a"]
    assert made == ["a", "b", "a"]
