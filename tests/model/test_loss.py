"""The loss made in chunks against autograd through all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import splitft.geometry
from live_memory import LiveMemory
from splitft.geometry import HEAD_POSITIONS, Span, head_positions, logits_bytes
from splitft.model import (
    Segment,
    divergence,
    held_out_sums,
    loss_and_gradient,
    losses_and_gradients,
    open_model,
    sums_of_batches,
)
from splitft.specs import ModelSpec
from tiny import VOCAB, WIDTH, tiny_model

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
    monkeypatch.setattr(splitft.geometry, "HEAD_POSITIONS", chunk)
    head, (hidden, targets) = _head(tiny_folders[family]), _hidden()
    leaf = hidden.clone().requires_grad_()
    expected = functional.cross_entropy(head.logits(leaf), targets)
    expected.backward()
    loss, gradient = loss_and_gradient(head, hidden, targets)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-6)
    targets[::3] = head.logits(hidden).argmax(1)[::3]  # some that are right
    total, right = held_out_sums(head, hidden, targets)
    assert total == pytest.approx(
        float(functional.cross_entropy(head.logits(hidden), targets, reduction="sum").detach()), rel=1e-6
    )
    assert right == int((head.logits(hidden).argmax(1) == targets).sum()) >= 13


@pytest.mark.parametrize("chunk", [1, 10, 256])
def test_divergence_is_torchs_own_and_nothing_of_a_thing_from_itself(tiny_llama, chunk, monkeypatch):
    monkeypatch.setattr(splitft.geometry, "HEAD_POSITIONS", chunk)
    head, (hidden, _) = _head(tiny_llama), _hidden()
    other = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.manual_seed(4))
    one, two = (torch.distributions.Categorical(logits=head.logits(rows)) for rows in (hidden, other))
    expected = torch.distributions.kl_divergence(one, two).mean()
    assert divergence(head, hidden, other) == pytest.approx(float(expected), rel=1e-4)
    assert divergence(head, hidden, hidden) == pytest.approx(0, abs=1e-7)


def test_batches_of_several_clients_have_the_losses_and_gradients_of_each_alone(tiny_llama):
    head, batches = _head(tiny_llama), [_hidden(count) for count in (37, 0, 5)]
    together = losses_and_gradients(head, batches)
    sums = sums_of_batches(head, batches)
    for (loss, gradient), total, (hidden, targets) in zip(together, sums, batches, strict=True):
        alone = loss_and_gradient(head, hidden, targets)
        assert loss == alone[0]
        assert torch.equal(gradient, alone[1])
        assert total == held_out_sums(head, hidden, targets)


def test_losses_are_read_from_the_device_once_however_many_chunks_and_clients(tiny_llama, monkeypatch):
    monkeypatch.setattr(splitft.geometry, "HEAD_POSITIONS", 4)
    head, batches, lists = _head(tiny_llama), [_hidden(), _hidden(9)], []
    as_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda one: lists.append(one) or as_list(one))
    for run in (
        lambda: losses_and_gradients(head, batches),
        lambda: sums_of_batches(head, batches),
        lambda: divergence(head, batches[0][0], batches[0][0]),
    ):
        lists.clear()
        with LiveMemory() as memory:
            run()
        assert (len(lists), memory.synchronisations) == (1, 0)


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("bfloat16", 2)])
def test_the_head_needs_at_most_600_mb_with_a_vocabulary_of_128_thousand(tmp_path, dtype, bytes_each):
    head = _head(tiny_model(tmp_path, "qwen2", dtype, vocab=128_256), dtype)
    hidden = torch.randn(600, WIDTH).to(head.dtype)
    targets = torch.randint(128_256, (600,))
    with LiveMemory() as memory:
        loss_and_gradient(head, hidden, targets)
    positions = head_positions(128_256, bytes_each)
    assert memory.peak < 600e6
    assert memory.peak == pytest.approx(positions * logits_bytes(128_256, bytes_each), rel=0.03)


def test_positions_at_one_time_fit_the_budget_whatever_the_vocabulary():
    assert head_positions(49_152, 2) == HEAD_POSITIONS
    for vocab in (128_256, 262_144, 10**6):
        for bytes_each in (2, 4, 8):
            assert head_positions(vocab, bytes_each) * logits_bytes(vocab, bytes_each) <= 512e6
    assert head_positions(10**9, 4) == 1


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
    monkeypatch.setattr(splitft.geometry, "HEAD_POSITIONS", 8)
    head, (hidden, targets) = _head(tiny_llama), _hidden()
    asked, logits = [], head.logits
    monkeypatch.setattr(head, "logits", lambda x: asked.append(len(x)) or logits(x))
    loss_and_gradient(head, hidden, targets)
    assert asked == [8, 8, 8, 8, 5]


def test_without_labelled_positions_the_loss_is_zero(tiny_llama):
    head, (hidden, targets) = _head(tiny_llama), _hidden(0)
    loss, gradient = loss_and_gradient(head, hidden, targets)
    assert (loss, gradient.shape) == (0.0, (0, WIDTH))
    assert held_out_sums(head, hidden, targets) == (0.0, 0)
