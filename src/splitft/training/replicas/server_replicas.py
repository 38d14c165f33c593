"""The server's blocks in several processes: each computes for its share of the clients.

    Server --forward, backward, step--> ServerReplicas --requests--> replica 0: clients a, c   blocks [k, L)
           <--as of one process--------                <--replies--- replica 1: clients b, d   blocks [k, L)

With a slot for each client (`per-client`) clients have nothing in common on the server but frozen weights, so
where each is computed changes nothing but rounding. They are divided by predicted work (`division`), for a
round. All replicas get their part of a group before the first reply is awaited, and a group has batches for
every replica, so they work at the same time.

This process holds no blocks. It keeps what outlives a round: moments and personal factors, from which
checkpoints are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

import torch

from splitft.adapters import AdapterState
from splitft.geometry import Plan, Span
from splitft.model import CPU, Model
from splitft.protocol import Activations, Message
from splitft.specs import SplitSpec, TrainingSpec
from splitft.training.batching import Group
from splitft.training.ranks import RankPolicy
from splitft.training.replicas.division import ReplicaPlan
from splitft.training.replicas.packet import Packet, under
from splitft.training.replicas.pool import ReplicaPool
from splitft.training.replicas.worker import ReplicaSetup
from splitft.training.server_blocks import ServerBlocks


@dataclass
class DividedGroup(Group):
    """A group whose clients' passes run in replicas."""

    number: int = 0
    """Its number at the replicas."""
    parts: dict[int, list[str]] = field(default_factory=dict)
    """Clients by replica."""


