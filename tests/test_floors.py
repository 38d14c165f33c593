"""Imports go down the floors, and what must be light is light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from importlinter import api
from importlinter.application.use_cases import lint_imports as lint

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src/splitft"
HEAVY = ("torch", "transformers", "peft", "datasets", "pandas", "plotly")


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "src"))


def modules_after(code: str) -> set[str]:
    """Return the names of the top-level modules that a fresh interpreter has after this code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_imports_go_down_the_floors(capsys):
    assert lint(config_filename="pyproject.toml", cache_dir=None), capsys.readouterr().out


def test_there_are_floors_to_go_down_and_every_room_has_its_own():
    contract = api.read_configuration("pyproject.toml")["contracts_options"][0]
    floors = [floor.split(" | ") for floor in contract["layers"]]
    assert len(floors) >= 6
    named = [room for floor in floors for room in floor]
    rooms = [path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()]
    files = [path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__"]
    assert sorted(named) == sorted(f"splitft.{name}" for name in rooms + files)


def test_a_floor_plan_upside_down_is_noticed(tmp_path, capsys):
    upside_down = tmp_path / "floors.ini"
    upside_down.write_text(
        "[importlinter]\nroot_package = splitft\n"
        "[importlinter:contract:1]\nname = upside down\ntype = layers\n"
        "layers =\n    splitft.errors\n    splitft.config\n",
        encoding="utf-8",
    )
    assert not lint(config_filename=str(upside_down), cache_dir=None)
    assert "splitft.config" in capsys.readouterr().out


def test_no_public_class_name_stands_twice():
    names = Counter(
        node.name
        for path in SOURCE.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert len(names) > 200
    assert {name for name, times in names.items() if times > 1} == set()


NAMED_WITH_THEIR_FOLDER = ("cli", "deploy/site", "deploy/server", "deploy/flare")
"""Folders whose modules are named after what they mirror: verbs of a room, or the other side of a deployment.
They are called by folder and name, such as `cli.audit`, `site.session` and `server.session`."""


def test_no_module_name_stands_twice():
    names = Counter(
        f"{path.parent.name}.{path.stem}"
        if path.parent.relative_to(SOURCE).as_posix() in NAMED_WITH_THEIR_FOLDER
        else path.stem
        for path in SOURCE.rglob("*.py")
        if path.stem != "__init__"
    )
    assert {name for name, times in names.items() if times > 1} == set()


def test_importing_the_package_is_light():
    assert modules_after("import splitft").isdisjoint(HEAVY)


LIGHT = ["geometry", "specs", "config", "schedule", "cli", "tracking.events", "report.page"]


@pytest.mark.parametrize("module", LIGHT)
def test_what_needs_no_tensors_brings_no_torch(module):
    assert modules_after(f"import splitft.{module}").isdisjoint(HEAVY)


def test_the_versions_that_are_installed_fit_the_ranges_that_are_promised():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    for requirement in map(Requirement, wanted):
        assert requirement.name.lower() in pinned, f"{requirement} is not pinned"
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement
