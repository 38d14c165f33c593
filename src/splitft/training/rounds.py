"""The algorithm: rounds of local training and aggregation. SplitFT, arXiv 2604.26388.

    for each round:
        1  the controller gives every client a cut; participants are drawn
        2  every participant gets the global factors of the blocks that are new to it (start);
           one that does not say that it has moved keeps its old cut
        3  local steps: client and server each train their own blocks                  (train)
        4  client's factors [0, k) + server's factors [k, L) for it = a full set, whatever its cut
        5  aggregation per block and target, weighted by labelled tokens               (aggregate)
        6  every client gets the global factors of its blocks; held-out loss           (install, evaluate)

Where the clients are, in this process or behind a network, is a `Federation`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from splitft.adapters import AdapterState, Fresh, add_folded, aggregate
from splitft.adapters.server_optimizer import Memory, stepped
from splitft.geometry import Span
from splitft.privacy.dp_fedavg import UpdateBounds
from splitft.privacy.noise import Noise
from splitft.protocol import AdapterUpload, Evaluation, GlobalAdapters, RoundReady, RoundStart
from splitft.schedule.controllers import Decision
from splitft.seeds import Draw
from splitft.specs import AggregateSpec, PrivacySpec, TrainingSpec
from splitft.tracking.events import CutsChanged, Evaluated, Listener, RoundDone, RoundTimed, StepDone, Traffic
from splitft.training.ranks import RankPolicy
from splitft.training.server import Server

HANDED_ON = "=handed on"
"""Slot of the moments that the server carries from client to client; no client's name begins with `=`."""


class Schedule(Protocol):
    """Chooses cuts, and keeps the simulated clock."""

    def choose(self, number: int, cuts: Mapping[str, int], losses: Mapping[str, float]) -> Decision:
        """The cuts of the round to come, from those in force and the last held-out losses."""

    def charge(
        self, number: int, participants: Sequence[str], before: Mapping[str, int], cuts: Mapping[str, int]
    ) -> RoundTimed:
        """What the round took on the simulated clock."""


class Federation(Protocol):
    """Carries a round to the clients and brings back what they answer."""

    def start(self, messages: Mapping[str, RoundStart]) -> dict[str, RoundReady]:
        """Begin a round with these clients; who is away does not answer."""

    def train(
        self, number: int, participants: Sequence[str], steps: int, listener: Callable[[StepDone], None]
    ) -> dict[str, AdapterUpload]:
        """Let them train; returns the blocks' factors of those whose training counts."""

    def install(self, messages: Mapping[str, GlobalAdapters], state: RunState) -> None:
        """Hand out the aggregated factors; `state` is where the run is with them, for who is away."""

    def evaluate(self) -> dict[str, Evaluation]:
        """Held-out loss of every client."""

    def traffic(self) -> dict[str, Traffic]:
        """Bytes by client since this was asked last, without those of steps."""


@dataclass(frozen=True)
class RunState:
    """What is between two rounds, and all that the next one needs beside the parties' own moments."""

    round: int
    """Rounds finished."""
    cuts: Mapping[str, int]
    """k of every client."""
    adapters: AdapterState
    """The global factors, over all L blocks."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Held-out loss of each client with them."""
    folded: AdapterState = field(default_factory=AdapterState)
    """What aggregation has folded into the frozen base so far, over all L blocks."""
    memory: Memory = field(default_factory=dict)
    """What the server's optimizer remembers."""


def train_rounds(
    state: RunState,
    server: Server,
    federation: Federation,
    ranks: RankPolicy,
    training: TrainingSpec,
    schedule: Schedule,
    listener: Listener,
    save: Callable[[RunState], None],
    privacy: PrivacySpec = PrivacySpec(),  # noqa: B008 frozen
    secret: bool = False,
    aggregation: AggregateSpec = AggregateSpec(),  # noqa: B008 frozen
) -> RunState:
    """Train from `state` to the last round; `save` is called after each.

    Noise on updates follows from the run's seed, or is fresh if `secret`, as a real deployment needs.
    """
    bounds = UpdateBounds(privacy, ranks.rule, Noise(ranks.seed, "=updates", secret))
    if state.round == 0:
        server.place(state.cuts)
        server.install(state.adapters, state.folded)
        before = _evaluated(0, federation)
        listener(before)
        state = replace(state, losses=before.by_client)
    for number in range(state.round + 1, training.rounds + 1):
        decision = schedule.choose(number, state.cuts, state.losses)
        cuts = dict(decision.cuts)
        if number == 1 or cuts != state.cuts:
            listener(CutsChanged(round=number, cuts=cuts, reason=decision.reason))
        old_cuts, state = state.cuts, replace(state, cuts=cuts)
        participants = participants_of(number, list(cuts), training.participation, ranks.seed)
        play = _round_in_turn if training.order == "in-turn" else _round
        state, participants = play(
            number, state, old_cuts, participants, server, federation, ranks, training, listener, bounds,
            aggregation,
        )  # fmt: skip
        listener(schedule.charge(number, participants, old_cuts, state.cuts))
        evaluated = _evaluated(number, federation)
        listener(evaluated)
        state = replace(state, losses=evaluated.by_client)
        save(state)
    return state


def participants_of(number: int, clients: Sequence[str], share: float, seed: int) -> list[str]:
    """The clients drawn for a round: a share of them, at least one, in their usual order."""
    count = max(1, round(share * len(clients)))
    generator = Draw.PARTICIPANT.generator(seed, number)
    return [clients[i] for i in np.sort(generator.choice(len(clients), count, replace=False))]


