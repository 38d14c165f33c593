"""Clients whose factors and moments take turns on an accelerator: the same numbers, within a budget."""

from __future__ import annotations

import pytest
import torch

from accelerator import FIRST
from laws.federations import federation, play, write_text
from splitft.model import CPU
from splitft.protocol import RoundStart
from splitft.training import parking
from splitft.training.parking import Parking, parking_on

CUTS = [1, 2, 3]
ON_ONE = {"model": {"dtype": "float32"}, "devices": {"server": "acc:0", "clients": "acc:0"},
          "wire": {"hidden": "fp32", "gradient": "fp32", "adapter": "fp32"}}  # fmt: skip
SHORT = {"rounds": 2, "steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def moves(monkeypatch):
    """The clients that were parked, in order."""
    parked, park = [], parking._Trained.park
    monkeypatch.setattr(parking._Trained, "park", lambda one: parked.append(one.slot) or park(one))
    return parked


def _learnt(monkeypatch, folder, text, memory: float, **sections):
    monkeypatch.setattr(parking, "device_memory", lambda device: memory)
    return play(federation(folder, text, CUTS, **sections))[0]


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {**SHORT, "optimizer_state": "keep", "checkpoint_blocks": True}},
        {"training": {**SHORT, "micro_batches": 2}, "lora": {"scaling": "rslora", "rank_at_cut": 2},
         "aggregate": {"rule": "svd"}},
        {"training": {**SHORT, "optimizer": "sgd"}, "lora": {"method": "dora"}, "split": {"group_tokens": 1}},
        {"training": SHORT, "clients": {"cuts": "whole"}},
    ],
    ids=str,
)  # fmt: skip
def test_parking_changes_no_number(tiny_llama, text, monkeypatch, moves, sections):
    """On the CPU, as if it had little memory: factors and optimizers are exchanged as on an accelerator."""
    roomy = _learnt(monkeypatch, tiny_llama, text, 1e12, **sections)
    assert not moves
    tight = _learnt(monkeypatch, tiny_llama, text, 1.0, **sections)
    assert len(moves) > 8
    for name, tensor in roomy.adapters.tensors().items():
        assert torch.equal(tight.adapters.tensors()[name], tensor), name
    assert tight.losses == roomy.losses


def _server(folder, text, budget_bytes: float):
    prepared = federation(folder, text, CUTS, **{**ON_ONE, "training": SHORT})
    server, clients, state = prepared.server, {one.name: one for one in prepared.clients}, prepared.initial()
    server.blocks.parking = Parking(budget_bytes)
    server.place(state.cuts)
    server.start(1, list(clients), state.adapters)
    for name, one in clients.items():
        one.start(RoundStart(round=1, cut=state.cuts[name]))
    return server, clients


def _devices_of(server, client: str) -> set[torch.device]:
    factors = server.blocks.bank.parameters(client).values()
    moments = [one for state in server.blocks._optimizers[client]._state.values() for one in state.values()]
    return {tensor.device for tensor in (*factors, *moments)}


def _step(server, clients, name: str) -> None:
    last = server.forward([clients[name].forward()])[name]
    clients[name].backward(server.backward([clients[name].head(last)])[name])


def test_the_longest_idle_are_parked_with_their_moments_and_come_back_to_work(tiny_llama, text, fake_devices):
    server, clients = _server(tiny_llama, text, 1e12)
    first, second, third = clients
    for name in clients:
        _step(server, clients, name)
    before = server.trained(first)[0].tensors()
    sizes = [one.nbytes for one in server.blocks.parking._clients.values()]
    server.blocks.parking.budget_bytes = sizes[1] + sizes[2]
    _step(server, clients, third)
    assert server.blocks.parking.parked == [first]
    assert _devices_of(server, first) == {CPU}
    assert _devices_of(server, second) == _devices_of(server, third) == {FIRST}
    for name, tensor in server.trained(first)[0].tensors().items():  # also from the host
        assert torch.equal(tensor, before[name])
    _step(server, clients, first)
    assert _devices_of(server, first) == {FIRST}
    assert server.blocks.parking.parked == [second, third]


def test_a_client_in_the_middle_of_a_step_is_never_parked(tiny_llama, text, fake_devices):
    server, clients = _server(tiny_llama, text, 1.0)
    first, second, *_ = clients
    last = server.forward([clients[first].forward()])[first]
    _step(server, clients, second)
    assert _devices_of(server, first) == {FIRST}
    assert first not in server.blocks.parking.parked
    clients[first].backward(server.backward([clients[first].head(last)])[first])
    _step(server, clients, second)
    assert first in server.blocks.parking.parked


def test_on_the_host_nothing_is_parked():
    assert parking_on([CPU]).budget_bytes == float("inf")
    assert parking_on([CPU, CPU]).budget_bytes == float("inf")
