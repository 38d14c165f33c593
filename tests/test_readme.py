"""The README's commands work, in its order, on the real model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitft.cli import app
from splitft.config import load
from splitft.errors import SplitftError

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["data.max_tokens=32", "data.eval_examples=2", "training.steps=1", "training.batch_size=1"]
"""Overrides that make a README run quick."""
MINUTES = {"audit"}
"""Verbs that take minutes on a real model; their own tests run them on tiny ones."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(verb: str) -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(verb)]


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = [words[1] for words in commands("make ")]
    assert named == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)


@pytest.mark.real
@pytest.mark.slow
def test_the_tour_and_the_python_lines_run_as_written(tmp_path, monkeypatch, real_model):
    monkeypatch.chdir(tmp_path)
    for words in commands("splitft "):
        if words[1] in MINUTES:
            continue
        overrides = {"train": SMALL, "compare": [*SMALL, "training.rounds=1"]}.get(words[1], [])
        result = CliRunner().invoke(app, [*words[1:], *overrides])
        assert result.exit_code == 0, f"{shlex.join(words)}: {result.output}"
    assert (tmp_path / "runs/a/report.html").is_file()
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "merged/model.safetensors").is_file()
    load("run.yaml", SMALL)
    (code,) = blocks("python")
    exec(code.replace('out="runs/b"', f'out="runs/b", overrides={SMALL!r}'), {})
    assert (tmp_path / "runs/b/adapter/adapter_config.json").is_file()


def test_the_configuration_shown_is_one_that_loads(tmp_path):
    (shown,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(shown, encoding="utf-8")
    try:
        config = load(tmp_path / "run.yaml")
    except SplitftError as error:
        pytest.fail(str(error))
    assert config.cuts == (2, 5, 10, 15)


def test_every_file_and_folder_that_the_readme_links_to_is_there():
    linked = list(re.findall(r"\]\(([^)#:]+)\)", README))
    assert linked
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_the_tree_shows_every_room():
    rooms = [path.name for path in (ROOT / "src/splitft").iterdir() if (path / "__init__.py").exists()]
    assert [room for room in rooms if f"── {room}/" not in README] == []
