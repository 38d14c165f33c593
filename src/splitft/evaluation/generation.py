"""Continue batches of prompts by greedy decoding.

    prompts --sorted by length, padded on the left--> model.generate --> continuations, in the prompts' order

    pad pad q0 q1 q2 | c0 c1 end pad        all prompts of a batch end at the same position
    q0  q1  q2 q3 q4 | c0 c1 c2  c3

Padding is masked, and transformers counts positions without it: a prompt is continued as it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.inference_mode()
def continue_all(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end: int | None,
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None],
) -> list[tuple[int, ...]]:
    """Return the tokens that the model generates after each prompt, up to and without the end-of-text token.

    Prompts are sequences of at least one token.
    """
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    continued: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        tokens, mask = _padded_left([prompts[place] for place in places], 0 if end is None else end)
        whole = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0 if end is None else end,
        )
        for place, row in zip(places, whole[:, tokens.shape[1] :].tolist(), strict=True):
            continued[place] = tuple(row[: row.index(end)] if end in row else row)
        advance(len(places))
    return [continued[place] for place in range(len(prompts))]


def _padded_left(prompts: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and mask (B, T), both int64."""
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask
