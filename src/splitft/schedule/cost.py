"""What a cut costs one client: seconds and bytes, leg by leg.

    labels on the client                              labels on the server
      client_forward    client   k blocks               client_forward   client
      up_hidden         up       N x D                  up_hidden        up      N x D, M token ids
      server_forward    server   L - k blocks           server_step      server  forward, head, backward
      down_hidden       down     M x D                  down_gradient    down    N x D
      head              client   M positions            client_backward  client
      up_gradient       up       M x D
      server_backward   server   L - k blocks         the whole model on the client (k = L)
      down_gradient     down     N x D                  client_forward, head, client_backward
      client_backward   client   k blocks
    and once a round: adapters_down, before the first step, and adapters_up, after the last.

N real tokens and M labelled ones a step, D width, L blocks, k the cut. Machines compute padded tokens, links
carry real ones. Waiting for the server is not a cost of a cut but of the others' cuts: `clock` finds it. A
link carries one message at a time and counts the latency, as request and answer do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from splitft.geometry import check_cut
from splitft.schedule.workload import ClientProfile, SharedCosts

Place = Literal["client", "up", "down", "server"]
"""What a leg occupies: the client's processor, its link in one direction, or the server."""

LEGS: dict[str, Place] = {
    "adapters_down": "down",
    "client_forward": "client",
    "up_hidden": "up",
    "server_forward": "server",
    "server_step": "server",
    "down_hidden": "down",
    "head": "client",
    "up_gradient": "up",
    "server_backward": "server",
    "down_gradient": "down",
    "client_backward": "client",
    "adapters_up": "up",
}
"""Every leg of a round, in its order, and what it occupies."""

FOLDED_BYTES = 4
"""A number of what joins the frozen base, which no codec rounds."""
LABEL_BYTES = 8
"""A token id on the wire."""


@dataclass(frozen=True)
class Leg:
    """One stage of a step or of a round."""

    name: str
    """One of LEGS."""
    seconds: float
    """How long it occupies its place when nothing else does; without the server's overhead of a group."""
    nbytes: float = 0.0
    """What it sends."""
    tokens: float = 0.0
    """Padded tokens, which limit how many clients the server groups."""

    @property
    def place(self) -> Place:
        """What it occupies."""
        return LEGS[self.name]


def step_legs(costs: SharedCosts, client: ClientProfile, cut: int) -> tuple[Leg, ...]:
    """The legs of one step, in order; they follow one another, so the step takes the sum of their seconds."""
    L, D = costs.sizes.blocks, costs.sizes.width
    check_cut(cut, L)
    work, device, server, wire = (
        client.workload,
        client.device,
        costs.server.device,
        client.wire or costs.wire,
    )
    padded = work.padded_tokens
    forward_s = cut * device.block_forward_s(padded)
    backward_s = cut * device.block_backward_s(padded)
    head_s = work.labelled_tokens * device.head_s_per_token
    if cut == L:
        return Leg("client_forward", forward_s), Leg("head", head_s), Leg("client_backward", backward_s)
    all_rows, labelled_rows = work.tokens * D, work.labelled_tokens * D
    (hide, show), (grade, read) = wire.hidden_s, wire.gradient_s  # to encode and to decode a number
    forward = Leg("client_forward", forward_s + all_rows * hide)
    backward = Leg("client_backward", backward_s + all_rows * read)
    head = Leg("head", head_s + labelled_rows * (show + grade))
    hidden = work.tokens * D * wire.hidden
    down_gradient = _down(client, "down_gradient", work.tokens * D * wire.gradient)
    forward_s = (L - cut) * server.block_forward_s(padded)
    backward_s = (L - cut) * server.block_backward_s(padded)
    if costs.labels == "server":
        head_s = work.labelled_tokens * server.head_s_per_token
        up = _up(client, "up_hidden", hidden + work.labelled_tokens * LABEL_BYTES)
        coding_s = all_rows * (show + grade)
        visit = Leg("server_step", forward_s + head_s + backward_s + coding_s, tokens=padded)
        return forward, up, visit, down_gradient, backward
    return (
        forward,
        _up(client, "up_hidden", hidden),
        Leg("server_forward", forward_s + all_rows * show + labelled_rows * hide, tokens=padded),
        _down(client, "down_hidden", work.labelled_tokens * D * wire.hidden),
        head,
        _up(client, "up_gradient", work.labelled_tokens * D * wire.gradient),
        Leg("server_backward", backward_s + labelled_rows * read + all_rows * grade, tokens=padded),
        down_gradient,
        backward,
    )


