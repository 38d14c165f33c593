"""The model, the text, and who has which part of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from splitft.specs.base import Spec


class ModelSpec(Spec):
    """Which language model, and how its frozen weights are kept."""

    name: str = "smollm2-135m"
    """Alias of an embedded model, a folder in Hugging Face format, or a hub id."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Type of the frozen weights and of the hidden states; adapters are float32 at least."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of transformers."""


class DataSpec(Spec):
    """Which text, and how it becomes examples."""

    source: str = "python-docs"
    """`python-docs` (embedded), a .txt, .jsonl, .csv, .tsv or .parquet file, or a hub id."""
    hub_config: str | None = None
    """Configuration of a hub data set that has several (`wikitext-2-raw-v1`); files have none."""
    hub_split: str = "train"
    """Split of a hub data set to read; files have none."""
    text: str = "text"
    """Column that holds the text; the loss covers all of it."""
    prompt: str | None = None
    """Column of the prompt; no loss on it. Needs `completion`, and replaces `text`."""
    completion: str | None = None
    """Column of the completion, which carries the loss."""
    separator: str = "\n"
    """What stands between prompt and completion."""
    max_tokens: int = Field(256, ge=2)
    """Longer examples are truncated to this many tokens, and counted."""
    max_examples: int | None = Field(None, ge=1)
    """Use at most this many examples of the source, drawn by the seed; null for all."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of each client's examples kept for evaluation; at least one example."""
    eval_examples: int | None = Field(32, ge=1)
    """Evaluate on at most this many held-out examples a client; null for all."""

    @model_validator(mode="after")
    def _prompt_and_completion_come_together(self) -> DataSpec:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion come together: give both columns, or neither")
        return self


class SharesSpec(Spec):
    """How text is divided among clients."""

    by: Literal["length", "iid", "label", "quantity", "natural"] = "length"
    """`length`: K length classes by quantile, then Dir(alpha) over clients within each class; `label`: the
    same within each value of `column`; `quantity`: Dir(alpha) over sizes alone; `natural`: one client a
    value of `column`; `iid`: equal parts at random."""
    column: str | None = None
    """Column that `by: label` and `by: natural` divide by, such as `site`; `python-docs` has `topic`.
    With other divisions it is only counted, by `splitft shares`."""
    alpha: float = Field(0.5, gt=0, le=1e6)
    """Dirichlet concentration: 0.1 is extreme, large is close to IID."""
    classes: int = Field(8, ge=1)
    """K, the number of length classes."""

    @model_validator(mode="after")
    def _a_division_by_column_names_it(self) -> SharesSpec:
        if self.by in ("label", "natural") and self.column is None:
            raise ValueError(f"by: {self.by} divides by the values of a column: give `column` too")
        return self


class ClientsSpec(Spec):
    """The federation's clients."""

    count: int = Field(4, ge=1)
    """Number of clients."""
    cuts: int | tuple[int, ...] | Literal["auto", "whole"] = 2
    """Blocks on the client: one number for all, or one a client, or `auto` (the controller decides), or
    `whole` (all of them: no split, and only adapters travel)."""
    pooled: bool = False
    """Whether all clients' text lies in one place, on the server's machine; it takes the steps of all of
    them, and is evaluated on what each of them would hold out."""
    shares: SharesSpec = SharesSpec()
    """How the text is divided among them."""
