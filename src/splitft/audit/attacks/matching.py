"""Match hidden states by beam search: run candidate tokens through the public blocks, keep those that fit.

    prefix -> candidates of inverter and language model -> their hidden states at the cut
           -> log-likelihood of the observed row + log p(candidate | prefix) -> the best prefixes are kept

A causal model makes this possible: the hidden state of a position depends on nothing to its right, so a token
can be judged before the next one is known. Where the best candidate does not fit (`ObservationModel.fits`),
more candidates are tried, in this order:

1. those that a screening of the whole vocabulary finds. `PublicModel.table` has every token's hidden state
   t_v in an empty context. The real context adds much the same h_c - t_c to all candidates c, so the table
   plus its mean over the candidates tried so far estimates every token's hidden state; the nearest are tried;
2. the whole vocabulary.

A prefix without a fitting candidate drops out of the beams. Without noise only what the codec has rounded
away remains uncertain. Cf. BiSR's second stage (arXiv 2409.00960), which optimises embeddings by gradient
instead, and has no test of whether a token is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from splitft.audit.attacks.observation_model import ObservationModel
from splitft.audit.attacks.public_model import PublicModel


@dataclass(frozen=True)
class Effort:
    """Effort of the search."""

    first: int = 48
    """Candidates tried for every position."""
    screened: tuple[int, ...] = (64, 256)
    """Candidates tried after each screening of the vocabulary."""
    whole: bool = False
    """Fall back to the whole vocabulary."""
    beams: int = 4
    """Prefixes kept for each sequence."""
    margin: float = 30.0
    """Drop a prefix that is this many nats less likely than the best one."""


@dataclass
class _Prefix:
    """One prefix of one sequence."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    score: float = 0.0


@dataclass
class _Candidates:
    """Candidates of one prefix that have been run."""

    tokens: list[torch.Tensor] = field(default_factory=list)
    misfits: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)


def match(
    sequences: Sequence[torch.Tensor],
    public_model: PublicModel,
    guesses: Sequence[torch.Tensor],
    observation_model: ObservationModel,
    effort: Effort = Effort(),
) -> list[list[int]]:
    """Read tokens off hidden states (T_b, D) of sequences; `guesses` are an inverter's scores (T_b, V)."""
    search = _Search([one.float() for one in sequences], public_model, guesses, observation_model, effort)
    return search.run()


