"""rsLoRA: a layer is trained at alpha / sqrt(its own rank), as in peft, and updates are what is averaged."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import splitft
from laws.federations import federation, largest_relative_difference, play, write_text
from laws.peft_oracle import _lengths
from laws.test_cut_invariance import _with_labels
from runs import settings
from splitft.config import from_mapping
from splitft.specs.rules import RULES

ALPHA, RANK, AT_CUT, STEPS = 8, 4, 2, 8
LORA = {"rank": RANK, "rank_at_cut": AT_CUT, "alpha": ALPHA, "scaling": "rslora"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


def _of_peft(folder, initial, names, ranks, batches) -> dict[str, torch.Tensor]:
    """The updates of every layer after a round of one whole model with peft's own rsLoRA."""
    layers = {f"{names[block]}.{target}": (block, factors) for (block, target), factors in initial.items()}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        use_rslora=True,
        rank_pattern={name: ranks[block] for name, (block, _) in layers.items() if ranks[block] != RANK},
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    modules = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")
    }
    for name, (block, factors) in layers.items():
        modules[name].lora_A["default"].weight.data = factors.A[: ranks[block]].clone()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    for ids, labels in batches:
        mask = (torch.arange(ids.shape[1]) < _lengths(labels)[:, None]).long()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: module.get_delta_weight("default").detach() for name, module in modules.items()}


@pytest.mark.parametrize("rule", ["zero-pad", "svd", "exact"])
def test_a_split_client_with_a_lower_rank_at_its_cut_trains_as_peft_does(rule, tiny_llama, text):
    training = {"rounds": 1, "steps": STEPS}
    prepared = federation(tiny_llama, text, [2], lora=LORA, aggregate={"rule": rule}, training=training)
    names, initial = prepared.model.block_names(), prepared.initial().adapters
    stream = prepared.clients[0].setup.stream
    batches = [_with_labels(stream.batch(step)) for step in range(STEPS)]
    ranks = prepared.ranks.of(2)
    assert set(ranks.values()) == {RANK, AT_CUT}
    wanted = _of_peft(tiny_llama, initial, names, ranks, batches)
    state, _ = play(prepared)
    found = {
        f"{names[block]}.{target}": prepared.ranks.scale * factors.product()
        for (block, target), factors in state.adapters.items()
    }
    assert largest_relative_difference(found, wanted) < 1e-5


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"factors", "fedsa"}))
def test_peft_loads_it_as_rslora_with_the_loss_that_was_evaluated(rule, tiny_llama, text, tmp_path):
    from splitft.run.setup import prepare
    from test_rules_end_to_end import _loss

    once = from_mapping(
        settings(tiny_llama, text, lora=LORA, aggregate={"rule": rule}, wire={"hidden": "fp32"})
    )
    run = splitft.train(once, tmp_path / "run")
    assert json.loads((run.adapter_dir / "adapter_config.json").read_text())["use_rslora"]
    losses = {client["name"]: client["loss"][-1] for client in run.summary["clients"]}
    base = AutoModelForCausalLM.from_pretrained(once.model.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run.adapter_dir)).eval()
    for client in prepare(once).clients:
        assert _loss(model, client.setup.held_out) == pytest.approx(losses[client.name], rel=1e-4)


def test_with_unequal_ranks_svd_averages_the_true_updates(tiny_llama, text, monkeypatch):
    """What aggregation gets, times the one scale, is each client's own alpha / sqrt(r) B A."""
    from splitft.training import rounds

    prepared = federation(
        tiny_llama, text, [1, 2, 3], lora=LORA, aggregate={"rule": "svd"}, training={"rounds": 1, "steps": 3}
    )
    taken, united = {}, rounds.aggregate
    finish = prepared.server.finish

    def finishing():
        for name, cut in prepared.server.blocks.cuts.items():
            client = next(one for one in prepared.clients if one.name == name)
            for bank, slot in ((client.blocks.bank, "own"), (prepared.server.blocks.bank, name)):
                for key, layer in bank._layers.items():
                    if slot in layer.slots and (key[0] < cut) == (slot == "own"):
                        held = layer.slots[slot]
                        scale = ALPHA / held.A.shape[0] ** 0.5
                        taken[name, key] = (scale * held.B @ held.A).detach().clone()
        finish()

    def watched(rule, members, *rest):
        for (_, state), name in zip(members, prepared.server.blocks.cuts, strict=True):
            for key, factors in state.items():
                ours = prepared.ranks.scale * factors.product()
                torch.testing.assert_close(ours, taken[name, key])
        return united(rule, members, *rest)

    monkeypatch.setattr(prepared.server, "finish", finishing)
    monkeypatch.setattr(rounds, "aggregate", watched)
    state, _ = play(prepared)
    assert len(taken) == 3 * len(state.adapters)


def test_with_equal_ranks_rslora_is_lora_with_another_alpha(tiny_llama, text):
    training = {"rounds": 2, "steps": 4}
    one, other = (
        play(federation(tiny_llama, text, [1, 3], lora=lora, training=training))[0].adapters.tensors()
        for lora in (
            {"rank": 4, "alpha": 8, "scaling": "rslora"},
            {"rank": 4, "alpha": 16, "scaling": "lora"},
        )
    )
    assert largest_relative_difference(one, other) == 0
