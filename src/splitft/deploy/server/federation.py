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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from splitft.adapters import AdapterState
from splitft.deploy.server.claims import SiteLimits, check_ready, check_size, given_up_blocks
from splitft.deploy.server.inbox import Inbox
from splitft.deploy.server.liveness import Liveness
from splitft.deploy.server.site_codecs import TrialCount
from splitft.deploy.server.steps import StepService
from splitft.errors import AdapterError, PausedError, ProtocolError
from splitft.geometry import Span
from splitft.protocol import (
    AdapterUpload,
    BaseFile,
    BaseTensor,
    ChooseCodecs,
    CodecsChosen,
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
from splitft.tracking.events import Listener, StepDone, Traffic, WireChosen
from splitft.training.ranks import RankPolicy
from splitft.training.run_state import RunState, Steps
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
    private_blocks: int = 0
    """First blocks of each site whose factors never leave it."""
    chooses: bool = False
    """True if each site chooses its codecs (`wire: auto`)."""
    wires: Mapping[str, WireChosen] = field(default_factory=dict)
    """The codecs that sites chose in earlier sessions."""


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
        self._listener, self._wires = listener, dict(setup.wires)
        for site, wire in self._wires.items():
            if site in inbox.sites:
                inbox.use_codecs(site, wire.hidden, wire.gradient)
        self._cuts: dict[str, int] = {}  # of the current round
        self._liveness = Liveness(inbox, setup.spec, state.round, listener, self._dropped)
        self._steps = StepService(
            inbox, setup.server, steps, setup.limits, self._liveness.refuse, setup.spec.turn_s
        )

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
        names = self._ready_sites(messages)
        for name in names:
            self._brief(name)
            self._inbox.post(name, messages[name])

        def check(site: str, message: Message) -> RoundReady:
            message = expect(message, RoundReady, round=messages[site].round)
            given_up = given_up_blocks(self._state.adapters, self._state.cuts[site], messages[site].cut)
            own = self._setup.ranks.keeps_own
            check_ready(site, message, given_up, self._setup.server.training, own)
            return message

        ready = self._liveness.collect(names, check, within_s=self._setup.spec.join_s)
        self._require_enough(ready)
        return ready

    def train(
        self, number: int, participants: Sequence[str], steps: Steps, listener: Callable[[StepDone], None]
    ) -> dict[str, AdapterUpload]:
        """Run the round's local steps; returns the uploads of sites that finished or were stopped in time."""
        self._steps.begin_training(number, participants, listener)
        for name in participants:
            count = steps if isinstance(steps, int) else steps[name]
            self._inbox.post(name, Train(round=number, steps=count))

        def check(site: str, message: Message) -> AdapterUpload:
            message = expect(message, AdapterUpload, round=number)
            self._check_upload(site, message)
            self._steps.rest(site, number)
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
        names = self._ready_sites(self._state.cuts)
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

    def _ready_sites(self, names: Iterable[str]) -> list[str]:
        """Return the sites that can be reached; those that have to choose codecs first do so now."""
        found = self._liveness.reachable(names)
        new = [name for name in found if name not in self._wires] if self._setup.chooses else []
        if not new:
            return found
        number = self._state.round
        self._steps.begin_evaluation(number, TrialCount)
        for name in new:
            self._brief(name)
            self._inbox.post(name, ChooseCodecs(round=number))

        def check(site: str, message: Message) -> CodecsChosen:
            return expect(message, CodecsChosen)

        answers = self._liveness.collect(new, check, self._steps, self._setup.spec.join_s)
        for name, one in answers.items():
            self._wires[name] = event = WireChosen(
                client=name, hidden=one.hidden, gradient=one.gradient, reason=one.reason
            )
            self._listener(event)
        return [name for name in found if name in self._wires and name not in self._liveness.out]

    def _check_upload(self, site: str, upload: AdapterUpload) -> None:
        """Raise a SplitftError unless the upload and what the server has trained for the site can be used."""
        if self._setup.server.in_step(site):
            raise ProtocolError(f"{site} sends its adapters, but its gradient was due")
        alone = self._steps.alone.tokens[site]
        if upload.tokens != alone or upload.moments:
            raise ProtocolError(
                f"{site} sends moments, or {upload.tokens} tokens with its adapters; the server has counted "
                f"{alone} of those that it need not process"
            )
        shared = self._shared_blocks(self._cuts[site])
        check_factors(site, upload.adapters, self._state.adapters, shared, self._setup.ranks)
        on_server, tokens = self._setup.server.trained(site)
        if not on_server.all_finite():
            raise AdapterError(f"the adapters that the server trained for {site} are not finite")
        check_size(site, upload.adapters)
        check_size(site, on_server)
        if not tokens and not alone:
            raise ProtocolError(f"{site} sends its adapters without having finished a step")

    def _brief(self, site: str) -> None:
        """Send a site the run's state, if it does not know it."""
        if site not in self._liveness.stale:
            return
        number, span = self._state.round, Span(0, self._state.cuts[site])
        shared = self._state.adapters.within(self._shared_blocks(span.stop))
        adapters = self._setup.ranks.part_sent(shared)
        self._inbox.withdraw(site)
        wire = self._wires.get(site)
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
                hidden="" if wire is None else wire.hidden,
                gradient="" if wire is None else wire.gradient,
            ),
        )
        self._liveness.stale.discard(site)

    def _shared_blocks(self, cut: int) -> Span:
        """Return the blocks of a site at this cut whose factors it shares."""
        return Span(min(self._setup.private_blocks, cut), cut)

    def _require_enough(self, answers: Mapping[str, object]) -> None:
        if len(answers) < self._setup.spec.min_clients:
            raise PausedError(
                f"{len(answers)} sites are left in round {self._liveness.number}, deploy.min_clients asks "
                f"for {self._setup.spec.min_clients}: the run pauses after round {self._state.round}"
            )

    def _dropped(self, site: str) -> None:
        self._setup.server.leave(site)
        self._steps.discard(site)


def check_factors(
    site: str, adapters: AdapterState, state: AdapterState, shared: Span, ranks: RankPolicy
) -> None:
    """Raise AdapterError unless an upload has the factors of the blocks that a site shares."""
    if odd := adapters.keys() ^ state.within(shared).keys():
        raise AdapterError(f"{site} sends other factors than those of its blocks: {min(odd)}")
    try:
        ranks.validate_upload(site, adapters, state, shared.stop)
    except ProtocolError as error:
        raise AdapterError(str(error)) from error