class _Search:
    def __init__(
        self,
        sequences: Sequence[torch.Tensor],
        public_model: PublicModel,
        guesses: Sequence[torch.Tensor],
        observation_model: ObservationModel,
        effort: Effort,
    ) -> None:
        self._sequences, self._model, self._guesses = sequences, public_model, guesses
        self._observation, self._effort = observation_model, effort
        self._width = public_model.shape.width

    @cached_property
    def _squares(self) -> torch.Tensor:
        return self._model.table.square()

    def run(self) -> list[list[int]]:
        rows = [_Prefix(index) for index in range(len(self._sequences))]
        found: list[list[int]] = [[] for _ in rows]
        cache: Any = self._model.new_cache()
        language = torch.zeros(len(rows), self._model.shape.vocab)
        for place in range(max(map(len, self._sequences))):
            active = [i for i, row in enumerate(rows) if place < len(self._sequences[row.sequence])]
            if len(active) < len(rows):
                kept = torch.tensor(active)
                cache.batch_select_indices(kept)
                rows, language = [rows[i] for i in active], language[kept]
            grown, parents = self._extend(rows, place, cache, language)
            cache.batch_select_indices(parents)
            rows = grown
            language = self._model.append(torch.tensor([row.tokens[-1] for row in rows]), cache)
            for row in reversed(rows):  # the best prefix of a sequence comes first
                if place == len(self._sequences[row.sequence]) - 1:
                    found[row.sequence] = row.tokens
        return found

    def _extend(
        self, rows: list[_Prefix], place: int, cache: Any, language: torch.Tensor
    ) -> tuple[list[_Prefix], torch.Tensor]:
        """Return each sequence's best prefixes with one more token, and the index of the row each extends."""
        observed = torch.stack([self._sequences[row.sequence][place] for row in rows])
        guess = torch.stack([self._guesses[row.sequence][place] for row in rows])
        tried = self._try_candidates(rows, observed, guess, language, cache)
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
                grown.append(_Prefix(sequence, [*rows[index].tokens, token], score))
                parents.append(index)
        return grown, torch.tensor(parents)

    def _try_candidates(
        self,
        prefixes: list[_Prefix],
        observed: torch.Tensor,
        guess: torch.Tensor,
        language: torch.Tensor,
        cache: Any,
    ) -> list[_Candidates]:
        """Try candidates for every prefix, and more for the best prefix of a sequence where none fits."""
        effort = self._effort
        tried = [_Candidates() for _ in observed]
        both = guess + language
        every = torch.arange(len(observed))
        third = max(1, effort.first // 3)
        first = torch.cat(
            [scores.topk(min(third, scores.shape[-1])).indices for scores in (both, guess, language)], 1
        )
        self._run(every, first, observed, cache, tried)
        for size in effort.screened:
            rows = self._unfitting(prefixes, tried)
            if not len(rows):
                return tried
            self._run(rows, self._screen(rows, size, observed, language, tried), observed, cache, tried)
        if effort.whole:
            for index in self._unfitting(prefixes, tried).tolist():
                row = torch.tensor([index])
                self._run(row, torch.arange(both.shape[-1])[None], observed, cache, tried)
        return tried

    def _unfitting(self, prefixes: list[_Prefix], tried: list[_Candidates]) -> torch.Tensor:
        """Return the best prefix of each sequence that has no fitting candidate."""
        best = torch.stack([torch.cat(one.misfits).min() for one in tried])
        fits = self._observation.fits(best, self._width)
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

    def _merit(self, prefix: _Prefix, misfit: torch.Tensor) -> float:
        return prefix.score - float(misfit) * self._width / 2

    def _run(
        self,
        rows: torch.Tensor,
        candidates: torch.Tensor,
        observed: torch.Tensor,
        cache: Any,
        tried: list[_Candidates],
    ) -> None:
        narrow = self._model.new_cache()
        for block, layer in enumerate(cache.layers):
            narrow.update(layer.keys[rows], layer.values[rows], block)
        hidden = self._model.hidden_of_candidates(candidates, narrow)
        misfits = self._observation.misfit(observed[rows], hidden)
        for at, row in enumerate(rows.tolist()):
            one = tried[row]
            one.tokens.append(candidates[at])
            one.misfits.append(misfits[at])
            if len(candidates[at]) < self._model.shape.vocab:  # the whole vocabulary's are needed no more
                one.hidden.append(hidden[at])

    def _screen(
        self,
        rows: torch.Tensor,
        size: int,
        observed: torch.Tensor,
        language: torch.Tensor,
        tried: list[_Candidates],
    ) -> torch.Tensor:
        """Return the likeliest tokens by the table plus the mean change in this context."""
        table, chosen = self._model.table, []
        for row in rows.tolist():
            one = tried[row]
            tokens, hidden = torch.cat(one.tokens), torch.cat(one.hidden)
            nearest = torch.cat(one.misfits).topk(min(16, len(tokens)), largest=False).indices
            added = hidden[nearest] - table[tokens[nearest]]
            spread = added.var(0) if len(nearest) > 1 else torch.zeros_like(added[0])
            weight = 1 / (self._observation.variance(observed[row]) + spread)  # (D,)
            here = observed[row] - added.mean(0)
            distance = self._squares @ weight - 2 * table @ (weight * here)
            scores = language[row] - distance / 2
            scores[tokens] = -torch.inf
            chosen.append(scores.topk(min(size, len(scores))).indices)
        return torch.stack(chosen)
