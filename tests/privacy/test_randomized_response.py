"""Randomised labels: how often each comes, what that promises, and what an attacker makes of it."""

from __future__ import annotations

import math

import pytest
import torch

from splitft.audit.attacks.labels import GradientObservationModel, read_head_gradient
from splitft.geometry import Span
from splitft.model import loss_and_gradient, open_model
from splitft.privacy.randomized_response import keep_probability, likeliest_labels, randomize_labels
from splitft.specs import ModelSpec

DRAWS = 40_000
PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])


def told(label: int, epsilon: float) -> torch.Tensor:
    """Shares of each token told in many draws for one label."""
    labels = torch.full((DRAWS,), label)
    logits = PRIOR.log().expand(DRAWS, -1)
    drawn = randomize_labels(logits, labels, epsilon, torch.Generator().manual_seed(label))
    return torch.bincount(drawn, minlength=5) / DRAWS


@pytest.mark.parametrize("epsilon", [0.5, 1.5, 3.0])
def test_no_answer_is_more_than_e_to_the_epsilon_likelier_for_one_label_than_for_another(epsilon):
    shares = torch.stack([told(label, epsilon) for label in range(5)])  # (label, answer)
    error = 5 / math.sqrt(DRAWS)
    least, most = shares.min(0).values, shares.max(0).values
    assert bool((most <= math.exp(epsilon) * (least + error) + error).all())


def test_the_set_of_answers_is_the_one_that_keeps_most_labels():
    epsilon = 1.5
    by_size = [float(keep_probability(epsilon, torch.tensor(k)) * PRIOR[:k].sum()) for k in range(1, 6)]
    best = 1 + by_size.index(max(by_size))
    assert best == 3
    answers = told(0, epsilon)
    assert int((answers > 0).sum()) == best
    assert float(answers[0]) == pytest.approx(float(keep_probability(epsilon, torch.tensor(best))), abs=0.01)
    others = answers[1:3]
    assert float(others[0]) == pytest.approx(float(others[1]), abs=0.01)


def test_a_label_that_the_model_does_not_expect_is_never_told():
    answers = told(4, 1.5)
    assert torch.allclose(answers[:3], torch.full((3,), 1 / 3), atol=0.01)
    assert float(answers[3:].sum()) == 0


def test_with_a_large_epsilon_labels_are_told_as_they_are():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 40, generator=generator)
    labels = torch.randint(40, (500,), generator=generator)
    assert torch.equal(randomize_labels(logits, labels, 60.0, generator), labels)


def test_bayes_rule_reads_more_than_what_was_told_or_the_guess_alone():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 30, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    answers = randomize_labels(logits, labels, 1.0, generator)
    right = [float((one == labels).float().mean()) for one in (answers, logits.argmax(-1))]
    assert float((likeliest_labels(logits, answers, 1.0) == labels).float().mean()) >= max(right) - 0.005


def test_the_gradient_gives_away_what_was_told_and_no_more(tiny_folders):
    head = open_model(ModelSpec(name=str(tiny_folders["llama"]), dtype="float32")).segment(
        Span(0, 0), embedding=True, head=True
    )
    generator = torch.Generator().manual_seed(0)
    last = 3 * torch.randn(200, 32, generator=generator)
    labels = torch.randint(272, (200,), generator=generator)
    with torch.no_grad():
        logits = head.logits(last)
    answers = randomize_labels(logits, labels, 2.0, generator)
    gradient = loss_and_gradient(head, last, answers)[1]
    assert torch.equal(read_head_gradient(head, last, gradient), answers)
    read = read_head_gradient(head, last, gradient, GradientObservationModel(epsilon=2.0))
    assert torch.equal(read, likeliest_labels(logits, answers, 2.0))
