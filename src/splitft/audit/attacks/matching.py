"""Match: propose tokens from left to right, run them through the public blocks, keep what fits what was seen.

    prefix so far -> candidates of inverter and language model -> their hidden states at the cut
                  -> log-likelihood of what was seen + log p(candidate | prefix) -> the best prefixes go on

A causal model makes this possible: the hidden state of a position depends on nothing to its right, so a token
can be judged before the next one is known. Where the best candidate does not fit (`Channel.fits`), the
attacker looks further, in this order:

1. a screening of the whole vocabulary: `Replica.table` has every token's hidden state t_v in a context of no
   meaning. What this context adds, h_c - t_c, is much the same for all candidates c, so its mean over those
   already tried moves the table to where the tokens would be here, and the nearest are tried for true;
2. the whole vocabulary, for true.

What fits nowhere costs its prefix its place among the beams. Without noise only what the codec has rounded
away remains uncertain. Cf. BiSR's second stage (arXiv 2409.00960), which optimises embeddings by gradient
instead, and cannot tell when it is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from splitft.audit.attacks.channel import ObservationModel
from splitft.audit.attacks.replica import PublicModel


@dataclass(frozen=True)
class Effort:
    """How hard the attacker tries."""

    first: int = 48
    """Candidates tried for every position."""
    screened: tuple[int, ...] = (64, 256)
    """Candidates tried after each screening of the vocabulary."""
    whole: bool = False
    """Whether to fall back to the whole vocabulary."""
    beams: int = 4
    """Prefixes kept for each sequence."""
    margin: float = 30.0
    """A prefix that is this many nats less likely than the best one is given up."""


@dataclass
class _Row:
    """One prefix of one sequence."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    score: float = 0.0


@dataclass
class _Tried:
    """Candidates of one prefix that have been run, with their log-likelihoods."""

    tokens: list[torch.Tensor] = field(default_factory=list)
    misfits: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)


def match(
    sequences: Sequence[torch.Tensor],
    replica: PublicModel,
    guesses: Sequence[torch.Tensor],
    channel: ObservationModel,
    effort: Effort = Effort(),
) -> list[list[int]]:
    """Read tokens off hidden states (T_b, D) of several sequences; `guesses` are an inverter's (T_b, V)."""
    search = _Search([one.float() for one in sequences], replica, guesses, channel, effort)
    return search.run()


