"""One frozen specification per room: what a user may ask of it, with units, bounds and defaults.

A room takes its own spec and nothing else; `config` puts them together into the file a user writes.
Unknown keys are refused, so that a typo is never silently ignored. No torch here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Spec(BaseModel):
    """Frozen, strict about its keys, documented by its field docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


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
    """Column that `by: label` and `by: natural` divide by, such as `site`; `python-docs` has `topic`."""
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
    cuts: int | tuple[int, ...] | Literal["auto"] = 2
    """Blocks on the client: one number for all, or one a client, or `auto` (the controller decides)."""
    shares: SharesSpec = SharesSpec()
    """How the text is divided among them."""


class LoraSpec(Spec):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(16, ge=1)
    """R, the rank of an adapter away from the cut."""
    rank_at_cut: int | None = Field(8, ge=1)
    """Rank of the blocks next to the cut; null for no difference."""
    cut_span: int = Field(1, ge=0)
    """How many blocks on each side count as next to the cut."""
    cut_sides: tuple[Literal["client", "server"], ...] = ("client", "server")
    """On which sides of the boundary the rank is lowered."""
    alpha: float = Field(32.0, gt=0)
    """The update of a layer is (alpha / rank) B A, whatever rank the layer itself carries."""
    targets: Literal["attention", "all-linear"] | tuple[str, ...] = "attention"
    """Adapted linear layers: attention projections, all linear layers, or module names."""

    @model_validator(mode="after")
    def _the_rank_at_the_cut_is_not_higher(self) -> LoraSpec:
        if self.rank_at_cut is not None and self.rank_at_cut > self.rank:
            raise ValueError(f"rank_at_cut {self.rank_at_cut} is above rank {self.rank}")
        return self


class SplitSpec(Spec):
    """What lives where, beside the blocks."""

    labels: Literal["client", "server"] = "client"
    """`client`: the head and the loss are on the client, the server sees no text. `server`: it does."""
    server_adapters: Literal["per-client", "shared"] = "per-client"
    """One copy of the server's adapters a client (SplitFed v1), or one trained by all (SplitLoRA)."""
    group_tokens: int = Field(1024, ge=1)
    """The server works on several clients' batches at once while they are at most this many padded tokens
    together; on a CPU larger groups are no faster (`benchmarks/server_batching.py`)."""


class TrainingSpec(Spec):
    """Local training and the number of rounds."""

    rounds: int = Field(3, ge=1)
    """Federated rounds."""
    steps: int = Field(10, ge=1)
    """Local optimizer steps a client takes in a round."""
    batch_size: int = Field(4, ge=1)
    """Sequences in a batch."""
    batch_tokens: int | None = Field(None, ge=1)
    """If given, a batch is filled with sequences up to this many padded tokens instead."""
    lr: float = Field(5.0e-4, gt=0)
    """Learning rate."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimizer, the same on both sides of the cut."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay on the adapters."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether a client's moments start afresh each round or live on (and move when its cut moves)."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share of the clients drawn for each round; at least one."""


class AggregateSpec(Spec):
    """How adapters of unequal cuts and ranks become one."""

    rule: Literal["factors", "zero-pad", "svd"] = "svd"
    """`factors` averages A and B; `zero-pad` does so after padding (HetLoRA); `svd` averages products."""


class DeviceSpec(Spec):
    """A machine by its numbers, where no preset fits."""

    block_forward_ms_per_token: float = Field(gt=0)
    """Milliseconds of one block's forward pass per token."""
    block_backward_ms_per_token: float = Field(gt=0)
    """Milliseconds of one block's backward pass per token."""
    head_ms_per_token: float = Field(gt=0)
    """Milliseconds of head and loss, forward and backward, per labelled token."""
    memory_gb: float = Field(gt=0)
    """Memory that training may use, in GB (10^9 bytes)."""


class LinkSpec(Spec):
    """A connection to the server by its numbers."""

    up_mbit_per_s: float = Field(gt=0)
    """Upload rate, in Mbit/s."""
    down_mbit_per_s: float = Field(gt=0)
    """Download rate, in Mbit/s."""
    latency_ms: float = Field(0.0, ge=0)
    """One-way delay, in milliseconds."""


DeviceName = Literal["phone", "laptop", "workstation", "edge-gpu", "server-gpu", "measured"]
LinkName = Literal["lte", "dsl", "fibre", "lan"]


class ChangeSpec(Spec):
    """A change of conditions, for scripted scenarios: from this round on, one client is faster or slower."""

    round: int = Field(ge=1)
    """First round it is in force."""
    client: int = Field(ge=1)
    """Which client, from 1."""
    link: float = Field(1.0, gt=0)
    """Its link's rates, as a multiple of what is given: 0.1 for a tenth."""
    compute: float = Field(1.0, gt=0)
    """Its machine's speed, likewise."""


class ScheduleSpec(Spec):
    """Who chooses the cuts, and the machines and links of the simulated clock."""

    controller: Literal["fixed", "resources", "paper", "makespan"] = "fixed"
    """`fixed`: as given in clients.cuts; `resources`: what fits memory and equalises compute time; `paper`:
    SplitFT's rule, by resources and held-out loss; `makespan`: the least predicted round time."""
    devices: DeviceName | DeviceSpec | tuple[DeviceName | DeviceSpec, ...] = "laptop"
    """Machines, one for all clients or one a client: a preset, `measured` (this machine), or numbers."""
    links: LinkName | LinkSpec | tuple[LinkName | LinkSpec, ...] = "fibre"
    """Connections likewise: a preset, or numbers."""
    server: DeviceName | DeviceSpec = "server-gpu"
    """The server's machine."""
    min_cut: int = Field(1, ge=1)
    """Shallowest cut that a controller may choose, for privacy."""
    max_cut: int | None = Field(None, ge=1)
    """Deepest cut that a controller may choose; null for all but the last block."""
    gamma: int = Field(1, ge=1)
    """Step size of the controller `paper`, in blocks."""
    misfit: Literal["stop", "leave-out"] = "stop"
    """What to do with a client that cannot hold even the shallowest cut."""
    changes: tuple[ChangeSpec, ...] = ()
    """Scripted changes of conditions while training."""


Codec = Annotated[str, Field(pattern="^(bf16|fp32|fp64)$")]


class WireSpec(Spec):
    """How tensors travel, by role."""

    hidden: Codec = "bf16"
    """Codec of hidden states: bf16, fp32, or fp64 for exactness studies on a float64 model."""
    gradient: Codec = "bf16"
    """Codec of gradients of hidden states."""
    adapter: Codec = "fp32"
    """Codec of adapters."""
    in_process: Literal["bytes", "direct"] = "bytes"
    """In simulation, pass every message through bytes, or hand its rounded tensors over for speed: the
    results are equal, and bytes are then those of the tensors alone."""


def field_docs(spec: type[BaseModel]) -> dict[str, str]:
    """Each field's documentation, for commented files and help texts."""
    return {name: field.description or "" for name, field in spec.model_fields.items()}


__all__: list[Any] = [
    "AggregateSpec",
    "ChangeSpec",
    "ClientsSpec",
    "DataSpec",
    "DeviceSpec",
    "LinkSpec",
    "LoraSpec",
    "ModelSpec",
    "ScheduleSpec",
    "SharesSpec",
    "Spec",
    "SplitSpec",
    "TrainingSpec",
    "WireSpec",
    "field_docs",
]
