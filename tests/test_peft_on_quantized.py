"""Adapters of a quantized base, loaded by peft on the quantized and on the full base of transformers."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import splitft
from quantized import KINDS, computing_as_in_training, needs_bitsandbytes, quantized_whole
from runs import settings_file
from splitft.adapters import AdapterState, Factors, attach, initial_state
from splitft.errors import ModelError
from splitft.geometry import Span
from splitft.model import Model, open_model
from splitft.peft_folder import with_adapter, write_merged, write_peft
from splitft.specs import ModelSpec
from splitft.tracking.events import RunStarted
from splitft.tracking.log import read_events
from tiny import tiny_model, tiny_tokenizer

pytestmark = needs_bitsandbytes

BLOCKS, SCALE, CUT = 4, 2.0, 2
TOKENS = torch.tensor([[5, 9, 200, 31, 8, 77], [3, 3, 250, 1, 90, 16]])
WIDE = {"llama": {"hidden_size": 64, "intermediate_size": 128}, "gpt2": {"n_embd": 64, "n_inner": 128}}
"""Sizes at which bitsandbytes' CPU kernel is right."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    base = tmp_path_factory.mktemp("wide")
    return {name: tiny_tokenizer(tiny_model(base / name, name, **sizes)) for name, sizes in WIDE.items()}


def _learnt(sizes, dora: bool) -> AdapterState:
    """Factors as after training: B is not zero, and the update is visible in the logits."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    state = initial_state(sizes, dict.fromkeys(range(BLOCKS), 4), 0, torch.float32)
    return AdapterState({
        key: Factors(factors.A, draw(*factors.B.shape), draw(1, len(factors.B)) if dora else None)
        for key, factors in state.items()
    })  # fmt: skip


@torch.no_grad()
def _trained(model: Model, folder, dora: bool = False):
    """The adapter's folder, and the logits of the two halves with it."""
    halves = (model.segment(Span(0, CUT), embedding=True), model.segment(Span(CUT, BLOCKS), head=True))
    banks = [attach(half.blocks, "all-linear", SCALE, torch.float32) for half in halves]
    state, hidden = _learnt(banks[0].sizes, dora), TOKENS
    for half, bank in zip(halves, banks, strict=True):
        bank.put("all", state.within(half.span))
        with bank.routed([("all", len(TOKENS))]):
            hidden = half.run(hidden)
    logits = halves[1].logits(hidden.flatten(0, 1)).unflatten(0, TOKENS.shape)
    return write_peft(state, model, SCALE, folder), logits


def _close(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", WIDE)
def test_peft_gives_the_logits_of_the_split_model_on_both_bases(wide, tmp_path, family, kind, dora):
    spec = ModelSpec(name=str(wide[family]), dtype="float32", quantize=kind)
    adapter, logits = _trained(open_model(spec), tmp_path / "adapter", dora)
    on_bits = PeftModel.from_pretrained(quantized_whole(wide[family], kind), str(adapter)).eval()
    _close(computing_as_in_training(on_bits)(TOKENS).logits, logits)
    _close(with_adapter(adapter, open_model(spec))(TOKENS).logits, logits)
    base = AutoModelForCausalLM.from_pretrained(wide[family], dtype=torch.float32)
    in_full = PeftModel.from_pretrained(base, str(adapter)).eval()(TOKENS).logits
    assert 1e-3 < float((in_full - logits).norm() / logits.norm()) < 0.6
    if not dora:  # the factors are the same on both
        full_spec = spec.model_copy(update={"quantize": "none"})
        _close(in_full, _trained(open_model(full_spec), tmp_path / "full")[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_does_at_widths_that_end_within_blocks_and_with_rows_in_int8(tiny_llama, tmp_path, kind):
    model = open_model(ModelSpec(name=str(tiny_llama), dtype="float32", quantize=kind, embedding="int8"))
    adapter, logits = _trained(model, tmp_path / "adapter")
    _close(with_adapter(adapter, model)(TOKENS).logits, logits)


@torch.no_grad()
def test_a_merged_checkpoint_has_full_weights_unless_there_are_none(wide, tmp_path):
    model = open_model(ModelSpec(name=str(wide["llama"]), dtype="float32", quantize="nf4"))
    adapter, _ = _trained(model, tmp_path / "adapter")
    write_merged(adapter, model, tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(wide["llama"], dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(adapter)).eval()(TOKENS).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    _close(merged(TOKENS).logits, expected)
    quantized_whole(wide["llama"], "nf4").save_pretrained(tmp_path / "bits")
    tiny_tokenizer(tmp_path / "bits")
    with pytest.raises(ModelError, match="has nf4 weights only"):
        write_merged(adapter, open_model(ModelSpec(name=str(tmp_path / "bits"))), tmp_path / "never")


def test_a_run_on_a_quantized_base_is_trained_evaluated_and_used(wide, tmp_path):
    file = settings_file(
        tmp_path, wide["llama"], model={"quantize": "nf4", "embedding": "int8"}, training={"rounds": 2}
    )
    run = splitft.train(file, tmp_path / "run")
    begun = next(event for event in read_events(run.folder / "events.jsonl") if isinstance(event, RunStarted))
    assert begun.precision.endswith(", blocks in nf4, rows of embedding and head in int8")
    losses = run.summary["eval_loss"]
    assert losses[-1] < losses[0]
    assert splitft.generate(run.folder, "ward dose", max_new_tokens=3)
