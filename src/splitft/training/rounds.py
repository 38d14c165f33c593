"""The algorithm: rounds of local training and aggregation. SplitFT, arXiv 2604.26388.

    for each round:
        1  the controller chooses a cut for every client; participants are drawn
        2  every participant gets the global factors of the blocks that are new to it  (start);
           a client that does not confirm its new cut keeps the old one
        3  local steps: client and server each train their own blocks                  (train)
        4  client's factors [0, k) + server's factors [k, L) for it = a full set, whatever its cut
        5  aggregation per block and target, weighted by labelled tokens               (aggregate)
           of updates none of which is far larger than the others'                     (norm_bound)
        6  every client gets the global factors of its blocks; held-out loss           (install, evaluate)
        7  if most clients failed, the run goes back to the adapters before the round  (undo)

A `Federation` carries the messages, to clients in this process or over a network.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from splitft.adapters import AdapterState, Fresh, add_folded, aggregate
from splitft.adapters.server_optimizer import server_step
from splitft.errors import FailedRoundError, RunError
from splitft.geometry import Span
from splitft.privacy.dp_fedavg import UpdateBounds
from splitft.privacy.noise import Noise
from splitft.protocol import AdapterUpload, Evaluation, GlobalAdapters, RoundStart
from splitft.specs import AggregateSpec, PrivacySpec, TrainingSpec
from splitft.tracking.events import CutsChanged, Listener, RoundDone, RoundUndone, Traffic
from splitft.training.loss_check import evaluated, loss_outliers, reported_losses, round_failure
from splitft.training.norm_bound import NormBound
from splitft.training.ranks import RankPolicy
from splitft.training.run_state import Federation as Federation
from splitft.training.run_state import RunState as RunState
from splitft.training.run_state import Schedule as Schedule
from splitft.training.run_state import back_to
from splitft.training.run_state import participants_of as participants_of
from splitft.training.server import Server

HANDED_ON = "=handed on"
"""Slot of the moments that the server carries from client to client; no client's name begins with `=`."""
MOST_UNDONE = 3
"""Rounds in a row that may be undone; the run stops at the next."""


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
            state = self._evaluated(state, self.federation.evaluate(), {})
        for number in range(state.round + 1, self.training.rounds + 1):
            # cuts and participants of the round
            decision = self.schedule.choose(number, state.cuts, state.losses)
            cuts, old_cuts = dict(decision.cuts), state.cuts
            if number == 1 or cuts != old_cuts:
                self.listener(CutsChanged(round=number, cuts=cuts, reason=decision.reason))
            drawn = participants_of(number, list(cuts), self.training.participation, self.ranks.seed)
            # training and aggregation
            run_round = self._round_in_turn if self.training.order == "in-turn" else self._round
            before = state
            state, participants, failure = run_round(before, cuts, drawn)
            # simulated time, held-out loss, checkpoint
            self.listener(self.schedule.charge(number, participants, old_cuts, state.cuts))
            results = {} if failure else self.federation.evaluate()
            if failure := failure or self._explosion(results, before.losses):
                state = self._undo(before, state, failure)
                results = self.federation.evaluate()
            state = self._evaluated(state, results, before.losses)
            self.save(state)
        return state

    def _round(
        self, state: RunState, cuts: Mapping[str, int], drawn: Sequence[str]
    ) -> tuple[RunState, list[str], str]:
        """Train all participants at once and aggregate.

        Return the next state, whose training is in it, and why it cannot be used, "" if it can.
        """
        number = state.round + 1
        # start: clients move to their cuts, client and server load the factors to train
        cuts, ready = self._move(state, cuts, drawn)
        participants = [name for name in drawn if name in ready]
        self.server.place(cuts)
        self.server.start(number, participants, state.adapters, state.folded)
        # train: local steps
        by_time = self.training.steps_by == "time" and participants
        steps = self.schedule.steps(number, participants, cuts) if by_time else self.training.steps
        uploads = self.federation.train(number, participants, steps, self.listener)
        full_sets = {
            name: self._full_set(state, name, cuts[name], upload) for name, upload in uploads.items()
        }
        self.server.finish()
        # aggregate: one set of global factors; private blocks of clients keep the factors they began with
        fresh, ranks, spec = Fresh(self.ranks.seed, salt=number), self.ranks, self.aggregation
        bound = self._norm_bound.apply(number, state.adapters, cuts, full_sets, state.update_sizes)
        if bound.event:
            self.listener(bound.event)
        try:
            if 2 * len(uploads) < len(participants):
                raise FailedRoundError(f"{len(uploads)} of {len(participants)} clients finished it")
            sets = list(bound.sets.values())
            where = self.server.blocks.segment.device
            result = aggregate(ranks.rule, sets, ranks.global_ranks(cuts), fresh, spec.byzantine, where)
        except FailedRoundError as error:
            self._tell_done(number, list(uploads), 0.0, self.federation.traffic())
            return replace(state, round=number, cuts=cuts), list(uploads), str(error)
        mean = self._bounds.noised(result.state.fill_from(state.adapters), len(full_sets), number)
        shared, memory = server_step(spec, state.adapters, mean, state.memory)
        adapters, folded = state.adapters.updated(shared), add_folded(state.folded, result.folded)
        after = RunState(number, cuts, adapters, folded=folded, memory=memory, update_sizes=bound.medians)
        # install: every client gets the part of the result that it cannot compute
        self.server.install(adapters, folded)
        messages = self._messages(after, shared, result.folded)
        self.federation.install(messages, after)
        if spent := self._bounds.spent(number):
            self.listener(spent)
        self._tell_done(number, list(uploads), result.error, self.federation.traffic())
        return after, list(uploads), ""

    def _messages(
        self, state: RunState, adapters: AdapterState, folded: AdapterState
    ) -> dict[str, GlobalAdapters]:
        """Return what each client is sent of these factors: the part of its blocks that it cannot compute."""
        return {
            name: GlobalAdapters(
                round=state.round,
                adapters=self.ranks.part_sent(adapters.within(Span(0, cut))),
                folded=folded.within(Span(0, cut)),
            )
            for name, cut in state.cuts.items()
        }

    def _undo(self, before: RunState, after: RunState, reason: str) -> RunState:
        """Go back to the adapters before a round, with its number and cuts, at all parties."""
        state = back_to(before, after, self.ranks)
        number, adapters = state.round, state.adapters
        self.listener(RoundUndone(round=number, reason=reason, in_a_row=state.undone))
        if state.undone > MOST_UNDONE:
            raise RunError(
                f"round {number} is the {state.undone}th in a row in which most clients failed: {reason}. "
                "Look at the warnings for who failed, then lower training.lr, leave clients out, or give "
                "aggregate.rule median; the last checkpoint has the adapters from before"
            )
        self.server.client_states.moments.clear()
        self.server.install(adapters, state.folded)
        shared = adapters.within(range(self.privacy.private_blocks, self.ranks.blocks))
        self.federation.undo(self._messages(state, shared, AdapterState()), state)
        return state

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
    ) -> tuple[RunState, list[str], str]:
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
        return after, finished, ""

    def _evaluated(
        self, state: RunState, results: Mapping[str, Evaluation], before: Mapping[str, float]
    ) -> RunState:
        """Add the held-out loss of every client to the state; `before` are the last ones."""
        losses = reported_losses(results)
        outliers = {} if self.privacy.protects_labels else loss_outliers(losses, before)
        self.listener(evaluated(state.round, results, outliers, self.federation.traffic()))
        fitting = [loss for name, loss in losses.items() if name not in outliers]
        usual = statistics.median(fitting) if outliers else 0.0
        known = {name: before.get(name, usual) for name in outliers}
        return replace(state, losses={**losses, **known})

    def _explosion(self, results: Mapping[str, Evaluation], before: Mapping[str, float]) -> str:
        """Describe how the loss of most clients has exploded in a round; "" if it has not."""
        if self.privacy.protects_labels or not self.aggregation.federated:
            return ""  # losses have noise; or nothing has been aggregated
        return round_failure(reported_losses(results), before)

    def _tell_done(
        self, number: int, participants: Sequence[str], error: float, traffic: dict[str, Traffic]
    ) -> None:
        self.listener(
            RoundDone(
                round=number, participants=tuple(participants), aggregation_error=error, traffic=traffic
            )
        )

    @cached_property
    def _norm_bound(self) -> NormBound:
        # clip_norm is a bound of its own, which others' updates must not move
        factor = None if self._bounds.bounding else self.aggregation.norm_bound
        return NormBound(factor, self.ranks, self.server.blocks.shared)

    @cached_property
    def _bounds(self) -> UpdateBounds:
        noise = Noise(self.ranks.seed, "=updates", self.secret)
        return UpdateBounds(self.privacy, self.ranks.rule, noise)
