"""A deployed run on a quantized base trains what its simulation trains."""

from __future__ import annotations

from deploy.network import deployed
from laws.federations import federation, largest_relative_difference, play, write_text
from quantized import needs_bitsandbytes


@needs_bitsandbytes
def test_a_federation_on_a_quantized_base_equals_its_simulation(tiny_llama, tmp_path):
    text = write_text(tmp_path / "notes.jsonl")
    sections = {
        "model": {"quantize": "nf4", "embedding": "int8"},
        "training": {"rounds": 2, "steps": 3},
    }
    simulated, _ = play(federation(tiny_llama, text, [1, 2, 3], **sections))
    outcome = deployed(federation(tiny_llama, text, [1, 2, 3], **sections))
    assert outcome.error is None
    found = outcome.state.adapters.tensors()
    assert largest_relative_difference(found, simulated.adapters.tensors()) < 1e-9
