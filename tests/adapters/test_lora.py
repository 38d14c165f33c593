"""Our factors on our layers against peft's on the unsplit model; many clients together against each alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from splitft.adapters import AdapterBank, AdapterState, Factors, attach, initial_state
from splitft.errors import AdapterError
from splitft.geometry import Span
from splitft.model import Segment, open_model
from splitft.model.anatomy import locate
from splitft.specs import ModelSpec
from tiny import VOCAB, WIDTH

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

BLOCKS = 4
RANKS = {0: 4, 1: 2, 2: 3, 3: 4}
SCALE = 0.7
TOKENS = torch.randint(1, VOCAB, (3, 9), generator=torch.manual_seed(2))
WEIGHTS = torch.randn(3, 9, VOCAB, generator=torch.manual_seed(4))
"""The loss of these tests is a weighted sum of the logits."""

Gradients = dict[tuple[int, str, str], torch.Tensor]


def _adapted(folder, dtype="float32", targets: Any = "all-linear") -> tuple[Segment, AdapterBank]:
    model = open_model(ModelSpec(name=str(folder), dtype=dtype))
    segment = model.segment(Span(0, BLOCKS), embedding=True, head=True)
    return segment, attach(segment.blocks, targets, SCALE, model.dtype)


def _trained(bank: AdapterBank, seed: int = 0, ranks: dict[int, int] = RANKS) -> AdapterState:
    """A state as after some training: B is not zero."""
    state = initial_state(bank.sizes, ranks, seed, torch.float32)
    generator = torch.manual_seed(seed)
    for factors in state.values():
        factors.B.normal_(std=0.2, generator=generator)
    return state


def _run(segment: Segment, bank: AdapterBank, rows: list, tokens: torch.Tensor) -> torch.Tensor:
    with bank.routed(rows):
        hidden = segment.run(tokens)
        return segment.logits(hidden.flatten(0, 1)).unflatten(0, tokens.shape)


def _gradients(bank: AdapterBank, slot: str) -> Gradients:
    return {key: parameter.grad.clone() for key, parameter in bank.parameters(slot).items()}


def _with_peft(
    folder, state: AdapterState, dtype: torch.dtype = torch.float32, computed_in: torch.dtype | None = None
) -> tuple[torch.Tensor, Gradients]:
    """Logits and gradients of the unsplit model with the same factors in peft's layers."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(computed_in or dtype).eval()
    names = {module: name for name, module in base.named_modules()}
    prefixes = [names[block] for block in locate(base).block_list()]
    paths = {key: f"{prefixes[key[0]]}.{key[1]}" for key in state}
    ranks = {paths[key]: factors.rank for key, factors in state.items()}
    config = LoraConfig(
        r=1,
        target_modules=list(ranks),
        fan_in_fan_out=any(type(base.get_submodule(path)).__name__ == "Conv1D" for path in ranks),
        rank_pattern=ranks,
        alpha_pattern={path: SCALE * rank for path, rank in ranks.items()},
    )
    model = get_peft_model(base, config).eval()
    layers = {key: base.get_submodule(path) for key, path in paths.items()}
    with torch.no_grad():
        for key, factors in state.items():
            assert layers[key].lora_A["default"].weight.dtype == torch.float32
            layers[key].lora_A["default"].weight.copy_(factors.A)
            layers[key].lora_B["default"].weight.copy_(factors.B)
    logits = model(TOKENS).logits
    (logits.float() * WEIGHTS).sum().backward()
    gradients: Gradients = {}
    for key, layer in layers.items():
        gradients[*key, "A"] = layer.lora_A["default"].weight.grad
        gradients[*key, "B"] = layer.lora_B["default"].weight.grad
    return logits.detach(), gradients


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _with_ours(folder, state: AdapterState, dtype: str) -> tuple[torch.Tensor, Gradients]:
    segment, bank = _adapted(folder, dtype)
    bank.put("one", state)
    logits = _run(segment, bank, [("one", 3)], TOKENS)
    (logits.float() * WEIGHTS).sum().backward()
    return logits.detach(), _gradients(bank, "one")


def test_outputs_and_gradients_are_pefts(tiny_folders, family):
    state = _trained(_adapted(tiny_folders[family])[1])
    logits, gradients = _with_ours(tiny_folders[family], state, "float32")
    expected_logits, expected = _with_peft(tiny_folders[family], state)
    assert _off(logits, expected_logits) < 1e-6
    assert gradients.keys() == expected.keys()
    assert max(_off(gradients[key], expected[key]) for key in expected) < 1e-5


