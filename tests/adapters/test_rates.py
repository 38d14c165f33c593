"""The learning rate over a run, against transformers; the two rates of LoRA+, against peft."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from splitft.adapters import LocalOptimizer
from splitft.adapters.rates import SHAPES, share_at
from splitft.specs import TrainingSpec

THEIRS = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}


@given(
    schedule=st.sampled_from(sorted(THEIRS)),
    rounds=st.integers(1, 6),
    steps=st.integers(1, 8),
    warmup=st.integers(0, 6),
)
def test_the_rate_is_that_of_transformers_with_the_warm_up_a_step_ahead(schedule, rounds, steps, warmup):
    warmup = min(warmup, rounds * steps)
    spec = TrainingSpec(rounds=rounds, steps=steps, warmup=warmup, schedule=schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = THEIRS[schedule](optimizer, warmup, rounds * steps).lr_lambdas[0]
    for step in range(rounds * steps):
        expected = theirs(step + 1) if step + 1 < warmup else theirs(step) if step >= warmup else 1.0
        assert share_at(spec, step) == pytest.approx(expected, abs=1e-12)


def test_by_default_the_rate_is_the_same_in_every_step():
    assert TrainingSpec().schedule == "constant"
    assert {share_at(TrainingSpec(), step) for step in range(100)} == {1.0}
    assert set(SHAPES) == {"constant", "linear", "cosine"}


def test_each_round_goes_on_where_the_last_one_ended_and_both_sides_agree():
    spec = TrainingSpec(rounds=3, steps=4, lr=0.1, warmup=2, schedule="linear", optimizer="sgd")
    moved = []
    for round in (1, 2, 3):
        parameter = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
        optimizer = LocalOptimizer({(0, "q", "A"): parameter}, spec, round=round)
        for _ in range(spec.steps):
            before = parameter.item()
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            moved.append(before - parameter.item())
    assert moved == pytest.approx([0.1 * share_at(spec, step) for step in range(12)])


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_plus_steps_as_the_optimizer_of_peft(ratio, weight_decay):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    config = LoraConfig(r=3, target_modules=["0", "2"])
    model = get_peft_model(whole, config, autocast_adapter_dtype=False)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay,
        weight_decay=weight_decay,
    )  # fmt: skip
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = {
        (0, name, "A" if "lora_A" in name else "B"): nn.Parameter(p.detach().clone())
        for name, p in named.items()
    }
    spec = TrainingSpec(lr=1e-2, weight_decay=weight_decay)
    optimizer = LocalOptimizer(ours, spec, lr_ratio=ratio)
    for _ in range(5):
        model(torch.randn(7, 6, dtype=torch.float64)).pow(2).mean().backward()
        for (_, name, _), parameter in ours.items():
            parameter.grad = named[name].grad.clone()
        theirs.step()
        theirs.zero_grad()
        optimizer.step()
        for (_, name, _), parameter in ours.items():
            torch.testing.assert_close(parameter, named[name])
