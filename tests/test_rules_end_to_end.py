"""Whole runs under every rule: resumed bit for bit while cuts move, exported as what was evaluated."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import splitft
from laws.federations import write_text
from runs import StoppedError, settings, stop_at
from splitft.config import from_mapping
from splitft.errors import ConfigError, RunError
from splitft.run.setup import prepare
from splitft.specs.rules import RULES
from splitft.tracking.events import StepDone

UNEQUAL = sorted(name for name, rule in RULES.items() if not rule.equal_ranks)
MOVING = {"controller": "paper"}  # by losses, so that some cut moves in every round


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture(scope="module")
def config(tiny_llama, text):
    def make(rule, **sections):
        return from_mapping(settings(tiny_llama, text, aggregate={"rule": rule}, **sections))

    return make


def _files(run) -> dict[str, bytes]:
    """What the run learnt: the global adapter, and each client's own where there is one."""
    return {
        str(path.relative_to(run)): path.read_bytes() for path in run.glob("*/**/adapter_model.safetensors")
    }


def _told(run) -> dict:
    timed = ("wall_seconds", "seconds_by_leg")
    return {key: value for key, value in run.summary.items() if key not in timed}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_rule_that_is_added_runs_as_a_built_in_one(tmp_path, config, rule):
    """The same function and facts under another name give the same factors: no name is treated specially."""
    sections = {"training": {"rounds": 2, "steps": 2}, "lora": {"rank_at_cut": None}}
    RULES.add("mine", RULES[rule])
    try:
        found, expected = (
            splitft.train(config(name, **sections), tmp_path / name).folder for name in ("mine", rule)
        )
        assert _files(found) == _files(expected)
    finally:
        del RULES._things["mine"]


@pytest.mark.parametrize("rule", UNEQUAL)
def test_a_run_whose_cuts_move_resumes_bit_for_bit(tmp_path, config, rule):
    kept = "keep" if RULES[rule].keeps_axes else "reset"
    once = config(
        rule,
        schedule=MOVING,
        training={"rounds": 4, "steps": 2, "optimizer_state": kept, "participation": 0.7},
    )
    whole = splitft.train(once, tmp_path / "whole")
    assert any(len(set(client["cut"])) > 1 for client in whole.summary["clients"])
    with pytest.raises(StoppedError):
        splitft.train(once, tmp_path / "stopped", listeners=[stop_at(StepDone, round=3)])
    again = splitft.train(once, tmp_path / "stopped", resume=True)
    assert _files(again.folder) == _files(whole.folder)
    assert _told(again) == _told(whole)


@pytest.mark.parametrize("rule", ["zero-pad", "exact", "stack", "ffa", "fedsa"])
def test_adapters_that_were_rounded_on_the_wire_resume_bit_for_bit(tmp_path, config, rule):
    once = config(rule, wire={"adapter": "bf16"}, training={"steps": 2}, lora={"rank_at_cut": None})
    whole = splitft.train(once, tmp_path / "whole")
    with pytest.raises(StoppedError):
        splitft.train(once, tmp_path / "stopped", listeners=[stop_at(StepDone, round=3)])
    assert _files(splitft.train(once, tmp_path / "stopped", resume=True).folder) == _files(whole.folder)


@pytest.mark.parametrize("rule", ["stack", "exact", "ffa", "fedsa"])
def test_blocks_that_a_client_keeps_to_itself_go_with_every_rule(tmp_path, config, rule):
    once = config(rule, privacy={"private_blocks": 1}, training={"steps": 2})
    whole = splitft.train(once, tmp_path / "whole")
    assert len(_files(whole.folder)) == 4  # the global one and three personal ones
    with pytest.raises(StoppedError):
        splitft.train(once, tmp_path / "stopped", listeners=[stop_at(StepDone, round=3)])
    assert _files(splitft.train(once, tmp_path / "stopped", resume=True).folder) == _files(whole.folder)


