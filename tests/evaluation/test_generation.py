"""Prompts continued together are continued as each would be alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from splitft.evaluation.generation import continue_all

FAMILIES = ("llama", "gpt2", "opt", "gemma2", "gpt_neox")


@pytest.mark.parametrize("family", FAMILIES)
def test_together_is_as_one_by_one(tiny_folders, family):
    model = AutoModelForCausalLM.from_pretrained(tiny_folders[family], dtype=torch.float32).eval()
    generator = np.random.default_rng(0)
    prompts = [tuple(generator.integers(1, 257, length).tolist()) for length in (3, 11, 1, 7, 7, 2)]
    done = []
    options = {"end": None, "max_new_tokens": 8, "advance": done.append}
    together = continue_all(model, prompts, batch_size=4, **options)
    alone = [continue_all(model, [prompt], batch_size=1, **options)[0] for prompt in prompts]
    assert together == alone
    assert all(len(one) == 8 for one in together)
    assert done[:2] == [4, 2]
    # and as a plain loop without cache, mask or padding has it
    for prompt, said in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for _ in range(3):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert tuple(tokens[len(prompt) :]) == said[:3]


def test_a_continuation_ends_before_the_end_token(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    prompts = [(5, 80, 90, 7), (9, 10)]
    free = continue_all(model, prompts, end=None, max_new_tokens=8, batch_size=2, advance=lambda count: None)
    end = free[0][3]
    stopped = continue_all(
        model, prompts, end=end, max_new_tokens=8, batch_size=2, advance=lambda count: None
    )
    for whole, part in zip(free, stopped, strict=True):
        assert part == (whole[: whole.index(end)] if end in whole else whole)
    assert len(stopped[0]) <= 3
