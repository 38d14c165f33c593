"""A deployed run says what its defences promise, and reports no loss that would break it."""

from __future__ import annotations

import pytest

from deploy.network import serve_with, site_thread
from laws.federations import write_text
from splitft.cli.operate import _show
from splitft.config import from_mapping
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.session import ServerSession
from splitft.deploy.server.status import RunStatus
from splitft.run.folder import Run
from splitft.tracking.events import StepDone
from splitft.tracking.log import read_events

KEY = bytes(range(16))


@pytest.fixture
def finished(tiny_llama, tmp_path) -> Run:
    """A run of two rounds with two sites on threads, with noise on gradients."""
    config = from_mapping({
        "model": {"name": str(tiny_llama), "dtype": "float32"},
        "data": {"source": str(write_text(tmp_path / "notes.jsonl")), "max_tokens": 32},
        "clients": {"count": 2, "cuts": 2},
        "lora": {"rank": 4, "rank_at_cut": None},
        "training": {"rounds": 2, "steps": 2, "batch_size": 2},
        "privacy": {"gradient": {"defence": "gaussian", "noise": 2.0}},
        "deploy": {"window_ms": 2, "min_clients": 2},
    })  # fmt: skip
    terms = load_run_terms(config)
    server = ServerSession(terms, tmp_path / "run", ("client-1", "client-2"), KEY)
    serve_with(server, [site_thread(config, name, server, KEY) for name in ("client-1", "client-2")])
    return Run(tmp_path / "run")


def test_a_deployed_run_states_its_promises_and_has_no_training_loss(finished):
    gradients, losses = finished.summary["defences"]
    assert "a text of 32 tokens" in gradients  # the server knows the bound on texts, not the texts
    assert "Losses of training batches are not reported" in losses
    assert "over the 3 of the run" in losses
    events = list(read_events(finished.folder / "events.jsonl"))
    assert {event.loss for event in events if isinstance(event, StepDone)} == {None}
    assert all(loss is not None for loss in finished.summary["eval_loss"])
    page = finished.report().read_text(encoding="utf-8")
    assert "Losses of training batches are not reported" in page


def test_the_table_of_sites_says_that_a_loss_is_not_reported():
    status = RunStatus(["client-1", "client-2"], rounds=1)
    status(StepDone(round=1, step=0, client="client-1", tokens=3, examples=1))
    data = {"job": "a", "state": "RUNNING", "connected": ["client-1", "client-2"], **status.as_data({})}
    table = _show(data).renderables[1]
    one, other = ([str(cell) for cell in column.cells] for column in table.columns[5:7])
    assert one == ["not reported", "-"]
    assert other == ["-", "-"]
