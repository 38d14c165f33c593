"""Adapters, where things live, local training, and aggregation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from splitft.specs.base import NameIn, Spec
from splitft.specs.rules import RULES

MOST_MICRO_BATCHES = 64
"""A step is divided into so many at most."""
MOST_IN_FLIGHT = 16
"""So many of them are underway at once at most: each keeps its activations on both sides."""


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
    client_ranks: Literal["halving"] | tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Ranks away from the cut where clients differ: one a client, at most `rank`; or `halving` (R, R/2, R/4
    in turn); null for `rank` everywhere."""
    alpha: float = Field(32.0, gt=0)
    """The update of a layer is (alpha / rank) B A, whatever rank the layer itself carries."""
    method: Literal["lora", "dora"] = "lora"
    """`lora`: W + scale B A; `dora`: that direction, and the magnitude of each row trained beside it (arXiv
    2402.09353); with aggregate.rule factors, zero-pad or svd."""
    scaling: Literal["lora", "rslora"] = "lora"
    """`lora`: alpha / rank for all; `rslora`: a layer that is trained at rank r is scaled alpha / sqrt(r), so
    that steps are stable at every rank (arXiv 2312.03732)."""
    lr_ratio: float = Field(1.0, gt=0)
    """Learning rate of B over that of A: 1 for LoRA; LoRA+ advises about 16 (arXiv 2402.12354)."""
    targets: Literal["attention", "all-linear"] | tuple[str, ...] = "attention"
    """Adapted linear layers: attention projections, all linear layers, or module names."""

    @model_validator(mode="after")
    def _the_rank_at_the_cut_is_not_higher(self) -> LoraSpec:
        if self.rank_at_cut is not None and self.rank_at_cut > self.rank:
            raise ValueError(f"rank_at_cut {self.rank_at_cut} is above rank {self.rank}")
        if isinstance(self.client_ranks, tuple) and max(self.client_ranks, default=0) > self.rank:
            raise ValueError(f"client_ranks {max(self.client_ranks)} is above rank {self.rank}")
        return self

    def rank_of(self, index: int) -> int:
        """R of a client, counted from 0."""
        if self.client_ranks is None:
            return self.rank
        if self.client_ranks == "halving":
            return max(1, self.rank >> index % 3)
        return self.client_ranks[index]


class SplitSpec(Spec):
    """What lives where, beside the blocks."""

    labels: Literal["client", "server"] = "client"
    """`client`: the head and the loss are on the client, the server sees no text. `server`: it does."""
    server_adapters: Literal["per-client", "shared", "shared-in-turn"] = "per-client"
    """One copy of the server's adapters a client (SplitFed v1); or one trained by all, with one step on
    all clients' batches together (`shared`, SplitLoRA) or one a batch in random order (`shared-in-turn`,
    SplitFed v2)."""
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
    micro_batches: int = Field(1, ge=1, le=MOST_MICRO_BATCHES)
    """Parts that a step's batch is divided into, by sequences; their gradients add up to exactly the batch's,
    and the optimizers step once for all. Client and server work on different parts at the same time."""
    in_flight: int = Field(2, ge=1, le=MOST_IN_FLIGHT)
    """Of these, how many are underway at once: sent, and not yet back. Costs memory, changes no result."""
    lr: float = Field(5.0e-4, gt=0)
    """Learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up: as it is, or down to 0 over the run's local steps."""
    warmup: int = Field(0, ge=0)
    """Local steps of the run in which the learning rate rises linearly from nearly 0."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimizer, the same on both sides of the cut."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay on the adapters."""
    order: Literal["together", "in-turn"] = "together"
    """Whether clients train at the same time and are then aggregated, or one after the other, each handing
    its factors and moments on to the next (vanilla split learning)."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether a client's moments start afresh each round or live on (and move when its cut moves)."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share of the clients drawn for each round; at least one."""


class AggregateSpec(Spec):
    """How adapters of unequal cuts and ranks become one."""

    federated: bool = True
    """Whether adapters are aggregated at all; if not, every client keeps its own and sends nothing."""
    rule: Annotated[str, NameIn(RULES)] = "svd"
    """`factors` averages A and B; `zero-pad` does so after padding (HetLoRA); `svd` averages products
    (FlexLoRA); `stack` folds the mean product into the base and starts anew (FLoRA); `exact` averages A and B
    and folds what they miss (FedEx-LoRA); `ffa` trains B alone (FFA-LoRA); `fedsa` averages A and leaves
    each client its own B (FedSA-LoRA)."""
    server_optimizer: Literal["none", "fedavgm", "fedadam"] = "none"
    """What the server makes of the mean: `none` takes it as it is; `fedavgm` adds momentum; `fedadam` scales
    each number by what its changes were before (Reddi et al. 2021, arXiv 2003.00295). Not with svd, stack or
    exact."""
    server_lr: float | None = Field(None, gt=0)
    """Its learning rate; null for 1 with fedavgm and 0.01 with fedadam."""
    server_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of fedavgm."""
    server_betas: tuple[float, float] = (0.9, 0.99)
    """Decay of fedadam's first and second moment, each at least 0 and below 1."""
    server_tau: float = Field(1e-3, gt=0)
    """Adaptivity of fedadam: changes well below it are not scaled up."""

    @model_validator(mode="after")
    def _betas_are_decays(self) -> AggregateSpec:
        if not all(0 <= beta < 1 for beta in self.server_betas):
            raise ValueError(f"server_betas {self.server_betas} must each be at least 0 and below 1")
        return self
