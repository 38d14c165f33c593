"""The whole federation in one process: the same client and server objects, on metered channels.

Local steps are synchronous: all participants run forward, the server works in groups, all run backward. Real
federations need not be synchronous; results do not depend on it, because every client has its own factors on
the server (with shared factors the method itself is synchronous). A step's micro-batches run one after the
other: how many are in flight at once matters only to the simulated clock.

With `split.server_adapters: shared-by-arrival` results do depend on the order in which steps begin and
complete at the server, and an `ArrivalOrder` gives it: in a run that of the simulated clock. A step is a
function of the factors with which it began, so it may run as a whole when it completes.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from splitft.adapters import AdapterState
from splitft.geometry import Span
from splitft.model.devices import synchronize
from splitft.protocol import (
    Activations,
    AdapterUpload,
    CutGradient,
    Evaluation,
    GlobalAdapters,
    HeadGradient,
    Message,
    MessageSerializer,
    RoundReady,
    RoundStart,
    expect,
)
from splitft.protocol.channel import Channel, Tap
from splitft.protocol.serializer import always
from splitft.schedule.arrival_order import ArrivalOrder, one_at_a_time, waves
from splitft.tracking.events import Role, StepDone, Traffic
from splitft.training.client import Client
from splitft.training.run_state import RunState, Steps
from splitft.training.server import Server

K = TypeVar("K")
M = TypeVar("M", bound=Message)


class Simulation:
    """Carrier of the messages between one server and its clients. Implements `rounds.Federation`."""

    def __init__(
        self,
        server: Server,
        clients: Sequence[Client],
        terms: MessageSerializer | Mapping[str, MessageSerializer],
        tap: Tap | None = None,
        seed: int = 0,
        order: ArrivalOrder = one_at_a_time,
    ) -> None:
        """Connect the parties; `terms` are common or by client, `seed` fixes random rounding.

        `order` is that of steps at the server, where it matters (`shared-by-arrival`).
        """
        self.server, self._order = server, order
        self.clients: Mapping[str, Client] = {client.name: client for client in clients}
        self._channels = {
            name: Channel(
                name,
                terms if isinstance(terms, MessageSerializer) else terms[name],
                tap,
                seed,
                {"client": always(client.segment.device), "server": server.blocks.place_of},
            )
            for name, client in self.clients.items()
        }
        segments = (server.segment, *(client.segment for client in clients))
        self._devices = tuple(dict.fromkeys(device for one in segments for device in one.devices))
        self._counted: dict[str, list[Traffic]] = {name: [] for name in self.clients}
        self._seconds: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))

    def start(self, messages: Mapping[str, RoundStart]) -> dict[str, RoundReady]:
        """Begin a round with these clients."""
        ready = {}
        for name, message in messages.items():
            channel = self._channels[name]
            ready[name] = channel.up(self.clients[name].start(channel.down(message)))
        return _all(RoundReady, ready)

    def train(
        self, number: int, participants: Sequence[str], steps: Steps, listener: Callable[[StepDone], None]
    ) -> dict[str, AdapterUpload]:
        """Run the round's local steps; return the clients' uploads."""
        self._count(participants)
        counts = dict.fromkeys(participants, steps) if isinstance(steps, int) else steps
        most = max(counts.values(), default=0)
        split = [name for name in participants if not self.clients[name].whole]
        for index in range(most):
            for name in participants:
                if self.clients[name].whole and index < counts[name]:
                    listener(self._step_alone(name))
            if not self.server.blocks.by_arrival:
                self._step_together([name for name in split if index < counts[name]], listener)
        if self.server.blocks.by_arrival:  # where all take as many
            self._step_in_order(number, split, most, listener)
        uploads = {name: self._channels[name].up(self.clients[name].upload()) for name in participants}
        return _all(AdapterUpload, uploads)

    def install(self, messages: Mapping[str, GlobalAdapters], state: RunState) -> None:
        """Send every client the aggregated factors of its blocks."""
        for name, message in messages.items():
            self.clients[name].install(self._channels[name].down(message))

    def undo(self, messages: Mapping[str, GlobalAdapters], state: RunState) -> None:
        """Send every client the adapters of `state` again; its optimizer and its codecs begin anew."""
        for name, client in self.clients.items():
            for end in self._channels[name].ends.values():
                end.restart()
            span = Span(0, state.cuts[name])
            known = state.adapters.within(span).replace_B(client.own()).updated(client.private())
            client.restore(span.stop, known, client.steps, {}, state.folded.within(span))
        self.install(messages, state)

    def evaluate(self) -> dict[str, Evaluation]:
        """Evaluate the global adapters on every client's held-out text."""
        evaluators = {name: client.held_out for name, client in self.clients.items()}
        for index in range(max(len(one) for one in evaluators.values())):
            names = [name for name, one in evaluators.items() if index < len(one)]
            for name in names:
                if self.clients[name].whole:
                    evaluators[name].alone(index)
            names = [name for name in names if not self.clients[name].whole]
            sent = {name: self._channels[name].up(evaluators[name].forward(index)) for name in names}
            for group in self._groups(list(_all(Activations, sent).values())):
                for name, reply in self.server.forward(group).items():
                    evaluators[name].head(self._channels[name].down(reply))
        results = {name: self._channels[name].up(one.result()) for name, one in evaluators.items()}
        return _all(Evaluation, results)

    def traffic(self) -> dict[str, Traffic]:
        """Return bytes of each client since the last call, without those of steps, which events report."""
        self._count(list(self._channels))
        total = {name: _sum(parts) for name, parts in self._counted.items()}
        self._counted = {name: [] for name in self._channels}
        return total

    def codec_states(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the states of codecs that learn, by client and end of its channel, for a checkpoint."""
        states = {
            f"{name}/{end}": state.tensors()
            for name, channel in self._channels.items()
            for end, state in channel.ends.items()
        }
        return {owner: tensors for owner, tensors in states.items() if tensors}

    def restore_codecs(
        self, states: Mapping[str, Mapping[str, torch.Tensor]], known: Mapping[str, AdapterState]
    ) -> dict[str, AdapterState]:
        """Restore the states of codecs from a checkpoint and the global factors of each client's blocks.

        Return these factors as each client has them: as they arrived, where the codec rounds them.
        """
        arrived = {}
        for name, channel in self._channels.items():
            for end, state in channel.ends.items():
                state.restore(states.get(f"{name}/{end}", {}))
                if not state.adapters.held:
                    state.adapters.restore({f"global/{n}": t for n, t in known[name].tensors().items()})
            arrived[name] = AdapterState.from_tensors(channel.ends["client"].adapters.global_factors())
        return arrived

    # ----------------------------------------------------------------------------------------------

    def _groups(self, messages: list[Activations]) -> list[list[Activations]]:
        return self.server.groups(messages) if messages else []

    def _step_together(self, names: Sequence[str], listener: Callable[[StepDone], None]) -> None:
        """Run one step of each of these clients, one micro-batch of all after the other."""
        due = list(names)
        while due:
            sent: list[Message] = []
            for name in due:
                with self._timed("client_forward", [name]):
                    activations = self.clients[name].forward()
                sent.append(self._channels[name].up(activations))
            for group in self._groups(list(_all(Activations, dict(enumerate(sent))).values())):
                for step in self._step(group):
                    listener(step)
            due = [name for name in due if self.clients[name].unsent]

    def _step_in_order(
        self, number: int, names: Sequence[str], steps: int, listener: Callable[[StepDone], None]
    ) -> None:
        """Run all steps of the round in their order of arrival."""
        cuts = {name: self.clients[name].plan.cut for name in names}
        divided = self.server.training.micro_batches > 1
        for event, clients in waves(self._order(number, cuts, steps)):
            if event == "begins":
                self.server.blocks.begin(clients)
            else:  # steps in parts do not end together, so each runs by itself
                for due in [[client] for client in clients] if divided else [clients]:
                    self._step_together(due, listener)

    def _step_alone(self, name: str) -> StepDone:
        """Run one step of a client that needs no server: nothing is sent."""
        with self._timed("client_step", [name]):
            totals = self.clients[name].step_alone()
        return totals.event(name, self._seconds.pop(name))

    def _step(self, group: Sequence[Activations]) -> Iterator[StepDone]:
        """Run one micro-batch of a group's clients from the cut on; yield the steps that it completes."""
        names = [message.client for message in group]
        # server forward; client head, server backward, unless the server has labels and did it all at once
        with self._timed("server_forward", names):
            replies: Mapping[str, Message] = self.server.forward(group)
        if not all(isinstance(reply, CutGradient) for reply in replies.values()):
            gradients: dict[str, Message] = {}
            for name in names:
                reply = self._channels[name].down(replies[name])
                with self._timed("head", [name]):
                    gradient = self.clients[name].head(reply)
                gradients[name] = self._channels[name].up(gradient)
            with self._timed("server_backward", names):
                replies = self.server.backward(list(_all(HeadGradient, gradients).values()))
        # client backward
        for name in names:
            reply = self._channels[name].down(replies[name])
            with self._timed("client_backward", [name]):
                self.clients[name].backward(reply)
            if totals := self.server.completed_step(name):
                yield totals.event(name, self._seconds.pop(name), self._channels[name].traffic())

    def _count(self, names: Sequence[str]) -> None:
        """Count the traffic up to now apart from that of the next steps."""
        for name in names:
            self._counted[name].append(self._channels[name].traffic())

    @contextmanager
    def _timed(self, leg: str, names: Sequence[str]) -> Iterator[None]:
        """Charge wall time in equal parts to these clients, that of all work which a device was given."""
        began = time.perf_counter()
        yield
        synchronize(self._devices)
        spent = (time.perf_counter() - began) / len(names)
        for name in names:
            self._seconds[name][leg] += spent


def _all(kind: type[M], messages: Mapping[K, Message]) -> dict[K, M]:
    """Return these messages, all of one kind."""
    return {key: expect(message, kind) for key, message in messages.items()}


def _sum(parts: Sequence[Traffic]) -> Traffic:
    up: Counter[Role] = Counter()
    down: Counter[Role] = Counter()
    for part in parts:
        up.update(part.up)
        down.update(part.down)
    return Traffic(up=dict(up), down=dict(down))
