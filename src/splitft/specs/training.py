"""Sections `lora`, `split`, `training` and `aggregate`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from splitft.specs.base import NameIn, Spec
from splitft.specs.rules import RULES

MOST_MICRO_BATCHES = 64
"""Largest number of micro-batches in a step."""
MOST_IN_FLIGHT = 16
"""Largest number of micro-batches in flight; each keeps its activations on both sides."""


MOST_TIMES = 4
"""A client takes at most so many times `training.steps`: with each its factors go further from others'."""


ServerAdapters = Literal["per-client", "shared", "shared-in-turn", "shared-by-arrival"]
"""The owners of the server's adapters, and when shared ones step."""
AUTO = "auto"
"""Left to the controller, which chooses once for the whole run (`run.run_mode`)."""


class LoraSpec(Spec):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(16, ge=1)
    """R, the rank of an adapter away from the cut."""
    rank_at_cut: int | None = Field(8, ge=1)
    """Rank of the blocks next to the cut; null for `rank`."""
    cut_span: int = Field(1, ge=0)
    """Number of blocks on each side that count as next to the cut."""
    cut_sides: tuple[Literal["client", "server"], ...] = ("client", "server")
    """Sides of the cut on which the rank is lowered."""
    client_ranks: Literal["halving"] | tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Ranks away from the cut, one for each client, each at most `rank`; `halving` for R, R/2, R/4 in turn;
    null for `rank` on every client."""
    alpha: float = Field(32.0, gt=0)
    """The update of a layer is (alpha / rank) B A, whatever rank the layer itself carries."""
    method: Literal["lora", "dora"] = "lora"
    """`lora`: W + scale B A; `dora`: the same direction, with a trained magnitude of each row (arXiv
    2402.09353); needs aggregate.rule factors, zero-pad or svd."""
    scaling: Literal["lora", "rslora"] = "lora"
    """`lora`: alpha / rank for all layers; `rslora`: alpha / sqrt(r) for a layer trained at rank r, which
    keeps steps stable at every rank (arXiv 2312.03732)."""
    lr_ratio: float = Field(1.0, gt=0)
    """Learning rate of B divided by that of A: 1 for LoRA; LoRA+ recommends about 16 (arXiv 2402.12354)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the numbers of a layer's input that its factors do not see in a training step (peft's
    lora_dropout): drawn anew for each layer and micro-batch, the same at every cut. None in evaluation."""
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
        """Return the rank R of a client, counted from 0."""
        if self.client_ranks is None:
            return self.rank
        if self.client_ranks == "halving":
            return max(1, self.rank >> index % 3)
        return self.client_ranks[index]


class SplitSpec(Spec):
    """Placement of the labels and of the server's adapters."""

    labels: Literal["client", "server"] = "client"
    """`client`: head and loss are on the client, and token ids stay there. `server`: the server receives the
    labels, and so the text."""
    server_adapters: ServerAdapters | Literal["auto"] = "per-client"
    """`per-client`: one copy of the server's adapters for each client (SplitFed v1); `shared`: one copy, with
    one step on all clients' batches together (SplitLoRA); `shared-in-turn`: one copy, with one step for each
    batch, see `turns` (SplitFed v2); `shared-by-arrival`: one copy, with one step whenever a client's step
    is complete, and nobody waits (a client's gradient is that of the copy as it was when its step began);
    `auto`: the quickest of these by schedule.controller `quickest`, chosen once, and else per-client."""
    turns: Literal["random", "fixed"] = "random"
    """Order of the clients with `shared-in-turn`: drawn for each step (SplitFed v2), or the clients' order in
    every step (SplitLoRA's public code)."""
    group_tokens: int = Field(1024, ge=1)
    """Most padded tokens that the server processes together when it groups several clients' batches; on a CPU
    larger groups are no faster (`benchmarks/server_batching.py`)."""

    @property
    def way(self) -> ServerAdapters:
        """`server_adapters`, or per-client while it is left to `auto`."""
        return "per-client" if self.server_adapters == "auto" else self.server_adapters


