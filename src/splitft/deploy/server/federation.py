"""The sites of one session, as `training.rounds` sees them: orders out, answers in.

    rounds --start, train, install, evaluate--> RemoteFederation --post orders--> inbox --> sites
           <--the sites' valid answers--        liveness.collect <--take messages--

A site may fall silent, be slow, or send an invalid message. It is then out for the round, and the others do
not notice: what it has not finished is discarded, its own factors on the server included. When it is heard
again it is sent the run's state (`Join`) and takes part from the next round on. If too few sites are left,
the round is abandoned (PausedError), and the run goes on after the last finished round.

`liveness` knows which sites take part, `steps` serves their steps; this file has the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from splitft.adapters import AdapterState
from splitft.deploy.server.claims import SiteLimits, check_ready, check_size, given_up_blocks
from splitft.deploy.server.inbox import Inbox
from splitft.deploy.server.liveness import Liveness
from splitft.deploy.server.steps import StepService, check_factors
from splitft.errors import AdapterError, PausedError, ProtocolError
from splitft.geometry import Span
from splitft.protocol import (
    AdapterUpload,
    BaseFile,
    BaseTensor,
    Evaluate,
    Evaluation,
    GlobalAdapters,
    Join,
    Message,
    RoundReady,
    RoundStart,
    Train,
    expect,
)
from splitft.specs import DeploySpec
from splitft.tracking.events import Listener, StepDone, Traffic
from splitft.training.ranks import RankPolicy
from splitft.training.rounds import RunState
from splitft.training.server import Server


@dataclass(frozen=True)
class FederationSetup:
    """The server's part of a federation, the same for all its rounds."""

    server: Server
    ranks: RankPolicy
    spec: DeploySpec
    manifest: tuple[BaseFile, ...] = ()
    """Files of the base model on the server."""
    tensors: tuple[BaseTensor, ...] = ()
    """Tensors of the base model on the server."""
    limits: Mapping[str, SiteLimits] = field(default_factory=dict)
    """The most text that each site may send, by its registration."""


class RemoteFederation:
    """Runs rounds with the sites of one session. Implements `training.rounds.Federation`."""

    def __init__(
        self,
        inbox: Inbox,
        setup: FederationSetup,
        state: RunState,
        steps: Mapping[str, int],
        listener: Listener,
    ) -> None:
        """Go on from `state` and these counts of steps; no site knows them yet."""
        self._inbox, self._setup, self._state = inbox, setup, state
        self._cuts: dict[str, int] = {}  # of the current round
        self._liveness = Liveness(inbox, setup.spec, state.round, listener, self._dropped)
        self._steps = StepService(inbox, setup.server, steps, setup.limits, self._liveness.refuse)

    @property
    def steps(self) -> dict[str, int]:
        """Optimizer steps of each site in finished rounds."""
        return self._steps.steps

    def decline(self, site: str, reason: str) -> None:
        """Leave out a site whose data owner forbids the run, until the session ends."""
        self._liveness.decline(site, reason)

    def start(self, messages: Mapping[str, RoundStart]) -> dict[str, RoundReady]:
        """Begin a round with those of these sites that can be reached."""
        self._liveness.number = next(iter(messages.values())).round
        self._cuts = {name: message.cut for name, message in messages.items()}
        names = self._liveness.reachable(messages)
        for name in names:
            self._brief(name)
            self._inbox.post(name, messages[name])

        def check(site: str, message: Message) -> RoundReady:
            message = expect(message, RoundReady, round=messages[site].round)
            given_up = given_up_blocks(self._state.adapters, self._state.cuts[site], messages[site].cut)
            check_ready(site, message, given_up, self._setup.server.training)
            return message

        ready = self._liveness.collect(names, check, within_s=self._setup.spec.join_s)
        self._require_enough(ready)
        return ready

    def train(
        self, number: int, participants: Sequence[str], steps: int, listener: Callable[[StepDone], None]
    ) -> dict[str, AdapterUpload]:
        """Run the round's local steps; returns the uploads of sites that finished or were stopped in time."""
        self._steps.begin_training(participants, listener)
        for name in participants:
            self._inbox.post(name, Train(round=number, steps=steps))

        def check(site: str, message: Message) -> AdapterUpload:
            message = expect(message, AdapterUpload, round=number)
            self._check_upload(site, message)
            return message

        uploads = self._liveness.collect(participants, check, self._steps)
        self._require_enough(uploads)
        self._steps.commit(uploads)
        return {name: uploads[name] for name in participants if name in uploads}

    def install(self, messages: Mapping[str, GlobalAdapters], state: RunState) -> None:
        """Send the aggregated factors; absent sites get them with `Join`."""
        self._state = state
        for name, message in messages.items():
            if name not in self._liveness.stale:
                self._inbox.post(name, message)

    def undo(self, messages: Mapping[str, GlobalAdapters], state: RunState) -> None:
        """Let every site join again, with the adapters of `state`."""
        self._state = state
        self._liveness.stale.update(messages)

    def evaluate(self) -> dict[str, Evaluation]:
        """Return the held-out loss of every site that can be reached."""
        number = self._state.round
        names = self._liveness.reachable(self._state.cuts)
        self._steps.begin_evaluation(number)
        for name in names:
            self._brief(name)
            self._inbox.post(name, Evaluate(round=number))

        def check(site: str, message: Message) -> Evaluation:
            return self._steps.held_out[site].checked(expect(message, Evaluation, round=number))

        results = self._liveness.collect(names, check, self._steps)
        self._require_enough(results)
        return results

    def traffic(self) -> dict[str, Traffic]:
        """Return each site's bytes since the last call."""
        return self._inbox.traffic()

    # ----------------------------------------------------------------------------------------------

    def _check_upload(self, site: str, upload: AdapterUpload) -> None:
        """Raise a SplitftError unless the upload and what the server has trained for the site can be used."""
        if self._setup.server.in_step(site):
            raise ProtocolError(f"{site} sends its adapters, but its gradient was due")
        if upload.tokens or upload.moments:
            raise ProtocolError(f"{site} sends tokens or moments with its adapters; the server counts them")
        check_factors(site, upload.adapters, self._state.adapters, self._cuts[site], self._setup.ranks)
        on_server, tokens = self._setup.server.trained(site)
        if not on_server.all_finite():
            raise AdapterError(f"the adapters that the server trained for {site} are not finite")
        check_size(site, upload.adapters)
        check_size(site, on_server)
        if not tokens:
            raise ProtocolError(f"{site} sends its adapters without having finished a step")

    def _brief(self, site: str) -> None:
        """Send a site the run's state, if it does not know it."""
        if site not in self._liveness.stale:
            return
        number, span = self._state.round, Span(0, self._state.cuts[site])
        adapters = self._setup.ranks.part_sent(self._state.adapters.within(span))
        self._inbox.withdraw(site)
        self._inbox.post(
            site,
            Join(
                round=number,
                cut=span.stop,
                steps=self.steps[site],
                adapters=adapters if number else AdapterState(),
                folded=self._state.folded.within(span),
                manifest=self._setup.manifest,
                tensors=self._setup.tensors,
            ),
        )
        self._liveness.stale.discard(site)

    def _require_enough(self, answers: Mapping[str, object]) -> None:
        if len(answers) < self._setup.spec.min_clients:
            raise PausedError(
                f"{len(answers)} sites are left in round {self._liveness.number}, deploy.min_clients asks "
                f"for {self._setup.spec.min_clients}: the run pauses after round {self._state.round}"
            )

    def _dropped(self, site: str) -> None:
        self._setup.server.leave(site)
        self._steps.discard(site)
