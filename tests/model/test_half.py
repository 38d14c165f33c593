"""Training in float16 has the gradients of float32, however small, and finite losses at any size."""

from __future__ import annotations

import pytest
import torch

import splitft
from laws.federations import write_text
from runs import settings
from splitft.adapters import attach, initial_state
from splitft.config import from_mapping
from splitft.geometry import Span
from splitft.model import checkpoint_blocks, loss_and_gradient, open_model
from splitft.specs import LoraSpec, ModelSpec
from splitft.training.ranks import RankPolicy
from tiny import tiny_model

SPAN = Span(0, 4)
TOKENS = torch.randint(1, 250, (4, 12), generator=torch.Generator().manual_seed(1))
OWNERS = {"one": [("a", 4)], "equal": [("a", 2), ("b", 2)], "unequal": [("a", 1), ("b", 3)]}


def _gradients(folder, dtype, rows, scale=1.0, checkpointed=False):
    """Gradients of the factors at an output gradient of this size, and that of the entering hidden states."""
    model = open_model(ModelSpec(name=str(folder), dtype=dtype))
    segment = model.segment(SPAN, embedding=True)
    bank = attach(segment.blocks, "attention", 2.0, model.dtype)
    if checkpointed:
        checkpoint_blocks(segment.blocks, bank.recorded)
    ranks = RankPolicy(LoraSpec(rank=4, rank_at_cut=None), 4, "svd", 0)
    state = initial_state(bank.sizes, ranks.initial(), 0, torch.float32)
    state = type(state)({key: type(one)(one.A, torch.ones_like(one.B) * 0.02) for key, one in state.items()})
    for slot, _ in rows:
        bank.put(slot, state)
    x = segment.run(TOKENS, Span(0, 0)).detach().requires_grad_()
    with torch.enable_grad(), bank.routed(rows):
        hidden = segment.run(x, SPAN)
    assert hidden.dtype == x.dtype == model.hidden_dtype
    wanted = torch.linspace(-1, 1, hidden.numel()).view_as(hidden).to(hidden.dtype)
    torch.autograd.backward([hidden], [wanted * scale])
    found = [parameter.grad for slot, _ in rows for parameter in bank.parameters(slot).values()]
    return [one.double() / scale for one in (*found, x.grad)]


def _error(found, expected) -> float:
    return max(float((one - two).norm() / two.norm()) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6], ids="size {:.0e}".format)
@pytest.mark.parametrize("rows", OWNERS.values(), ids=OWNERS)
def test_gradients_in_float16_are_those_of_float32_whatever_their_size(tiny_llama, rows, scale):
    expected = _gradients(tiny_llama, "float32", rows)
    assert _error(_gradients(tiny_llama, "float16", rows, scale), expected) < 0.01


def test_blocks_that_are_computed_again_have_the_same_gradients(tiny_llama):
    rows = OWNERS["equal"]
    kept, again = (_gradients(tiny_llama, "float16", rows, 1e-9, checkpointed=c) for c in (False, True))
    assert all(torch.equal(one, two) for one, two in zip(kept, again, strict=True))


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    """A model whose hidden states leave the range of float16: some channels of its embedding are huge."""
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path_factory.mktemp("outliers"), "llama")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    tensors[name][:, 3] = -6e4
    for name in tensors:
        if name.endswith("down_proj.weight"):
            tensors[name][3] = 2e4  # each block adds to that channel
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_hidden_states_beyond_the_range_leave_loss_and_gradients_finite(outliers):
    wide = open_model(ModelSpec(name=str(outliers), dtype="float32")).segment(SPAN, embedding=True, head=True)
    assert float(wide.run(TOKENS).abs().max()) > 65504
    gradients = _gradients(outliers, "float16", OWNERS["one"])
    assert all(bool(one.isfinite().all()) for one in gradients)
    segment = open_model(ModelSpec(name=str(outliers), dtype="float16")).segment(
        SPAN, embedding=True, head=True
    )
    last = segment.run(TOKENS).flatten(0, 1)
    loss, gradient = loss_and_gradient(segment, last, TOKENS.flatten())
    exact, _ = loss_and_gradient(wide, wide.run(TOKENS).flatten(0, 1), TOKENS.flatten())
    assert loss == pytest.approx(exact, rel=0.2)
    assert bool(gradient.isfinite().all())


def test_the_gradient_of_a_mean_loss_does_not_vanish(tiny_llama):
    """Of 4,096 labelled positions each has a gradient near the least number of float16, or below it."""
    hidden = torch.randn(4096, 32, generator=torch.Generator().manual_seed(2))
    targets = torch.randint(1, 250, (4096,), generator=torch.Generator().manual_seed(3))
    narrow, wide = (
        loss_and_gradient(
            open_model(ModelSpec(name=str(tiny_llama), dtype=dtype)).segment(Span(0, 0), head=True),
            hidden,
            targets,
        )
        for dtype in ("float16", "float32")
    )
    assert narrow[0] == pytest.approx(wide[0], rel=1e-3)
    assert _error([narrow[1]], [wide[1]]) < 0.01


@pytest.mark.parametrize("labels", ["client", "server"])
def test_a_run_in_float16_learns_what_it_learns_in_float32(tiny_llama, tmp_path, labels):
    text = write_text(tmp_path / "notes.jsonl")
    losses = {}
    for dtype in ("float16", "float32"):
        sections = {"model": {"dtype": dtype}, "split": {"labels": labels}, "training": {"rounds": 2}}
        config = from_mapping(settings(tiny_llama, text, **sections))
        losses[dtype] = splitft.train(config, tmp_path / dtype).summary["eval_loss"]
    assert losses["float16"] == pytest.approx(losses["float32"], rel=5e-3)
    assert losses["float16"][-1] < losses["float16"][0]