class TrainingSpec(Spec):
    """Local training and the number of rounds."""

    rounds: int = Field(3, ge=1)
    """Federated rounds."""
    steps: int = Field(10, ge=1)
    """Local optimizer steps of a client in a round."""
    steps_by: Literal["count", "time"] = "count"
    """`count`: every client takes `steps`; `time`: one that would be done earlier than the slowest takes more
    in the same time, up to 4 times as many, by the simulated clock. It then weighs more in the average, which
    is by labelled tokens. For a constant learning rate, and one copy of the server's adapters a client."""
    batch_size: int = Field(4, ge=1)
    """Sequences in a batch."""
    batch_tokens: int | None = Field(None, ge=1)
    """If given, a batch is filled with sequences up to this many padded tokens instead."""
    micro_batches: int = Field(1, ge=1, le=MOST_MICRO_BATCHES)
    """Parts into which a step's batch is divided, by sequences. Their gradients add up to those of the batch,
    and the optimizers step once. Client and server work on different parts at the same time."""
    in_flight: int = Field(2, ge=1, le=MOST_IN_FLIGHT)
    """Most micro-batches in flight: sent, and not yet returned. More take memory, and change no result."""
    checkpoint_blocks: bool = False
    """True if blocks keep only their inputs for the backward pass, on both sides of the cut, and are computed
    again in it: a small part of the activations, for another forward pass. Changes no result."""
    lr: float = Field(5.0e-4, gt=0)
    """Learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or decaying to 0 over the run's local steps."""
    warmup: int = Field(0, ge=0)
    """Local steps at the start of the run in which the learning rate rises linearly."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimizer, the same on both sides of the cut."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay on the adapters."""
    clip: float | None = Field(None, gt=0)
    """Largest gradient norm of a step; a longer gradient is scaled down to it. null for no bound. Client and
    server each clip the gradient of the factors that they hold, so the bound depends on the cut."""
    order: Literal["together", "in-turn"] = "together"
    """`together`: clients train at the same time and are then aggregated; `in-turn`: one after the other,
    each passing its factors and optimizer state to the next (vanilla split learning)."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """`reset`: a client's optimizer state is cleared each round; `keep`: it is kept, and moves with the
    blocks when the cut moves."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share of the clients drawn for each round; at least one client."""

    @property
    def most_steps(self) -> int:
        """Most steps of a client in a round."""
        return self.steps * (MOST_TIMES if self.steps_by == "time" else 1)


class AggregateSpec(Spec):
    """Aggregation of adapters of unequal cuts and ranks."""

    federated: bool = True
    """True if adapters are aggregated. If not, every client keeps its own and sends none."""
    rule: Annotated[str, NameIn(RULES)] = "svd"
    """`factors` averages A and B; `zero-pad` does so after padding (HetLoRA); `svd` averages products
    (FlexLoRA); `stack` folds the mean product into the base and restarts the factors (FLoRA); `exact`
    averages A and B and folds the residual (FedEx-LoRA); `ffa` trains B alone (FFA-LoRA); `fedsa` averages A,
    and each client keeps its own B (FedSA-LoRA); `median`, `trimmed-mean` and `krum` withstand clients that
    send anything at all (Yin et al. 2018; Blanchard et al. 2017)."""
    byzantine: int | None = Field(None, ge=0)
    """Number of hostile clients in a round that trimmed-mean and krum withstand; null for a fifth of the
    round's participants, rounded up, or as many as the rule can. Other rules need no number."""
    norm_bound: float | None = Field(5.0, ge=1)
    """Largest update of a client, as a multiple of the median of this round's and the last rounds' updates;
    a larger one is scaled down to it. null for no bound."""
    server_optimizer: Literal["none", "fedavgm", "nesterov", "fedadam"] = "none"
    """Server optimizer that applies the mean update: `none`; `fedavgm` adds momentum; `nesterov` adds it as
    DiLoCo does (arXiv 2311.08105); `fedadam` adapts the learning rate of each number to its earlier changes
    (Reddi et al. 2021, arXiv 2003.00295). With factors, zero-pad, ffa and fedsa."""
    server_lr: float | None = Field(None, gt=0)
    """Learning rate of the server optimizer; null for 1 with fedavgm, 0.7 with nesterov and 0.01 with
    fedadam."""
    server_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of fedavgm and nesterov."""
    server_betas: tuple[float, float] = (0.9, 0.99)
    """Decay of fedadam's first and second moment, each at least 0 and below 1."""
    server_tau: float = Field(1e-3, gt=0)
    """Adaptivity of fedadam: changes well below it are not scaled up."""

    @model_validator(mode="after")
    def _betas_are_decays(self) -> AggregateSpec:
        if not all(0 <= beta < 1 for beta in self.server_betas):
            raise ValueError(f"server_betas {self.server_betas} must each be at least 0 and below 1")
        return self
