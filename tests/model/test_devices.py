"""The devices that a run takes, and segments on them."""

from __future__ import annotations

import pytest
import torch

from accelerator import FIRST, SECOND
from splitft.errors import ConfigError
from splitft.geometry import Span
from splitft.model import open_model
from splitft.model.devices import (
    CPU,
    RunDevices,
    available_devices,
    device_memory,
    divide_blocks,
    find_device,
    take_devices,
)
from splitft.specs import DevicesSpec, ModelSpec


def test_auto_is_the_cpu_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert available_devices() == (CPU,)
    assert take_devices(DevicesSpec()) == RunDevices((CPU,), (CPU,))


def test_auto_is_the_first_accelerator(fake_devices):
    assert available_devices() == (FIRST, SECOND, CPU)
    assert take_devices(DevicesSpec()) == RunDevices((FIRST,), (FIRST,))
    assert find_device("acc", "devices.server") == FIRST
    assert find_device("acc:1", "devices.server") == SECOND
    assert find_device("cpu", "devices.server") == CPU


@pytest.mark.parametrize("name", ["acc:2", "xpu", "nonsense"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(fake_devices, name):
    with pytest.raises(
        ConfigError, match=rf"^devices.clients\[1\]: found '{name}'; .* acc:0, acc:1, cpu here"
    ):
        take_devices(DevicesSpec(clients=("cpu", name)))


def test_a_list_is_dealt_to_the_clients_in_turn_and_is_said(fake_devices):
    devices = take_devices(DevicesSpec(server=("acc:0", "acc:1"), clients=("cpu", "acc:1")))
    assert [devices.of_client(index) for index in range(3)] == [CPU, SECOND, CPU]
    assert str(devices) == "server on acc:0 and acc:1, clients on cpu and acc:1"
    assert str(RunDevices((CPU,), (CPU,))) == "all on cpu"


def test_blocks_are_divided_in_contiguous_ranges_of_about_equal_length():
    for count in range(1, 9):
        for parts in range(1, 4):
            devices = [torch.device("cuda", index) for index in range(parts)]
            places = list(divide_blocks(Span(3, 3 + count), devices).values())
            sizes = [places.count(device) for device in devices]
            assert places == sorted(places, key=devices.index)
            assert sum(sizes) == count
            assert max(sizes) - min(sizes) <= 1


def test_a_device_that_does_not_say_its_memory_has_none_of_its_own(fake_devices):
    assert device_memory(CPU) is None
    assert device_memory(FIRST) is None


@pytest.mark.parametrize("devices", [(FIRST,), (FIRST, SECOND)], ids=["one", "two"])
def test_blocks_on_devices_compute_what_they_compute_on_the_cpu(tiny_folders, family, devices, fake_devices):
    model = open_model(ModelSpec(name=str(tiny_folders[family]), dtype="float32"))
    span, x = Span(1, 4), torch.randn(2, 9, model.shape.width, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, place in {"cpu": (CPU,), "devices": devices}.items():
        segment = model.segment(span, head=True, device=place)
        leaf = x.detach().to(segment.device_of(1), copy=True).requires_grad_()
        hidden = segment.run(leaf)
        assert hidden.device == place[-1]
        logits = segment.logits(hidden[0])
        logits.sum().backward()
        found[name] = [tensor.detach().cpu() for tensor in (hidden, logits, leaf.grad)]
    for wanted, got in zip(*found.values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_client_s_embedding_blocks_and_head_are_on_its_device(tiny_folders, family, fake_devices):
    model = open_model(ModelSpec(name=str(tiny_folders[family]), dtype="float32"))
    tokens = torch.arange(12).view(2, 6) % model.shape.vocab
    logits = []
    for device in (CPU, SECOND):
        segment = model.segment(Span(0, 2), embedding=True, head=True, device=device)
        logits.append(segment.logits(segment.run(tokens)[0]).detach())
    assert logits[1].device == SECOND
    torch.testing.assert_close(logits[1].cpu(), logits[0], rtol=1e-5, atol=1e-5)


def test_a_span_that_moves_divides_its_blocks_anew(tiny_llama, fake_devices):
    model = open_model(ModelSpec(name=str(tiny_llama), dtype="float32"))
    segment = model.segment(Span(0, 4), device=(FIRST, SECOND))
    assert [segment.device_of(block) for block in range(4)] == [FIRST, FIRST, SECOND, SECOND]
    segment.resize(Span(2, 4))
    assert [segment.device_of(block) for block in range(2, 4)] == [FIRST, SECOND]
    x = torch.randn(1, 5, model.shape.width)
    expected = model.segment(Span(2, 4)).run(x)
    torch.testing.assert_close(segment.run(x).cpu(), expected, rtol=1e-5, atol=1e-5)
    held = {p.device for block in segment.blocks[:2] for p in block.parameters()}
    assert held == {torch.device("meta")}
