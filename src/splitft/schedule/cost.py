"""Costs of a cut for one client: seconds and bytes, leg by leg.

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

With `training.checkpoint_blocks` a backward pass includes another forward pass of its blocks.

N real tokens and M labelled ones a step, D width, L blocks, k the cut. Machines compute padded tokens, links
carry real ones. The time of waiting for the server depends on the other clients' cuts: `clock` simulates it.
A link carries one message at a time, and each message takes the latency once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from splitft.geometry import check_cut
from splitft.schedule.profile import Device
from splitft.schedule.workload import ClientProfile, SharedCosts

Place = Literal["client", "up", "down", "server"]
"""The resource that a leg occupies: the client's processor, its link in one direction, or the server."""

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
"""Every leg of a round, in order, with its place."""

FOLDED_BYTES = 4
"""Bytes of a number that is folded into the frozen base, which no codec rounds."""
LABEL_BYTES = 8
"""Bytes of a token id on the wire."""


@dataclass(frozen=True)
class Leg:
    """One stage of a step or of a round."""

    name: str
    """One of LEGS."""
    seconds: float
    """Seconds for which it occupies its place alone, without the server's overhead of a group."""
    nbytes: float = 0.0
    """Bytes that it sends."""
    tokens: float = 0.0
    """Padded tokens, which limit the server's groups."""
    shared_s: float = 0.0
    """The part of `seconds` that a group at the server has once: fixed time of blocks, for any tokens."""

    @property
    def place(self) -> Place:
        """The place that it occupies."""
        return LEGS[self.name]

    def scaled(self, ratio: float) -> Leg:
        """Return the leg with so many times its seconds."""
        return replace(self, seconds=self.seconds * ratio, shared_s=self.shared_s * ratio)


def step_legs(costs: SharedCosts, client: ClientProfile, cut: int) -> tuple[Leg, ...]:
    """Return the legs of one step, in order; without waiting, a step takes the sum of their seconds."""
    L, D = costs.sizes.blocks, costs.sizes.width
    check_cut(cut, L)
    work, device, wire = client.workload, client.device, client.wire or costs.wire
    padded, rows, labelled_rows = work.padded_tokens, work.tokens * D, work.labelled_tokens * D
    # the client's processor: its blocks, head and codecs
    forward_s = cut * device.block_forward_s(padded)
    backward_s = cut * _backward_s(costs, device, padded)
    head_s = work.labelled_tokens * device.head_s_per_token
    if cut == L:
        return Leg("client_forward", forward_s), Leg("head", head_s), Leg("client_backward", backward_s)
    (encode_hidden_s, decode_hidden_s), (encode_grad_s, decode_grad_s) = wire.hidden_s, wire.gradient_s
    forward = Leg("client_forward", forward_s + rows * encode_hidden_s)
    head = Leg("head", head_s + labelled_rows * (decode_hidden_s + encode_grad_s))
    backward = Leg("client_backward", backward_s + rows * decode_grad_s)
    down_gradient = _down(client, "down_gradient", rows * wire.gradient)
    # the server: the other blocks, with labels there also the head
    server = costs.server.device
    server_forward_s = (L - cut) * server.block_forward_s(padded)
    server_backward_s = (L - cut) * _backward_s(costs, server, padded)
    fixed_s = (L - cut) * server.block_forward_s(0), (L - cut) * _backward_s(costs, server, 0)
    if costs.labels == "server":
        server_s = server_forward_s + work.labelled_tokens * server.head_s_per_token + server_backward_s
        server_s += rows * (decode_hidden_s + encode_grad_s)
        server_step = Leg("server_step", server_s, tokens=padded, shared_s=sum(fixed_s))
        up_hidden = _up(client, "up_hidden", rows * wire.hidden + work.labelled_tokens * LABEL_BYTES)
        return forward, up_hidden, server_step, down_gradient, backward
    server_forward_s = server_forward_s + rows * decode_hidden_s + labelled_rows * encode_hidden_s
    server_backward_s = server_backward_s + labelled_rows * decode_grad_s + rows * encode_grad_s
    return (
        forward,
        _up(client, "up_hidden", rows * wire.hidden),
        Leg("server_forward", server_forward_s, tokens=padded, shared_s=fixed_s[0]),
        _down(client, "down_hidden", labelled_rows * wire.hidden),
        head,
        _up(client, "up_gradient", labelled_rows * wire.gradient),
        Leg("server_backward", server_backward_s, tokens=padded, shared_s=fixed_s[1]),
        down_gradient,
        backward,
    )