class _Search:
    def __init__(
        self,
        sequences: Sequence[torch.Tensor],
        replica: PublicModel,
        guesses: Sequence[torch.Tensor],
        channel: ObservationModel,
        effort: Effort,
    ) -> None:
        self._sequences, self._replica, self._guesses = sequences, replica, guesses
        self._channel, self._effort = channel, effort
        self._width = replica.shape.width

    @cached_property
    def _squares(self) -> torch.Tensor:
        return self._replica.table.square()

    def run(self) -> list[list[int]]:
        rows = [_Row(index) for index in range(len(self._sequences))]
        found: list[list[int]] = [[] for _ in rows]
        cache: Any = self._replica.new_cache()
        language = torch.zeros(len(rows), self._replica.shape.vocab)
        for place in range(max(map(len, self._sequences))):
            active = [i for i, row in enumerate(rows) if place < len(self._sequences[row.sequence])]
            if len(active) < len(rows):
                kept = torch.tensor(active)
                cache.batch_select_indices(kept)
                rows, language = [rows[i] for i in active], language[kept]
            grown, parents = self._grown(rows, place, cache, language)
            cache.batch_select_indices(parents)
            rows = grown
            language = self._replica.append(torch.tensor([row.tokens[-1] for row in rows]), cache)
            for row in reversed(rows):  # the best prefix of a sequence comes first
                if place == len(self._sequences[row.sequence]) - 1:
                    found[row.sequence] = row.tokens
        return found

    def _grown(
        self, rows: list[_Row], place: int, cache: Any, language: torch.Tensor
    ) -> tuple[list[_Row], torch.Tensor]:
        """Each sequence's best prefixes with one more token, and which row each comes from."""
        observed = torch.stack([self._sequences[row.sequence][place] for row in rows])
        guess = torch.stack([self._guesses[row.sequence][place] for row in rows])
        tried = self._searched(rows, observed, guess, language, cache)
        options: dict[int, list[tuple[float, int, int]]] = {}
        for index, (row, one) in enumerate(zip(rows, tried, strict=True)):
            tokens, misfits = torch.cat(one.tokens), torch.cat(one.misfits)
            likelihood = -misfits * self._width / 2
            scores = row.score + likelihood + language[index][tokens]
            best = scores.topk(min(self._effort.beams * 2, len(scores)))
            seen: set[int] = set()
            for score, at in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                token = int(tokens[at])
                if token not in seen:
                    seen.add(token)
                    options.setdefault(row.sequence, []).append((score, index, token))
        grown, parents = [], []
        for sequence, choices in options.items():
            choices = sorted(choices, reverse=True)[: self._effort.beams]
            for score, index, token in choices:
                if score < choices[0][0] - self._effort.margin:
                    break
                grown.append(_Row(sequence, [*rows[index].tokens, token], score))
                parents.append(index)
        return grown, torch.tensor(parents)

    def _searched(
        self,
        prefixes: list[_Row],
        observed: torch.Tensor,
        guess: torch.Tensor,
        language: torch.Tensor,
        cache: Any,
    ) -> list[_Tried]:
        """Try candidates for every row, and more for the best one of a sequence where none fits."""
        effort = self._effort
        tried = [_Tried() for _ in observed]
        both = guess + language
        every = torch.arange(len(observed))
        third = max(1, effort.first // 3)
        first = torch.cat(
            [scores.topk(min(third, scores.shape[-1])).indices for scores in (both, guess, language)], 1
        )
        self._try(every, first, observed, cache, tried)
        for size in effort.screened:
            rows = self._unfitting(prefixes, tried)
            if not len(rows):
                return tried
            self._try(rows, self._screened(rows, size, observed, language, tried), observed, cache, tried)
        if effort.whole:
            for index in self._unfitting(prefixes, tried).tolist():
                row = torch.tensor([index])
                self._try(row, torch.arange(both.shape[-1])[None], observed, cache, tried)
        return tried

    def _unfitting(self, prefixes: list[_Row], tried: list[_Tried]) -> torch.Tensor:
        """The best prefix of each sequence none of whose prefixes has a candidate that fits."""
        best = torch.stack([torch.cat(one.misfits).min() for one in tried])
        fits = self._channel.fits(best, self._width)
        chosen: dict[int, int] = {}
        settled: set[int] = set()
        for index, prefix in enumerate(prefixes):
            if fits[index]:
                settled.add(prefix.sequence)
            rival = chosen.get(prefix.sequence)
            if rival is None or self._merit(prefix, best[index]) > self._merit(prefixes[rival], best[rival]):
                chosen[prefix.sequence] = index
        return torch.tensor(
            [row for sequence, row in chosen.items() if sequence not in settled], dtype=torch.long
        )

    def _merit(self, prefix: _Row, misfit: torch.Tensor) -> float:
        return prefix.score - float(misfit) * self._width / 2

    def _try(
        self,
        rows: torch.Tensor,
        candidates: torch.Tensor,
        observed: torch.Tensor,
        cache: Any,
        tried: list[_Tried],
    ) -> None:
        narrow = self._replica.new_cache()
        for block, layer in enumerate(cache.layers):
            narrow.update(layer.keys[rows], layer.values[rows], block)
        hidden = self._replica.tried(candidates, narrow)
        misfits = self._channel.misfit(observed[rows], hidden)
        for at, row in enumerate(rows.tolist()):
            one = tried[row]
            one.tokens.append(candidates[at])
            one.misfits.append(misfits[at])
            if len(candidates[at]) < self._replica.shape.vocab:  # the whole vocabulary is the last resort
                one.hidden.append(hidden[at])

    def _screened(
        self,
        rows: torch.Tensor,
        size: int,
        observed: torch.Tensor,
        language: torch.Tensor,
        tried: list[_Tried],
    ) -> torch.Tensor:
        """The likeliest tokens by the table, moved by what the context adds to those already tried."""
        table, chosen = self._replica.table, []
        for row in rows.tolist():
            one = tried[row]
            tokens, hidden = torch.cat(one.tokens), torch.cat(one.hidden)
            nearest = torch.cat(one.misfits).topk(min(16, len(tokens)), largest=False).indices
            added = hidden[nearest] - table[tokens[nearest]]
            spread = added.var(0) if len(nearest) > 1 else torch.zeros_like(added[0])
            weight = 1 / (self._channel.variance(observed[row]) + spread)  # (D,)
            here = observed[row] - added.mean(0)
            distance = self._squares @ weight - 2 * table @ (weight * here)
            scores = language[row] - distance / 2
            scores[tokens] = -torch.inf
            chosen.append(scores.topk(min(size, len(scores))).indices)
        return torch.stack(chosen)
