"""Many clients: the compressed mean product against the uncompressed one in float64."""

from __future__ import annotations

import math
import weakref
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from splitft.adapters import AdapterState, Factors, Fresh, United, aggregate, mean_product
from splitft.adapters.mean_product import MOST_STACKED, compressed, mean_norm
from splitft.adapters.state import fresh_rows
from splitft.specs.rules import RULES, Rule

FRESH = Fresh(seed=0, salt=1)
KEY = (0, "q")
RANK, CLIENTS = 8, 40
"""The stacked rank is 320, above the bound."""
WIDE, OUT = 768, 704
"""So large that the matrix has more numbers than its stacked factors."""
LIMITED = sorted(set(RULES) - {"median", "trimmed-mean", "krum"})


def _members(related: float, clients: int = CLIENTS, wide: int = WIDE, out: int = OUT, seed: int = 0):
    """Clients whose A are a common one and something of their own; with `related` 1, the common one alone."""
    generator = torch.manual_seed(seed)
    start, learnt = fresh_rows(KEY, RANK, wide, seed), torch.randn(out, RANK, generator=generator)
    found = []
    for number in range(clients):
        own = torch.randn(RANK, wide, generator=generator) / math.sqrt(3 * wide)
        B = torch.randn(out, RANK, generator=generator)
        factors = Factors(related * start + (1 - related) * own, related * learnt + (1 - related) * B)
        found.append((1.0 + number % 3, AdapterState({KEY: factors})))
    return found


def _dense(found) -> torch.Tensor:
    total = sum(weight for weight, _ in found)
    return sum(w / total * state[KEY].B.double() @ state[KEY].A.double() for w, state in found)


def _layer(found):
    total = sum(weight for weight, _ in found)
    return [(weight / total, state[KEY]) for weight, state in found]


