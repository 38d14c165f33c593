"""Who gets which text: the corpus of a configuration, read and divided among its clients.

    RunConfig, Model --divide_text--> Divided(text, parts, names) --shares--> SharesTold

A run divides its text with the same function, so what `splitft shares` shows is what `splitft train` uses.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from splitft.config import RunConfig
from splitft.data.corpora import read_records
from splitft.data.shares import Shares, divide, values_of
from splitft.data.summary import ShareSummary, summarise_shares
from splitft.data.tokens import Tokenised, tokenise
from splitft.model import Model, open_model
from splitft.model.quiet import silence_transformers
from splitft.specs import SharesSpec


@dataclass(frozen=True)
class Divided:
    """A corpus and its owners."""

    text: Tokenised
    """All examples."""
    parts: Shares
    """For each client the indices of its examples."""
    names: tuple[str, ...]
    """How the run calls each client."""


@dataclass(frozen=True)
class SharesTold:
    """Who gets which text, as plain numbers."""

    source: str
    """`data.source`."""
    spec: SharesSpec
    """How the text was divided."""
    seed: int
    names: tuple[str, ...]
    """How the run calls each client."""
    summary: ShareSummary
    truncated: int
    """Examples cut off at `data.max_tokens`."""
    dropped: int
    """Records of which nothing could be learnt."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "spec": self.spec.model_dump(mode="json")}


def divide_text(config: RunConfig, model: Model) -> Divided:
    """Read the text and divide it. Raises DataError if there is none, or not enough."""
    shares = config.clients.shares
    records = read_records(config.data, shares.column, config.seed)
    text = tokenise(records, model.tokenizer(), config.data.max_tokens, config.data.separator)
    parts = divide(text.examples, config.clients.count, shares, config.seed)
    natural = shares.by == "natural"
    names = values_of(text.examples) if natural else tuple(f"client-{n}" for n in range(1, len(parts) + 1))
    return Divided(text, parts, names)


def shares(config: RunConfig) -> SharesTold:
    """Divide the text as a run would, and count; trains nothing. Raises what `divide_text` raises."""
    with silence_transformers():
        divided = divide_text(config, open_model(config.model))
    spec, text = config.clients.shares, divided.text
    bins = spec.classes if spec.by == "length" else SharesSpec().classes
    return SharesTold(
        source=config.data.source,
        spec=spec,
        seed=config.seed,
        names=divided.names,
        summary=summarise_shares(text.examples, divided.parts, bins),
        truncated=text.truncated,
        dropped=text.dropped,
    )
