"""The inputs of the cost model: each client's work, machine and link, and what all clients share.

SharedCosts(model, server, ranks, codecs, ...)  +  ClientProfile(device, link, Workload)  -->  `cost`, `clock`
Fleet: SharedCosts, every ClientProfile, and scripted changes of conditions
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from splitft.errors import ScheduleError
from splitft.geometry import Side, ranks_by_block
from splitft.schedule.codec_cost import WireBytes
from splitft.schedule.profile import Device, Link, ServerProfile
from splitft.schedule.sizes import ModelSizes
from splitft.specs import ChangeSpec, LoraSpec


@dataclass(frozen=True)
class Workload:
    """The training work of one client in a round; means over its steps, which may be fractions."""

    tokens: float
    """N, real tokens of a step."""
    labelled_tokens: float
    """M, those of them that carry a label."""
    sequences: float
    """B, sequences of a step."""
    padded_length: float
    """T, tokens of a sequence after padding."""
    steps: int
    """Local steps of a round."""
    largest_tokens: float = 0.0
    """Padded tokens of the largest batch, which memory must hold; 0 if all batches are equal."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.name != "largest_tokens" and not getattr(self, entry.name) > 0:
                raise ScheduleError(
                    f"workload: {entry.name} is {getattr(self, entry.name)}; it must be above 0"
                )
        if self.labelled_tokens > self.tokens or self.tokens > self.padded_tokens * (1 + 1e-9):
            raise ScheduleError(
                f"workload: {self.labelled_tokens:g} labelled of {self.tokens:g} real of "
                f"{self.padded_tokens:g} padded tokens; each must be at most the next"
            )

    @property
    def padded_tokens(self) -> float:
        """B x T, the tokens that machines compute."""
        return self.sequences * self.padded_length

    @property
    def peak_tokens(self) -> float:
        """Padded tokens of the largest batch."""
        return max(self.largest_tokens, self.padded_tokens)

    def divided(self, parts: int) -> Workload:
        """Return the workload of one of `parts` equal micro-batches of every step."""
        return replace(
            self,
            tokens=self.tokens / parts,
            labelled_tokens=self.labelled_tokens / parts,
            sequences=self.sequences / parts,
            largest_tokens=self.largest_tokens / parts,
        )


@dataclass(frozen=True)
class ClientProfile:
    """One client of the cost model."""

    name: str
    """Its name in messages."""
    device: Device
    """Its machine."""
    link: Link
    """Its link to the server."""
    workload: Workload
    """Its training work in a round."""
    wire: WireBytes | None = None
    """Its own codecs, where they are not those of all clients."""
    rank: int | None = None
    """Its LoRA rank away from the cut, where clients differ."""


@dataclass(frozen=True)
class AdapterTraffic:
    """The part of a round's adapters that the aggregation rule sends."""

    up: float = 1.0
    """Share of the numbers of A and B together that a client sends: about half for one factor alone."""
    down: float = 1.0
    """Share that it receives."""
    full_rank: bool = False
    """True if the factors that it receives have the full rank R in every block, also next to a cut."""
    folded_members: int = 0
    """Participants whose ranks add up to that of the update folded into the base; 0 if none is folded."""


@dataclass(frozen=True)
class QuantizedBytes:
    """Bytes of frozen weights that are held in fewer bits than they compute in."""

    client_block: float
    """Of a weight of a client's blocks, on average; norms and biases are in full."""
    server_block: float
    """Of a weight of the server's blocks."""
    rows: float
    """Of a weight of the embedding and the output matrix."""
    made: float
    """Of the largest matrix that is made from its bits, to be used and freed."""


@dataclass(frozen=True)
class SharedCosts:
    """The terms of the cost model that all clients share."""

    sizes: ModelSizes
    """The model."""
    server: ServerProfile
    """The machine of the deeper blocks."""
    lora: LoraSpec
    """Ranks, also at the cut."""
    wire: WireBytes = field(default_factory=WireBytes)
    """Bytes and seconds of an element on the wire."""
    labels: Side = "client"
    """Side of the labels, and so of the head and the loss."""
    weight_bytes: int = 2
    """Bytes of a frozen weight and of a kept activation: 2 for bfloat16, 4 for float32."""
    quantized: QuantizedBytes | None = None
    """Bytes of frozen weights, if some are quantized."""
    moments: int = 2
    """Optimizer moments of a parameter: 2 for AdamW, 0 for SGD."""
    micro_batches: int = 1
    """Micro-batches of a step, at most one for each sequence."""
    in_flight: int = 1
    """Micro-batches in progress at once."""
    checkpoint_blocks: bool = False
    """True if blocks keep only their inputs, and are computed again in the backward pass."""
    adapter_traffic: AdapterTraffic = field(default_factory=AdapterTraffic)
    """The part of the adapters that is sent."""
    federated: bool = True
    """True if adapters are sent at all."""
    handed_on: bool = False
    """True if optimizer moments are sent with them, from client to client."""

    def parts(self, workload: Workload) -> int:
        """Return the number of micro-batches of a step with this workload, each at least a sequence."""
        return max(1, min(self.micro_batches, int(workload.sequences + 1e-9)))

    def share_in_flight(self, workload: Workload, at_once: int | None = None) -> float:
        """Return the share of a batch in its largest micro-batches: `at_once` of them, or all in flight."""
        parts, sequences = self.parts(workload), max(1, int(workload.sequences + 1e-9))
        sizes = [sequences // parts + (part < sequences % parts) for part in range(parts)]
        return sum(sizes[: self.in_flight if at_once is None else at_once]) / sequences

    def ranks(self, cut: int, rank: int | None = None) -> tuple[int, ...]:
        """Return the LoRA rank of each block for a client with this cut; `rank` is its own, if it has one."""
        lora = self.lora
        rank = lora.rank if rank is None else rank
        at_cut = None if lora.rank_at_cut is None else min(rank, lora.rank_at_cut)
        return ranks_by_block(cut, self.sizes.blocks, rank, at_cut, lora.cut_span, lora.cut_sides)


@dataclass(frozen=True)
class Fleet:
    """All machines and links of a run."""

    costs: SharedCosts
    """What all clients share, the server included."""
    clients: tuple[ClientProfile, ...]
    """The clients before any scripted change."""
    changes: tuple[ChangeSpec, ...] = ()
    """Scripted changes of conditions."""

    def at(self, number: int) -> tuple[ClientProfile, ...]:
        """Return the clients under the conditions of a round."""
        clients = list(self.clients)
        for change in sorted(self.changes, key=lambda one: one.round):
            if change.round <= number:
                clients[change.client - 1] = _changed(self.clients[change.client - 1], change)
        return tuple(clients)


def _changed(client: ClientProfile, change: ChangeSpec) -> ClientProfile:
    link = replace(
        client.link,
        up_bytes_per_s=client.link.up_bytes_per_s * change.link,
        down_bytes_per_s=client.link.down_bytes_per_s * change.link,
    )
    return replace(client, device=client.device.scaled(change.compute), link=link)
