"""A deployed run over a network of threads equals its simulation, whatever the carrier loses or repeats."""

from __future__ import annotations

import pytest

from deploy.network import deployed
from laws.federations import federation, largest_relative_difference, play, write_text

TRAINING = {"rounds": 2, "steps": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


def test_a_federation_on_threads_equals_its_simulation(tiny_llama, text):
    state, _ = play(federation(tiny_llama, text, [1, 2, 3], training=TRAINING))
    outcome = deployed(federation(tiny_llama, text, [1, 2, 3], training=TRAINING))
    assert outcome.error is None
    assert not outcome.of("SiteChanged")
    assert largest_relative_difference(outcome.state.adapters.tensors(), state.adapters.tensors()) < 1e-6
    assert outcome.state.losses == pytest.approx(state.losses, rel=1e-6)