def adapter_legs(costs: SharedCosts, client: ClientProfile, cut: int) -> tuple[Leg, Leg]:
    """adapters_down and adapters_up of one round: the factors of the client's own blocks, as they travel.

    What is folded into the base travels in float32 at most at the members' rank sum, or the width if less.
    """
    sizes, rank, exchange = costs.sizes, costs.lora.rank, costs.adapter_traffic
    moments = 4 * costs.moments if costs.handed_on else 0  # they travel as they are kept, in float32
    whole = (
        [rank] * cut if exchange.full_rank else costs.ranks(cut)[:cut]
    )  # the global factors, whatever its own
    folded = sizes.adapter_parameters([min(exchange.folded_members * rank, sizes.width)] * cut)
    down = sizes.adapter_parameters(whole) * (exchange.down * costs.wire.adapter + moments)
    up = sizes.adapter_parameters(costs.ranks(cut, client.rank)[:cut]) * (
        exchange.up * costs.wire.adapter + moments
    )
    return _down(client, "adapters_down", down + folded * FOLDED_BYTES), _up(client, "adapters_up", up)


def exchange_legs(
    costs: SharedCosts, client: ClientProfile, cut: int
) -> tuple[tuple[Leg, ...], tuple[Leg, ...]]:
    """Legs before the first step of a round and after the last; none if adapters stay where they are."""
    if not costs.federated:
        return (), ()
    down, up = adapter_legs(costs, client, cut)
    return (down,), (up,)


def pipelined_step_s(micro_batch: Sequence[Leg], micro_batches: int) -> float:
    """Least seconds of a step whose micro-batches are all in flight: no schedule does it in less.

    Each place works through all its legs of all micro-batches, one at a time; and one micro-batch must go
    through its whole chain. `micro_batch` holds the legs of one: `step_legs` of the divided workload. With a
    single micro-batch this is the sum of the legs.
    """
    chain_s = sum(leg.seconds for leg in micro_batch)
    by_place: dict[Place, float] = {}
    for leg in micro_batch:
        by_place[leg.place] = by_place.get(leg.place, 0.0) + leg.seconds
    return max(chain_s, micro_batches * max(by_place.values()))


def round_seconds(costs: SharedCosts, client: ClientProfile, cut: int) -> dict[str, float]:
    """Seconds of a round by leg, with the server to itself: each visit pays the overhead of a group."""
    seconds: dict[str, float] = {}
    for leg, times in _round(costs, client, cut):
        overhead_s = costs.server.group_overhead_s if leg.place == "server" else 0.0
        seconds[leg.name] = times * (leg.seconds + overhead_s)
    return seconds


def round_bytes(costs: SharedCosts, client: ClientProfile, cut: int) -> dict[str, float]:
    """Bytes of a round by leg; legs that send nothing are left out."""
    return {leg.name: times * leg.nbytes for leg, times in _round(costs, client, cut) if leg.nbytes}


def move_seconds(
    costs: SharedCosts,
    client: ClientProfile,
    old: int,
    new: int,
    weights_kept: bool = False,
    moments_kept: bool = False,
) -> float:
    """Seconds that changing a client's cut takes before its next round can begin.

    Going deeper it fetches the frozen weights of the blocks between (unless `weights_kept` at the client),
    their adapters and, if the run keeps them, their moments; going shallower it hands over moments only.
    """
    if new == old:
        return 0.0
    low, high = sorted((old, new))
    factors = costs.sizes.adapter_parameters(costs.ranks(new, client.rank)[low:high])
    moments = factors * costs.moments * costs.wire.adapter if moments_kept else 0.0
    if new < old:
        return client.link.seconds_up(moments)
    weights = 0 if weights_kept else (high - low) * costs.sizes.block_parameters * costs.weight_bytes
    return client.link.seconds_down(weights + factors * costs.wire.adapter + moments)


def total_by_place(by_leg: Mapping[str, float], place: Place) -> float:
    """Sum over the legs that occupy this place."""
    return sum(value for leg, value in by_leg.items() if LEGS[leg] == place)


def _round(costs: SharedCosts, client: ClientProfile, cut: int) -> list[tuple[Leg, int]]:
    """The legs of a round, and how often each runs: those of a step for each of its micro-batches."""
    before, after = exchange_legs(costs, client, cut)
    parts = costs.parts(client.workload)
    steps = client.workload.steps * parts
    legs = step_legs(costs, replace(client, workload=client.workload.divided(parts)), cut)
    return [*((leg, 1) for leg in before), *((leg, steps) for leg in legs), *((leg, 1) for leg in after)]


def _up(client: ClientProfile, name: str, nbytes: float) -> Leg:
    return Leg(name, client.link.seconds_up(nbytes), nbytes)


def _down(client: ClientProfile, name: str, nbytes: float) -> Leg:
    return Leg(name, client.link.seconds_down(nbytes), nbytes)
