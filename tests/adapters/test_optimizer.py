"""An optimizer cut in two against torch's over everything; learning rates against transformers and peft."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from splitft.adapters import LocalOptimizer, moments_within, step_together
from splitft.adapters.optimizer import LR_SHAPES, lr_factor
from splitft.errors import AdapterError
from splitft.geometry import Span
from splitft.specs import TrainingSpec

BLOCKS = 4
SPECS = [
    TrainingSpec(lr=0.02),
    TrainingSpec(lr=0.02, weight_decay=0.1),
    TrainingSpec(lr=0.1, optimizer="sgd", weight_decay=0.1),
]
CLIPPED = TrainingSpec(lr=0.02, clip=0.5)
"""A bound that every step of these tests exceeds, and that depends on all gradients of a slot."""
Parameters = dict[tuple[int, str, str], nn.Parameter]


def _parameters(ranks: dict[int, int] | None = None) -> Parameters:
    generator = torch.manual_seed(0)
    found: Parameters = {}
    for block in range(BLOCKS):
        rank = (ranks or {}).get(block, 2)
        for target in ("self_attn.q_proj", "mlp.up"):
            found[block, target, "A"] = nn.Parameter(torch.randn(rank, 5, generator=generator))
            found[block, target, "B"] = nn.Parameter(torch.randn(4, rank, generator=generator))
    return found


def _backward(parameters: Parameters, step: int) -> None:
    """A gradient that depends on the numbers, on the parameter and on the step."""
    for number, parameter in enumerate(parameters.values()):
        (((step + number) * parameter).sin() * parameter).sum().backward()


def _of(parameters: Parameters, span: Span) -> Parameters:
    return {key: parameter for key, parameter in parameters.items() if key[0] in span}


def _torchs(parameters: Parameters, spec: TrainingSpec) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if spec.optimizer == "adamw" else torch.optim.SGD
    return kind(parameters.values(), lr=spec.lr, weight_decay=spec.weight_decay)


def _after(spec: TrainingSpec, steps: int = 6) -> Parameters:
    """The oracle: torch's optimizer over all parameters."""
    parameters = _parameters()
    optimizer = _torchs(parameters, spec)
    for step in range(steps):
        optimizer.zero_grad()
        _backward(parameters, step)
        optimizer.step()
    return parameters


def _check_equal(found: Parameters, expected: Parameters) -> None:
    for key, parameter in expected.items():
        torch.testing.assert_close(found[key].data, parameter.data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("cut", range(BLOCKS + 1))
def test_two_optimizers_at_any_cut_are_one_over_everything(spec, cut):
    parameters = _parameters()
    sides = [LocalOptimizer(_of(parameters, span), spec) for span in (Span(0, cut), Span(cut, BLOCKS))]
    for step in range(6):
        _backward(parameters, step)
        for side in sides:
            side.step()
    _check_equal(parameters, _after(spec))


@pytest.mark.parametrize("spec", SPECS)
def test_moments_that_change_sides_go_on_as_if_they_had_not(spec):
    """Cuts 1, 3 and 2, two steps each; every optimizer is new, with the moments of its blocks."""
    parameters, moments = _parameters(), {}
    for turn, cut in enumerate((1, 3, 2)):
        spans = (Span(0, cut), Span(cut, BLOCKS))
        sides = [LocalOptimizer(_of(parameters, s), spec, moments_within(moments, s)) for s in spans]
        for step in (2 * turn, 2 * turn + 1):
            _backward(parameters, step)
            for side in sides:
                side.step()
        moments = {**sides[0].moments(), **sides[1].moments()}
    _check_equal(parameters, _after(spec))


def test_moments_survive_a_round_trip_and_are_copies():
    parameters = _parameters()
    optimizer = LocalOptimizer(parameters, SPECS[0])
    _backward(parameters, 0)
    optimizer.step()
    moments = optimizer.moments()
    assert len(moments) == 3 * len(parameters)  # exp_avg, exp_avg_sq, step
    again = LocalOptimizer(parameters, SPECS[0], moments).moments()
    assert again.keys() == moments.keys()
    assert all(torch.equal(again[name], moments[name]) for name in moments)
    kept = {name: value.clone() for name, value in moments.items()}
    _backward(parameters, 1)
    optimizer.step()
    assert all(torch.equal(moments[name], kept[name]) for name in kept)


def test_a_block_whose_rank_changed_starts_afresh_and_the_others_do_not():
    parameters = _parameters()
    optimizer = LocalOptimizer(parameters, SPECS[0])
    _backward(parameters, 0)
    optimizer.step()
    moments, changed = optimizer.moments(), _parameters({2: 3})
    restored = LocalOptimizer(changed, SPECS[0], moments)
    assert {int(name.split(".")[0]) for name in restored.moments()} == {0, 1, 3}
    _backward(changed, 1)
    restored.step()
    steps = {name: int(value) for name, value in restored.moments().items() if name.endswith(".step")}
    assert {name: count for name, count in steps.items() if count == 1} == {
        f"2.{target}.{factor}.step": 1 for target in ("self_attn.q_proj", "mlp.up") for factor in "AB"
    }


def test_moments_of_blocks_held_elsewhere_are_left_out():
    parameters = _parameters()
    optimizer = LocalOptimizer(parameters, SPECS[0])
    _backward(parameters, 0)
    optimizer.step()
    client = LocalOptimizer(_of(parameters, Span(0, 1)), SPECS[0], optimizer.moments())
    assert client.moments().keys() == moments_within(optimizer.moments(), Span(0, 1)).keys()


def test_a_step_applies_the_gradients_once_and_clears_them():
    parameters = _parameters()
    optimizer = LocalOptimizer(parameters, SPECS[0])
    _backward(parameters, 0)
    optimizer.step()
    assert all(parameter.grad is None for parameter in parameters.values())
    _backward(parameters, 1)
    optimizer.forget()
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize("largest", [0.5, 1e6])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_clipped_step_is_that_of_torch(kind, largest):
    spec = TrainingSpec(lr=0.02, optimizer=kind, clip=largest)
    ours, theirs = _parameters(), _parameters()
    optimizer, torchs = LocalOptimizer(ours, spec), _torchs(theirs, spec)
    for step in range(3):
        _backward(ours, step)
        _backward(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), largest)
        assert 0.5 < norm < 1e6
        optimizer.step()
        torchs.step()
        torchs.zero_grad()
    _check_equal(ours, theirs)


@pytest.mark.parametrize("spec", [*SPECS, CLIPPED])
def test_gradients_of_several_clients_can_be_divided_by_their_number(spec):
    summed, mean = _parameters(), _parameters()
    one, other = LocalOptimizer(summed, spec), LocalOptimizer(mean, spec)
    for _ in range(3):
        _backward(summed, 1)
    _backward(mean, 1)
    one.step(divide_by=3)
    other.step()
    _check_equal(summed, mean)


@pytest.mark.parametrize("spec", [*SPECS, CLIPPED])
def test_slots_that_step_together_step_as_each_alone(spec):
    """To the last bit, with moments of a client that is two steps ahead, at unequal learning rates."""
    spec = spec.model_copy(update={"schedule": "linear", "rounds": 2, "steps": 4})
    ways = []
    for together in (True, False):
        slots = [_parameters({1: rank}) for rank in (2, 3, 2)]
        optimizers = [LocalOptimizer(slot, spec, lr_ratio=4.0) for slot in slots]
        for step, chosen in enumerate(([0], [0, 1], [0, 1, 2], [1, 2])):
            for number in chosen:
                _backward(slots[number], step + number)
            if together:
                step_together([optimizers[number] for number in chosen])
            else:
                for number in chosen:
                    optimizers[number].step()
        ways.append([slot[key] for slot in slots for key in slot])
        ways[-1] += [value for one in optimizers for value in one.moments().values()]
    assert all(torch.equal(one, other) for one, other in zip(*ways, strict=True))


def test_gradients_and_moments_may_lie_in_memory_unlike_the_factor():
    """The fused kernel reads storage in order; the bank keeps B like its transpose."""
    key = (0, "q", "B")
    plain = {key: nn.Parameter(torch.randn(4, 3, generator=torch.manual_seed(1)))}
    turned = {key: nn.Parameter(plain[key].detach().mT.contiguous().mT)}
    optimizers = [LocalOptimizer(one, SPECS[0]) for one in (plain, turned)]
    for step in range(4):
        for number, parameters in enumerate((plain, turned)):
            gradient = torch.randn(4, 3, generator=torch.manual_seed(step))
            parameters[key].grad = gradient if step % 2 else gradient.mT.contiguous().mT
            optimizers[number].step()
            moments = optimizers[number].moments()
            assert all(value.is_contiguous() for value in moments.values())
            optimizers[number] = LocalOptimizer(parameters, SPECS[0], moments)
    assert torch.equal(plain[key], turned[key])


def test_sgd_has_no_moments_and_nobody_to_train_is_no_error():
    parameters = _parameters()
    optimizer = LocalOptimizer(parameters, SPECS[2])
    _backward(parameters, 0)
    optimizer.step()
    assert optimizer.moments() == {}
    idle = LocalOptimizer({}, SPECS[0], {"0.q.A.step": torch.ones(())})
    idle.step()
    idle.forget()
    assert idle.moments() == {}


def test_moments_over_float64_factors_stay_in_float64():
    parameter = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = LocalOptimizer({(0, "q", "A"): parameter}, SPECS[0])
    parameter.sum().backward()
    optimizer.step()
    assert optimizer.moments()["0.q.A.exp_avg"].dtype == torch.float64


def test_names_that_are_no_moments_are_refused():
    with pytest.raises(AdapterError, match="not a name of a moment"):
        moments_within({"q.A.step": torch.ones(())}, Span(0, 1))


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
        assert lr_factor(spec, step) == pytest.approx(expected, abs=1e-12)


def test_by_default_the_rate_is_the_same_in_every_step():
    assert TrainingSpec().schedule == "constant"
    assert {lr_factor(TrainingSpec(), step) for step in range(100)} == {1.0}
    assert set(LR_SHAPES) == {"constant", "linear", "cosine"}


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
    assert moved == pytest.approx([0.1 * lr_factor(spec, step) for step in range(12)])


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
