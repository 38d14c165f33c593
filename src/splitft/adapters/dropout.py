"""Draw the dropout of LoRA's input: numbers of x that one layer's factors do not see in one training step.

    x (B, T, in) --- frozen W ------------------> y
         |--- times mask / (1 - p) --- A, B ------^        a mask for each layer, as in peft

A mask is a hash of the place of each number: run seed, client, step, micro-batch, block and target fix the
words of the hash, sequence, token and column the number. So it is the same on every device, at every cut,
whoever shares the batch, when a block is computed again in the backward pass, and after a resume. A step in
micro-batches draws for each of them, and differs from the whole batch in that.

The hash adds a mixed word of the row to one of the column, and mixes the sum (multiply, xor with its upper
bits, multiply); the words are mixed by Wellons' 32-bit hash, https://nullprogram.com/blog/2018/07/31/.
Dropout: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html.

Shapes: B sequences, T tokens of the longest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splitft.adapters.state import Key

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
"""Multipliers of the hash, as signed 32-bit numbers."""


@dataclass(frozen=True)
class DropoutRows:
    """The rows of one client's micro-batch, and what fixes their masks."""

    p: float
    """Share of the numbers that are left out."""
    seed: int
    """Seed of the run."""
    client: str
    step: int
    """Step of the client over the whole run."""
    micro_batch: int
    sequences: int
    """B."""
    tokens: int
    """T of the client's own batch, without the padding of a group."""

    def left_out(self, key: Key, width: int, device: torch.device) -> torch.Tensor:
        """Return the numbers (B, T, width) that a layer's factors do not see, as a mask."""
        words = f"{self.seed}/{self.client}/{self.step}/{self.micro_batch}/{key[0]}/{key[1]}"
        digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
        row, column = (int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4))
        rows = _mixed(self.sequences * self.tokens, row, device)
        mixed = rows[:, None] + _mixed(width, column, device)
        mixed.mul_(_FIRST)
        mixed.bitwise_xor_(_shifted(mixed, 15)).mul_(_SECOND)
        below = mixed < min(round(self.p * 2**32), 2**32 - 1) - 2**31
        return below.view(self.sequences, self.tokens, width)


def dropped(x: torch.Tensor, rows: Sequence[DropoutRows], key: Key) -> torch.Tensor:
    """Return x (B, T, in) or (B T, in) as the factors of a layer see it; `rows` are in the order of x."""
    sequences = sum(one.sequences for one in rows)
    width = x.shape[-1]
    tokens = x.numel() // (width * sequences)  # of the longest of all clients in the batch
    masks = [one.left_out(key, width, x.device) for one in rows]
    if any(one.tokens < tokens for one in rows):  # padding, which changes nothing
        masks = [
            torch.nn.functional.pad(mask, (0, 0, 0, tokens - one.tokens))
            for one, mask in zip(rows, masks, strict=True)
        ]
    mask = masks[0] if len(masks) == 1 else torch.cat(masks)
    return x.masked_fill(mask.view_as(x), 0.0) * (1 / (1 - rows[0].p))


def _mixed(count: int, word: int, device: torch.device) -> torch.Tensor:
    """Return a 32-bit hash (count,) of 0, 1, ... with a word."""
    mixed = torch.arange(count, dtype=torch.int64, device=device).add_(word).to(torch.int32)
    mixed.bitwise_xor_(_shifted(mixed, 16)).mul_(_FIRST)
    mixed.bitwise_xor_(_shifted(mixed, 15)).mul_(_SECOND)
    return mixed.bitwise_xor_(_shifted(mixed, 16))


def _shifted(mixed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return 32-bit numbers shifted to the right, without their signs."""
    return (mixed >> bits).bitwise_and_((1 << (32 - bits)) - 1)
