"""Registries: names of all origins, imported late, and refusals that say what there is."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from splitft import registry
from splitft.errors import PluginError
from splitft.registry import REGISTRIES, Lazy, Registry, generation


@pytest.fixture
def shapes():
    yield Registry("shape", "splitft.shapes", {"round": 1, "flat": "json:dumps"})
    REGISTRIES.pop("splitft.shapes")


def test_what_is_built_in_by_place_is_imported_when_it_is_asked_for(shapes):
    import json

    assert shapes["flat"] is json.dumps
    assert dict(shapes) == {"round": 1, "flat": json.dumps}


def test_what_is_added_stands_beside_what_is_built_in_and_may_be_added_again(shapes):
    before = generation()
    assert shapes.add("square-2", 4) == 4
    assert shapes.add("square-2", 5) == shapes["square-2"] == 5
    assert list(shapes) == ["round", "flat", "square-2"]
    assert generation() > before


@pytest.mark.parametrize("name", ["", "Big", "a b", "../a", "-a", "x" * 41, "a\n"])
def test_a_name_is_a_short_lower_case_word(shapes, name):
    with pytest.raises(PluginError, match="lower-case"):
        shapes.add(name, 1)
    assert len(shapes) == 2


def test_what_is_built_in_is_not_replaced(shapes):
    with pytest.raises(PluginError, match="'round' is built in; give yours another name"):
        shapes.add("round", 2)
    assert shapes["round"] == 1


def test_an_unknown_name_is_answered_with_the_nearest_or_with_all(shapes):
    with pytest.raises(PluginError, match="no shape is called 'rond'; did you mean round"):
        shapes.find("rond")
    with pytest.raises(PluginError, match="there are round, flat"):
        shapes.find("zzz")
    with pytest.raises(KeyError):
        shapes["zzz"]


def test_an_installed_package_adds_by_entry_points_and_is_imported_late(shapes, monkeypatch):
    entries = [
        EntryPoint("oval", "math:pi", "splitft.shapes"),
        EntryPoint("broken", "no_such_module:x", "splitft.shapes"),
        EntryPoint("round", "math:e", "splitft.shapes"),
        EntryPoint("Not A Name", "math:e", "splitft.shapes"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == "splitft.shapes" else [])
    assert list(shapes) == ["round", "flat", "oval", "broken"]
    assert shapes["oval"] == pytest.approx(3.14159, abs=1e-5)
    assert shapes["round"] == 1
    with pytest.raises(PluginError, match="'broken' of no_such_module:x cannot be loaded: ModuleNotFound"):
        shapes["broken"]


def test_a_lazy_function_is_imported_when_it_is_called():
    assert Lazy("no_such_module:f") == Lazy("no_such_module:f")
    assert Lazy("math:hypot")(3, 4) == 5