@pytest.mark.parametrize("rule", UNEQUAL)
def test_peft_loads_what_was_evaluated(tmp_path, config, rule):
    once = config(rule, lora={"targets": "all-linear"}, training={"rounds": 2}, wire={"hidden": "fp32"})
    run = splitft.train(once, tmp_path / "run")
    losses = {client["name"]: client["loss"][-1] for client in run.summary["clients"]}
    for client in prepare(once).clients:
        folder = run.folder / "personal" / client.name if rule == "fedsa" else run.adapter_dir
        base = AutoModelForCausalLM.from_pretrained(once.model.name, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(folder)).eval()
        assert _loss(model, client.setup.held_out) == pytest.approx(losses[client.name], rel=1e-4)
        with model.disable_adapter():
            assert _loss(model, client.setup.held_out) != pytest.approx(losses[client.name], rel=1e-3)


@torch.no_grad()
def _loss(model, batches) -> float:
    """Mean loss over labelled tokens, sequence by sequence."""
    total = tokens = 0.0
    for batch in batches:
        for ids, length, first in zip(batch.tokens, batch.lengths, batch.labelled_from, strict=True):
            labels = ids[:length].clone()
            labels[:first] = -100
            count = length - first
            total += float(model(input_ids=ids[None, :length], labels=labels[None]).loss) * count
            tokens += count
    return total / tokens


def test_with_own_factors_the_global_adapter_is_the_mean_of_the_clients(tmp_path, config):
    from safetensors.torch import load_file

    run = splitft.train(config("fedsa"), tmp_path / "run")
    mean = load_file(run.adapter_dir / "adapter_model.safetensors")
    own = [load_file(path) for path in sorted(run.folder.glob("personal/*/adapter_model.safetensors"))]
    assert len(own) == 3
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, sum(one[name] for one in own) / 3)
        if "lora_A" in name:
            assert all(torch.equal(one[name], tensor) for one in own)


@pytest.mark.parametrize("rule", UNEQUAL)
def test_the_simulated_clock_charges_the_adapters_that_travel(tiny_llama, text, rule):
    from laws.federations import federation, play
    from splitft.schedule.cost import round_bytes
    from splitft.tracking.events import RoundDone

    sections = {"aggregate": {"rule": rule}, "wire": {"adapter": "fp32", "in_process": "direct"}}
    sections |= {
        "model": {"name": str(tiny_llama), "dtype": "float32"},
        "training": {"rounds": 1, "steps": 3},  # after one, A is still the same for all
    }
    prepared = federation(tiny_llama, text, [1, 2, 3], lora={"rank_at_cut": 2}, **sections)
    _, events = play(prepared)
    (done,) = (event for event in events if isinstance(event, RoundDone))
    fleet = prepared.cut_schedule.fleet
    for client, cut in zip(fleet.clients, (1, 2, 3), strict=True):
        told, sent = round_bytes(fleet.costs, client, cut), done.traffic[client.name]
        assert sent.up["adapter"] == pytest.approx(told["adapters_up"])
        down = sent.down["adapter"]
        if RULES[rule].folds:  # the rank sum is the most that is folded
            assert 0.4 * told["adapters_down"] <= down <= told["adapters_down"]
        elif RULES[rule].full_rank:
            assert down == pytest.approx(told["adapters_down"])
        else:  # the highest rank that any client brings to a block
            assert told["adapters_down"] <= down


@pytest.mark.parametrize("rule", ["stack", "exact", "ffa"])
def test_one_set_of_server_adapters_for_all_goes_with_them(tmp_path, config, rule):
    run = splitft.train(config(rule, split={"server_adapters": "shared"}), tmp_path / "run")
    assert run.summary["eval_loss"][-1] < run.summary["eval_loss"][0]
    assert max(run.summary["aggregation_error"]) < 1e-6


def test_own_factors_and_shared_ones_are_refused_together(config):
    with pytest.raises(ConfigError, match=r"aggregate.rule: found fedsa.*per-client, or another rule"):
        config("fedsa", split={"server_adapters": "shared"})


