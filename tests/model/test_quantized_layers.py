"""Segments of quantized models against transformers with bitsandbytes: equal to the last bit."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from accelerator import FIRST
from quantized import KINDS, needs_bitsandbytes, quantized_whole
from splitft.adapters import attach
from splitft.adapters.targets import weight_of
from splitft.errors import ModelError
from splitft.geometry import Span
from splitft.model import Model, open_model
from splitft.model.quantized_layers import QuantizedLinear
from splitft.model.quantized_weights import QUANTIZERS
from splitft.specs import ModelSpec
from tiny import VOCAB, tiny_model

BLOCKS = 4
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Sizes of whole blocks, at which bitsandbytes' CPU kernel is right."""
OPTIONS = {
    "llama": WIDE,
    "qwen2": WIDE,
    "gemma3_text": {**WIDE, "head_dim": 16},
    "gpt_neox": WIDE,
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_inner": 128},
}
TOKENS = torch.randint(1, VOCAB, (2, 9), generator=torch.manual_seed(5))

pytestmark = needs_bitsandbytes


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folder of a family's tiny model with sizes of whole blocks, made once."""
    base, made = tmp_path_factory.mktemp("wide"), {}

    def find(family):
        if family not in made:
            made[family] = tiny_model(base / family, family, **OPTIONS[family])
        return made[family]

    return find


def _model(folder, **spec) -> Model:
    return open_model(ModelSpec(name=str(folder), **{"dtype": "float32", **spec}))


def _logits(model: Model, cut: int, tokens=TOKENS) -> torch.Tensor:
    client = model.segment(Span(0, cut), embedding=True)
    server = model.segment(Span(cut, BLOCKS), head=True)
    hidden = server.run(client.run(tokens))
    return server.logits(hidden.flatten(0, 1)).unflatten(0, tokens.shape)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", OPTIONS)
