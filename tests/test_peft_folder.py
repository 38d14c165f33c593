"""What is exported gives, in peft and in transformers, the logits of our own split model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitft
from runs import settings_file
from splitft.adapters import AdapterState, Factors, attach, initial_state
from splitft.errors import ModelError, RunError
from splitft.geometry import Span, ranks_by_block
from splitft.model import open_model
from splitft.peft_folder import with_adapter, write_merged, write_peft
from splitft.specs import ModelSpec

BLOCKS, SCALE, CUT = 4, 2.0, 2
TOKENS = torch.tensor([[5, 9, 200, 31, 8, 77], [3, 3, 250, 1, 90, 16]])
EQUAL = dict.fromkeys(range(BLOCKS), 4)
UNEQUAL = {
    block: max(one, other)
    for block, (one, other) in enumerate(
        zip(ranks_by_block(1, BLOCKS, 8, 2), ranks_by_block(2, BLOCKS, 8, 3), strict=True)
    )
}
"""Ranks that aggregation leaves when one client has cut 1 and rank 2 there, another cut 2 and rank 3."""


def _segments(folder):
    """Client's and server's halves of the model, float32."""
    model = open_model(ModelSpec(name=str(folder), dtype="float32"))
    client = model.segment(Span(0, CUT), embedding=True)
    return model, client, model.segment(Span(CUT, BLOCKS), head=True)


def _learnt(sizes, ranks) -> AdapterState:
    """Factors as after training: B is not zero, and the update is visible in the logits."""
    generator = torch.Generator().manual_seed(1)
    state = initial_state(sizes, ranks, 0, torch.float32)
    return AdapterState({
        key: Factors(factors.A, 0.2 * torch.randn(factors.B.shape, generator=generator))
        for key, factors in state.items()
    })  # fmt: skip


@pytest.fixture
def trained(tiny_folders, tmp_path):
    """Our model, an adapter for it, where it is exported, and the logits (B, T, V) of the two halves."""

    def make(family, targets="attention", ranks=UNEQUAL):
        model, client, server = _segments(tiny_folders[family])
        banks = [attach(half.blocks, targets, SCALE, torch.float32) for half in (client, server)]
        state = _learnt(banks[0].sizes, ranks)
        hidden = TOKENS
        with torch.no_grad():
            for half, bank in zip((client, server), banks, strict=True):
                bank.put("all", state)
                with bank.routed([("all", len(TOKENS))]):
                    hidden = half.run(hidden)
            logits = server.logits(hidden.flatten(0, 1)).unflatten(0, TOKENS.shape)
        return model, state, write_peft(state, model, SCALE, tmp_path / "adapter"), logits

    return make


def _assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


CASES = [
    ("llama", "attention", EQUAL),
    ("llama", "attention", UNEQUAL),
    ("llama", "all-linear", UNEQUAL),
    ("gpt2", "attention", UNEQUAL),
    ("gpt2", "all-linear", UNEQUAL),
    ("gpt2", ("mlp.c_proj",), UNEQUAL),
    ("qwen2", ("q_proj", "v_proj"), UNEQUAL),
    ("gpt_neox", "all-linear", UNEQUAL),
    ("phi3", "attention", UNEQUAL),
]


@pytest.mark.parametrize(("family", "targets", "ranks"), CASES)
def test_peft_and_the_merged_model_give_the_logits_of_the_split_model(
    trained, tmp_path, family, targets, ranks
):
    model, _, adapter, wanted = trained(family, targets, ranks)
    base = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    with torch.no_grad():
        plain = base(TOKENS).logits
        _assert_close(PeftModel.from_pretrained(base, str(adapter)).eval()(TOKENS).logits, wanted)
        assert (plain - wanted).abs().max() > 0.01  # the adapter matters
        merged = write_merged(adapter, model, tmp_path / "merged")
        _assert_close(
            AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(TOKENS).logits, wanted
        )
    assert not (merged / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(merged).decode([5, 6, 7]) == model.tokenizer().decode([5, 6, 7])


@pytest.mark.parametrize(("family", "targets", "ranks"), CASES)
def test_peft_puts_factors_on_just_the_adapted_layers_with_their_ranks(trained, family, targets, ranks):
    model, state, adapter, _ = trained(family, targets, ranks)
    base = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(adapter))
    names = model.block_names()
    wanted = {
        f"base_model.model.{names[block]}.{target}": (factors.rank, SCALE * factors.rank, SCALE)
        for (block, target), factors in state.items()
    }
    found = {
        name: (module.r["default"], module.lora_alpha["default"], module.scaling["default"])
        for name, module in loaded.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == wanted


def test_the_folder_holds_the_factors_themselves_under_the_names_of_peft(trained):
    _, state, adapter, _ = trained("llama")
    assert sorted(path.name for path in adapter.iterdir() if path.suffix != ".md") == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(state)
    for (block, target), factors in state.items():
        name = f"base_model.model.model.layers.{block}.{target}"
        assert torch.equal(tensors[f"{name}.lora_A.weight"], factors.A)
        assert torch.equal(tensors[f"{name}.lora_B.weight"], factors.B)


def test_the_configuration_is_short_where_ranks_are_equal_and_names_what_differs(trained):
    _, _, adapter, _ = trained("llama", ranks=EQUAL)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert not config["fan_in_fan_out"]

    _, state, adapter, _ = trained("llama")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert state.ranks() == {0: 8, 1: 3, 2: 8, 3: 8} == UNEQUAL
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert set(config["rank_pattern"].values()) == {3}
    assert set(config["alpha_pattern"].values()) == {6}
    assert all(name.startswith("model.layers.1.self_attn.") for name in config["rank_pattern"])


def test_targets_that_share_a_last_name_with_others_are_written_longer(trained):
    _, _, adapter, _ = trained("gpt2", "attention")  # mlp.c_proj is not adapted, attn.c_proj is
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj"]
    assert config["fan_in_fan_out"]


@settings(max_examples=10)
@given(st.lists(st.integers(1, 9), min_size=12, max_size=12))
def test_any_ranks_of_a_dozen_blocks_come_out_right(tmp_path_factory, ranks):
    """Blocks 1, 10 and 11 begin alike, as patterns that are matched by name might forget."""
    from tiny import tiny_model

    folder = tmp_path_factory.getbasetemp() / "dozen"
    if not folder.exists():
        tiny_model(folder, "llama", blocks=12)
    model = open_model(ModelSpec(name=str(folder), dtype="float32"))
    sizes = {(block, "self_attn.q_proj"): (32, 32) for block in range(12)}
    state = _learnt(sizes, dict(enumerate(ranks)))
    adapter = write_peft(state, model, SCALE, tmp_path_factory.mktemp("adapter"))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(adapter))
    for block, layer in enumerate(loaded.base_model.model.model.layers):
        q_proj = layer.self_attn.q_proj
        assert (q_proj.r["default"], q_proj.scaling["default"]) == (ranks[block], SCALE)
        _assert_close(q_proj.get_delta_weight("default"), SCALE * state[block, "self_attn.q_proj"].product())


def test_a_folder_without_an_adapter_or_a_base_that_is_gone_are_said_to_be_so(trained, tmp_path):
    model, _, adapter, _ = trained("llama")
    with pytest.raises(RunError, match="holds no adapter; it is written when a run has finished a round"):
        with_adapter(tmp_path, model)
    with pytest.raises(ModelError, match="gone cannot be loaded"):
        with_adapter(adapter, replace(model, path=str(tmp_path / "gone")))


def test_a_run_is_exported_in_the_process_that_trained_it(tmp_path, tiny_llama):
    run = splitft.train(settings_file(tmp_path, tiny_llama, training={"rounds": 1}), tmp_path / "run")
    assert (splitft.export(run.folder, tmp_path / "adapter") / "adapter_config.json").is_file()


def test_no_module_has_the_name_of_a_public_function():
    """Importing `splitft.x` sets the attribute `x` of the package, and so would replace the function."""
    home = Path(splitft.__file__).parent
    modules = {path.stem for path in home.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not modules & set(splitft.__all__)