def test_moments_of_factors_that_are_made_anew_are_refused(config):
    with pytest.raises(ConfigError, match=r"does not fit aggregate.rule stack"):
        config("stack", training={"optimizer_state": "keep"})


ON_TOP = {
    "fedavgm": {"rule": "zero-pad", "server_optimizer": "fedavgm", "server_momentum": 0.5},
    "nesterov": {"rule": "zero-pad", "server_optimizer": "nesterov"},
    "fedadam": {"rule": "zero-pad", "server_optimizer": "fedadam"},
    "fedadam on ffa": {"rule": "ffa", "server_optimizer": "fedadam"},
    "fedavgm on fedsa": {"rule": "fedsa", "server_optimizer": "fedavgm"},
}


@pytest.mark.parametrize("aggregate", ON_TOP.values(), ids=ON_TOP)
def test_the_servers_optimizer_goes_on_after_a_stop(tmp_path, tiny_llama, text, aggregate):
    training = {"rounds": 4, "steps": 2, "schedule": "cosine", "warmup": 3, "clip": 0.1}
    lora = {"lr_ratio": 4, "dropout": 0.2}
    once = from_mapping(
        settings(tiny_llama, text, aggregate=aggregate, schedule=MOVING, training=training, lora=lora)
    )
    whole = splitft.train(once, tmp_path / "whole")
    plain = splitft.train(
        once.model_copy(update={"aggregate": once.aggregate.model_copy(update={"server_optimizer": "none"})}),
        tmp_path / "plain",
    )
    assert _files(plain.folder) != _files(whole.folder)
    with pytest.raises(StoppedError):
        splitft.train(once, tmp_path / "stopped", listeners=[stop_at(StepDone, round=3)])
    again = splitft.train(once, tmp_path / "stopped", resume=True)
    assert _files(again.folder) == _files(whole.folder)
    assert _told(again) == _told(whole)
    for adapter in whole.folder.rglob("adapter_config.json"):
        assert json.loads(adapter.read_text(encoding="utf-8"))["lora_dropout"] == 0.2


def test_cuts_do_not_matter_with_schedules_two_rates_and_a_server_optimizer(tiny_llama, text):
    from laws.federations import federation, largest_relative_difference, play

    sections = {
        "training": {"rounds": 2, "steps": 4, "schedule": "cosine", "warmup": 2},
        "aggregate": {"rule": "factors", "server_optimizer": "fedadam"},
        "lora": {"lr_ratio": 8},
    }
    one, other = (play(federation(tiny_llama, text, cuts, **sections))[0] for cuts in ([1, 1, 1], [3, 1, 2]))
    assert largest_relative_difference(one.adapters.tensors(), other.adapters.tensors()) < 1e-5


def test_a_run_whose_rate_falls_cannot_be_made_longer(tmp_path, config):
    once = config("svd", training={"rounds": 2, "steps": 1, "schedule": "linear"})
    splitft.train(once, tmp_path / "run")
    longer = config("svd", training={"rounds": 3, "steps": 1, "schedule": "linear"})
    with pytest.raises(RunError, match=r"training.rounds \(was 2, now 3\)"):
        splitft.train(longer, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("aggregate", "training", "message"),
    [
        ({"rule": "svd", "server_optimizer": "fedadam"}, {}, "goes on from the last factors.*zero-pad"),
        ({"rule": "exact", "server_optimizer": "fedavgm"}, {}, "aggregate.server_optimizer: found fedavgm"),
        ({"server_betas": [0.9, 1.0]}, {}, "below 1"),
        ({}, {"warmup": 100}, "found 100, but the run has 9 local steps"),
    ],
)
def test_what_cannot_go_together_is_said_at_once(tiny_llama, text, aggregate, training, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(settings(tiny_llama, text, aggregate=aggregate, training=training))
