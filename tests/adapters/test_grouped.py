"""The products of many unequal clients as one, against each client alone; operations counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from splitft.adapters import AdapterBank, AdapterState, Factors, LocalOptimizer, attach, step_together
from splitft.adapters import lora as lora_module
from splitft.adapters.grouped import grouped_mm_works, product_kind
from splitft.specs import TrainingSpec

IN, OUT, TOKENS, SCALE = 16, 24, 3, 0.7
KEY = (0, "lin")
MOST_OPERATIONS = 40
"""Of a layer, forward and backward, for 64 unequal clients."""
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.02}

needs_grouped = pytest.mark.skipif(
    not grouped_mm_works(torch.device("cpu"), torch.float32), reason="this torch has no grouped product"
)


class Operations(TorchDispatchMode):
    """A count of the operations that reach torch's dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Client:
    """A client of a drawn batch; `rank` None for rows of the base model."""

    rank: int | None
    sequences: int
    rest: int = 0
    trains: str = "AB"
    dora: bool = False


def _bank(
    dtype: torch.dtype, gain: Any = lambda rank: 1.0, device: Any = "cpu"
) -> tuple[nn.Module, AdapterBank]:
    block = nn.Sequential()
    block.add_module("lin", nn.Linear(IN, OUT, dtype=dtype, device=device).requires_grad_(False))
    return block, attach([block], "all-linear", SCALE, dtype, gain, lambda _: torch.device(device))


def _factors(rank: int, dora: bool = False) -> Factors:
    magnitude = torch.randn(1, OUT) / 10 if dora else None
    return Factors(torch.randn(rank, IN), torch.randn(OUT, rank), magnitude)


def _fill(bank: AdapterBank, clients: list[Client], folded: int) -> list[tuple[str | None, int]]:
    update = AdapterState({KEY: _factors(folded)}) if folded else None
    rows: list[tuple[str | None, int]] = []
    for number, client in enumerate(clients):
        slot = None if client.rank is None else f"client-{number}"
        if slot is not None:
            rest = AdapterState({KEY: _factors(client.rest)}) if client.rest else None
            state = AdapterState({KEY: _factors(client.rank or 0, client.dora)})
            bank.put(slot, state, rest, update, client.trains)
        rows.append((slot, client.sequences))
    return rows


def _gradients(bank: AdapterBank, rows: list[tuple[str | None, int]]) -> dict[Any, torch.Tensor]:
    found = {}
    for slot, _ in rows:
        for key, parameter in bank.parameters(slot or "").items():
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shape
            assert parameter.grad.dtype == parameter.dtype
            found[slot, *key] = parameter.grad.clone()
            parameter.grad = None
    return found


def _check_each_alone(
    block: nn.Module, bank: AdapterBank, rows: list[tuple[str | None, int]], dtype: torch.dtype
) -> None:
    """Compare one pass of all with a pass of each: outputs, and gradients of rows and factors."""
    x = torch.randn(sum(count for _, count in rows), TOKENS, IN, dtype=dtype, requires_grad=True)
    weights = torch.randn(len(x), TOKENS, OUT, dtype=dtype)
    with bank.routed(rows):
        together = block(x)
    together.backward(weights)
    of_x, found = x.grad, _gradients(bank, rows)
    assert of_x is not None
    alone, x.grad = [], None
    for (slot, count), x_, w_ in zip(
        rows, x.split([c for _, c in rows]), weights.split([c for _, c in rows]), strict=True
    ):
        with bank.routed([(slot, count)]):
            alone.append(block(x_))
        if alone[-1].requires_grad:
            alone[-1].backward(w_)
    expected = _gradients(bank, rows)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * 20}
    torch.testing.assert_close(together, torch.cat(alone), **close)
    torch.testing.assert_close(of_x, x.grad, **close)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, **close)


