"""The attacker's own copy of the public model, with the global adapters.

    tokens (R, 1) after a cache's prefixes --blocks 0..k-1--> hidden at the cut (R, 1, D)
                                           --all blocks, head--> log-probabilities of the next token (R, V)

A cache holds keys and values of R prefixes. To try C candidates after each prefix, the prefixes are copied C
times; only the chosen tokens are appended to the cache itself.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch

from splitft.adapters import AdapterState, attach
from splitft.geometry import Span
from splitft.model import Model

SLOT = "global"
FIRST = 0
"""Token before those of the table: an attention sink, which every real text has too."""
ROWS_AT_ONCE = 1024
"""Candidates whose keys and values are in memory at one time."""


class PublicModel:
    """The public model, run up to the cut as a client does, and as a whole language model."""

    def __init__(self, model: Model, cut: int, adapters: AdapterState, targets: Any, scale: float) -> None:
        self.model, self.cut, self.shape = model, cut, model.shape
        self.segment = model.segment(Span(0, model.shape.blocks), embedding=True, head=True)
        self._bank = attach(self.segment.blocks, targets, scale, model.dtype)
        self._bank.put(SLOT, adapters)
        self._slot = SLOT if adapters else None  # None runs the base model
        self._tables: dict[int, torch.Tensor] = {}  # by cut; shared with all copies that `at` makes

    def at(self, cut: int) -> PublicModel:
        """Return the same model with another cut."""
        other = copy.copy(self)
        other.cut = cut
        return other

    @cached_property
    def embedding(self) -> torch.Tensor:
        """Input of block 0 for each token as the first of a text, (V, D) in float32."""
        every = torch.arange(self.shape.vocab)[:, None]
        return self.hidden(every, cut=0)[:, 0].float()

    @torch.no_grad()
    def hidden(self, tokens: torch.Tensor, cut: int | None = None) -> torch.Tensor:
        """Run whole sequences (B, T) through the blocks before the cut -> (B, T, D)."""
        with self._bank.routed([(self._slot, len(tokens))]):
            return self.segment.run(tokens, Span(0, self.cut if cut is None else cut))

    @property
    def table(self) -> torch.Tensor:
        """Hidden state at the cut of every token as the second of a text, (V, D).

        It is computed from the table of the deepest cut before, so that no block runs all V tokens twice.
        """
        if self.cut not in self._tables:
            cache, first = self.new_cache(), torch.tensor([[FIRST]])
            with torch.no_grad(), self._bank.routed([(self._slot, 1)]):
                self.segment.run(first, Span(0, self.cut), cache)
            before = max((cut for cut in self._tables if cut < self.cut), default=0)
            tokens = torch.arange(self.shape.vocab)
            entering = self._tables[before].to(self.model.hidden_dtype) if before else tokens
            owners = torch.zeros_like(tokens)
            self._tables[self.cut] = self._alone(entering[:, None], owners, cache, before)
        return self._tables[self.cut]

    def from_cut(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the server's blocks, differentiably: (B, T, D) at the cut -> (B, T, D) after the last block."""
        with self._bank.routed([(self._slot, len(hidden))]):
            return self.segment.run(hidden, Span(self.cut, self.shape.blocks))

    def new_cache(self) -> Any:
        """Return a cache of empty prefixes."""
        from transformers import DynamicCache

        return DynamicCache()

    def base_hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run sequences as `hidden` does, without adapters."""
        with torch.no_grad(), self._bank.routed([(None, len(tokens))]):
            return self.segment.run(tokens, Span(0, self.cut))

    @torch.no_grad()
    def append(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """Append one token (R,) to each prefix; return log-probabilities of the next token, (R, V)."""
        with self._bank.routed([(self._slot, len(tokens))]):
            last = self.segment.run(tokens[:, None], Span(0, self.shape.blocks), cache)
        return torch.log_softmax(self.segment.logits(last[:, 0]).float(), -1)

    @torch.no_grad()
    def hidden_of_candidates(self, candidates: torch.Tensor, cache: Any) -> torch.Tensor:
        """Return hidden states at the cut of candidates (R, C), each alone after its prefix, (R, C, D)."""
        rows, count = candidates.shape
        owners = torch.arange(rows).repeat_interleave(count)
        return self._alone(candidates.reshape(-1, 1), owners, cache).view(rows, count, -1)

    def hidden_twice(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states (B T, D) at the cut of texts (B, T), computed together and token by token."""
        cache, by_token = self.new_cache(), []
        for column in tokens.T:
            by_token.append(self.hidden_of_candidates(column[:, None], cache)[:, 0])
            with torch.no_grad(), self._bank.routed([(self._slot, len(column))]):
                self.segment.run(column[:, None], Span(0, self.cut), cache)
        return self.hidden(tokens).float().flatten(0, 1), torch.stack(by_token, 1).flatten(0, 1)

    @torch.no_grad()
    def _alone(
        self, entering: torch.Tensor, owners: torch.Tensor, cache: Any, start: int = 0
    ) -> torch.Tensor:
        """Return hidden states (N, D) at the cut, each row alone after the prefix that owns it.

        Tokens (N, 1) enter at block 0, hidden states (N, 1, D) at block `start`.
        """
        found = torch.empty(len(entering), self.shape.width, dtype=torch.float32)
        for part in torch.split(torch.arange(len(entering)), ROWS_AT_ONCE):
            copied = self._copied(cache, owners[part])
            with self._bank.routed([(self._slot, len(part))]):
                hidden = self.segment.run(entering[part], Span(start, self.cut), copied)
            found[part] = hidden[:, 0].float()
        return found

    def _copied(self, cache: Any, owners: torch.Tensor) -> Any:
        """Copy the keys and values of these prefixes in the blocks before the cut."""
        copy = self.new_cache()
        for block, layer in enumerate(cache.layers[: self.cut]):
            copy.update(layer.keys[owners], layer.values[owners], block)
        return copy
