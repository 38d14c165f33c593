"""The algorithm: rounds of local training and aggregation. SplitFT, arXiv 2604.26388.

    for each round:
        1  the controller chooses a cut for every client; participants are drawn
        2  every participant gets the global factors of the blocks that are new to it  (start);
           a client that does not confirm its new cut keeps the old one
        3  local steps: client and server each train their own blocks                  (train)
        4  client's factors [0, k) + server's factors [k, L) for it = a full set, whatever its cut
        5  aggregation per block and target, weighted by labelled tokens               (aggregate)
        6  every client gets the global factors of its blocks; held-out loss           (install, evaluate)

A `Federation` carries the messages, to clients in this process or over a network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from splitft.adapters import AdapterState, Fresh, add_folded, aggregate
from splitft.adapters.server_optimizer import Memory, server_step
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
    """Chooser of cuts and keeper of the simulated clock."""

    def choose(self, number: int, cuts: Mapping[str, int], losses: Mapping[str, float]) -> Decision:
        """Choose the cuts of the next round from the current ones and the last held-out losses."""

    def charge(
        self, number: int, participants: Sequence[str], before: Mapping[str, int], cuts: Mapping[str, int]
    ) -> RoundTimed:
        """Advance the simulated clock by one round."""


class Federation(Protocol):
    """Carrier of messages between the rounds and the clients."""

    def start(self, messages: Mapping[str, RoundStart]) -> dict[str, RoundReady]:
        """Begin a round with these clients; those that are away do not answer."""

    def train(
        self, number: int, participants: Sequence[str], steps: int, listener: Callable[[StepDone], None]
    ) -> dict[str, AdapterUpload]:
        """Run the local steps; return the uploads of participants whose training counts."""

    def install(self, messages: Mapping[str, GlobalAdapters], state: RunState) -> None:
        """Send the aggregated factors; `state` is the run with them, for clients that are away."""

    def evaluate(self) -> dict[str, Evaluation]:
        """Evaluate the global adapters on every client's held-out text."""

    def traffic(self) -> dict[str, Traffic]:
        """Return bytes by client since the last call, without those of steps."""


@dataclass(frozen=True)
class RunState:
    """State of a run between two rounds, without the optimizer moments of the parties."""

    round: int
    """Rounds finished."""
    cuts: Mapping[str, int]
    """k of every client."""
    adapters: AdapterState
    """The global factors, over all L blocks."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Held-out loss of each client with them."""
    folded: AdapterState = field(default_factory=AdapterState)
    """Updates that aggregation has folded into the frozen base, over all L blocks."""
    memory: Memory = field(default_factory=dict)
    """State of the server's optimizer."""