CLIENTS = st.builds(
    Client,
    rank=st.one_of(st.none(), st.integers(0, 9)),
    sequences=st.integers(1, 3),
    rest=st.sampled_from([0, 0, 3]),
    trains=st.sampled_from(["AB", "AB", "B"]),
    dora=st.sampled_from([False, False, True]),
)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param("grouped", torch.float32, marks=needs_grouped),
        pytest.param("grouped", torch.bfloat16, marks=needs_grouped),
        ("padded", torch.float32),
        ("padded", torch.float64),
        (None, torch.float64),
    ],
)
@settings(max_examples=40, deadline=None)
@given(
    clients=st.lists(CLIENTS, min_size=2, max_size=5),
    folded=st.sampled_from([0, 0, 5]),
    scaled=st.booleans(),
    seed=st.integers(0, 99),
)
@example(clients=[Client(3, 1), Client(2, 2, dora=True)], folded=0, scaled=False, seed=0)
@example(clients=[Client(3, 1), Client(None, 2)], folded=5, scaled=False, seed=0)
@example(clients=[Client(4, 1, rest=3), Client(1, 2)], folded=5, scaled=True, seed=0)
def test_unequal_clients_together_get_what_each_gets_alone(kind, dtype, clients, folded, scaled, seed):
    torch.manual_seed(seed)
    block, bank = _bank(dtype, (lambda rank: rank**0.5) if scaled else (lambda rank: 1.0))
    rows = _fill(bank, clients, folded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_module, "product_kind", lambda *_: kind)
        _check_each_alone(block, bank, rows, dtype)


def test_a_slot_with_rows_in_two_places_and_clients_of_unequal_updates_fall_back():
    block, bank = _bank(torch.float32)
    _fill(bank, [Client(2, 1), Client(3, 1)], folded=2)
    bank.put("other", AdapterState({KEY: _factors(2)}), folded=AdapterState({KEY: _factors(1)}))
    for slots in ((["client-0", "other"]), ["client-0", "client-1", "client-0"]):
        x = torch.randn(len(slots), TOKENS, IN)
        with torch.no_grad():
            with bank.routed([(slot, 1) for slot in slots]):
                together = block(x)
            for slot, x_, y_ in zip(slots, x, together, strict=True):
                with bank.routed([(slot, 1)]):
                    torch.testing.assert_close(block(x_[None])[0], y_, rtol=0, atol=1e-5)


UNEQUAL = [Client(1 + number % 7, 1 + number % 3, rest=number % 2) for number in range(64)]


def _passed(block: nn.Module, bank: AdapterBank, rows: list[Any], dtype: torch.dtype) -> Counter[str]:
    """Count the operations of a forward and a backward pass."""
    x = torch.randn(sum(count for _, count in rows), TOKENS, IN, dtype=dtype, requires_grad=True)
    weights = torch.randn(len(x), TOKENS, OUT, dtype=dtype)
    with Operations() as operations:
        with bank.routed(rows):
            y = block(x)
        y.backward(weights)
    return operations.names


@needs_grouped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_needs_few_operations_for_64_unequal_clients(dtype):
    block, bank = _bank(dtype)
    rows = _fill(bank, UNEQUAL, folded=0)
    optimizers = [LocalOptimizer(bank.parameters(slot or ""), TrainingSpec()) for slot, _ in rows]
    _passed(block, bank, rows, dtype)  # layouts are made once
    with Operations() as first:
        step_together(optimizers)
    assert first.names["aten::_fused_adamw_"] == 1
    again = _passed(block, bank, rows, dtype)
    assert 20 < again.total() <= MOST_OPERATIONS, again
    with Operations() as step:
        step_together(optimizers)
    assert step.names == {"aten::_foreach_add_": 1, "aten::_fused_adamw_": 1}