def _round(
    number: int,
    state: RunState,
    old_cuts: Mapping[str, int],
    participants: Sequence[str],
    server: Server,
    federation: Federation,
    ranks: RankPolicy,
    training: TrainingSpec,
    listener: Listener,
    bounds: UpdateBounds,
    aggregation: AggregateSpec,
) -> tuple[RunState, list[str]]:
    """One round of training and aggregation: the next global factors, and whose training is in them."""
    clients, asked = list(state.cuts), state.cuts
    gained = {name: Span(0, asked[name]).minus(Span(0, old_cuts[name])) for name in clients}
    starts = {
        name: RoundStart(
            round=number,
            cut=asked[name],
            adapters=server.kept.personal(name, state.adapters.within(gained[name])),
            moments=server.kept.moments_of(name, gained[name]),
            folded=state.folded.within(gained[name]),
        )
        for name in (clients if asked != old_cuts else participants)
    }
    there = federation.start(starts)
    for name, ready in there.items():
        server.kept.moved(name, gained[name], ready.moments, ready.own)
    cuts = {name: asked[name] if name in there else old_cuts[name] for name in clients}
    if stayed := [name for name in clients if cuts[name] != asked[name]]:
        reason = f"{', '.join(stayed)} did not come with the others, and keeps the cut it had"
        listener(CutsChanged(round=number, cuts=cuts, reason=reason))
    server.place(cuts)
    participants = [name for name in participants if name in there]
    server.start(number, participants, state.adapters, state.folded)

    uploads = federation.train(number, participants, training.steps, listener)

    full_sets = []
    for name, upload in uploads.items():
        others, tokens = server.trained(name)
        trained = ranks.validate_upload(name, upload.adapters, state.adapters, cuts[name]).union(others)
        start = (
            ranks.factors_at_start(state.adapters, cuts[name], number, name) if bounds.bounding else trained
        )
        full_sets.append((bounds.weight(tokens or upload.tokens), bounds.clipped(start, trained)))
    server.finish()
    fresh = Fresh(ranks.seed, salt=number)
    result = aggregate(ranks.rule, full_sets, ranks.united(cuts), fresh)
    shared = bounds.noised(result.state.completed(state.adapters), len(full_sets), number)
    shared, memory = stepped(aggregation, state.adapters, shared, state.memory)
    adapters = state.adapters.updated(shared)  # blocks that clients keep private stay as they began
    folded = add_folded(state.folded, result.folded)
    server.install(adapters, folded)
    after = RunState(number, cuts, adapters, folded=folded, memory=memory)
    lacking = {name: _lacking(number, Span(0, cuts[name]), ranks, shared, result.folded) for name in clients}
    federation.install(lacking, after)
    if spent := bounds.spent(number):
        listener(spent)
    listener(
        RoundDone(
            round=number,
            participants=tuple(uploads),
            aggregation_error=result.error,
            traffic=federation.traffic(),
        )
    )
    return after, list(uploads)


def _lacking(
    number: int, span: Span, ranks: RankPolicy, adapters: AdapterState, folded: AdapterState
) -> GlobalAdapters:
    """What a client of these blocks lacks of the round's result."""
    sent = ranks.part_sent(adapters.within(span))
    return GlobalAdapters(round=number, adapters=sent, folded=folded.within(span))


def _round_in_turn(
    number: int,
    state: RunState,
    old_cuts: Mapping[str, int],
    participants: Sequence[str],
    server: Server,
    federation: Federation,
    ranks: RankPolicy,
    training: TrainingSpec,
    listener: Listener,
    bounds: UpdateBounds,
    aggregation: AggregateSpec,
) -> tuple[RunState, list[str]]:
    """One round in which clients train one after the other: each hands its factors and moments on.

    Vanilla split learning (arXiv 1810.06060): with the server's factors they are one model, trained on all
    text in turn. The server carries what is handed on, so that clients need not know each other. Cuts stay
    (`old_cuts`), no single client has an update to bound (`bounds`), and nothing is averaged (`aggregation`);
    configurations that ask for such are refused. A client that is lost in its turn is left out of the chain.
    """
    cuts, adapters = state.cuts, state.adapters
    server.place(cuts)
    if training.optimizer_state == "reset":
        server.moments.clear()
    finished: list[str] = []
    for name in participants:
        span = Span(0, cuts[name])
        handed_on = server.moments.pop(HANDED_ON, {})
        start = RoundStart(round=number, cut=cuts[name], adapters=adapters.within(span), moments=handed_on)
        federation.start({name: start})
        server.start(number, [name], adapters)
        uploads = federation.train(number, [name], training.steps, listener)
        if name in uploads:
            adapters = uploads[name].adapters.union(server.trained(name)[0])
            handed_on = dict(uploads[name].moments)
            finished.append(name)
        server.finish()
        server.moments[HANDED_ON] = handed_on
    if training.optimizer_state == "reset":
        server.moments.clear()
    server.install(adapters)
    traffic = federation.traffic()  # what follows is for evaluation only: the model has been handed on
    after = RunState(number, cuts, adapters)
    whole = {
        name: GlobalAdapters(round=number, adapters=adapters.within(Span(0, cut)))
        for name, cut in cuts.items()
    }
    federation.install(whole, after)
    listener(RoundDone(round=number, participants=tuple(finished), aggregation_error=0.0, traffic=traffic))
    return after, finished


def _evaluated(number: int, federation: Federation) -> Evaluated:
    """Held-out loss by client, and over all labelled tokens of all clients."""
    results = federation.evaluate()
    tokens = sum(result.tokens for result in results.values())
    return Evaluated(
        round=number,
        loss=sum(result.loss for result in results.values()) / max(1, tokens),
        by_client={name: result.loss / max(1, result.tokens) for name, result in results.items()},
        traffic=federation.traffic(),
    )