@dataclass(frozen=True)
class FederatedTrainer:
    """Training of one run, round by round."""

    server: Server
    federation: Federation
    ranks: RankPolicy
    training: TrainingSpec
    schedule: Schedule
    listener: Listener
    save: Callable[[RunState], None] = lambda state: None
    """Called after each round."""
    aggregation: AggregateSpec = AggregateSpec()  # noqa: RUF009 frozen
    privacy: PrivacySpec = PrivacySpec()  # noqa: RUF009 frozen
    secret: bool = False
    """Draw the noise on updates anew, as a deployment needs, rather than from the run's seed."""

    def train(self, state: RunState) -> RunState:
        """Train from `state` to the last round."""
        if state.round == 0:
            self.server.place(state.cuts)
            self.server.install(state.adapters, state.folded)
            state = self._evaluate(state)
        for number in range(state.round + 1, self.training.rounds + 1):
            # cuts and participants of the round
            decision = self.schedule.choose(number, state.cuts, state.losses)
            cuts, old_cuts = dict(decision.cuts), state.cuts
            if number == 1 or cuts != old_cuts:
                self.listener(CutsChanged(round=number, cuts=cuts, reason=decision.reason))
            drawn = participants_of(number, list(cuts), self.training.participation, self.ranks.seed)
            # training and aggregation
            run_round = self._round_in_turn if self.training.order == "in-turn" else self._round
            state, participants = run_round(state, cuts, drawn)
            # simulated time, held-out loss, checkpoint
            self.listener(self.schedule.charge(number, participants, old_cuts, state.cuts))
            state = self._evaluate(state)
            self.save(state)
        return state

    def _round(
        self, state: RunState, cuts: Mapping[str, int], drawn: Sequence[str]
    ) -> tuple[RunState, list[str]]:
        """Train all participants at once and aggregate; return the next state and whose training is in it."""
        number = state.round + 1
        # start: clients move to their cuts, client and server load the factors to train
        cuts, ready = self._move(state, cuts, drawn)
        participants = [name for name in drawn if name in ready]
        self.server.place(cuts)
        self.server.start(number, participants, state.adapters, state.folded)
        # train: local steps
        uploads = self.federation.train(number, participants, self.training.steps, self.listener)
        full_sets = [self._full_set(state, name, cuts[name], upload) for name, upload in uploads.items()]
        self.server.finish()
        # aggregate: one set of global factors; private blocks of clients keep the factors they began with
        fresh = Fresh(self.ranks.seed, salt=number)
        result = aggregate(self.ranks.rule, full_sets, self.ranks.global_ranks(cuts), fresh)
        mean = self._bounds.noised(result.state.fill_from(state.adapters), len(full_sets), number)
        shared, memory = server_step(self.aggregation, state.adapters, mean, state.memory)
        adapters, folded = state.adapters.updated(shared), add_folded(state.folded, result.folded)
        after = RunState(number, cuts, adapters, folded=folded, memory=memory)
        # install: every client gets the part of the result that it cannot compute
        self.server.install(adapters, folded)
        messages = {}
        for name, cut in cuts.items():
            sent = self.ranks.part_sent(shared.within(Span(0, cut)))
            new_folded = result.folded.within(Span(0, cut))
            messages[name] = GlobalAdapters(round=number, adapters=sent, folded=new_folded)
        self.federation.install(messages, after)
        if spent := self._bounds.spent(number):
            self.listener(spent)
        self._tell_done(number, list(uploads), result.error, self.federation.traffic())
        return after, list(uploads)

    def _move(
        self, state: RunState, asked: Mapping[str, int], drawn: Sequence[str]
    ) -> tuple[dict[str, int], Collection[str]]:
        """Start the round at clients that move or take part; return all cuts, and the clients that answer.

        Clients that do not answer keep the cut they had.
        """
        number, old, states = state.round + 1, state.cuts, self.server.client_states
        gained = {name: Span(0, cut).minus(Span(0, old[name])) for name, cut in asked.items()}
        starts = {
            name: RoundStart(
                round=number,
                cut=asked[name],
                adapters=states.personal(name, state.adapters.within(gained[name])),
                moments=states.moments_of(name, gained[name]),
                folded=state.folded.within(gained[name]),
            )
            for name in (asked if asked != old else drawn)
        }
        ready = self.federation.start(starts)
        for name, answer in ready.items():
            states.move(name, gained[name], answer.moments, answer.own)
        cuts = {name: cut if name in ready else old[name] for name, cut in asked.items()}
        if stayed := [name for name in cuts if cuts[name] != asked[name]]:
            reason = f"no answer from {', '.join(stayed)} at the start of the round: cut kept"
            self.listener(CutsChanged(round=number, cuts=cuts, reason=reason))
        return cuts, ready.keys()

    def _full_set(
        self, state: RunState, name: str, cut: int, upload: AdapterUpload
    ) -> tuple[float, AdapterState]:
        """Join a client's factors with the server's for it; return their weight and the clipped full set."""
        ranks, bounds = self.ranks, self._bounds
        on_server, tokens = self.server.trained(name)
        trained = ranks.validate_upload(name, upload.adapters, state.adapters, cut).union(on_server)
        start = trained
        if bounds.bounding:
            start = ranks.factors_at_start(state.adapters, cut, state.round + 1, name)
        if cut == ranks.blocks and not tokens:  # it trains without the server, which has nothing to count
            tokens = upload.tokens
        return bounds.weight(tokens), bounds.clipped(start, trained)

    def _round_in_turn(
        self, state: RunState, cuts: Mapping[str, int], drawn: Sequence[str]
    ) -> tuple[RunState, list[str]]:
        """Train the participants one after the other: each hands its factors and moments on to the next.

        Vanilla split learning (arXiv 1810.06060): with the server's factors they are one model, trained on
        all text in turn. The server carries factors and moments, so that clients need not know each other.
        Cuts stay, no update is bounded and nothing is averaged; configurations that ask for such are refused.
        A client that is lost in its turn is left out.
        """
        number, adapters, server, federation = state.round + 1, state.adapters, self.server, self.federation
        server.place(cuts)
        if self.training.optimizer_state == "reset":
            server.moments.clear()
        # train: each begins with the factors and moments of the one before
        finished: list[str] = []
        for name in drawn:
            span = Span(0, cuts[name])
            moments = server.moments.pop(HANDED_ON, {})
            start = RoundStart(round=number, cut=cuts[name], adapters=adapters.within(span), moments=moments)
            federation.start({name: start})
            server.start(number, [name], adapters)
            uploads = federation.train(number, [name], self.training.steps, self.listener)
            if name in uploads:
                adapters = uploads[name].adapters.union(server.trained(name)[0])
                moments = dict(uploads[name].moments)
                finished.append(name)
            server.finish()
            server.moments[HANDED_ON] = moments
        if self.training.optimizer_state == "reset":
            server.moments.clear()
        # install: for evaluation only, so it is not counted as the round's traffic
        server.install(adapters)
        traffic = federation.traffic()
        after = RunState(number, cuts, adapters)
        messages = {
            name: GlobalAdapters(round=number, adapters=adapters.within(Span(0, cut)))
            for name, cut in cuts.items()
        }
        federation.install(messages, after)
        self._tell_done(number, finished, 0.0, traffic)
        return after, finished

    def _evaluate(self, state: RunState) -> RunState:
        """Add the held-out loss of every client to the state."""
        results = self.federation.evaluate()
        tokens = sum(result.tokens for result in results.values())
        evaluated = Evaluated(
            round=state.round,
            loss=sum(result.loss for result in results.values()) / max(1, tokens),
            by_client={name: result.loss / max(1, result.tokens) for name, result in results.items()},
            traffic=self.federation.traffic(),
        )
        self.listener(evaluated)
        return replace(state, losses=evaluated.by_client)

    def _tell_done(
        self, number: int, participants: Sequence[str], error: float, traffic: dict[str, Traffic]
    ) -> None:
        self.listener(
            RoundDone(
                round=number, participants=tuple(participants), aggregation_error=error, traffic=traffic
            )
        )

    @cached_property
    def _bounds(self) -> UpdateBounds:
        noise = Noise(self.ranks.seed, "=updates", self.secret)
        return UpdateBounds(self.privacy, self.ranks.rule, noise)


def participants_of(number: int, clients: Sequence[str], share: float, seed: int) -> list[str]:
    """Draw a share of the clients for a round, at least one, in their usual order."""
    count = max(1, round(share * len(clients)))
    generator = Draw.PARTICIPANT.generator(seed, number)
    return [clients[i] for i in np.sort(generator.choice(len(clients), count, replace=False))]