class ServerReplicas(ServerBlocks):
    """The server's blocks in replicas, with the interface of those in one process."""

    def __init__(
        self,
        model: Model,
        deepest: Span,
        ranks: RankPolicy,
        split: SplitSpec,
        training: TrainingSpec,
        plan: ReplicaPlan,
    ) -> None:
        """Start the replicas, and wait until each has loaded the blocks `deepest`.

        Raises ReplicaError if one ends meanwhile, or the error with which one has failed.
        """
        # no blocks and no head here; the first device is the one that averages
        blocks, headless = model.shape.blocks, split.model_copy(update={"labels": "client"})
        super().__init__(model, Span(blocks, blocks), ranks, headless, training, plan.devices[:1])
        self._split, self._plan = split, plan
        self._places: dict[str, int] = {}  # the replica of each client
        self._number = 0
        self._replicas = ReplicaPool([
            ReplicaSetup(model.spec, deepest, ranks, split, training, plan.devices_of(number))
            for number in range(plan.count)
        ])  # fmt: skip

    @property
    def pipelined(self) -> bool:
        """True if groups fill a pipeline of several devices."""
        return len(self._plan.devices_of(0)) > 1

    def close(self) -> None:
        """End the replicas."""
        self._replicas.close()

    def place_of(self, message: Message) -> torch.device:
        """Return the host: a message goes to its replica through it."""
        return CPU

    # --- rounds -----------------------------------------------------------------------------------

    def place(self, cuts: Mapping[str, int]) -> int:
        """Hold the blocks that these cuts leave to the server in each replica; return bytes read."""
        for cut in cuts.values():
            Plan(cut, self.segment.shape.blocks, self._split.labels)
        self.cuts = dict(cuts)
        self._divide(cuts)
        replies = self._replicas.ask_all([Packet("place", {"cuts": self.cuts})] * len(self._replicas))
        return sum(int(reply.fields["read"]) for reply in replies)

    def start(
        self, number: int, participants: Sequence[str], state: AdapterState, folded: AdapterState | None
    ) -> None:
        """Divide the participants, and load the round's factors for each where it is computed."""
        self._divide(participants)
        requests = []
        for clients in self._shares():
            request = self._with_factors("start", clients, state, folded, {"number": number})
            for i, name in enumerate(clients):
                held = range(self.cuts[name], self.segment.shape.blocks)
                moments = self.client_states.moments_of(name, held)
                request = _added(request, under(f"moments {i}", moments))
            requests.append(request)
        self._replicas.ask_all(requests)

    def trained(self, client: str) -> AdapterState:
        """Return the factors of blocks [k, L) trained for one client."""
        [reply] = self._replicas.ask({self._places[client]: Packet("trained", {"client": client})}).values()
        return AdapterState.from_tensors(reply.tensors)

    def finish(self) -> None:
        """End the round: keep moments and personal factors where the run keeps them."""
        for reply in self._replicas.ask_all([Packet("finish")] * len(self._replicas)):
            for i, name in enumerate(reply.fields["moments"]):
                self.client_states.moments[name] = reply.part(f"moments {i}")
            for i, name in enumerate(reply.fields["own"]):
                self.client_states.own[name] = AdapterState.from_tensors(reply.part(f"own {i}"))

    def install(self, state: AdapterState, folded: AdapterState | None) -> None:
        """Load the aggregated factors to evaluate with, for each client with its personal ones."""
        self._divide(self.cuts)
        self._replicas.ask_all([
            self._with_factors("install", clients, state, folded, {}) for clients in self._shares()
        ])  # fmt: skip

    # --- passes -----------------------------------------------------------------------------------

    def groups(self, messages: Sequence[Activations]) -> list[list[Activations]]:
        """Group batches to run together: in each group there is one of similar lengths for each replica."""
        shares: dict[int, list[Activations]] = {}
        for message in messages:
            shares.setdefault(self._places[message.client], []).append(message)
        groups = [ServerBlocks.groups(self, share) for _, share in sorted(shares.items())]
        return [list(chain.from_iterable(together)) for together in zip_longest(*groups, fillvalue=())]

    def forward(self, messages: Sequence[Activations], training: bool) -> Group:
        """Run batches, one of each client, from the cuts to the end."""
        self._number += 1
        group = DividedGroup(messages={message.client: message for message in messages}, number=self._number)
        requests = {}
        for place, part in self._parts(group.messages).items():
            group.parts[place] = part
            tensors: dict[str, torch.Tensor] = {}
            plain = []
            for i, message in enumerate(group.messages[client] for client in part):
                values = {name: getattr(message, name) for name in type(message).model_fields}
                held = {name: one for name, one in values.items() if isinstance(one, torch.Tensor)}
                tensors |= under(str(i), held)
                plain.append({name: one for name, one in values.items() if name not in held})
            fields = {"group": group.number, "training": training, "messages": plain}
            requests[place] = Packet("forward", fields, tensors)
        try:
            self._replicas.ask(requests)
        except Exception:  # nobody will ask for the parts that have succeeded
            self._replicas.post(dict.fromkeys(requests, Packet("drop", {"group": group.number})))
            raise
        return group

    def outputs(self, group: Group) -> dict[str, torch.Tensor]:
        """Return the hidden states of each client after the last block, (M, D)."""
        return {client: tensor for client, (_, tensor) in self._ask_parts(group, "outputs").items()}

    def losses_and_gradients(self, group: Group) -> dict[str, tuple[float, torch.Tensor]]:
        """Return each client's mean loss and its gradient at the outputs, where labels are here."""
        return self._ask_parts(group, "losses_and_gradients")

    def held_out_sums(self, group: Group) -> dict[str, tuple[float, int]]:
        """Return each client's summed loss and right predictions, where labels are here."""
        sums = self._ask_parts(group, "held_out_sums")
        return {client: (loss, correct) for client, ((loss, correct), _) in sums.items()}

    def backward(
        self,
        group: Group,
        gradients: Mapping[str, torch.Tensor],
        weights: Mapping[str, int],
        retain_graph: bool,
    ) -> dict[str, torch.Tensor]:
        """Run backward from gradients at these clients' outputs; return those at their cuts.

        A replica knows for itself whether clients of its part are still to come.
        """
        assert isinstance(group, DividedGroup)
        parts = self._parts(gradients)
        replies = self._replicas.ask({
            place: Packet(
                "backward",
                {"group": group.number, "weights": {client: weights[client] for client in part}},
                {str(i): gradients[client] for i, client in enumerate(part)},
            )
            for place, part in parts.items()
        })  # fmt: skip
        return {
            client: replies[place].tensors[str(i)]
            for place, part in parts.items()
            for i, client in enumerate(part)
        }

    def step(self, weights: Mapping[str, int]) -> None:
        """Step the optimizers of clients that have completed a step; the server does not wait for it."""
        self._replicas.post({
            place: Packet("step", {"weights": {client: weights[client] for client in part}})
            for place, part in self._parts(weights).items()
        })  # fmt: skip

    def forget(self, client: str) -> None:
        """Drop what the client's current step has added to its gradients."""
        if client in self._places:
            self._replicas.post({self._places[client]: Packet("forget", {"client": client})})

    def leave(self, client: str) -> None:
        """Drop a participant that takes no further part in the round."""
        if client in self._places:
            self._replicas.post({self._places[client]: Packet("leave", {"client": client})})

    # ----------------------------------------------------------------------------------------------

    def _divide(self, clients: Iterable[str]) -> None:
        blocks = self.segment.shape.blocks
        self._places = self._plan.divide({name: blocks - self.cuts[name] for name in clients})

    def _shares(self) -> list[list[str]]:
        """Return the clients of each replica."""
        return [
            [name for name, place in self._places.items() if place == number]
            for number in range(len(self._replicas))
        ]

    def _parts(self, clients: Iterable[str]) -> dict[int, list[str]]:
        """Return these clients by replica."""
        parts: dict[int, list[str]] = {}
        for client in clients:
            parts.setdefault(self._places[client], []).append(client)
        return parts

    def _with_factors(
        self,
        kind: str,
        clients: Sequence[str],
        state: AdapterState,
        folded: AdapterState | None,
        fields: Mapping[str, Any],
    ) -> Packet:
        """Return a request with global factors, and with the personal ones of a replica's clients."""
        held = Span(min(self.cuts.values()), self.segment.shape.blocks)
        tensors = under("state", state.within(held).tensors())
        if folded is not None:
            tensors |= under("folded", folded.within(held).tensors())
        for i, name in enumerate(clients):
            tensors |= under(f"own {i}", self.client_states.own.get(name, AdapterState()).tensors())
        cuts = {name: self.cuts[name] for name in clients}
        return Packet(kind, {**fields, "cuts": cuts, "folds": folded is not None}, tensors)

    def _ask_parts(self, group: Group, kind: str) -> dict[str, tuple[Any, Any]]:
        """Ask each replica for its part of a group; return the plain value and the tensor of each client."""
        assert isinstance(group, DividedGroup)
        replies = self._replicas.ask({place: Packet(kind, {"group": group.number}) for place in group.parts})
        found = {}
        for place, part in group.parts.items():
            values = replies[place].fields.get("values", [None] * len(part))
            for i, (client, value) in enumerate(zip(part, values, strict=True)):
                found[client] = value, replies[place].tensors.get(str(i))
        return {client: found[client] for client in group.messages}


def _added(request: Packet, tensors: Mapping[str, torch.Tensor]) -> Packet:
    return Packet(request.kind, request.fields, {**request.tensors, **tensors})
