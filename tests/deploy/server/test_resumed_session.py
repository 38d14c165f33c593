"""A deployed run that goes on: its inputs are those of the run, its checkpoint is whole, its totals go on."""

from __future__ import annotations

import json
import os

import pytest

from deploy.network import serve_with, site_thread
from laws.federations import write_text
from splitft.config import from_mapping
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.session import ServerSession
from splitft.errors import RunError
from splitft.tracking.events import RunResumed, SiteChanged, Warned
from splitft.tracking.log import read_events, read_started
from splitft.training.checkpoint import folder_of

KEY = bytes(range(16))
SITES = ("client-1", "client-2")


def _config(model, text, rounds: int):
    return from_mapping({
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"source": str(text), "max_tokens": 32},
        "clients": {"count": 2, "cuts": [1, 2]},
        "lora": {"rank": 4, "rank_at_cut": None},
        "training": {"rounds": rounds, "steps": 2, "batch_size": 2},
        "deploy": {"window_ms": 2, "min_clients": 1},
    })  # fmt: skip


def _session(config, folder) -> ServerSession:
    """One session with both sites, as jobs wire them."""
    terms = load_run_terms(config)
    server = ServerSession(terms, folder / "run", SITES, KEY)
    sites = [site_thread(config, name, server, KEY, folder=folder / "sites" / name) for name in SITES]
    serve_with(server, sites)
    return server


@pytest.fixture
def trained(tiny_llama, tmp_path):
    """A run of two rounds."""
    text = write_text(tmp_path / "notes.jsonl")
    return _session(_config(tiny_llama, text, 2), tmp_path), text


@pytest.mark.fault(
    "a site's text has grown between two sessions; the last checkpoint is damaged",
    "the site declines; the checkpoint before is used",
)
def test_a_site_whose_text_has_grown_declines_and_a_damaged_checkpoint_is_passed_over(
    trained, tiny_llama, tmp_path
):
    before, text = trained
    os.truncate(folder_of(tmp_path / "run", 2) / "state.safetensors", 99)
    with text.open("a") as file:  # the shares of both sites change
        file.write(json.dumps({"text": "one more sentence that nobody had seen before"}) + "\n")
    path = tmp_path / "sites/client-1/text.txt"
    path.unlink()  # the owner of this one accepts it
    after = _session(_config(tiny_llama, text, 3), tmp_path)
    events = read_events(tmp_path / "run/events.jsonl")
    (declined,) = [one for one in events if isinstance(one, SiteChanged) and one.state == "declined"]
    assert declined.site == "client-2"
    assert "not the one with which it began this run" in declined.reason
    assert [one.round for one in events if isinstance(one, RunResumed)] == [2]
    assert any("round-0002 is damaged" in one.message for one in events if isinstance(one, Warned))
    # the totals are those of the whole run, without what was trained in vain
    assert (before.status()["steps"], after.status()["steps"]) == (8, 8)
    assert len(after.status()["losses"]) == 4
    assert after.status()["troubles"] == [{"site": "client-2", "state": "declined", "times": 1}]
    assert after.status()["disk_free_bytes"] > 0


def test_another_base_model_at_the_server_is_refused(trained, tiny_llama, tmp_path):
    path = tmp_path / "run/events.jsonl"
    started = read_started(path)
    assert set(started.base) >= {"model.safetensors", "config.json"}
    other = started.model_copy(update={"base": {**started.base, "model.safetensors": "0" * 64}})
    rest = path.read_text().splitlines(keepends=True)[1:]
    path.write_text("".join([other.model_dump_json() + "\n", *rest]))
    with pytest.raises(
        RunError, match=r"model.safetensors of the base model has SHA-256 .* had 000000000000"
    ):
        _session(_config(tiny_llama, trained[1], 3), tmp_path)
