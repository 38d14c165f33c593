"""A batch's exact mean loss gives its labels away: one for certain, several by trying."""

from __future__ import annotations

import math

import pytest
import torch

from splitft.audit.attacks import ATTACKS, Observation
from splitft.audit.attacks.mean_loss import COMBINATIONS, candidate_counts, read_mean_loss
from splitft.geometry import Span
from splitft.model import loss_and_gradient, open_model
from splitft.specs import ModelSpec

VOCAB = 272


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def head(request, tiny_folders):
    model = open_model(ModelSpec(name=str(tiny_folders[request.param]), dtype="float32"))
    return model.segment(Span(0, 0), embedding=True, head=True)


def batches(count: int, labels: int):
    generator = torch.Generator().manual_seed(labels)
    for _ in range(count):
        yield (
            3 * torch.randn(labels, 32, generator=generator),
            torch.randint(VOCAB, (labels,), generator=generator),
        )


def share_read(head, count: int, labels: int) -> float:
    right = 0
    for last, truth in batches(count, labels):
        loss, _ = loss_and_gradient(head, last, truth)
        right += int((read_mean_loss(head, last, loss) == truth).sum())
    return right / (count * labels)


def test_a_single_label_is_read_off_its_loss(head):
    assert share_read(head, 200, 1) == 1.0


def test_two_labels_are_read_off_their_mean_loss(head):
    assert share_read(head, 20, 2) > 0.9


def test_a_rounded_loss_is_not_enough(head):
    """The attack reads the digits of the loss, and nothing else tells it the label."""
    read = [
        int(read_mean_loss(head, last, round(loss_and_gradient(head, last, truth)[0], 0))) == int(truth)
        for last, truth in batches(50, 1)
    ]
    assert sum(read) / len(read) < 0.2


@pytest.mark.parametrize(("labels", "least"), [(5, 4), (60, 50)])
def test_of_many_labels_that_the_model_expects_it_reads_most(head, labels, least):
    """All labels are the likeliest but one; of 60, many combinations have the same sum to rounding."""
    for last, _ in batches(3, labels):
        truth = head.logits(last).argmax(-1)
        truth[labels // 2] = int(head.logits(last)[labels // 2].argsort(descending=True)[1])
        loss, _ = loss_and_gradient(head, last, truth)
        read = read_mean_loss(head, last, loss)
        assert read.shape == (labels,)
        assert int((read == truth).sum()) >= least


def test_a_loss_that_no_combination_has_gives_the_prediction(head):
    [(last, _)] = batches(1, 4)
    assert torch.equal(read_mean_loss(head, last, 1e4), head.logits(last).argmax(-1))


def test_candidates_are_the_likeliest_and_no_more_than_can_be_tried():
    sure, unsure = torch.arange(8.0) * 5, torch.arange(8.0)
    assert candidate_counts(torch.stack([sure, unsure]), 8) == [1, 8]
    assert candidate_counts(torch.stack([sure, unsure]), 64) == [8, 8]
    counts = candidate_counts(torch.rand(40, VOCAB).sort(-1).values, COMBINATIONS)
    assert COMBINATIONS / 4 < math.prod(counts) <= COMBINATIONS


def test_without_a_loss_the_attack_is_not_possible():
    rows = torch.zeros(1, 4)
    seen = Observation("a", 0, True, (2,), ((0, 1),), rows, last=rows, head_gradient=rows, mean_loss=1.0)
    without = Observation("a", 0, True, (2,), ((0, 1),), rows, last=rows, head_gradient=rows)
    assert ATTACKS["mean loss"].possible([seen])
    assert not ATTACKS["mean loss"].possible([seen, without])
    assert ATTACKS["head gradient"].possible([seen, without])
