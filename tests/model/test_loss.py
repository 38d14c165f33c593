"""The loss made in chunks against autograd through all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import splitft.model.loss
from splitft.geometry import Span
from splitft.model import Segment, divergence, loss_and_gradient, open_model, summed_loss
from splitft.specs import ModelSpec
from tiny import VOCAB, WIDTH

POSITIONS = 37


def _head(folder, dtype="float32") -> Segment:
    model = open_model(ModelSpec(name=str(folder), dtype=dtype))
    return model.segment(Span(4, 4), head=True)


def _hidden(count: int = POSITIONS, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.manual_seed(3)
    hidden = torch.randn(count, WIDTH, generator=generator).to(dtype)
    return hidden, torch.randint(VOCAB, (count,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 10, POSITIONS, 256])
def test_loss_and_gradient_are_those_of_autograd_whatever_the_chunk(tiny_folders, family, chunk, monkeypatch):
    monkeypatch.setattr(splitft.model.loss, "CHUNK", chunk)
    head, (hidden, targets) = _head(tiny_folders[family]), _hidden()
    leaf = hidden.clone().requires_grad_()
    expected = functional.cross_entropy(head.logits(leaf), targets)
    expected.backward()
    loss, gradient = loss_and_gradient(head, hidden, targets)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-6)
    assert summed_loss(head, hidden, targets) / POSITIONS == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 10, 256])
def test_divergence_is_torchs_own_and_nothing_of_a_thing_from_itself(tiny_llama, chunk, monkeypatch):
    monkeypatch.setattr(splitft.model.loss, "CHUNK", chunk)
    head, (hidden, _) = _head(tiny_llama), _hidden()
    other = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.manual_seed(4))
    one, two = (torch.distributions.Categorical(logits=head.logits(rows)) for rows in (hidden, other))
    expected = torch.distributions.kl_divergence(one, two).mean()
    assert divergence(head, hidden, other) == pytest.approx(float(expected), rel=1e-4)
    assert divergence(head, hidden, hidden) == pytest.approx(0, abs=1e-7)


def test_the_loss_of_a_text_is_the_one_transformers_gives(tiny_folders, family):
    tokens = torch.randint(VOCAB, (3, 12), generator=torch.manual_seed(0))
    labels = tokens.clone()
    labels[:, :4] = -100  # a prompt without loss
    whole = AutoModelForCausalLM.from_pretrained(tiny_folders[family]).eval()
    with torch.no_grad():
        expected = whole(tokens, labels=labels).loss.item()
        model = open_model(ModelSpec(name=str(tiny_folders[family]), dtype="float32"))
        segment = model.segment(Span(0, 4), embedding=True, head=True)
        hidden = segment.run(tokens)[:, 3:-1].flatten(0, 1)
    loss, _ = loss_and_gradient(segment, hidden, tokens[:, 4:].flatten())
    assert loss == pytest.approx(expected, rel=1e-6)


def test_neither_the_graph_nor_the_hidden_states_of_the_caller_are_touched(tiny_llama):
    head, (hidden, targets) = _head(tiny_llama), _hidden()
    leaf = hidden.requires_grad_()
    with torch.no_grad():  # also there a gradient is made
        _, gradient = loss_and_gradient(head, leaf * 1, targets)
    assert leaf.grad is None
    assert not gradient.requires_grad
    assert gradient.shape == hidden.shape


def test_a_bfloat16_loss_is_summed_in_float32(tiny_llama):
    """4,000 equal positions: a bfloat16 sum would stand still at a few hundred."""
    head, (hidden, targets) = _head(tiny_llama, "bfloat16"), _hidden(1, torch.bfloat16)
    one, gradient = loss_and_gradient(head, hidden, targets)
    many, gradients = loss_and_gradient(head, hidden.expand(4000, -1), targets.expand(4000))
    assert many == pytest.approx(one, rel=1e-3)
    assert gradients.dtype == gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradients[17] * 4000, gradient[0], rtol=0.02, atol=1e-4)


def test_no_more_logits_than_a_chunk_exist_at_a_time(tiny_llama, monkeypatch):
    monkeypatch.setattr(splitft.model.loss, "CHUNK", 8)
    head, (hidden, targets) = _head(tiny_llama), _hidden()
    asked, logits = [], head.logits
    monkeypatch.setattr(head, "logits", lambda x: asked.append(len(x)) or logits(x))
    loss_and_gradient(head, hidden, targets)
    assert asked == [8, 8, 8, 8, 5]


def test_without_labelled_positions_the_loss_is_zero(tiny_llama):
    head, (hidden, targets) = _head(tiny_llama), _hidden(0)
    loss, gradient = loss_and_gradient(head, hidden, targets)
    assert (loss, gradient.shape) == (0.0, (0, WIDTH))
    assert summed_loss(head, hidden, targets) == 0.0
