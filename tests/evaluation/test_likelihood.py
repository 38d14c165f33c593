"""Our loss is the loss that transformers itself reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from splitft.data.text import Example, eval_batches
from splitft.evaluation.likelihood import likelihood, windows


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_mean_loss_is_transformers_own(tiny_folders, family):
    model = AutoModelForCausalLM.from_pretrained(tiny_folders[family], dtype=torch.float32).eval()
    generator = np.random.default_rng(1)
    examples = [
        Example(tuple(generator.integers(1, 257, length).tolist()), labelled_from=first)
        for length, first in ((4, 1), (19, 1), (9, 5), (30, 12), (2, 1))
    ]
    total, right, count = 0.0, 0, 0
    for example in examples:
        tokens = torch.tensor([example.tokens])
        labels = tokens.clone()
        labels[:, : example.labelled_from] = -100
        with torch.no_grad():
            found = model(input_ids=tokens, labels=labels)
        loss = float(found.loss)
        right += int((found.logits.argmax(2)[:, :-1] == labels[:, 1:]).sum())
        total += loss * (len(example) - example.labelled_from)
        count += len(example) - example.labelled_from
    done = []
    ours = likelihood(model, eval_batches(examples, 5, 64), done.append)
    assert (ours.loss, ours.accuracy, ours.tokens) == (
        pytest.approx(total / count, rel=1e-5), right / count, count,
    )  # fmt: skip
    assert sum(done) == len(examples)


def test_windows_hold_every_token_once():
    parts = windows(range(10), 4)
    assert [part.tokens for part in parts] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [part.tokens for part in windows(range(9), 4)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