def test_over_a_bfloat16_base_we_are_as_near_the_exact_gradients_as_peft(tiny_folders, family):
    """The factors are float32 in both; peft computes the small products in float32, we in bfloat16."""
    state = _trained(_adapted(tiny_folders[family])[1])
    exact_logits, exact = _with_peft(tiny_folders[family], state, torch.bfloat16, torch.float32)
    peft_logits, peft = _with_peft(tiny_folders[family], state, torch.bfloat16)
    logits, gradients = _with_ours(tiny_folders[family], state, "bfloat16")
    assert _off(logits, exact_logits) < 1.5 * _off(peft_logits, exact_logits)
    ours = math.sqrt(sum(_off(gradients[key], exact[key]) ** 2 for key in exact))
    assert ours < 1.5 * math.sqrt(sum(_off(peft[key], exact[key]) ** 2 for key in exact))
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_factors_start_from_pefts_distribution():
    """Uniform in +-1/sqrt(in) for A, zero for B; on 512 x 400 numbers quantiles agree to a hundredth."""
    layer = nn.Sequential()
    layer.add_module("lin", nn.Linear(400, 30))
    pefts = get_peft_model(layer, LoraConfig(r=512, target_modules=["lin"])).base_model.model.lin
    state = initial_state({(0, "lin"): (400, 30)}, {0: 512}, 1, torch.float32)
    A, expected = state[0, "lin"].A, pefts.lora_A["default"].weight.detach()
    at = torch.linspace(0.001, 0.999, 50)
    bound = 1 / math.sqrt(400)
    for rows in (slice(0, 16), slice(100, 116)):
        ours, theirs = A[rows].flatten(), expected[rows].flatten()
        assert float((ours.quantile(at) - theirs.quantile(at)).abs().max()) < 0.05 * bound
    assert bound * 0.999 < float(A.abs().max()) <= bound
    assert torch.count_nonzero(state[0, "lin"].B) == torch.count_nonzero(pefts.lora_B["default"].weight) == 0


def test_new_adapters_change_nothing(tiny_folders, family):
    segment, bank = _adapted(tiny_folders[family])
    bank.put("one", initial_state(bank.sizes, RANKS, 0, torch.float32))
    with torch.no_grad():
        assert torch.equal(
            _run(segment, bank, [("one", 3)], TOKENS), _run(segment, bank, [(None, 3)], TOKENS)
        )


def test_many_clients_in_one_batch_each_get_what_they_get_alone(tiny_folders, family):
    """Of unequal ranks, one between two rows of the base model, and one of two sequences."""
    segment, bank = _adapted(tiny_folders[family])
    for number, slot in enumerate("abc"):
        bank.put(slot, _trained(bank, number, {block: 1 + number + block % 2 for block in range(BLOCKS)}))
    rows = [("a", 2), (None, 1), ("b", 1), (None, 1), ("c", 3)]
    tokens = torch.randint(1, VOCAB, (8, 7), generator=torch.manual_seed(1))
    weights = torch.randn(8, 7, VOCAB, generator=torch.manual_seed(6))
    together = _run(segment, bank, rows, tokens)
    (together * weights).sum().backward()
    found = {slot: _gradients(bank, slot) for slot in "abc"}
    start = 0
    for slot, count in rows:
        own = slice(start, start + count)
        start += count
        for parameter in bank.parameters(slot or "").values():
            parameter.grad = None
        alone = _run(segment, bank, [(slot, count)], tokens[own])
        torch.testing.assert_close(together[own], alone, rtol=0, atol=1e-5)
        if slot is None:
            continue
        (alone * weights[own]).sum().backward()
        expected = _gradients(bank, slot)
        assert max(_off(found[slot][key], expected[key]) for key in expected) < 1e-5


def test_a_layer_that_gets_flattened_rows_divides_them_by_client():
    """Some families flatten (B, T, in) to (B T, in) before a linear layer."""
    block = nn.Sequential()
    block.add_module("lin", nn.Linear(5, 6))
    bank = attach([block], "all-linear", 1.0, torch.float32)
    for slot in "ab":
        bank.put(slot, _trained(bank, ord(slot), {0: 2}))
    x = torch.randn(3, 4, 5)
    with torch.no_grad(), bank.routed([("a", 1), ("b", 2)]):
        torch.testing.assert_close(block(x.flatten(0, 1)).unflatten(0, (3, 4)), block(x))


