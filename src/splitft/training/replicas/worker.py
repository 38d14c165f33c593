"""A replica: the server's blocks and factors for its share of the clients, which does what it is asked.

    place, start, (forward, outputs, backward, step) ..., trained, finish, install      a reply to each

Between rounds the replica has nothing that counts: moments and personal factors come with `start` and go back
with `finish`, so a client may be with another replica in each round. Groups of clients between forward and
backward pass go by the number under which the server knows them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

import torch

from splitft.adapters import AdapterState
from splitft.geometry import Span
from splitft.model import open_model
from splitft.protocol import Activations
from splitft.specs import ModelSpec, SplitSpec, TrainingSpec
from splitft.training.batching import Group
from splitft.training.ranks import RankPolicy
from splitft.training.replicas.packet import Packet, read_packet, under, write_packet
from splitft.training.server_blocks import ServerBlocks

FAILED = "failed"
"""Kind of a reply that says how a request has failed."""


@dataclass(frozen=True)
class ReplicaSetup:
    """The arguments of a replica."""

    model: ModelSpec
    """The model, with a type instead of `auto`."""
    deepest: Span
    """The blocks that it loads first."""
    ranks: RankPolicy
    split: SplitSpec
    training: TrainingSpec
    devices: tuple[torch.device, ...]


def serve(setup: ReplicaSetup, requests: IO[bytes], replies: IO[bytes], at_end: Callable[[], None]) -> None:
    """Load the blocks and answer requests until the server closes the pipe; then call `at_end`.

    Requests are read while the replica computes, so the server never waits to hand one over; and a replica
    whose server has died notices at once, in the middle of a pass.
    """
    queue: SimpleQueue[Packet | None] = SimpleQueue()

    def receive() -> None:
        try:
            while True:
                queue.put(read_packet(requests))
        except (EOFError, OSError):
            at_end()
            queue.put(None)

    Thread(target=receive, daemon=True).start()
    with contextlib.suppress(OSError):  # the server is gone
        try:
            worker = ReplicaWorker(setup)
        except Exception as error:
            write_packet(replies, _failure(error))
            return
        write_packet(replies, Packet("ready"))
        while (request := queue.get()) is not None:
            write_packet(replies, worker.answer(request))


class ReplicaWorker:
    """The replica's side of the conversation with the server."""

    def __init__(self, setup: ReplicaSetup) -> None:
        """Load the blocks."""
        model = open_model(setup.model, setup.devices)
        self._blocks = ServerBlocks(
            model, setup.deepest, setup.ranks, setup.split, setup.training, setup.devices
        )
        self._groups: dict[int, Group] = {}
        self._waiting: dict[int, set[str]] = {}  # clients of each group whose pass is not complete
        self._answers: dict[str, Callable[[Packet], Packet]] = {
            "place": self._place,
            "start": self._start,
            "forward": self._forward,
            "outputs": self._outputs,
            "losses_and_gradients": self._losses_and_gradients,
            "held_out_sums": self._held_out_sums,
            "backward": self._backward,
            "step": self._step,
            "drop": self._drop,
            "trained": self._trained,
            "finish": self._finish,
            "install": self._install,
            "forget": self._forget,
            "leave": self._leave,
        }

    def answer(self, request: Packet) -> Packet:
        """Return the reply to a request, which says so if it has failed."""
        try:
            return self._answers[request.kind](request)
        except Exception as error:  # the server decides what it means
            return _failure(error)

    # --- rounds -----------------------------------------------------------------------------------

    def _place(self, request: Packet) -> Packet:
        return Packet("place", {"read": self._blocks.place(request.fields["cuts"])})

    def _start(self, request: Packet) -> Packet:
        self._clear()
        self._take_over(request)
        names = list(request.fields["cuts"])
        kept = self._blocks.client_states
        kept.moments = {
            name: moments for i, name in enumerate(names) if (moments := request.part(f"moments {i}"))
        }
        self._blocks.start(request.fields["number"], names, *_factors(request))
        return Packet("start")

    def _trained(self, request: Packet) -> Packet:
        return Packet("trained", tensors=self._blocks.trained(request.fields["client"]).tensors())

    def _finish(self, request: Packet) -> Packet:
        """End the round; hand moments and personal factors back, and keep none."""
        self._clear()
        kept = self._blocks.client_states
        kept.moments, kept.own = {}, {}
        self._blocks.finish()
        tensors: dict[str, torch.Tensor] = {}
        for i, moments in enumerate(kept.moments.values()):
            tensors |= under(f"moments {i}", moments)
        for i, own in enumerate(kept.own.values()):
            tensors |= under(f"own {i}", own.tensors())
        reply = Packet("finish", {"moments": list(kept.moments), "own": list(kept.own)}, tensors)
        kept.moments, kept.own = {}, {}
        return reply

    def _install(self, request: Packet) -> Packet:
        self._clear()
        self._take_over(request)
        self._blocks.install(*_factors(request))
        return Packet("install")

    def _take_over(self, request: Packet) -> None:
        """Serve these clients from now on, with their personal factors."""
        self._blocks.cuts = dict(request.fields["cuts"])
        states = {
            name: AdapterState.from_tensors(request.part(f"own {i}"))
            for i, name in enumerate(self._blocks.cuts)
        }
        self._blocks.client_states.own = {name: own for name, own in states.items() if own}

    # --- steps ------------------------------------------------------------------------------------

    def _forward(self, request: Packet) -> Packet:
        messages = [
            Activations.model_validate({**fields, **request.part(str(i))})
            for i, fields in enumerate(request.fields["messages"])
        ]
        number = request.fields["group"]
        self._groups[number] = self._blocks.forward(messages, request.fields["training"])
        self._waiting[number] = {message.client for message in messages}
        return Packet("forward")

    def _outputs(self, request: Packet) -> Packet:
        group = self._groups[request.fields["group"]]
        outputs = self._blocks.outputs(group)
        self._end_evaluation(request)
        return Packet("outputs", tensors=_numbered(outputs, list(group.messages)))

    def _losses_and_gradients(self, request: Packet) -> Packet:
        group = self._groups[request.fields["group"]]
        graded = self._blocks.losses_and_gradients(group)
        gradients = _numbered({client: one for client, (_, one) in graded.items()}, list(group.messages))
        losses = [graded[client][0] for client in group.messages]
        return Packet("losses_and_gradients", {"values": losses}, gradients)

    def _held_out_sums(self, request: Packet) -> Packet:
        group = self._groups[request.fields["group"]]
        sums = self._blocks.held_out_sums(group)
        self._end_evaluation(request)
        return Packet("held_out_sums", {"values": [sums[client] for client in group.messages]})

    def _backward(self, request: Packet) -> Packet:
        """Run backward for some clients of a group; keep its graph while others' gradients are to come."""
        number, weights = request.fields["group"], dict[str, int](request.fields["weights"])
        gradients = {client: request.tensors[str(i)] for i, client in enumerate(weights)}
        others = self._waiting[number] - weights.keys()
        at_cuts = self._blocks.backward(self._groups[number], gradients, weights, bool(others))
        self._leave_groups(weights, [number])
        return Packet("backward", tensors=_numbered(at_cuts, list(weights)))

    def _step(self, request: Packet) -> Packet:
        self._blocks.step(request.fields["weights"])
        return Packet("step")

    def _drop(self, request: Packet) -> Packet:
        number = request.fields["group"]
        self._groups.pop(number, None)
        self._waiting.pop(number, None)
        return Packet("drop")

    def _forget(self, request: Packet) -> Packet:
        self._leave_groups([request.fields["client"]], list(self._groups))
        self._blocks.forget(request.fields["client"])
        return Packet("forget")

    def _leave(self, request: Packet) -> Packet:
        self._leave_groups([request.fields["client"]], list(self._groups))
        self._blocks.leave(request.fields["client"])
        return Packet("leave")

    def _leave_groups(self, clients: Mapping[str, Any] | list[str], numbers: list[int]) -> None:
        """Wait for nothing more of these clients in these groups; drop a group that waits for nobody."""
        for number in numbers:
            self._waiting[number] -= set(clients)
            if not self._waiting[number]:
                del self._groups[number], self._waiting[number]

    def _end_evaluation(self, request: Packet) -> None:
        number = request.fields["group"]
        if not next(iter(self._groups[number].messages.values())).training:
            self._drop(request)

    def _clear(self) -> None:
        self._groups, self._waiting = {}, {}


def _factors(request: Packet) -> tuple[AdapterState, AdapterState | None]:
    """Return the global factors of a request, and what is folded into the base."""
    folded = AdapterState.from_tensors(request.part("folded")) if request.fields["folds"] else None
    return AdapterState.from_tensors(request.part("state")), folded


def _numbered(tensors: Mapping[str, torch.Tensor], order: list[str]) -> dict[str, torch.Tensor]:
    """Return clients' tensors by their place in this order."""
    return {str(i): tensors[client] for i, client in enumerate(order)}


def _failure(error: Exception) -> Packet:
    return Packet(FAILED, {"type": type(error).__name__, "text": str(error)})