def test_at_every_cut_the_logits_are_those_of_transformers(folder_of, family, kind):
    expected = quantized_whole(folder_of(family), kind)(TOKENS).logits
    model = _model(folder_of(family), quantize=kind)
    for cut in range(BLOCKS + 1):
        assert torch.equal(_logits(model, cut), expected), f"cut {cut}"
    assert not torch.equal(_logits(_model(folder_of(family)), 2), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_they_are_too(tmp_path, kind):
    folder = tiny_model(tmp_path, "llama", "bfloat16", **WIDE)
    expected = quantized_whole(folder, kind, torch.bfloat16)(TOKENS).logits
    assert torch.equal(_logits(_model(folder, dtype="bfloat16", quantize=kind), 2), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_what_enters_are_those_of_transformers(folder_of, kind):
    whole = quantized_whole(folder_of("llama"), kind)
    entered = whole.get_input_embeddings()(TOKENS).detach().requires_grad_()
    (expected,) = torch.autograd.grad(whole(inputs_embeds=entered).logits.square().sum(), entered)
    segment = _model(folder_of("llama"), quantize=kind).segment(Span(0, BLOCKS), head=True)
    hidden = segment.run(entered)
    (found,) = torch.autograd.grad(segment.logits(hidden.flatten(0, 1)).square().sum(), entered)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_bits_do_not_depend_on_the_type_of_the_hidden_states(folder_of, dtype):
    one, other = (
        _bytes(_model(folder_of("llama"), dtype=name, quantize="nf4")) for name in (dtype, "float32")
    )
    assert len(one) == 7 * BLOCKS
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _bytes(model: Model) -> list[torch.Tensor]:
    segment = model.segment(Span(0, BLOCKS))
    parts = (layer for block in segment.blocks for layer in block.modules())
    return [layer.weight for layer in parts if isinstance(layer, QuantizedLinear)]


def test_norms_and_biases_stay_and_only_the_held_blocks_are_quantized(folder_of, monkeypatch):
    quantized = []
    true = type(QUANTIZERS["nf4"]).quantize

    def counted(self, weight):
        quantized.append(weight)
        return true(self, weight)

    monkeypatch.setattr(type(QUANTIZERS["nf4"]), "quantize", counted)
    segment = _model(folder_of("llama"), quantize="nf4").segment(Span(1, 2))
    assert len(quantized) == 7
    kinds = {name: p.dtype for name, p in segment.blocks[1].named_parameters()}
    assert {dtype for name, dtype in kinds.items() if name.endswith("proj.weight")} == {torch.uint8}
    assert {dtype for name, dtype in kinds.items() if "norm" in name or "bias" in name} == {torch.float32}
    assert any("norm" in name for name in kinds)
    assert any("bias" in name for name in kinds)
    assert all(p.is_meta for p in segment.blocks[0].parameters())
    segment.resize(Span(1, 3))
    assert len(quantized) == 14
    segment.resize(Span(2, 3))
    assert all(p.is_meta for p in segment.blocks[1].parameters())


def test_segments_of_one_process_share_the_bytes(folder_of):
    model = _model(folder_of("llama"), quantize="nf4")
    one, other = (model.segment(Span(0, 2)) for _ in range(2))
    for mine, theirs in zip(one.blocks[0].parameters(), other.blocks[0].parameters(), strict=True):
        assert mine is theirs


@pytest.mark.parametrize(
    ("kind", "options"),
    [("nf4", {}), ("nf4", {"bnb_4bit_use_double_quant": True}), ("fp4", {}), ("int8", {})],
    ids=["nf4", "nf4-nested", "fp4", "int8"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_that_bitsandbytes_has_quantized_is_read_as_it_is(
    folder_of, tmp_path, family, kind, options
):
    whole = quantized_whole(folder_of(family), kind, **options)
    with torch.no_grad():
        expected = whole(TOKENS).logits
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = _model(tmp_path)
    assert model.quantized == kind
    with torch.no_grad():
        assert torch.equal(_logits(model, 2), expected)


def test_layers_that_a_quantized_checkpoint_has_in_full_stay_full(folder_of, tmp_path):
    from transformers import BitsAndBytesConfig

    skipping = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "o_proj"]
    )
    whole = AutoModelForCausalLM.from_pretrained(folder_of("llama"), quantization_config=skipping)
    whole.save_pretrained(tmp_path)
    segment = _model(tmp_path).segment(Span(0, 1))
    attention = segment.blocks[0].self_attn
    assert attention.o_proj.weight.dtype == torch.float32
    assert attention.q_proj.weight.dtype == torch.uint8


def test_checkpoints_of_other_libraries_and_other_kinds_are_refused(folder_of, tmp_path):
    quantized_whole(folder_of("llama"), "int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(ModelError, match=r"has int8 weights already.*set quantize to none"):
        _model(tmp_path / "int8", quantize="nf4")
    strange = tiny_model(tmp_path / "gptq", "llama")
    config = (strange / "config.json").read_text()
    (strange / "config.json").write_text(
        config.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1)
    )
    with pytest.raises(ModelError, match="quantized by gptq; splitft reads those of bitsandbytes"):
        _model(strange)


def test_a_family_with_layers_of_its_own_is_refused(tiny_folders):
    with pytest.raises(ModelError, match="family 'falcon' has no layers"):
        _model(tiny_folders["falcon"], quantize="nf4").segment(Span(0, 1))


def test_without_bitsandbytes_it_is_said_what_to_install(tiny_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ModelError, match=r"pip install 'splitft\[quant\]'"):
        _model(tiny_llama, quantize="nf4")
    assert _model(tiny_llama).quantized is None


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_rows_in_int8_are_those_of_the_rounded_matrices(folder_of, family):
    """Untied and tied, with a family's own class of embedding, with learned positions."""
    whole = AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32).eval()
    for matrix in {whole.get_input_embeddings().weight, whole.get_output_embeddings().weight}:
        largest = matrix.half().abs().amax(1, keepdim=True).float()
        rounded = (matrix.half() * (127 / largest)).round()
        matrix.data = rounded.to(torch.int8).float() * (largest * (1 / 127))
    model = _model(folder_of(family), embedding="int8")
    torch.testing.assert_close(_logits(model, 2), whole(TOKENS).logits, rtol=0, atol=1e-6)
    halves = model.segment(Span(0, 1), embedding=True, head=True)
    full = _model(folder_of(family)).segment(Span(0, 1), embedding=True, head=True)
    assert halves.parameter_count() == full.parameter_count()


def test_a_client_with_rows_in_int8_holds_half_of_bfloat16(folder_of):
    def held(**spec) -> int:
        segment = _model(folder_of("llama"), dtype="bfloat16", **spec).segment(
            Span(0, 0), embedding=True, head=True
        )
        return sum(p.nbytes for p in segment._lm.parameters() if not p.is_meta)

    assert held(embedding="int8") == pytest.approx(held() / 2, rel=0.07)


def test_the_weight_of_an_adapted_layer_is_known_as_numbers(folder_of):
    model = _model(folder_of("gpt2"), quantize="nf4")
    segment = model.segment(Span(0, 1))
    bank = attach(segment.blocks, "all-linear", 1.0, torch.float32)
    full = attach(_model(folder_of("gpt2")).segment(Span(0, 1)).blocks, "all-linear", 1.0, torch.float32)
    assert bank.sizes == full.sizes
    layer, other = (one._layers[0, "mlp.c_fc"].base for one in (bank, full))
    assert weight_of(layer).shape == weight_of(other).shape == (128, 64)
    assert float((weight_of(layer) - weight_of(other)).norm() / weight_of(other).norm()) < 0.12


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_device_the_bits_are_the_same_and_no_weight_goes_back(folder_of, fake_devices, kind):
    model = _model(folder_of("llama"), quantize=kind, embedding="int8")
    results = []
    for device in (torch.device("cpu"), FIRST):
        segment = model.segment(Span(0, BLOCKS), embedding=True, head=True, device=device)
        fake_devices.copies.clear()
        entered = segment.run(TOKENS, Span(0, 0)).detach().requires_grad_()
        logits = segment.logits(segment.run(entered).flatten(0, 1))
        (gradient,) = torch.autograd.grad(logits.square().sum(), entered)
        assert fake_devices.copies["from"] == 0
        weight = segment.blocks[0].self_attn.q_proj.weight
        results.append([one.detach().cpu() for one in (logits, gradient, weight)])
    for found, expected in zip(results[1][:2], results[0][:2], strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(results[1][2], results[0][2])