@pytest.mark.parametrize("rows", [[("a", 1), ("a", 1)], [("a", 3), ("a", 3)], [("a", 2)], []])
def test_a_batch_of_another_size_than_its_rows_is_refused(tiny_llama, rows):
    segment, bank = _adapted(tiny_llama)
    bank.put("a", _trained(bank))
    with pytest.raises(AdapterError, match=f"batch of 4 sequences is routed as {sum(n for _, n in rows)}"):
        _run(segment, bank, rows, torch.ones(4, 3, dtype=torch.long))


def test_the_type_of_the_factors_is_float32_or_that_of_a_wider_base(tiny_llama):
    for dtype, expected in (("bfloat16", torch.float32), ("float64", torch.float64)):
        _, bank = _adapted(tiny_llama, dtype)
        bank.put("a", _trained(bank))
        assert {parameter.dtype for parameter in bank.parameters("a").values()} == {expected}


def test_factors_are_copied_in_and_out(tiny_llama):
    _, bank = _adapted(tiny_llama)
    state = _trained(bank)
    bank.put("a", state)
    taken = bank.take("a")
    with torch.no_grad():
        for parameter in bank.parameters("a").values():
            parameter.zero_()
    for key in state:
        assert torch.equal(taken[key].A, state[key].A)
        assert torch.count_nonzero(state[key].B) > 0
    assert bank.take("b") == AdapterState()


def test_putting_replaces_the_slot_and_dropping_empties_it(tiny_llama):
    _, bank = _adapted(tiny_llama)
    bank.put("a", _trained(bank))
    bank.put("a", _trained(bank).within([2]))
    assert {block for block, _ in bank.take("a")} == {2}
    bank.drop("a")
    assert not bank.parameters("a")
    bank.drop("never there")


@pytest.mark.parametrize(
    ("key", "A", "message"),
    [
        ((9, "self_attn.q_proj"), (2, WIDTH), "block 9 has no adapted layer 'self_attn.q_proj'"),
        ((1, "q"), (2, WIDTH), "block 1 has no adapted layer 'q'"),
        ((1, "self_attn.q_proj"), (2, 31), "on a layer of 32 inputs and 32 outputs"),
    ],
)
def test_factors_that_do_not_fit_are_refused(tiny_llama, key, A, message):
    _, bank = _adapted(tiny_llama)
    with pytest.raises(AdapterError, match=message):
        bank.put("a", AdapterState({key: Factors(torch.zeros(A), torch.zeros(WIDTH, A[0]))}))


ATTENTION = {
    "llama": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj"},
    "gpt_neo": {f"attn.attention.{name}_proj" for name in ("q", "k", "v", "out")},
    "gpt_neox": {"attention.query_key_value", "attention.dense"},
    "falcon": {"self_attention.query_key_value", "self_attention.dense"},
    "opt": {f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
}


@pytest.mark.parametrize("family", ATTENTION)
def test_attention_means_the_projections_of_the_attention_alone(tiny_folders, family):
    _, bank = _adapted(tiny_folders[family], targets="attention")
    assert set(bank.sizes) == {(block, name) for block in range(BLOCKS) for name in ATTENTION[family]}


def test_a_name_fits_every_layer_that_ends_with_it(tiny_folders):
    _, bank = _adapted(tiny_folders["gpt2"], targets=("c_proj",))
    assert {target for _, target in bank.sizes} == {"attn.c_proj", "mlp.c_proj"}
    assert bank.sizes[0, "mlp.c_proj"] == (48, WIDTH)
    _, bank = _adapted(tiny_folders["gpt2"], targets=("mlp.c_proj",))
    assert {target for _, target in bank.sizes} == {"mlp.c_proj"}


def test_a_name_that_fits_nothing_is_refused_with_those_there_are(tiny_llama):
    with pytest.raises(AdapterError, match=r"no linear layer named query; there are self_attn.q_proj, "):
        _adapted(tiny_llama, targets=("q_proj", "query"))


def test_a_family_without_attention_is_told_what_to_name():
    block = nn.Sequential()
    block.add_module("mixer", nn.Linear(2, 2))
    with pytest.raises(AdapterError, match="no attention layers in this family; name targets among mixer"):
        attach([block], "attention", 1.0, torch.float32)


def test_after_an_error_within_rows_are_as_before(tiny_llama):
    segment, bank = _adapted(tiny_llama)
    bank.put("a", _trained(bank))
    with torch.no_grad(), bank.routed([("a", 3)]):
        expected = segment.run(TOKENS)
        with pytest.raises(AdapterError), bank.routed([("a", 1), ("a", 1)]):
            segment.run(TOKENS)
        assert torch.equal(segment.run(TOKENS), expected)
