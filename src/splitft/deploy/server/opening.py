"""The state from which a session of a run goes on, and the events that say how it begins.

no checkpoint --> RunStarted, initial adapters      checkpoint --> RunResumed, its adapters and moments
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from splitft.deploy.run_terms import RunTerms
from splitft.deploy.server.setup import ServerParty
from splitft.model.precision import describe
from splitft.privacy.accounting import accountant_missing
from splitft.run.promises import run_promises, run_started
from splitft.run.same_inputs import check_inputs
from splitft.tracking.events import Listener, RunResumed, Warned
from splitft.training import RunState
from splitft.training.checkpoint import Snapshot

logger = logging.getLogger(__name__)


def begin(
    terms: RunTerms, party: ServerParty, folder: Path, snapshot: Snapshot | None, listener: Listener
) -> RunState:
    """Return the state from which these sites go on, and record how the run begins, or goes on.

    Raises RunError if the base model is not the one that it began with.
    """
    config = terms.config
    if snapshot is None:
        found = {
            "defences": _promises(terms, party),
            "machines": party.schedule.machines(),
            "base": _digests(party),
            "precision": describe(terms.model.spec.dtype, terms.devices.server),
            "devices": terms.devices.of_server,
        }
        listener(run_started(config, terms.model.shape.blocks, party.facts).model_copy(update=found))
        for message in (*party.schedule.left_out, *party.schedule.misfits):
            listener(Warned(message=message))
        return RunState(0, party.cuts, party.server.initial())
    check_inputs(folder, _digests(party))
    listener(RunResumed(round=snapshot.state.round + 1))
    for message in snapshot.passed_over:
        logger.warning("%s", message)
        listener(Warned(message=message))
    old = snapshot.state
    cuts = {name: old.cuts.get(name, cut) for name, cut in party.cuts.items()}
    party.server.moments.update(snapshot.server_moments)
    for name, own in snapshot.own.items():
        party.server.client_states.add_own(name, own)
    party.server.place(cuts)
    party.server.install(old.adapters, old.folded)
    losses = {name: loss for name, loss in old.losses.items() if name in cuts}
    return replace(old, cuts=cuts, losses=losses)


def _promises(terms: RunTerms, party: ServerParty) -> tuple[str, ...]:
    """Return what the run's defences guarantee; the texts' lengths are not known here, their bound is."""
    config, width = terms.config, terms.model.shape.width
    noisy = config.privacy.hidden.noise or config.privacy.gradient.noise
    if noisy and (missing := accountant_missing()):
        return (f"Rows have noise, but no epsilon is stated: {missing}.",)
    return run_promises(config, party.schedule.fleet, party.facts, width, config.data.max_tokens)


def _digests(party: ServerParty) -> dict[str, str]:
    """Return the SHA-256 of the files of the base model on this machine."""
    return {file.name: file.sha256 for file in party.manifest}
