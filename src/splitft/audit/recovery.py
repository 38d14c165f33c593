"""Score how much of a text an attack has read: by token, by text, by order, and by kind of word.

    tokens      share of tokens right, each at its own place
    sentences   share of texts with every token right
    rouge_l     F1 of the longest common subsequence of words (Lin 2004, ROUGE), so that a slip of one place
                does not count as total failure
    rare        share of tokens right in words with a digit or a capital letter: names, numbers, codes
    function    the same in function words, which say little and are easily guessed

Names and numbers identify people, so they are counted separately: an attack that reads 60 % of the tokens may
read all of the names, or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

FUNCTION_WORDS = frozenset(
    " ".join((
        "a about above after again against all also am an and any are as at be because been before",
        "being below between both but by can could did do does doing down during each few for from",
        "further had has have having he her here hers him his how i if in into is it its just me",
        "more most my no nor not of off on once only or other our out over own same she should so",
        "some such than that the their them then there these they this those through to too under",
        "until up very was we were what when where which while who whom why will with would you",
        "your",
    )).split()
)  # fmt: skip
"""English words that carry grammar rather than content."""

Tokens = Sequence[int]


@dataclass(frozen=True)
class Recovery:
    """Shares of some texts that an attack has recovered, from 0 to 1; nan if there was nothing to recover."""

    tokens: float
    """Share of all tokens."""
    rare: float
    """Share of tokens in names, numbers and codes."""
    function: float
    """Share of tokens in function words."""
    sentences: float
    """Share of texts recovered without an error."""
    rouge_l: float
    """Mean ROUGE-L over texts."""
    count: int
    """Tokens to recover."""

    @property
    def error(self) -> float:
        """Standard error of `tokens`, as if tokens were independent."""
        return math.sqrt(self.tokens * (1 - self.tokens) / max(1, self.count))


def measure_recovery(
    truth: Sequence[Tokens], read: Sequence[Tokens], piece: Callable[[int], str]
) -> Recovery:
    """Compare texts with what was read; `piece` returns the text of one token, with its leading space."""
    right = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(truth, read, strict=True)]
    kinds = [word_kinds([piece(token) for token in text]) for text in truth]
    flat = [
        (hit, kind) for hits, ks in zip(right, kinds, strict=True) for hit, kind in zip(hits, ks, strict=True)
    ]
    scores = [
        rouge_l(words([piece(t) for t in one]), words([piece(t) for t in other]))
        for one, other in zip(truth, read, strict=True)
    ]
    return Recovery(
        tokens=_share(hit for hit, _ in flat),
        rare=_share(hit for hit, kind in flat if kind == "rare"),
        function=_share(hit for hit, kind in flat if kind == "function"),
        sentences=_share(all(hits) for hits in right),
        rouge_l=sum(scores) / len(scores) if scores else math.nan,
        count=len(flat),
    )


def word_kinds(pieces: Sequence[str]) -> list[str]:
    """Return the kind of each token's word: `rare`, `function` or `other`."""
    kinds: list[str] = []
    for word in _grouped(pieces):
        text = "".join(word).strip()
        if not any(c.isalnum() for c in text):
            kind = "other"
        elif text.lower() in FUNCTION_WORDS:
            kind = "function"
        elif any(c.isdigit() or c.isupper() for c in text):
            kind = "rare"
        else:
            kind = "other"
        kinds += [kind] * len(word)
    return kinds


def words(pieces: Sequence[str]) -> list[str]:
    """Return the words of a text given as pieces, without punctuation attached, in lower case."""
    joined = ("".join(word).strip().lower() for word in _grouped(pieces))
    return [word for word in joined if word]


def rouge_l(truth: Sequence[str], read: Sequence[str]) -> float:
    """Return F1 of the longest common subsequence of two lists of words; 1 for two empty ones."""
    if not truth or not read:
        return float(not truth and not read)
    row = [0] * (len(read) + 1)
    for one in truth:
        diagonal = 0
        for column, other in enumerate(read, 1):
            above = row[column]
            row[column] = diagonal + 1 if one == other else max(above, row[column - 1])
            diagonal = above
    return 2 * row[-1] / (len(truth) + len(read))


def _grouped(pieces: Sequence[str]) -> list[list[str]]:
    """Group tokens into words: a word continues while letters and digits follow without a space."""
    groups: list[list[str]] = []
    for piece in pieces:
        joins = groups and piece[:1].isalnum() and groups[-1][-1][-1:].isalnum() and not piece[:1].isspace()
        if joins:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _share(hits: Iterable[bool]) -> float:
    known = list(hits)
    return sum(known) / len(known) if known else math.nan
