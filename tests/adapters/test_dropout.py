"""Masks of dropout: their share, their independence, and the words that fix them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from splitft.adapters import AdapterState, Factors, attach
from splitft.adapters import lora as lora_module
from splitft.adapters.dropout import DropoutRows, dropped

CPU = torch.device("cpu")
ROWS = DropoutRows(0.25, seed=3, client="site-1", step=7, micro_batch=0, sequences=8, tokens=64)
KEY = (2, "self_attn.q_proj")
WIDTH = 96


def _standardised(rows: DropoutRows, key=KEY) -> torch.Tensor:
    """Left-out numbers as mean 0 and variance 1."""
    mask = rows.left_out(key, WIDTH, CPU).double().view(-1, WIDTH)
    return (mask - rows.p) / math.sqrt(rows.p * (1 - rows.p))


@pytest.mark.parametrize("p", [0.05, 0.25, 0.5, 0.9])
def test_masks_leave_out_their_share_and_are_as_a_matrix_of_chance(p):
    z = _standardised(replace(ROWS, p=p))
    assert abs(float(z.mean())) * math.sqrt(z.numel()) < 4
    assert float(z.mean(0).abs().max()) * math.sqrt(len(z)) < 4.5
    assert float(z.mean(1).abs().max()) * math.sqrt(WIDTH) < 5
    # the largest singular value of a matrix of independent numbers: Bai and Yin 1993
    assert float(torch.linalg.matrix_norm(z, 2)) < 1.15 * (math.sqrt(len(z)) + math.sqrt(WIDTH))


@pytest.mark.parametrize(
    "other",
    [
        (replace(ROWS, seed=4), KEY),
        (replace(ROWS, client="site-2"), KEY),
        (replace(ROWS, step=8), KEY),
        (replace(ROWS, micro_batch=1), KEY),
        (ROWS, (3, "self_attn.q_proj")),
        (ROWS, (2, "self_attn.k_proj")),
    ],
    ids=str,
)
def test_each_client_step_micro_batch_and_layer_draws_its_own(other):
    rows, key = other
    one, two = _standardised(ROWS), _standardised(rows, key)
    assert abs(float((one * two).mean())) * math.sqrt(one.numel()) < 4
    assert torch.equal(one, _standardised(ROWS))  # a second pass draws the same


def test_rows_of_a_padded_group_have_the_masks_that_they_have_alone():
    short = replace(ROWS, client="site-2", sequences=2, tokens=5)
    x = torch.ones(10, 64, WIDTH)
    both = dropped(x, [ROWS, short], KEY)
    assert torch.equal(both[:8], dropped(x[:8], [ROWS], KEY))
    assert torch.equal(both[8:, :5], dropped(x[8:, :5], [short], KEY))
    assert torch.equal(dropped(x.view(-1, WIDTH), [ROWS, short], KEY), both.view(-1, WIDTH))
    assert float(both[:8].unique().max()) == pytest.approx(1 / 0.75)


def test_without_dropout_nothing_is_drawn(monkeypatch):
    monkeypatch.setattr(lora_module, "dropped", lambda *args: pytest.fail("drawn"))
    block = nn.ModuleDict({"proj": nn.Linear(4, 3)})
    bank = attach([block], ["proj"], 1.0, torch.float32)
    bank.put("a", AdapterState({(0, "proj"): Factors(torch.ones(2, 4), torch.ones(3, 2))}))
    with bank.routed([("a", 2)]):
        block["proj"](torch.ones(2, 5, 4))


def test_the_schedule_foresees_what_layers_keep_for_their_backward_pass():
    layers = ("q_proj", "k_proj", "v_proj")
    block = nn.ModuleDict({name: nn.Linear(WIDTH, 8, bias=False).requires_grad_(False) for name in layers})
    bank = attach([block], layers, 1.0, torch.float32)
    bank.put("a", AdapterState({(0, one): Factors(torch.ones(2, WIDTH), torch.ones(8, 2)) for one in layers}))
    x = torch.ones(8, 64, WIDTH, requires_grad=True)

    def kept(rows: list[DropoutRows]) -> int:
        found: dict[int, int] = {}

        def see(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if tensor.shape[-1] == WIDTH and tensor.numel() > 2 * WIDTH:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        held = []
        with bank.routed([("a", 8)], rows), torch.autograd.graph.saved_tensors_hooks(see, lambda one: one):
            held = [block[name](x) for name in layers]
        del held
        return sum(found.values())

    inputs = 3 * WIDTH  # of the layers; `run.fleet` adds the input and a mask of one byte a number
    foreseen = (inputs + -(-inputs // 4)) * 4 * 8 * 64
    assert kept([ROWS]) - kept([]) + x.nbytes == foreseen  # x itself is not kept any more


def test_what_is_folded_into_the_base_sees_the_whole_input():
    block = nn.ModuleDict({"proj": nn.Linear(WIDTH, 3, bias=False).requires_grad_(False)})
    bank = attach([block], ["proj"], 1.0, torch.float32)
    factors = AdapterState({(0, "proj"): Factors(torch.randn(2, WIDTH), torch.zeros(3, 2))})
    folded = AdapterState({(0, "proj"): Factors(torch.randn(2, WIDTH), torch.randn(3, 2))})
    bank.put("a", factors, folded=folded)
    x = torch.randn(8, 64, WIDTH)
    with bank.routed([("a", 8)]):
        whole = block["proj"](x)
    with bank.routed([("a", 8)], [ROWS]):
        assert torch.equal(block["proj"](x), whole)
