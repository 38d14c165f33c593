"""The fake devices behave as real ones do where our code can tell: operands, copies, gradients, waits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accelerator import FIRST, SECOND, enabled

CPU = torch.device("cpu")


def test_they_are_there_only_while_a_test_has_them():
    assert not torch.accelerator.is_available()
    with enabled():
        assert torch.accelerator.is_available()
        assert torch.accelerator.device_count() == 2
    assert not torch.accelerator.is_available()


@pytest.mark.parametrize("other", [CPU, SECOND])
def test_an_operand_on_another_device_is_refused(fake_devices, other):
    x = torch.ones(2, 2).to(FIRST)
    with pytest.raises(RuntimeError, match="same device"):
        x @ torch.ones(2, 2).to(other)
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([x, torch.ones(2, 2).to(other)])
    with pytest.raises(RuntimeError, match="same device"):
        x.add_(torch.ones(2, 2).to(other))
    assert (x * torch.tensor(2.0)).device == FIRST  # a number of no dimension is no operand


def test_gradients_are_those_of_the_cpu_and_go_back_the_way_that_the_numbers_came(fake_devices):
    one, other = torch.randn(4, 4), torch.randn(4, 4)

    def gradients(first: torch.device, second: torch.device):
        a, b = nn.Parameter(one.to(first)), nn.Parameter(other.to(second))
        hidden = (torch.ones(2, 4).to(first) @ a).relu()
        (hidden.to(second) @ b).square().sum().backward()
        return a.grad, b.grad

    wanted, found = gradients(CPU, CPU), gradients(FIRST, SECOND)
    assert [x.device for x in found] == [FIRST, SECOND]
    for x, y in zip(wanted, found, strict=True):
        torch.testing.assert_close(x, y.cpu(), rtol=0, atol=0)
    assert fake_devices.copies == {"to": 3, "across": 2, "from": 2}


def test_a_copy_on_the_device_is_a_copy_and_the_same_tensor_is_not_copied(fake_devices):
    x = torch.ones(3).to(FIRST)
    assert x.to(FIRST) is x
    copied = x.to(FIRST, copy=True)
    copied.add_(1)
    assert x.cpu().tolist() == [1, 1, 1]
    assert x.to(SECOND).to(FIRST).cpu().tolist() == [1, 1, 1]
    assert fake_devices.copies == {"to": 1, "across": 2, "from": 2}


def test_reading_a_number_is_a_wait(fake_devices):
    x = torch.ones(3).to(FIRST)
    assert float(x.sum()) == 3
    assert bool((x == 1).all())
    assert fake_devices.waits == 2


@pytest.mark.parametrize("device", [FIRST, SECOND])
def test_a_fused_optimizer_steps_parameters_where_they_are(fake_devices, device):
    parameters = [nn.Parameter(torch.ones(2).to(where)) for where in (CPU, device)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
        torch.optim.AdamW([parameter], lr=0.1, fused=True).step()
    assert torch.equal(parameters[0], parameters[1].detach().cpu())
