"""With `model.dtype: auto` each party of a deployed run computes in the type that its own device has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deploy.network import deployed
from laws.federations import federation, largest_relative_difference, play, write_text
from splitft.model import precision
from splitft.run.setup import serializer_of

EXACT = {"hidden": "fp32", "gradient": "fp32", "adapter": "fp32"}


@pytest.fixture
def party(tiny_llama, tmp_path, monkeypatch):
    """Makes all parties in the type that their machine is fastest in, and their serializer."""
    text = write_text(tmp_path / "notes.jsonl")
    training = {"rounds": 2, "steps": 4}

    def make(dtype):
        native = precision.Precision(dtype, "so the test has it")
        monkeypatch.setattr(precision, "native_precision", lambda device: native)
        made = federation(tiny_llama, text, [1, 2, 3], model={"dtype": "auto"}, wire=EXACT, training=training)
        return replace(made, serializer=serializer_of(made.config, made.model))

    return make


def _mixed(server, sites):
    """The server of one machine with a site of each of others."""
    clients = tuple(site.clients[index] for index, site in enumerate(sites))
    serializers = {one.name: site.serializer for one, site in zip(clients, sites, strict=True)}
    return deployed(replace(server, clients=clients), serializers=serializers)


def _update(state, start):
    """The learnt change of every factor, in one row."""
    one, other = state.adapters.tensors(), start.adapters.tensors()
    return torch.cat([(one[key].double() - other[key].double()).flatten() for key in sorted(one)])


@pytest.mark.parametrize(
    ("server", "sites"),
    [
        ("bfloat16", ("float32", "bfloat16", "float32")),
        ("float32", ("bfloat16", "float32", "float16")),
        ("float16", ("bfloat16", "float32", "float16")),
    ],
)
def test_parties_that_differ_in_type_learn_what_they_learn_in_float32(party, server, sites):
    wanted = play(party("float32"))[0]
    outcome = _mixed(party(server), [party(dtype) for dtype in sites])
    assert outcome.error is None
    start = party("float32").initial()
    found, expected = _update(outcome.state, start), _update(wanted, start)
    assert float(found @ expected / (found.norm() * expected.norm())) > 0.99
    assert float((found - expected).norm() / expected.norm()) < 0.15


def test_parties_of_one_type_learn_the_same_whether_or_not_they_may_differ(party):
    wanted = play(party("float32"))[0]
    found = _mixed(party("float32"), [party("float32")] * 3).state  # the server has other batches
    assert largest_relative_difference(found.adapters.tensors(), wanted.adapters.tensors()) < 1e-3
