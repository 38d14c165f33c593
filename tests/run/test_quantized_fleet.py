"""Predicted bytes of a quantized base against those that its segments hold."""

from __future__ import annotations

import pytest

from laws.federations import federation, write_text
from quantized import needs_bitsandbytes
from splitft.geometry import Span
from splitft.schedule.memory import RUNTIME_BYTES, client_memory, server_weights_bytes

pytestmark = needs_bitsandbytes

BLOCKS = 4
HELD = [
    {"quantize": "nf4"},
    {"quantize": "int8", "embedding": "int8"},
    {"quantize": "nf4", "quantize_at": "clients"},
    {"quantize": "nf4", "quantize_at": "server", "embedding": "int8"},
    {},
]


def _bytes(segment) -> int:
    places = (place for frozen in (*segment._shared, *segment._frozen) for place in frozen.places.values())
    held = {id(one): one.nbytes for one in (getattr(*place) for place in places) if not one.is_meta}
    return sum(held.values())


@pytest.mark.parametrize("model", HELD, ids=lambda model: "-".join(model.values()) or "full")
def test_the_predicted_weights_are_those_that_are_held(tiny_llama, tmp_path, model):
    text = write_text(tmp_path / "notes.jsonl")
    prepared = federation(tiny_llama, text, [2], model={"dtype": "bfloat16", **model})
    fleet = prepared.cut_schedule.fleet
    costs, client = fleet.costs, fleet.clients[0]
    made = costs.quantized.made if costs.quantized else 0
    mine = prepared.model.at("clients").segment(Span(0, 2), embedding=True, head=True)
    theirs = prepared.model.at("server").segment(Span(2, BLOCKS))
    found = client_memory(costs, client, 2).weights - made
    assert found == pytest.approx(_bytes(mine), rel=1e-3)
    assert server_weights_bytes(costs, 2) - RUNTIME_BYTES - made == pytest.approx(_bytes(theirs), rel=1e-3)