@pytest.mark.parametrize("related", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rule", LIMITED)
def test_the_reported_error_of_many_clients_is_that_of_the_dense_product(rule, related):
    found = _members(related)
    done = aggregate(rule, found, {0: RANK}, FRESH)
    dense = _dense(found)
    error = float((dense - done.product(KEY).double()).norm() / dense.norm())
    assert done.error == pytest.approx(error, rel=0.02, abs=1e-5)


@pytest.mark.parametrize("related", [0.0, 0.5, 0.9])
def test_svd_of_many_clients_is_as_near_as_the_best_factors_can_be(related):
    """Eckart and Young: the truncated singular value decomposition of the dense mean."""
    found = _members(related)
    done = aggregate("svd", found, {0: RANK}, FRESH).state[KEY]
    dense = _dense(found)
    best = float(torch.linalg.svdvals(dense)[RANK:].norm())
    assert float((dense - done.product().double()).norm()) <= 1.002 * best
    assert done.A.dtype == torch.float32


def test_svd_of_many_clients_of_a_low_rank_is_exact():
    found = _members(1.0)
    done = aggregate("svd", found, {0: RANK}, FRESH)
    assert done.error < 1e-5
    torch.testing.assert_close(done.product(KEY).double(), _dense(found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("related", [0.0, 0.9])
def test_a_compressed_product_trains_on_from_where_the_uncompressed_one_does(related):
    """The same rows of A, where the mean product has leading directions; else factors as good."""
    found = _members(related)
    done = aggregate("svd", found, {0: RANK}, FRESH)
    with mock.patch.object(mean_product, "MOST_STACKED", 10**6):
        whole = aggregate("svd", found, {0: RANK}, FRESH)
    assert done.error == pytest.approx(whole.error, rel=0.02)
    if related:
        torch.testing.assert_close(done.state[KEY].A, whole.state[KEY].A, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("related", [0.0, 0.5, 1.0])
def test_a_norm_is_within_a_few_per_cent_and_exact_where_the_matrix_is_the_smaller(related):
    found = _members(related)
    assert mean_norm(_layer(found)) == pytest.approx(float(_dense(found).norm()), rel=0.02)
    small = _members(related, wide=96, out=80)
    assert mean_norm(_layer(small)) == pytest.approx(float(_dense(small).norm()), rel=1e-6)


def test_a_norm_of_products_that_cancel_is_not_lost_in_rounding():
    found = _layer(_members(0.5))
    away = [(-weight, factors) for weight, factors in found]
    assert mean_norm([*found, *away]) < 1e-6 * mean_norm(found)


@pytest.mark.parametrize("rule", ["stack", "exact"])
@pytest.mark.parametrize(("wide", "out"), [(WIDE, OUT), (96, 80), (80, 96)])
def test_what_many_clients_fold_is_the_rest_of_the_mean(rule, wide, out):
    found = _members(0.5, wide=wide, out=out)
    done = aggregate(rule, found, {0: RANK}, FRESH)
    dense = _dense(found)
    assert float((done.product(KEY).double() - dense).norm()) < 1e-5 * float(dense.norm())
    assert done.folded[KEY].rank <= min(wide, out, (CLIENTS + 1) * RANK)
    assert done.folded[KEY].A.dtype == torch.float32


def test_nothing_is_folded_where_many_clients_agree():
    found = _members(1.0)
    assert not aggregate("exact", found, {0: RANK}, FRESH).folded


@pytest.mark.parametrize("clients", [MOST_STACKED // RANK, MOST_STACKED // RANK + 1])
def test_nothing_is_compressed_up_to_the_bound(clients):
    leading = compressed(_layer(_members(0.5, clients)), RANK)
    assert (leading.rank == clients * RANK) == (clients * RANK <= MOST_STACKED)


class _LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


@pytest.mark.parametrize("rule", ["factors", "zero-pad", "svd", "ffa", "fedsa"])
def test_no_tensor_grows_with_the_number_of_clients(rule):
    largest = []
    for clients in (CLIENTS, 3 * CLIENTS):
        found = _members(0.5, clients, wide=4096, out=4096)
        with _LargestTensor() as seen:
            aggregate(rule, found, {0: RANK}, FRESH)
        largest.append(seen.numel)
    assert largest[0] == largest[1] <= 4096 * 2 * mean_product.PROBES


class _ReadLater(AdapterState):
    """A set whose factors are made when they are asked for; counts those that are in memory."""

    alive = most = 0

    def __init__(self, number: int) -> None:
        super().__init__({KEY: Factors(torch.zeros(1, 1), torch.zeros(1, 1))})
        self._number = number

    def __getitem__(self, key):
        generator = torch.Generator().manual_seed(self._number)
        A, B = torch.randn(RANK, WIDE, generator=generator), torch.randn(OUT, RANK, generator=generator)
        factors, cls = Factors(A, B), type(self)
        cls.alive, cls.most = cls.alive + 1, max(cls.most, cls.alive + 1)
        weakref.finalize(factors, cls._forget)
        return factors

    @classmethod
    def _forget(cls) -> None:
        cls.alive -= 1


@pytest.mark.parametrize("rule", ["factors", "zero-pad", "svd"])
def test_few_sets_are_in_memory_at_once_where_they_are_read_from_elsewhere(rule):
    _ReadLater.most = 0
    aggregate(rule, [(1.0, _ReadLater(number)) for number in range(CLIENTS)], {0: RANK}, FRESH)
    assert 0 < _ReadLater.most <= 4


@pytest.mark.parametrize("clients", [3, CLIENTS])
@pytest.mark.parametrize("rule", LIMITED)
def test_a_device_gives_what_the_cpu_gives_and_the_result_is_on_the_cpu(fake_devices, rule, clients):
    found = _members(0.5, clients, wide=96 if rule in ("stack", "exact") else WIDE)
    here, there = (
        aggregate(rule, found, {0: RANK}, FRESH, device=torch.device(name)) for name in ("cpu", "acc:1")
    )
    assert fake_devices.copies["to"] >= 2 * clients
    assert there.error == pytest.approx(here.error, rel=1e-4, abs=1e-6)
    for one in (there.state[KEY], *there.folded.values()):
        assert {one.A.device.type, one.B.device.type} == {"cpu"}
    torch.testing.assert_close(there.product(KEY), here.product(KEY), rtol=1e-4, atol=1e-5)


def test_a_rule_of_a_plugin_is_given_its_members_on_the_cpu(fake_devices):
    def unite(key, members, rank, fresh):
        assert all(one.A.device.type == "cpu" for _, one in members)
        return United(members[0][1])

    RULES.add("mine", Rule(unite=unite))
    try:
        found = _members(0.5, 3)
        done = aggregate("mine", found, {0: RANK}, FRESH, device=torch.device("acc:0"))
    finally:
        RULES._things.pop("mine", None)
    assert torch.equal(done.state[KEY].A, found[0][1][KEY].A)
