"""One link of a run: from its last finished round to the end, or until the sites that are there do not fit.

    FOLDER/checkpoints --> Hellos of who is there --> rounds --> finished | back | paused

A run over real machines is a chain of links, since the sites of a link are fixed. A link ends when all rounds
are trained, when somebody who was away can join (after the round that is underway), or when too few sites
are left. Whatever ends it, and be it a power cut, the next one begins from the last finished round.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag

from splitft.adapters import with_folded
from splitft.deploy.common import Common, ServerParty, open_server, site_names, unfit
from splitft.deploy.server.federation import RemoteFederation
from splitft.deploy.server.inbox import Arrival, Inbox
from splitft.deploy.server.status import RunStatus
from splitft.errors import PausedError
from splitft.model.quiet import silence_transformers
from splitft.protocol import Declined, Register
from splitft.run.folder import Run, find_snapshot, is_finished, open_log, put_adapter
from splitft.run.train import stopping
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
from splitft.tracking.summary import write_summary
from splitft.training import RunState, train_rounds
from splitft.training.checkpoint import Snapshot, save_snapshot
from splitft.version import __version__

logger = logging.getLogger(__name__)


class _BackError(Exception):
    """Somebody who was away can join."""


class ServerSession:
    """The server's side of one link."""

    def __init__(self, common: Common, folder: Path, present: tuple[str, ...], link: bytes) -> None:
        """`present` are the sites that the carrier reaches; `folder` is the run's, for all its links."""
        self._common, self._folder = common, folder
        everyone = site_names(common.config)
        self._present = tuple(name for name in everyone if name in present)
        self._absent = tuple(name for name in everyone if name not in present)
        self.desk = Inbox(
            self._present, link, common.terms, common.frame_limit, common.batch_tokens, common.config.seed
        )
        self.board = RunStatus(everyone, common.config.training.rounds)
        self._back, self._stopped = Flag(), Flag()
        self._declined: dict[str, str] = {}  # sites whose data owners forbid what is asked, and why

    def make_room(self) -> None:
        """End the link after the round that is underway, so that who is back can join the next."""
        self._back.set()

    def stop(self) -> None:
        """End the link and the run, since whoever runs the federation says so; it can go on later."""
        self._stopped.set()
        self.desk.close("the run was stopped")

    def abort(self) -> None:
        """Let everybody go: the engine ends the job. The next link goes on."""
        self.desk.close("the job was stopped")

    def status(self) -> dict[str, object]:
        """Where the run is, as plain data."""
        return self.board.status({name: self.desk.silence_s(name) for name in self._present})

    def serve(self) -> SessionEnded:
        """Train from the last finished round on. Raises what stops a run for good, such as a full disk."""
        config, folder = self._common.config, self._folder
        snapshot = find_snapshot(folder, config, resume=(folder / "config.yaml").is_file())
        with (
            stopping(folder),
            contextlib.closing(open_log(folder, config, snapshot)) as log,
            silence_transformers(),
            self._letting_go(),
        ):

            def listener(event: Event) -> None:
                log(event)
                self.board(event)

            if snapshot is not None and snapshot.state.round >= config.training.rounds:
                return self._finish(listener, snapshot.state.round)
            hellos = self._greet()
            if self.desk.closed:
                return self._let_go(listener, 0 if snapshot is None else snapshot.state.round, "")
            if len(hellos) < config.deploy.min_clients:
                done = 0 if snapshot is None else snapshot.state.round
                self._tell_declined(listener, done)
                return self._end(listener, done, "paused", f"{len(hellos)} sites said hello")
            party = open_server(self._common, hellos)
            try:
                state = self._train(party, tuple(hellos), snapshot, listener)
            except PausedError as error:
                return self._let_go(listener, self._rounds_done(), str(error))
            except _BackError:
                return self._end(listener, self._rounds_done(), "back", "somebody who was away can join")
            return self._finish(listener, state.round)

    # ----------------------------------------------------------------------------------------------

    def _greet(self) -> dict[str, Register]:
        """Wait until every site that is reached has read its text; who takes too long is left out."""
        found: dict[str, Register] = {}
        config, blocks = self._common.config, self._common.model.shape.blocks
        until = time.monotonic() + self._common.config.deploy.join_s
        while len(found) + len(self._declined) < len(self._present) and time.monotonic() < until:
            if self.desk.closed:
                break
            for arrival in self.desk.take(0, 0.5):
                if not isinstance(arrival, Arrival):
                    continue
                if isinstance(arrival.message, Declined):
                    self._declined[arrival.site] = arrival.message.reason
                elif isinstance(arrival.message, Register):
                    if reason := unfit(config, blocks, arrival.site, arrival.message):
                        self._declined[arrival.site] = reason
                    else:
                        found[arrival.site] = arrival.message
        return {name: found[name] for name in self._present if name in found}

    def _tell_declined(self, listener: Listener, number: int) -> None:
        for site, reason in self._declined.items():
            logger.warning("%s declines: %s", site, reason)
            listener(SiteChanged(round=number, site=site, state="declined", reason=reason))

    def _train(
        self, party: ServerParty, here: tuple[str, ...], snapshot: Snapshot | None, listener: Listener
    ) -> RunState:
        common, config = self._common, self._common.config
        steps = {} if snapshot is None else dict(snapshot.steps)
        away = (
            {} if snapshot is None else {n: c for n, c in snapshot.state.cuts.items() if n not in party.cuts}
        )
        state = self._begin(party, snapshot, listener)
        self.board.place(state.cuts)
        names = [name for name in here if name in party.cuts]
        absent = tuple(name for name in site_names(config) if name not in names)
        listener(SessionStarted(round=state.round + 1, sites=tuple(names), absent=absent))
        self._declined.update(party.left_out)
        self._tell_declined(listener, state.round)
        gathering = RemoteFederation(
            self.desk, party.server, common.ranks, config.deploy, state, steps, listener, party.manifest
        )

        def save(state: RunState) -> None:
            whole = replace(state, cuts={**away, **state.cuts})
            moments = {slot: own for slot, own in party.server.moments.items() if own}
            path = save_snapshot(self._folder, Snapshot(whole, gathering.steps, {}, moments))
            learnt = with_folded(state.adapters, state.folded)
            put_adapter(learnt, common.model, common.ranks, Run(self._folder).adapter_dir)
            listener(CheckpointSaved(round=state.round, path=str(path.relative_to(self._folder))))
            write_summary(self._folder)
            if self._back.is_set() and state.round < config.training.rounds:
                raise _BackError

        return train_rounds(
            state, party.server, gathering, common.ranks, config.training, party.pace, listener, save,
            config.privacy, secret=True, aggregation=config.aggregate,
        )  # fmt: skip

    def _begin(self, party: ServerParty, snapshot: Snapshot | None, listener: Listener) -> RunState:
        """Where the run is, for the sites that are there."""
        config = self._common.config
        if snapshot is None:
            listener(
                RunStarted(
                    version=__version__,
                    method=config.method,
                    seed=config.seed,
                    model=config.model.name,
                    blocks=self._common.model.shape.blocks,
                    rounds=config.training.rounds,
                    steps=config.training.steps,
                    labels=config.split.labels,
                    clients=party.facts,
                    machines=party.pace.machines(),
                )
            )
            for message in (*party.pace.left_out, *party.pace.misfits):
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

    def _rounds_done(self) -> int:
        return self.board.rounds_done

    def _finish(self, listener: Listener, rounds: int) -> SessionEnded:
        if not is_finished(self._folder):
            listener(RunDone(rounds=rounds))
        write_summary(self._folder)
        Run(self._folder).report()
        return self._end(listener, rounds, "finished", "")

    def _let_go(self, listener: Listener, rounds: int, detail: str) -> SessionEnded:
        """It ends before its time, for want of sites or since it was stopped."""
        reason = "stopped" if self._stopped.is_set() else "paused"
        return self._end(listener, rounds, reason, detail)

    def _end(self, listener: Listener, rounds: int, reason: str, detail: str) -> SessionEnded:
        ended = SessionEnded.model_validate({"round": rounds, "reason": reason, "detail": detail})
        listener(ended)
        logger.info("the link ends after round %d: %s %s", rounds, reason, detail)
        return ended

    @contextlib.contextmanager
    def _letting_go(self) -> Iterator[None]:
        """However it ends, nobody is left waiting."""
        try:
            yield
        finally:
            self.desk.close("the link has ended")
