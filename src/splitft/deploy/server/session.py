"""Run one session of a run on the server: rounds from the last finished one on, with the sites that register.

    FOLDER/checkpoints --> sites register --> rounds --> finished | back | paused | stopped

The sites of a session are fixed, so a run over real machines takes several. A session ends when all rounds
are trained, after the current round when an absent site can join, or when too few sites are left. Whatever
ends it, even a power cut, the next session goes on after the last finished round.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag

from splitft.adapters import with_folded, with_mean_of_own
from splitft.deploy.run_terms import RunTerms, site_names
from splitft.deploy.server.claims import SiteLimits
from splitft.deploy.server.federation import FederationSetup, RemoteFederation
from splitft.deploy.server.inbox import Inbox
from splitft.deploy.server.opening import begin
from splitft.deploy.server.quota import InboxLimits
from splitft.deploy.server.registration import await_registrations
from splitft.deploy.server.run_folder import PLAIN_REQUEST, SessionRequest, check_kept, make_ready
from splitft.deploy.server.run_totals import RunTotals
from splitft.deploy.server.setup import ServerParty, open_server
from splitft.deploy.server.status import RunStatus
from splitft.deploy.server.steady_schedule import SteadySchedule
from splitft.errors import PausedError, SplitftError
from splitft.model.source import silence_transformers
from splitft.protocol import Register
from splitft.run.folder import Run, find_snapshot, is_finished, open_log, put_adapter
from splitft.run.lock import hold
from splitft.run.train import stopping
from splitft.tracking.events import (
    CheckpointSaved,
    Event,
    Listener,
    RunDone,
    SessionEnded,
    SessionStarted,
    SiteChanged,
    WireChosen,
)
from splitft.tracking.log import EventLog, read_events, settled
from splitft.tracking.summary_writer import SummaryWriter
from splitft.training import FederatedTrainer, RunState
from splitft.training.checkpoint import Snapshot, save_snapshot

logger = logging.getLogger(__name__)


class _MakeRoomError(Exception):
    """An absent site can join."""


class ServerSession:
    """The server's side of one session."""

    def __init__(
        self,
        terms: RunTerms,
        folder: Path,
        connected: tuple[str, ...],
        session_key: bytes,
        request: SessionRequest = PLAIN_REQUEST,
    ) -> None:
        """Prepare a session with the `connected` sites; `folder` is the run's, for all sessions."""
        self._terms, self._folder, self._request = terms, folder, request
        self.began = False
        """True if it has come to training: an error after that need not come again."""
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
        self._summary, self._totals = SummaryWriter(folder), RunTotals()
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
        known = self._status.as_data({name: self.inbox.silence_s(name) for name in self._connected})
        limits = {"silence_s": self._terms.config.deploy.silence_s}
        with contextlib.suppress(OSError):
            disk = shutil.disk_usage(self._folder)
            limits |= {"disk_free_bytes": disk.free, "disk_bytes": disk.total}
        return {**self._totals.as_data(), **limits, **known}

    def notes(self) -> tuple[tuple[int, str], ...]:
        """Return the numbered messages of the session."""
        return self._status.notes()

    @property
    def rounds_done(self) -> int:
        """Rounds that are saved on disk."""
        return self._status.rounds_done

    def serve(self) -> SessionEnded:
        """Train from the last finished round on. Raises what stops a session, such as a full disk.

        Raises BusyError if another session trains the run.
        """
        with contextlib.ExitStack() as at_end:
            at_end.callback(self.inbox.close, "the session has ended")
            at_end.enter_context(hold(self._folder, f"session {self._request.session} of a deployed run"))
            try:
                return self._serve()
            except SplitftError as error:
                if self.began:
                    with (
                        contextlib.suppress(OSError),
                        contextlib.closing(EventLog(self._folder / "events.jsonl")) as log,
                    ):
                        self._end(log, self.rounds_done, "failed", str(error))
                raise

    def _serve(self) -> SessionEnded:
        """Train in the run folder that this session holds."""
        config, folder = self._terms.config, self._folder
        snapshot = find_snapshot(folder, config, resume=make_ready(folder, self._request))
        done = 0 if snapshot is None else snapshot.state.round
        with (
            stopping(folder),
            contextlib.closing(open_log(folder, config, snapshot)) as log,
            silence_transformers(),
        ):

            def listener(event: Event) -> None:
                log(event)
                self._summary(event)
                self._totals(event)
                self._status(event)

            if snapshot is not None and done >= config.training.rounds:
                return self._finish(listener, done)
            registered = await_registrations(self._terms, self.inbox, self._connected, self._declined)
            if self.inbox.closed:
                return self._end_early(listener, done, "")
            if len(registered) < config.deploy.min_clients:
                self._record_declined(listener, done)
                return self._end(listener, done, "paused", self._too_few(registered))
            party = open_server(self._terms, registered)
            self.inbox.place = party.server.blocks.place_of
            try:
                state = self._train(party, registered, snapshot, listener)
            except PausedError as error:
                return self._end_early(listener, self._status.rounds_done, str(error))
            except _MakeRoomError:
                return self._end(listener, self._status.rounds_done, "back", "an absent site can join")
            finally:
                party.server.close()
            return self._finish(listener, state.round)

    # ----------------------------------------------------------------------------------------------

    def _too_few(self, registered: Mapping[str, Register]) -> str:
        """Return why the session cannot begin."""
        silent = [name for name in self._connected if name not in registered and name not in self._declined]
        reasons = [f"{name} declined" for name in self._declined]
        reasons += [
            f"{name} did not register within {self._terms.config.deploy.join_s:.0f} s" for name in silent
        ]
        return (
            f"{len(registered)} of {len(self._connected)} connected sites registered; deploy.min_clients is "
            f"{self._terms.config.deploy.min_clients} ({', '.join(reasons)})"
        )

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
        state = begin(terms, party, self._folder, snapshot, listener)
        self._status.place(state.cuts)
        names = [name for name in registered if name in party.cuts]
        absent = tuple(name for name in site_names(config) if name not in names)
        self.began = True
        session = self._request.session
        listener(SessionStarted(round=state.round + 1, sites=tuple(names), absent=absent, session=session))
        self._declined.update(party.left_out)
        self._record_declined(listener, state.round)
        steps, old_cuts = ({}, {}) if snapshot is None else (snapshot.steps, snapshot.state.cuts)
        absent_cuts = {name: cut for name, cut in old_cuts.items() if name not in party.cuts}
        before = settled(read_events(self._folder / "events.jsonl")) if snapshot is not None else []
        wires = {event.client: event for event in before if isinstance(event, WireChosen)}
        limits = {name: SiteLimits.of(config, one) for name, one in registered.items()}
        setup = FederationSetup(
            party.server, terms.ranks, config.deploy, party.manifest, party.tensors, limits,
            config.privacy.private_blocks, config.wire.chooses, wires,
        )  # fmt: skip

        def measuring(event: Event) -> None:
            """Let the controller of the cuts know codecs, and the seconds of steps."""
            party.schedule.observe(event)
            listener(event)

        federation = RemoteFederation(self.inbox, setup, state, steps, measuring)

        def save(state: RunState) -> None:
            check_kept(self._folder)
            whole = replace(state, cuts={**absent_cuts, **state.cuts})
            moments = {slot: own for slot, own in party.server.moments.items() if own}
            own = {name: one for name, one in party.server.client_states.own.items() if one}
            path = save_snapshot(self._folder, Snapshot(whole, federation.steps, {}, moments, own=own))
            trained = with_folded(with_mean_of_own(state.adapters, own.values()), state.folded)
            put_adapter(trained, terms.model, terms.ranks, Run(self._folder).adapter_dir)
            listener(CheckpointSaved(round=state.round, path=str(path.relative_to(self._folder))))
            self._summary.write()
            if self._room_wanted.is_set() and state.round < config.training.rounds:
                raise _MakeRoomError

        if snapshot is not None:  # the seconds of the last round were measured in an earlier session
            self._totals.restart(before)
            for event in before:
                party.schedule.observe(event)
        schedule = SteadySchedule(party.schedule, listener)
        trainer = FederatedTrainer(
            party.server, federation, terms.ranks, config.training, schedule, measuring, save,
            config.aggregate, config.privacy, secret=True,
        )  # fmt: skip
        return trainer.train(state)

    def _finish(self, listener: Listener, rounds: int) -> SessionEnded:
        if not is_finished(self._folder):
            listener(RunDone(rounds=rounds))
        self._summary.write()
        Run(self._folder).report()
        return self._end(listener, rounds, "finished", "")

    def _end_early(self, listener: Listener, rounds: int, detail: str) -> SessionEnded:
        reason = "stopped" if self._stopped.is_set() else "paused"
        return self._end(listener, rounds, reason, detail)

    def _end(self, listener: Listener, rounds: int, reason: str, detail: str) -> SessionEnded:
        session = self._request.session
        ended = SessionEnded.model_validate(
            {"round": rounds, "reason": reason, "detail": detail, "session": session}
        )
        listener(ended)
        logger.info("the session ends after round %d: %s %s", rounds, reason, detail)
        return ended
