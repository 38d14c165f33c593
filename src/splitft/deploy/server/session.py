"""Run one session of a run on the server: rounds from the last finished one on, with the sites that register.

    FOLDER/checkpoints --> sites register --> rounds --> finished | back | paused | stopped

The sites of a session are fixed, so a run over real machines takes several. A session ends when all rounds
are trained, after the current round when an absent site can join, or when too few sites are left. Whatever
ends it, even a power cut, the next session goes on after the last finished round.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag

from splitft.adapters import with_folded
from splitft.deploy.run_terms import RunTerms, site_names
from splitft.deploy.server.claims import SiteLimits
from splitft.deploy.server.federation import FederationSetup, RemoteFederation
from splitft.deploy.server.inbox import Inbox
from splitft.deploy.server.quota import InboxLimits
from splitft.deploy.server.registration import await_registrations
from splitft.deploy.server.setup import ServerParty, open_server
from splitft.deploy.server.status import RunStatus
from splitft.deploy.server.steady_schedule import SteadySchedule
from splitft.errors import PausedError
from splitft.model.source import silence_transformers
from splitft.privacy.accounting import accountant_missing
from splitft.protocol import Register
from splitft.run.folder import Run, find_snapshot, is_finished, open_log, put_adapter
from splitft.run.train import run_promises, stopping
from splitft.tracking.events import (
    CheckpointSaved,
    Event,
    Listener,
    RunDone,
    RunResumed,
    RunStarted,
    SessionEnded,
    SessionStarted,
    SiteChanged,
    Warned,
)
from splitft.tracking.log import read_events, settled
from splitft.tracking.summary import write_summary
from splitft.training import FederatedTrainer, RunState
from splitft.training.checkpoint import Snapshot, save_snapshot
from splitft.version import __version__

logger = logging.getLogger(__name__)


class _MakeRoomError(Exception):
    """An absent site can join."""


class ServerSession:
    """The server's side of one session."""

    def __init__(self, terms: RunTerms, folder: Path, connected: tuple[str, ...], session_key: bytes) -> None:
        """`connected` are the sites that the transport reaches; `folder` is the run's, for all sessions."""
        self._terms, self._folder = terms, folder
        everyone = site_names(terms.config)
        self._connected = tuple(name for name in everyone if name in connected)
        self.inbox = Inbox(
            self._connected,
            session_key,
            terms.serializer,
            InboxLimits(
                terms.frame_limit,
                terms.batch_tokens,
                min(terms.config.training.in_flight, terms.config.training.micro_batches),
                terms.config.wire.needs_example_ids,
            ),
            terms.config.seed,
        )
        self._status = RunStatus(everyone, terms.config.training.rounds)
        self._room_wanted, self._stopped = Flag(), Flag()
        self._declined: dict[str, str] = {}  # sites that take no part, and why

    def make_room(self) -> None:
        """End the session after the current round, so that absent sites can join the next."""
        self._room_wanted.set()

    def stop(self) -> None:
        """End the session and the run on the operator's behalf; the run can go on later."""
        self._stopped.set()
        self.inbox.close("the run was stopped")

    def abort(self) -> None:
        """End the session because its job ends; the next session goes on."""
        self.inbox.close("the job was stopped")

    def status(self) -> dict[str, object]:
        """Return the run's status as plain data."""
        return self._status.as_data({name: self.inbox.silence_s(name) for name in self._connected})

    def serve(self) -> SessionEnded:
        """Train from the last finished round on. Raises what stops a run for good, such as a full disk."""
        config, folder = self._terms.config, self._folder
        snapshot = find_snapshot(folder, config, resume=(folder / "config.yaml").is_file())
        done = 0 if snapshot is None else snapshot.state.round
        with (
            stopping(folder),
            contextlib.closing(open_log(folder, config, snapshot)) as log,
            silence_transformers(),
            contextlib.ExitStack() as at_end,
        ):
            at_end.callback(self.inbox.close, "the session has ended")

            def listener(event: Event) -> None:
                log(event)
                self._status(event)

            if snapshot is not None and done >= config.training.rounds:
                return self._finish(listener, done)
            registered = await_registrations(self._terms, self.inbox, self._connected, self._declined)
            if self.inbox.closed:
                return self._end_early(listener, done, "")
            if len(registered) < config.deploy.min_clients:
                self._record_declined(listener, done)
                return self._end(listener, done, "paused", f"{len(registered)} sites registered")
            party = open_server(self._terms, registered)
            try:
                state = self._train(party, registered, snapshot, listener)
            except PausedError as error:
                return self._end_early(listener, self._status.rounds_done, str(error))
            except _MakeRoomError:
                return self._end(listener, self._status.rounds_done, "back", "an absent site can join")
            return self._finish(listener, state.round)

    # ----------------------------------------------------------------------------------------------

    def _record_declined(self, listener: Listener, number: int) -> None:
        for site, reason in self._declined.items():
            logger.warning("%s declines: %s", site, reason)
            listener(SiteChanged(round=number, site=site, state="declined", reason=reason))

    def _train(
        self,
        party: ServerParty,
        registered: Mapping[str, Register],
        snapshot: Snapshot | None,
        listener: Listener,
    ) -> RunState:
        """Train rounds with the sites that are present, and save each."""
        terms, config = self._terms, self._terms.config
        state = self._begin(party, snapshot, listener)
        self._status.place(state.cuts)
        names = [name for name in registered if name in party.cuts]
        absent = tuple(name for name in site_names(config) if name not in names)
        listener(SessionStarted(round=state.round + 1, sites=tuple(names), absent=absent))
        self._declined.update(party.left_out)
        self._record_declined(listener, state.round)
        steps, old_cuts = ({}, {}) if snapshot is None else (snapshot.steps, snapshot.state.cuts)
        absent_cuts = {name: cut for name, cut in old_cuts.items() if name not in party.cuts}
        limits = {name: SiteLimits.of(config, one) for name, one in registered.items()}
        setup = FederationSetup(party.server, terms.ranks, config.deploy, party.manifest, limits)
        federation = RemoteFederation(self.inbox, setup, state, steps, listener)

        def save(state: RunState) -> None:
            whole = replace(state, cuts={**absent_cuts, **state.cuts})
            moments = {slot: own for slot, own in party.server.moments.items() if own}
            path = save_snapshot(self._folder, Snapshot(whole, federation.steps, {}, moments))
            trained = with_folded(state.adapters, state.folded)
            put_adapter(trained, terms.model, terms.ranks, Run(self._folder).adapter_dir)
            listener(CheckpointSaved(round=state.round, path=str(path.relative_to(self._folder))))
            write_summary(self._folder)
            if self._room_wanted.is_set() and state.round < config.training.rounds:
                raise _MakeRoomError

        def measuring(event: Event) -> None:
            """Let the controller of the cuts know the seconds of steps."""
            party.schedule.observe(event)
            listener(event)

        if snapshot is not None:  # the seconds of the last round were measured in an earlier session
            for event in settled(read_events(self._folder / "events.jsonl")):
                party.schedule.observe(event)
        schedule = SteadySchedule(party.schedule, listener)
        trainer = FederatedTrainer(
            party.server, federation, terms.ranks, config.training, schedule, measuring, save,
            config.aggregate, config.privacy, secret=True,
        )  # fmt: skip
        return trainer.train(state)

    def _begin(self, party: ServerParty, snapshot: Snapshot | None, listener: Listener) -> RunState:
        """Return the state from which these sites go on, and record how the run begins."""
        config = self._terms.config
        if snapshot is None:
            listener(
                RunStarted(
                    version=__version__,
                    method=config.method,
                    seed=config.seed,
                    model=config.model.name,
                    blocks=self._terms.model.shape.blocks,
                    rounds=config.training.rounds,
                    steps=config.training.steps,
                    labels=config.split.labels,
                    defences=self._promises(party),
                    clients=party.facts,
                    machines=party.schedule.machines(),
                )
            )
            for message in (*party.schedule.left_out, *party.schedule.misfits):
                listener(Warned(message=message))
            return RunState(0, party.cuts, party.server.initial())
        listener(RunResumed(round=snapshot.state.round + 1))
        old = snapshot.state
        cuts = {name: old.cuts.get(name, cut) for name, cut in party.cuts.items()}
        party.server.moments.update(snapshot.server_moments)
        party.server.place(cuts)
        party.server.install(old.adapters, old.folded)
        losses = {name: loss for name, loss in old.losses.items() if name in cuts}
        return replace(old, cuts=cuts, losses=losses)

    def _promises(self, party: ServerParty) -> tuple[str, ...]:
        """Return what the run's defences guarantee; the texts' lengths are not known here, their bound is."""
        config, width = self._terms.config, self._terms.model.shape.width
        noisy = config.privacy.hidden.noise or config.privacy.gradient.noise
        if noisy and (missing := accountant_missing()):
            return (f"Rows have noise, but no epsilon is stated: {missing}.",)
        return run_promises(config, party.schedule.fleet, party.facts, width, config.data.max_tokens)

    def _finish(self, listener: Listener, rounds: int) -> SessionEnded:
        if not is_finished(self._folder):
            listener(RunDone(rounds=rounds))
        write_summary(self._folder)
        Run(self._folder).report()
        return self._end(listener, rounds, "finished", "")

    def _end_early(self, listener: Listener, rounds: int, detail: str) -> SessionEnded:
        reason = "stopped" if self._stopped.is_set() else "paused"
        return self._end(listener, rounds, reason, detail)

    def _end(self, listener: Listener, rounds: int, reason: str, detail: str) -> SessionEnded:
        ended = SessionEnded.model_validate({"round": rounds, "reason": reason, "detail": detail})
        listener(ended)
        logger.info("the session ends after round %d: %s %s", rounds, reason, detail)
        return ended