def _backward_s(costs: SharedCosts, device: Device, padded_tokens: float) -> float:
    """Return the seconds of one block's backward pass, with its forward pass if that is computed again."""
    again_s = device.block_forward_s(padded_tokens) if costs.checkpoint_blocks else 0.0
    return again_s + device.block_backward_s(padded_tokens)


def adapter_legs(costs: SharedCosts, client: ClientProfile, cut: int) -> tuple[Leg, Leg]:
    """Return adapters_down and adapters_up of one round: the factors of the client's blocks, as encoded.

    An update that is folded into the base is sent in float32, with rank the sum of the participants' ranks,
    but at most the width.
    """
    sizes, rank, traffic = costs.sizes, costs.lora.rank, costs.adapter_traffic
    moments = 4 * costs.moments if costs.handed_on else 0  # sent as they are stored, in float32
    # what is received has the ranks of the global factors, what is sent the client's own
    received = sizes.adapter_parameters([rank] * cut if traffic.full_rank else costs.ranks(cut)[:cut])
    sent = sizes.adapter_parameters(costs.ranks(cut, client.rank)[:cut])
    folded = sizes.adapter_parameters([min(traffic.folded_members * rank, sizes.width)] * cut)
    down = received * (traffic.down * costs.wire.adapter + moments) + folded * FOLDED_BYTES
    up = sent * (traffic.up * costs.wire.adapter + moments)
    return _down(client, "adapters_down", down), _up(client, "adapters_up", up)


def exchange_legs(
    costs: SharedCosts, client: ClientProfile, cut: int
) -> tuple[tuple[Leg, ...], tuple[Leg, ...]]:
    """Return the legs before a round's first step and after its last; none if adapters are not sent."""
    if not costs.federated:
        return (), ()
    down, up = adapter_legs(costs, client, cut)
    return (down,), (up,)


def round_seconds(costs: SharedCosts, client: ClientProfile, cut: int) -> dict[str, float]:
    """Return the seconds of a round by leg, alone on the server: each server leg has a group's overhead."""
    seconds: dict[str, float] = {}
    for leg, times in _round(costs, client, cut):
        overhead_s = costs.server.group_overhead_s if leg.place == "server" else 0.0
        seconds[leg.name] = times * (leg.seconds + overhead_s)
    return seconds


def round_bytes(costs: SharedCosts, client: ClientProfile, cut: int) -> dict[str, float]:
    """Return the bytes of a round by leg, without legs that send nothing."""
    return {leg.name: times * leg.nbytes for leg, times in _round(costs, client, cut) if leg.nbytes}


def move_seconds(
    costs: SharedCosts, client: ClientProfile, old: int, new: int, moments_kept: bool = False
) -> float:
    """Return the seconds of changing a client's cut, before its next round can begin.

    For a deeper cut the client receives the frozen weights of the blocks between, their adapters and, with
    `moments_kept`, their optimizer moments. For a shallower one it sends the moments alone.
    """
    if new == old:
        return 0.0
    low, high = sorted((old, new))
    factors = costs.sizes.adapter_parameters(costs.ranks(new, client.rank)[low:high])
    moments = factors * costs.moments * costs.wire.adapter if moments_kept else 0.0
    if new < old:
        return client.link.seconds_up(moments)
    weights = (high - low) * costs.sizes.block_parameters * costs.weight_bytes
    return client.link.seconds_down(weights + factors * costs.wire.adapter + moments)


def total_by_place(by_leg: Mapping[str, float], place: Place) -> float:
    """Return the sum over the legs that occupy this place."""
    return sum(value for leg, value in by_leg.items() if LEGS[leg] == place)


def _round(costs: SharedCosts, client: ClientProfile, cut: int) -> list[tuple[Leg, int]]:
    """Return the legs of a round, and how often each runs: those of a step for each of its micro-batches."""
    before, after = exchange_legs(costs, client, cut)
    parts = costs.parts(client.workload)
    steps = client.workload.steps * parts
    legs = step_legs(costs, replace(client, workload=client.workload.divided(parts)), cut)
    return [*((leg, 1) for leg in before), *((leg, steps) for leg in legs), *((leg, 1) for leg in after)]


def _up(client: ClientProfile, name: str, nbytes: float) -> Leg:
    return Leg(name, client.link.seconds_up(nbytes), nbytes)


def _down(client: ClientProfile, name: str, nbytes: float) -> Leg:
    return Leg(name, client.link.seconds_down(nbytes), nbytes)
