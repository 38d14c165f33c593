"""DoRA: whatever the cuts, the directions and magnitudes that peft's own DoRA learns on whole models."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import splitft
from laws.federations import federation, largest_relative_difference, play, write_text
from laws.peft_oracle import train
from laws.test_cut_invariance import _with_labels
from runs import settings
from splitft.adapters.targets import oriented
from splitft.config import from_mapping

STEPS, ROUNDS = 6, 2
DORA = {"method": "dora"}
TRAINING = {"rounds": ROUNDS, "steps": STEPS}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture(scope="module")
def oracle(tiny_llama, text):
    """Whole models trained with peft's DoRA, and A, B and m averaged by tokens."""
    prepared = federation(tiny_llama, text, [1, 1, 1], lora=DORA, training=TRAINING)
    names = prepared.model.block_names()
    initial = {
        f"base_model.model.{names[block]}.{target}.lora_{factor}.weight": tensor
        for (block, target), factors in prepared.initial().adapters.items()
        for factor, tensor in (("A", factors.A), ("B", factors.B))
    }
    batches = []
    for number in range(ROUNDS):
        steps = range(number * STEPS, (number + 1) * STEPS)
        batches.append([[_with_labels(c.setup.stream.batch(s)) for s in steps] for c in prepared.clients])
    return train(tiny_llama, initial, batches, TARGETS, rank=4, alpha=8, lr=5e-3, dora=True)


def _as_peft_names(prepared, state, folder) -> dict[str, torch.Tensor]:
    """A, B and whole magnitudes, from the weights that transformers loads."""
    names = prepared.model.block_names()
    modules = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).named_modules())
    found = {}
    for (block, target), factors in state.adapters.items():
        name = f"{names[block]}.{target}"
        weight = oriented(modules[name], modules[name].weight.detach())
        found[f"base_model.model.{name}.lora_A.weight"] = factors.A
        found[f"base_model.model.{name}.lora_B.weight"] = factors.B
        found[f"base_model.model.{name}.lora_magnitude_vector.weight"] = (
            weight.norm(dim=1) + factors.magnitude[0]
        )
    return found


@pytest.mark.parametrize("rule", ["factors", "zero-pad"])
@pytest.mark.parametrize("cuts", [[1, 2, 3], [3, 1, 2]], ids=str)
def test_a_federation_of_unequal_cuts_learns_what_peft_learns_on_whole_models(
    rule, cuts, tiny_llama, text, oracle
):
    prepared = federation(tiny_llama, text, cuts, lora=DORA, training=TRAINING, aggregate={"rule": rule})
    state, _ = play(prepared)
    found = _as_peft_names(prepared, state, tiny_llama)
    assert largest_relative_difference(found, oracle) < 1e-5
    assert all(float(factors.magnitude.abs().max()) > 1e-4 for factors in state.adapters.values())


def test_cuts_that_change_between_rounds_take_magnitudes_along(tiny_llama, text, oracle):
    prepared = federation(tiny_llama, text, [1, 2, 3], lora=DORA, training=TRAINING)
    names = [client.name for client in prepared.clients]
    by_round = [[1, 2, 3], [3, 3, 1]]
    state, _ = play(prepared, lambda number, cuts: dict(zip(names, by_round[number - 1], strict=True)))
    assert largest_relative_difference(_as_peft_names(prepared, state, tiny_llama), oracle) < 1e-5


@pytest.mark.parametrize("server_adapters", ["per-client", "shared"])
def test_a_server_that_groups_clients_trains_them_as_one_that_does_not(server_adapters, tiny_llama, text):
    one, other = (
        play(
            federation(
                tiny_llama,
                text,
                [1, 2, 2],
                lora={**DORA, "rank_at_cut": 2},
                training={"rounds": 1, "steps": 3},
                aggregate={"rule": "svd"},
                split={"server_adapters": server_adapters, "group_tokens": tokens},
            )
        )[0].adapters.tensors()
        for tokens in (1, 4096)
    )
    assert any(name.endswith(".M") for name in one)
    assert largest_relative_difference(one, other) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", ["zero-pad", "svd"])
def test_peft_loads_it_as_dora_with_the_loss_that_was_evaluated(rule, family, tiny_folders, text, tmp_path):
    from splitft.run.setup import prepare
    from test_rules_end_to_end import _loss

    lora = {**DORA, "scaling": "rslora" if rule == "svd" else "lora"}
    sections = {"lora": lora, "aggregate": {"rule": rule}, "wire": {"hidden": "fp32"}}
    once = from_mapping(settings(tiny_folders[family], text, **sections))
    run = splitft.train(once, tmp_path / "run")
    assert json.loads((run.adapter_dir / "adapter_config.json").read_text())["use_dora"]
    losses = {client["name"]: client["loss"][-1] for client in run.summary["clients"]}
    base = AutoModelForCausalLM.from_pretrained(once.model.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run.adapter_dir)).eval()
    for client in prepare(once).clients:
        assert _loss(model, client.setup.held_out) == pytest.approx(losses[client.name], rel=1e-4)


@pytest.mark.parametrize("rule", ["stack", "exact", "ffa", "fedsa"])
def test_rules_that_magnitudes_do_not_fit_are_refused_with_what_does(rule, tiny_llama, text):
    from splitft.errors import ConfigError

    with pytest.raises(ConfigError, match=rf"lora\.method.*{rule}.*factors, zero-pad, svd, median"):
        from_mapping(settings(tiny_llama, text, lora=DORA, aggregate={"rule": rule}))


def test_the_schedule_counts_the_magnitudes(tiny_llama, text):
    prepared = federation(tiny_llama, text, [2], lora=DORA, training={"rounds": 1, "steps": 1})
    numbers = sum(tensor.numel() for tensor in prepared.initial().adapters.tensors().values())
    sizes = prepared.cut_schedule.fleet.costs.sizes
    assert sizes.adapter_parameters(list(prepared.ranks.of(2).values())) == numbers


def test_the_schedule_foresees_what_a_layer_keeps_for_its_backward_pass():
    from torch import nn

    from splitft.adapters import AdapterState, Factors, attach

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 10, bias=False).requires_grad_(False)

    def kept(magnitude) -> int:
        block, sizes = Block(), []
        bank = attach([block], ["proj"], 1.0, torch.float32)
        bank.put("a", AdapterState({(0, "proj"): Factors(torch.ones(2, 6), torch.ones(10, 2), magnitude)}))
        x = torch.ones(1, 400, 6, requires_grad=True)
        seen = lambda tensor: sizes.append(tensor.numel()) or tensor  # noqa: E731
        with bank.routed([("a", 1)]), torch.autograd.graph.saved_tensors_hooks(seen, lambda one: one):
            block.proj(x)
        return sum(size for size in sizes if size >= 400)

    assert kept(torch.zeros(1, 10)) - kept(None) == 2 * 10 * 400
