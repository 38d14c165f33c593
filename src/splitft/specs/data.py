"""Sections `model`, `data` and `clients`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from splitft.registry import Lazy, Registry
from splitft.specs.base import NameIn, Spec

Source = Callable[["DataSpec", Sequence[str]], Iterable[Mapping[str, object]]]
"""(the specification, the columns needed) -> rows, values by column; `spec.source_argument` says which."""

SOURCES: Registry[Source] = Registry(
    "data source", "splitft.sources", {"python-docs": "splitft.data.corpora:python_docs"}
)
"""Every source of text that is read by name, beside files and hub data sets."""

EMBEDDED = frozenset({"python-docs"})
"""Sources that are part of every installation: each site has the same text, and nobody owns it."""


@dataclass(frozen=True)
class Partition:
    """A way to divide examples among clients."""

    divide: Callable[..., Any]
    """(examples, number of clients, SharesSpec, generator) -> the indices of each client's examples."""
    description: str = "by {by}"
    """The division in words for reports; fields of SharesSpec stand in braces, such as {alpha:g}."""
    needs_column: bool = False
    """True if it needs `column`, whose values label the examples."""
    owns_text: bool = False
    """True if each client owns the text of one value of `column`: clients are named after the values, and no
    example is moved to fill a share."""
    by_length: bool = False
    """True if it divides by `classes` length classes, which then are the bins of the shares' histograms."""


PARTITIONS: Registry[Partition] = Registry("partition", "splitft.partitions", {
    "length": Partition(
        Lazy("splitft.data.partitions:by_length"),
        "by length, {classes} classes, Dirichlet {alpha:g}",
        by_length=True,
    ),
    "iid": Partition(Lazy("splitft.data.partitions:iid"), "equal parts at random"),
    "label": Partition(
        Lazy("splitft.data.partitions:by_label"), "by {column}, Dirichlet {alpha:g}", needs_column=True
    ),
    "quantity": Partition(
        Lazy("splitft.data.partitions:by_quantity"), "by quantity, Dirichlet {alpha:g}"
    ),
    "natural": Partition(
        Lazy("splitft.data.partitions:natural"),
        "one client for each {column}",
        needs_column=True,
        owns_text=True,
    ),
})  # fmt: skip
"""Every way to divide text, by the name in `clients.shares.by`."""


class ModelSpec(Spec):
    """The language model and its frozen weights."""

    name: str = "smollm2-135m"
    """Alias of an embedded model, a folder in Hugging Face format, or a hub id."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """Type of the frozen weights and of the hidden states; adapters are float32 at least. `auto` is what the
    device computes fastest: bfloat16 if it has instructions for it, else float32, or float16 on older GPUs;
    the first line of a run says which, and its folder keeps it."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of transformers."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Quantization of the blocks' linear weights as they are read, by bitsandbytes (extra `quant`): `nf4`
    takes 4.5 bits a weight, `int8` 8. Norms and biases keep `dtype`, in which all products are computed. A
    checkpoint that bitsandbytes has quantized is read as it is; leave `none` then."""
    quantize_at: Literal["both", "clients", "server"] = "both"
    """Parties whose blocks are quantized. On one side alone, a block is another block where it runs on the
    other side: cuts must be fixed, and clients with unequal cuts train on unequal models."""
    embedding: Literal["full", "int8"] = "full"
    """Rows of the embedding and of the output matrix: `int8` holds them in 8 bits with a scale for each row,
    which halves what even the shallowest client holds (extra `quant`)."""


class DataSpec(Spec):
    """The text, and its examples."""

    source: str = "python-docs"
    """`python-docs` (embedded), a .txt, .jsonl, .csv, .tsv or .parquet file, a hub id, or a plug-in's source:
    `NAME`, or `NAME:ARGUMENT`."""
    hub_config: str | None = None
    """Configuration of a hub data set that has several (`wikitext-2-raw-v1`); files have none."""
    hub_split: str = "train"
    """Split of a hub data set to read; files have none."""
    text: str = "text"
    """Column that holds the text; the loss covers all of it."""
    prompt: str | None = None
    """Column of the prompt; no loss on it. Needs `completion`, and replaces `text`."""
    completion: str | None = None
    """Column of the completion, which the loss covers."""
    separator: str = "\n"
    """Text between prompt and completion."""
    max_tokens: int = Field(256, ge=2)
    """Most tokens of an example; longer ones are truncated, and their number is reported."""
    max_examples: int | None = Field(None, ge=1)
    """Most examples to use of the source, drawn by the seed; null for all."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of each client's examples kept for evaluation; at least one example."""
    eval_examples: int | None = Field(32, ge=1)
    """Most held-out examples to evaluate on for each client; null for all."""
    eval_part: Literal["all", "first-half", "second-half"] = "all"
    """Held-out examples to evaluate on. `compare --tune` chooses on the second half and measures on the
    first, so that no figure is of text that a choice was made on."""

    @model_validator(mode="after")
    def _prompt_and_completion_come_together(self) -> DataSpec:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion come together: give both columns, or neither")
        return self

    @property
    def source_name(self) -> str | None:
        """The name in SOURCES that `source` gives, alone or before a colon; None for a file or a hub id."""
        name = self.source.partition(":")[0]
        return name if name in SOURCES else None

    @property
    def source_argument(self) -> str:
        """The part of `source` after the colon."""
        return self.source.partition(":")[2]


class SharesSpec(Spec):
    """The division of text among clients."""

    by: Annotated[str, NameIn(PARTITIONS)] = "length"
    """`length`: K length classes by quantile, then Dir(alpha) over clients within each class; `label`: the
    same within each value of `column`; `quantity`: Dir(alpha) over sizes alone; `natural`: one client
    for each value of `column`; `iid`: equal parts at random."""
    column: str | None = None
    """Column that `by: label` and `by: natural` divide by, such as `site`; `python-docs` has `topic`.
    `splitft shares` counts its values for every kind of division."""
    alpha: float = Field(0.5, gt=0, le=1e6)
    """Dirichlet concentration: 0.1 is extreme, large is close to IID."""
    classes: int = Field(8, ge=1)
    """K, the number of length classes."""

    @model_validator(mode="after")
    def _a_division_by_column_names_it(self) -> SharesSpec:
        if PARTITIONS[self.by].needs_column and self.column is None:
            raise ValueError(f"by: {self.by} divides by the values of a column: give `column` too")
        return self


class ClientsSpec(Spec):
    """The federation's clients."""

    count: int = Field(4, ge=1)
    """Number of clients."""
    cuts: int | tuple[int, ...] | Literal["auto", "whole"] = 2
    """Number of blocks on the client: one number for all clients; one for each; `auto`, if the controller
    chooses; or `whole` for all blocks (no split: only adapters are sent)."""
    pooled: bool = False
    """True if all clients' text is pooled on the server's machine, as an upper bound. One client then takes
    the steps of all, and is evaluated on the examples that each of them would hold out."""
    shares: SharesSpec = SharesSpec()
    """The division of the text among the clients."""
