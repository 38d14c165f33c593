"""Activation checkpointing of blocks: keep a block's input, and compute the block again in the backward pass.

    forward     x (B, T, D) --[block b]--> y                        kept: x, instead of all that b computes
    backward    x --[block b, with what it keeps]--> gradient of x  kept: what one block keeps, one at a time

It costs another forward pass of each block, and changes no result: the same operations run on the same
numbers, so gradients are the same bit for bit. What a block reads beside its inputs, such as the owners of
the rows and their factors, must be what it was in the forward pass; the caller's `recorded` sees to it.

Chen et al. 2016, https://arxiv.org/abs/1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Recorded = Callable[[int], AbstractContextManager[None]]
"""Called in the forward pass with a block's index; returns the context of its second pass, which may be
entered several times."""


def checkpoint_blocks(blocks: Sequence[nn.Module], recorded: Recorded) -> None:
    """Let these blocks, of index 0, 1, ..., keep only their inputs for the backward pass."""
    for index, block in enumerate(blocks):
        block.forward = partial(_forward, block.forward, partial(recorded, index))


def _forward(
    forward: Callable[..., Any],
    recorded: Callable[[], AbstractContextManager[None]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        partial(forward, **kwargs),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # blocks are in evaluation mode and draw nothing
        context_fn=lambda: (nullcontext(), recorded()),
    )