@needs_grouped
def test_factors_are_stacked_once_for_a_step_and_again_when_one_changes():
    block, bank = _bank(torch.float32)
    rows = _fill(bank, UNEQUAL[:5], folded=0)
    optimizer = LocalOptimizer(bank.parameters("client-3"), TrainingSpec(lr=0.1))
    assert _passed(block, bank, rows, torch.float32)["aten::cat"] == 2
    assert _passed(block, bank, rows, torch.float32)["aten::cat"] == 0
    optimizer.step()
    _gradients(bank, rows[:3] + rows[4:])
    _check_each_alone(block, bank, rows, torch.float32)
    bank.put("client-1", AdapterState({KEY: _factors(4)}))
    _check_each_alone(block, bank, rows, torch.float32)
    with torch.no_grad():
        next(iter(bank.parameters("client-2").values())).mul_(2)
    _check_each_alone(block, bank, rows, torch.float32)
    _check_each_alone(block, bank, rows[::-1], torch.float32)


@pytest.mark.parametrize("kind", [pytest.param("grouped", marks=needs_grouped), "padded"])
def test_micro_batches_add_up_and_one_client_may_forget_between(kind, monkeypatch):
    """Gradients of two passes, the first of which one client forgets, and a pass for one client's output."""
    monkeypatch.setattr(lora_module, "product_kind", lambda *_: kind)
    block, bank = _bank(torch.float32)
    rows = _fill(bank, UNEQUAL[:4], folded=0)
    counts = [count for _, count in rows]
    x = torch.randn(sum(counts), TOKENS, IN)
    weights = torch.randn(len(x), TOKENS, OUT)
    with bank.routed(rows):
        first, second = block(x), block(x)
    torch.autograd.backward(first.split(counts)[1], weights.split(counts)[1], retain_graph=True)
    LocalOptimizer(bank.parameters("client-2"), TrainingSpec()).forget()
    first.backward(weights)
    LocalOptimizer(bank.parameters("client-3"), TrainingSpec()).forget()
    second.backward(weights)
    found = _gradients(bank, rows)
    with bank.routed(rows):
        block(x).backward(weights)
    for (slot, *key), gradient in _gradients(bank, rows).items():
        times = {"client-1": 3, "client-3": 1}.get(slot, 2)
        torch.testing.assert_close(found[slot, *key], times * gradient, rtol=1e-5, atol=1e-4)


def test_the_product_is_chosen_by_type_alignment_and_padding():
    def kind(counts, width=IN, dtype=torch.float32):
        return product_kind(counts, (width, OUT), torch.empty(0, dtype=dtype))

    works = grouped_mm_works(torch.device("cpu"), torch.float32)
    assert kind([3, 1]) == ("grouped" if works else None)
    assert kind([3, 1], width=6) is None
    assert kind([2, 2]) == kind([2, 2], width=6) == kind([2, 2], dtype=torch.float64) == "padded"
    assert kind([3, 1], dtype=torch.float64) is None
    assert not grouped_mm_works(torch.device("cpu"), torch.float64)


def test_another_device_pads_and_copies_nothing_once_the_places_of_rows_are_known(fake_devices):
    rows = [("client-0", 2), (None, 1), ("client-2", 1)]
    states = {slot: [AdapterState({KEY: _factors(rank)}) for rank in (3, 2)] for slot, _ in rows if slot}
    x, weights = torch.randn(4, TOKENS, IN), torch.randn(4, TOKENS, OUT)
    passes, whole = [], _bank(torch.float32)[0].state_dict()
    for device in ("cpu", "acc:0"):
        block, bank = _bank(torch.float32, device=device)
        block.load_state_dict(whole)
        for slot, (state, rest) in states.items():
            bank.put(slot, state, rest)
        x_, weights_ = x.detach().to(device).requires_grad_(), weights.to(device)
        for _ in range(2):
            before = fake_devices.copies.total()
            with bank.routed(rows):
                block(x_).backward(weights_)
        assert fake_devices.copies.total() == before
        passes.append({key: gradient.cpu() for key, gradient in _gradients(bank, rows).items()})
    assert any(name == "aten::bmm" for _, name in fake_devices.log)
    for key, gradient in passes[0].items():
        torch.testing.assert_close(passes[1][key], gradient, rtol=1e-5, atol=1e-4)
