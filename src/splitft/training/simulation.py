"""The whole federation in one process: the same client and server objects, on metered lines.

Each local step of all participants is played at once: all forward, the server in groups, all backward. Real
federations need not be in step; results do not depend on it, since every client has its own
factors on the server (with shared factors, in step is what the method means). A step's micro-batches are
played one after the other: how many are underway at once is a matter of time, and the simulated clock's.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from splitft.adapters import AdapterState
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
)
from splitft.protocol.channel import Channel, Tap
from splitft.tracking.events import Role, StepDone, Traffic
from splitft.training.client import Client
from splitft.training.micro_batch import StepTotals
from splitft.training.rounds import RunState
from splitft.training.server import Server

K = TypeVar("K")
M = TypeVar("M", bound=Message)


class Simulation:
    """Carries the messages between one server and its clients. Implements `rounds.Federation`."""

    def __init__(
        self,
        server: Server,
        clients: Sequence[Client],
        terms: MessageSerializer | Mapping[str, MessageSerializer],
        tap: Tap | None = None,
        seed: int = 0,
    ) -> None:
        """`terms` are for all, or one for each client; `seed` is that of rounding at random."""
        self.server = server
        self.clients: Mapping[str, Client] = {client.name: client for client in clients}
        self._lines = {
            name: Channel(name, terms if isinstance(terms, MessageSerializer) else terms[name], tap, seed)
            for name in self.clients
        }
        self._tallies: dict[str, StepTotals] = {}  # of steps that have begun
        self._aside: dict[str, list[Traffic]] = {name: [] for name in self.clients}
        self._seconds: dict[str, defaultdict[str, float]] = {
            name: defaultdict(float) for name in self.clients
        }

    def start(self, messages: Mapping[str, RoundStart]) -> dict[str, RoundReady]:
        """Begin a round with these clients."""
        ready = {}
        for name, message in messages.items():
            line = self._lines[name]
            ready[name] = line.up(self.clients[name].start(line.down(message)))
        return _all(RoundReady, ready)

    def train(
        self, number: int, participants: Sequence[str], steps: int, listener: Callable[[StepDone], None]
    ) -> dict[str, AdapterUpload]:
        """Play the round's local steps; returns the clients' factors."""
        self._set_aside(participants)
        for _ in range(steps):
            for name in participants:
                if self.clients[name].whole:
                    listener(self._step_alone(number, name))
            due = [name for name in participants if not self.clients[name].whole]
            while due:
                sent: list[Message] = []
                for name in due:
                    with self._timed("client_forward", [name]):
                        activations = self.clients[name].forward()
                    sent.append(self._lines[name].up(activations))
                for group in self._groups(list(_all(Activations, dict(enumerate(sent))).values())):
                    for step in self._step(number, group):
                        listener(step)
                due = [name for name in due if self.clients[name].unsent]
        uploads = {name: self._lines[name].up(self.clients[name].upload()) for name in participants}
        return _all(AdapterUpload, uploads)

    def install(self, messages: Mapping[str, GlobalAdapters], state: RunState) -> None:
        """Hand every client the aggregated factors of its blocks."""
        for name, message in messages.items():
            self.clients[name].install(self._lines[name].down(message))

    def evaluate(self) -> dict[str, Evaluation]:
        """Held-out loss of the global adapters on every client's text."""
        for index in range(max(client.held_out_batches for client in self.clients.values())):
            names = [name for name, client in self.clients.items() if index < client.held_out_batches]
            for name in names:
                if self.clients[name].whole:
                    self.clients[name].held_out_alone(index)
            names = [name for name in names if not self.clients[name].whole]
            sent = {name: self._lines[name].up(self.clients[name].held_out(index)) for name in names}
            for group in self._groups(list(_all(Activations, sent).values())):
                for name, reply in self.server.forward(group).items():
                    self.clients[name].held_out_head(self._lines[name].down(reply))
        return _all(Evaluation, {n: self._lines[n].up(c.evaluation()) for n, c in self.clients.items()})

    def traffic(self) -> dict[str, Traffic]:
        """Bytes of each client since this was asked last, without those of steps (their events have them)."""
        self._set_aside(list(self._lines))
        counted = {name: _sum(parts) for name, parts in self._aside.items()}
        self._aside = {name: [] for name in self._lines}
        return counted

    def memories(self) -> dict[str, dict[str, torch.Tensor]]:
        """What codecs remember, by client and end of its line, for a checkpoint."""
        kept = {
            f"{name}/{end}": streams.tensors()
            for name, line in self._lines.items()
            for end, streams in line.ends.items()
        }
        return {owner: tensors for owner, tensors in kept.items() if tensors}

    def recall(
        self, memories: Mapping[str, Mapping[str, torch.Tensor]], known: Mapping[str, AdapterState]
    ) -> dict[str, AdapterState]:
        """Remember what a checkpoint kept, beside the global factors of each client's blocks.

        Returns these as each client has them: where the wire rounds factors, as they arrived.
        """
        arrived = {}
        for name, line in self._lines.items():
            for end, streams in line.ends.items():
                streams.restore(memories.get(f"{name}/{end}", {}))
                if not streams.adapters.held:
                    streams.adapters.restore({f"global/{n}": t for n, t in known[name].tensors().items()})
            arrived[name] = AdapterState.from_tensors(dict(line.ends["client"].adapters.known()))
        return arrived

    # ----------------------------------------------------------------------------------------------

    def _groups(self, messages: list[Activations]) -> list[list[Activations]]:
        return self.server.groups(messages) if messages else []

    def _step_alone(self, number: int, name: str) -> StepDone:
        """One step of a client that needs no server: nothing travels."""
        step = self.clients[name].steps
        with self._timed("client_step", [name]):
            loss, batch = self.clients[name].step_alone()
        seconds = {leg: round(spent, 6) for leg, spent in self._seconds[name].items()}
        self._seconds[name].clear()
        return StepDone(
            round=number,
            step=step,
            client=name,
            loss=loss,
            tokens=batch.labelled_tokens,
            examples=len(batch.lengths),
            seconds=seconds,
        )

    def _step(self, number: int, group: Sequence[Activations]) -> Iterator[StepDone]:
        """One micro-batch of the clients of one group, after their forward; their steps that are whole."""
        names = [message.client for message in group]
        steps = {name: self.clients[name].steps for name in names}
        losses: dict[str, float] = {}
        with self._timed("server_forward", names):
            replies: Mapping[str, Message] = self.server.forward(group)
        if not all(isinstance(reply, CutGradient) for reply in replies.values()):
            gradients: dict[str, Message] = {}
            for name in names:
                reply = self._lines[name].down(replies[name])
                with self._timed("head", [name]):
                    gradient = self.clients[name].head(reply)
                losses[name] = gradient.loss
                gradients[name] = self._lines[name].up(gradient)
            with self._timed("server_backward", names):
                replies = self.server.backward(list(_all(HeadGradient, gradients).values()))
        for message in group:
            name = message.client
            reply = self._lines[name].down(replies[name])
            assert isinstance(reply, CutGradient)
            with self._timed("client_backward", [name]):
                self.clients[name].backward(reply)
            loss = losses[name] if reply.loss is None else reply.loss
            tally = self._tallies.setdefault(name, StepTotals())
            if not tally.add(message, loss):
                continue
            del self._tallies[name]
            yield StepDone(
                round=number,
                step=steps[name],
                client=name,
                loss=tally.loss,
                tokens=tally.tokens,
                examples=tally.examples,
                seconds={leg: round(spent, 6) for leg, spent in self._seconds[name].items()},
                traffic=self._lines[name].traffic(),
            )
            self._seconds[name].clear()

    def _set_aside(self, names: Sequence[str]) -> None:
        """Keep what was counted so far apart from the steps to come."""
        for name in names:
            self._aside[name].append(self._lines[name].traffic())

    @contextmanager
    def _timed(self, leg: str, names: Sequence[str]) -> Iterator[None]:
        """Charge wall time in equal parts to those it was spent for."""
        began = time.perf_counter()
        yield
        spent = (time.perf_counter() - began) / len(names)
        for name in names:
            self._seconds[name][leg] += spent


def _all(kind: type[M], messages: Mapping[K, Message]) -> dict[K, M]:
    """These messages, known to be of one kind."""
    known: dict[K, M] = {}
    for key, message in messages.items():
        assert isinstance(message, kind)
        known[key] = message
    return known


def _sum(parts: Sequence[Traffic]) -> Traffic:
    up: Counter[Role] = Counter()
    down: Counter[Role] = Counter()
    for part in parts:
        up.update(part.up)
        down.update(part.down)
    return Traffic(up=dict(up), down=dict(down))
