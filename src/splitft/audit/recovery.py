"""How much of a text was read: by token, by sentence, by order, and where it hurts.

    tokens      share of tokens right, each at its own place
    sentences   share of texts with every token right
    rouge_l     F1 of the longest common subsequence of words (Lin 2004, ROUGE), so that a slip of one place
                does not count as total failure
    rare        share of tokens right in words with a digit or a capital letter: names, numbers, codes
    function    the same in function words, which say little and are easily guessed

Names and numbers are what identifies a person, so they are told apart: an attack that reads 60 % of the
tokens may read all of the names, or none.
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
    """What an attack recovered of some texts, as shares from 0 to 1; nan where there was nothing."""

    tokens: float
    """Of all tokens."""
    rare: float
    """Of tokens in names, numbers and codes."""
    function: float
    """Of tokens in function words."""
    sentences: float
    """Texts recovered without a fault."""
    rouge_l: float
    """Mean over texts."""
    count: int
    """Tokens that there were to recover."""

    @property
    def error(self) -> float:
        """Standard error of `tokens`, as if tokens were independent."""
        return math.sqrt(self.tokens * (1 - self.tokens) / max(1, self.count))


def recovery(truth: Sequence[Tokens], read: Sequence[Tokens], piece: Callable[[int], str]) -> Recovery:
    """Compare texts with what was read of them; `piece` is the text of one token, with its leading space."""
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
    """For each token whether its word is `rare`, `function` or `other`."""
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
    """The words of a text given in pieces, punctuation apart, in lower case."""
    joined = ("".join(word).strip().lower() for word in _grouped(pieces))
    return [word for word in joined if word]


def rouge_l(truth: Sequence[str], read: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of words; 1 for two empty ones."""
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
    """Tokens put together to words: a word goes on while letters and digits follow each other unspaced."""
    groups: list[list[str]] = []
    for piece in pieces:
        goes_on = groups and piece[:1].isalnum() and groups[-1][-1][-1:].isalnum() and not piece[:1].isspace()
        if goes_on:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _share(hits: Iterable[bool]) -> float:
    known = list(hits)
    return sum(known) / len(known) if known else math.nan
