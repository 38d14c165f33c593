"""DP-FedAvg stands on one bound: zeroing one client's update moves the mean by no more than C / n."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitft.adapters import AdapterState, Fresh, aggregate
from splitft.adapters.state import Factors
from splitft.privacy.dp_fedavg import add_noise, clip_update, noise_deviation, update_norm

KEYS = ((0, "q"), (0, "v"), (1, "q"))


def state(seed: int, rank: int = 2, scale: float = 1.0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return AdapterState({key: Factors(drawn(rank, 5), drawn(4, rank)) for key in KEYS})


def cut_down(whole: AdapterState, rank: int) -> AdapterState:
    return AdapterState({key: Factors(value.A[:rank], value.B[:, :rank]) for key, value in whole.items()})


def moved(start: AdapterState, update: AdapterState) -> AdapterState:
    return AdapterState({
        key: Factors(start[key].A + update[key].A, start[key].B + update[key].B) for key in start
    })  # fmt: skip


@pytest.mark.parametrize("rule", ["factors", "zero-pad"])
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-3, 1e3),
    norm=st.floats(1e-2, 1e2),
    clients=st.integers(1, 4),
)
def test_zeroing_one_clients_update_moves_the_mean_by_at_most_the_norm_over_n(
    rule, seed, scale, norm, clients
):
    start = state(seed, rank=3)
    ranks = [3 if rule == "factors" else 1 + (seed + i) % 3 for i in range(clients)]
    starts = [cut_down(start, rank) for rank in ranks]
    trained = [
        moved(one, state(seed + 1 + i, rank, scale))
        for i, (one, rank) in enumerate(zip(starts, ranks, strict=True))
    ]
    sets = [clip_update(one, after, norm) for one, after in zip(starts, trained, strict=True)]
    assert all(update_norm(one, after) <= norm * (1 + 1e-9) for one, after in zip(starts, sets, strict=True))

    def mean(members: list[AdapterState]) -> AdapterState:
        return aggregate(rule, [(1.0, one) for one in members], {0: 3, 1: 3}, Fresh(0, 0)).state

    without_first = [starts[0], *sets[1:]]
    assert update_norm(mean(without_first), mean(sets)) <= norm / clients * (1 + 1e-9)


def test_an_update_within_the_norm_stays_bit_for_bit():
    start, trained = state(0), state(1, scale=0.01)
    near = moved(start, trained)
    assert clip_update(start, near, 1.0) is near


def test_an_update_that_is_not_finite_becomes_none():
    start = state(0)
    broken = AdapterState({**state(1), (0, "q"): Factors(start[0, "q"].A * math.nan, start[0, "q"].B)})
    assert update_norm(start, clip_update(start, broken, 1.0)) == 0


def test_noise_on_the_mean_has_the_deviation_that_the_accountant_takes():
    wide = AdapterState({(0, "q"): Factors(torch.zeros(200, 300), torch.zeros(300, 200))})
    deviation = noise_deviation(clip_norm=0.5, noise_multiplier=3.0, participants=5)
    assert deviation == pytest.approx(0.3)
    result = add_noise(wide, deviation, torch.Generator().manual_seed(0), frozen_A=False)[0, "q"]
    for factor in (result.A, result.B):
        assert float(factor.std()) == pytest.approx(deviation, rel=0.02)
        assert float(factor.mean()) == pytest.approx(0, abs=4 * deviation / math.sqrt(factor.numel()))


def test_a_factor_that_is_never_trained_gets_no_noise():
    before = state(0)
    after = add_noise(before, 1.0, torch.Generator().manual_seed(0), frozen_A=True)
    assert all(torch.equal(before[key].A, after[key].A) for key in KEYS)
    assert not any(torch.equal(before[key].B, after[key].B) for key in KEYS)
