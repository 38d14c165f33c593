"""Server-side optimisation against torch's SGD with momentum, and Reddi et al.'s algorithm in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splitft.adapters import AdapterState, Factors
from splitft.adapters.server_optimizer import server_step
from splitft.specs import AggregateSpec

KEY = (0, "q")


def _state(seed: int, rank: int = 2) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, 4), (3, rank)))
    return AdapterState({KEY: Factors(A, B)})


def _spec(**options) -> AggregateSpec:
    return AggregateSpec(rule="zero-pad", **options)


def test_none_takes_the_mean_as_it_is():
    mean = _state(1)
    assert server_step(_spec(), _state(0), mean, {}) == (mean, {})


@pytest.mark.parametrize("lr", [None, 0.3])
@pytest.mark.parametrize(("name", "usual_lr"), [("fedavgm", 1.0), ("nesterov", 0.7)])
def test_momentum_is_that_of_torchs_sgd_on_the_negative_change(name, usual_lr, lr):
    spec, state, memory = _spec(server_optimizer=name, server_lr=lr, server_momentum=0.8), _state(0), {}
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in state.tensors().values()]
    ahead = name == "nesterov"
    optimizer = torch.optim.SGD(theirs, lr=lr or usual_lr, momentum=0.8, nesterov=ahead)
    for round in range(1, 5):
        mean = _state(round)
        for parameter, tensor in zip(theirs, mean.tensors().values(), strict=True):
            parameter.grad = parameter.detach() - tensor
        optimizer.step()
        state, memory = server_step(spec, state, mean, memory)
        for ours, wanted in zip(state.tensors().values(), theirs, strict=True):
            torch.testing.assert_close(ours, wanted.detach())


def test_fedadam_is_the_algorithm_of_reddi_et_al():
    spec = _spec(server_optimizer="fedadam", server_lr=0.05, server_betas=(0.7, 0.95), server_tau=0.01)
    state, memory = _state(0), {}
    x = {name: tensor.numpy().copy() for name, tensor in state.tensors().items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    v = {name: np.full_like(value, 0.01**2) for name, value in x.items()}
    for round in range(1, 6):
        mean = _state(round)
        for name, tensor in mean.tensors().items():
            delta = tensor.numpy() - x[name]
            m[name] = 0.7 * m[name] + 0.3 * delta
            v[name] = 0.95 * v[name] + 0.05 * delta * delta
            x[name] = x[name] + 0.05 * m[name] / (np.sqrt(v[name]) + 0.01)
        state, memory = server_step(spec, state, mean, memory)
        for name, tensor in state.tensors().items():
            np.testing.assert_allclose(tensor.numpy(), x[name], rtol=1e-12)


def test_fedavgm_without_momentum_at_rate_one_is_plain_averaging():
    spec = _spec(server_optimizer="fedavgm", server_momentum=0.0)
    state, mean = _state(0), _state(1)
    after, _ = server_step(spec, state, mean, {})
    for ours, wanted in zip(after.tensors().values(), mean.tensors().values(), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("name", ["fedavgm", "nesterov", "fedadam"])
def test_rows_that_come_with_a_higher_rank_begin_as_the_mean_has_them(name):
    spec = _spec(server_optimizer=name, server_lr=0.5)
    state, memory = server_step(spec, _state(0), _state(1), {})
    mean = _state(2, rank=3)
    grown, memory = server_step(spec, state, mean, memory)
    torch.testing.assert_close(grown[KEY].A[2], mean[KEY].A[2])
    assert all(tensor.shape in ((3, 4), (3, 3)) for tensor in memory.values())
    smaller, _ = server_step(spec, grown, _state(3, rank=2), memory)
    assert smaller.ranks() == {0: 2}
