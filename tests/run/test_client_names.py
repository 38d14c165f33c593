"""Clients are named as their data say; nothing that a name says leads out of the run folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as budget
from hypothesis import strategies as st

import splitft
from laws.federations import WORDS
from runs import StoppedError, invoke, settings, stop_at
from splitft.config import from_mapping
from splitft.errors import DataError
from splitft.tracking.events import CheckpointSaved

HOSTILE = (
    "../../escaped", "Klinik Süd/3", "ü" * 200, "a\0b", ".", "..", "a/../a", "con", "NUL", "x.", "x ",
    "North", "north", "</script><script>alert(1)</script>", "\x1b[2J\u202e", "[bold]", "=1+1", "server",
    "x" * 201, "~", "/tmp/absolute", "C:\\x", "{{ 7 * 7 }}", "%s%n", " ",
)  # fmt: skip
WAYS = {
    "local": {"method": "local"},
    "fedsa": {"aggregate": {"rule": "fedsa"}},
    "private blocks": {"privacy": {"private_blocks": 1}},
}


def configured(model, folder: Path, values, **sections):
    """A run of two rounds whose clients are these values of a column."""
    text, cuts = folder / "notes.jsonl", "whole" if sections.get("method") == "local" else 2
    rows = [
        {"text": " ".join([*WORDS[client : client + 3], WORDS[number]]), "site": value}
        for client, value in enumerate(values)
        for number in range(3)
    ]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return from_mapping(
        settings(
            model,
            text,
            clients={"count": len(values), "cuts": cuts, "shares": {"by": "natural", "column": "site"}},
            lora={"rank": 2, "rank_at_cut": None},
            training={"rounds": 2, "steps": 1},
            **sections,
        )
    )


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("way", WAYS)
@given(
    values=st.lists(
        st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=210), min_size=2, max_size=3, unique=True
    )
)
@example(values=["../../escaped", "Klinik Süd/3", "ü" * 200])
@example(values=["a\0b", ".", ".."])
@example(values=["North", "north", "NORTH"])
@budget(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@pytest.mark.hostile(
    "text names its clients `../../escaped`, NUL and the like ({id})",
    "nothing outside the run folder; the run resumes",
)
def test_a_run_with_any_names_stays_in_its_folder_and_goes_on(tiny_llama, way, values):
    root = Path(tempfile.mkdtemp())
    try:
        _try_names(tiny_llama, root, WAYS[way], values)
    finally:
        shutil.rmtree(root)


def _no_client(name: str) -> bool:
    return len(name) > 200 or name == "server" or name.startswith("=")


def _try_names(model, root: Path, way, values):
    around = root / "a" / "b" / "c"  # room for what would climb out
    around.mkdir(parents=True)
    config, run = configured(model, around, values, **way), around / "run"
    before = everything(root)
    try:
        splitft.train(config, run, listeners=[stop_at(CheckpointSaved, 1)])
    except StoppedError:
        pass
    except DataError:  # refused before anything is written
        refused = everything(root) == before and any(map(_no_client, values))
    else:
        refused = False
    if any(map(_no_client, values)):
        assert refused
        return
    finished = splitft.train(config, run, resume=True)
    outside = {path for path in everything(root) - before if not path.startswith("a/b/c/run")}
    assert outside == set()
    # every client has its own adapter, under the name that the data gave it
    assert [one["name"] for one in finished.summary["clients"]] == sorted(values)
    personal = finished.personal
    assert personal.keys() == set(values)
    contents = {
        name: (folder / "adapter_model.safetensors").read_bytes() for name, folder in personal.items()
    }
    assert len(set(contents.values())) == len(values)
    assert all(folder.resolve().parent == (run / "personal").resolve() for folder in personal.values())
    # evaluation finds it, and the report shows it
    first = sorted(values)[0]
    done = invoke("eval", run, "--client", first) if not first.startswith("-") else None
    assert done is None or done.exit_code == 0, done.output
    assert "<script>alert" not in (run / "report.html").read_text(encoding="utf-8")
    if way.get("method") != "local":
        splitft.export(run, around / "exported")
        assert (around / "exported" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("value", ["x" * 201, "=handed on", "server"])
@pytest.mark.hostile("a client is named {id}", "refused before anything is written")
def test_a_name_that_no_client_can_have_is_refused_before_anything_is_written(tiny_llama, tmp_path, value):
    config = configured(tiny_llama, tmp_path, ["north", value])
    with pytest.raises(DataError, match=r"clients\.shares\.column"):
        splitft.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_half_a_character_is_no_name(tiny_llama, tmp_path):
    config = configured(tiny_llama, tmp_path, ["north", "\ud800"])
    with pytest.raises(DataError, match=r"line 4, column 'site', is not valid text"):
        splitft.train(config, tmp_path / "run")


def test_ordinary_names_are_folders_as_ever(tiny_llama, tmp_path):
    run = splitft.train(
        configured(tiny_llama, tmp_path, ["North", "ward-3"], method="local"), tmp_path / "run"
    )
    assert sorted(path.name for path in (run.folder / "personal").iterdir()) == ["North", "ward-3"]
