"""Adapters as changes: exact ones train what whole ones would, rounded ones nearly that for fewer bytes."""

from __future__ import annotations

from typing import get_args

import pytest

import splitft
from laws.federations import write_text
from runs import adapter_bytes, settings
from splitft.config import from_mapping
from splitft.protocol.adapter_deltas import SAME, DeltaState
from splitft.protocol.frame import Frame
from splitft.specs import AggregateSpec

RULES = get_args(AggregateSpec.model_fields["rule"].annotation)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def train(tiny_llama, text, tmp_path):
    def make(name: str, tap=None, **sections):
        config = from_mapping(settings(tiny_llama, text, **sections))
        return splitft.train(config, tmp_path / name, tap=tap)

    return make


def _adapter_bytes_sent(run) -> int:
    return sum(run.summary["bytes"]["adapter"].values())


@pytest.mark.parametrize("rule", [rule for rule in ("svd", "ffa") if rule in RULES])
def test_an_exact_federation_is_that_in_which_everything_travels(train, monkeypatch, rule):
    sections = {"aggregate": {"rule": rule}, "schedule": {"controller": "makespan"}}
    changes = train("changes", **sections)
    monkeypatch.setattr(DeltaState, "_hold", lambda *anything: None)
    whole = train("whole", **sections)
    assert adapter_bytes(changes.folder) == adapter_bytes(whole.folder)
    assert changes.summary["eval_loss"] == whole.summary["eval_loss"]
    assert _adapter_bytes_sent(changes) <= _adapter_bytes_sent(whole)


@pytest.mark.parametrize(("rule", "controller"), [("svd", "fixed"), ("zero-pad", "makespan")])
def test_rounded_changes_train_nearly_the_same_in_fewer_bytes(train, rule, controller):
    sections = {"aggregate": {"rule": rule}, "schedule": {"controller": controller}}
    exact = train("exact", wire={"in_process": "direct"}, **sections)  # which counts tensors alone
    losses = exact.summary["eval_loss"]
    for codec, share in (("bf16", 0.5), ("int8", 0.3)):
        run = train(codec, wire={"adapter": codec, "in_process": "direct"}, **sections)
        assert _adapter_bytes_sent(run) <= share * _adapter_bytes_sent(exact)
        moved = losses[0] - losses[-1]
        assert abs(run.summary["eval_loss"][-1] - losses[-1]) < 0.02 * moved
        assert adapter_bytes(run.folder) != adapter_bytes(exact.folder)


def test_what_travels_after_the_first_round_are_differences(train):
    frames = []
    train(
        "run", lambda client, direction, data: frames.append(Frame.from_bytes(data)), wire={"adapter": "int8"}
    )
    later = [f for f in frames if f.kind == "AdapterUpload" and f.fields["round"] > 1]
    tensors = [encoded for frame in later for encoded in frame.tensors.values()]
    differences = [one for one in tensors if "base" in one.parameters or one.codec == SAME]
    assert len(differences) > len(tensors) / 2
    assert all(one.codec in ("int8", SAME) for one in tensors)


def test_passing_changes_on_directly_equals_passing_them_through_bytes(train):
    runs = [
        train(how, wire={"adapter": "int8", "in_process": how}, aggregate={"rule": "zero-pad"})
        for how in ("bytes", "direct")
    ]
    assert adapter_bytes(runs[0].folder) == adapter_bytes(runs[1].folder)
