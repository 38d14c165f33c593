"""`wire: auto`: for each client the cheapest codecs whose effect, measured on its text, is within the budget.

    held-out batches --the run's own evaluation, through each codec in turn--> rise of perplexity    hidden
    gradient at the last hidden states --through each codec--> error of a layer's gradient          gradient

The real model, the client's real text and its cut; no hidden states that the first evaluation does not send
too. Half of the budget is for hidden states: the mean change over batches, up or (by luck) down, and its
standard error must be within it. The other half is for gradients, where a loss cannot show the effect before
there is training: an error of relative energy w in a layer's gradient leaves 1 / (1 + w) of a step's descent
(as variance does in QSGD, arXiv 1610.02132), and fine-tuning is taken to have EXPECTED_GAIN nats to gain. Two
legs carry gradients, so w counts twice.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from splitft.protocol import LastHidden, Terms
from splitft.runtime import Client, Server
from splitft.runtime.line import Line
from splitft.specs import WireSpec
from splitft.specs.wire import AUTO
from splitft.tracking.events import WireChosen
from splitft.wire import Passage, codec_of

HIDDEN = ("principal", "principal:bits=3", "int4", "int8", "bf16")
"""Candidates for hidden states, from the fewest bytes on; the last is taken if nothing else fits."""
GRADIENT = ("int2", "int4", "int8", "bf16")
"""Candidates for gradients likewise."""
MEASURED = 4
"""Held-out batches that effects are measured on, at most; the others teach codecs that learn."""
EXPECTED_GAIN = 0.5
"""Nats that fine-tuning is expected to lower the loss by."""


@dataclass(frozen=True)
class Trial:
    """One candidate on one client."""

    codec: str
    rise: float
    """Estimated rise of perplexity, as a share."""
    error: float
    """Its standard error; 0 where it is not a mean."""
    fits: bool

    def __str__(self) -> str:
        return f"{self.codec} {100 * self.rise:+.2f} %" + (
            f" (+- {100 * self.error:.2f})" if self.error else ""
        )


def choose_wires(
    clients: Sequence[Client], server: Server, terms: Terms
) -> tuple[dict[str, WireSpec], tuple[WireChosen, ...]]:
    """The wire of each client, and what to tell the user; some seconds for each client."""
    server.place({client.name: client.plan.client.stop for client in clients})
    server.install(server.initial())
    wires, told = {}, []
    for client in clients:
        wire = terms.wire
        trials: dict[str, list[Trial]] = {}
        if wire.hidden == AUTO:
            trials["hidden"] = _hidden_trials(client, server, terms)
        if wire.gradient == AUTO:
            trials["gradient"] = _gradient_trials(client, server, terms)
        chosen = {role: _first_fitting(tried) for role, tried in trials.items()}
        wires[client.name] = wire = wire.model_copy(update=chosen)
        told.append(
            WireChosen(
                client=client.name, hidden=wire.hidden, gradient=wire.gradient, reason=_reason(wire, trials)
            )
        )
    return wires, tuple(told)


def _hidden_trials(client: Client, server: Server, terms: Terms) -> list[Trial]:
    """Candidates until one fits."""
    count = min(MEASURED, max(1, client.held_out_batches // 2))
    exact, _ = _losses(client, server, _with(terms, "fp32"), count)
    trials: list[Trial] = []
    for codec in HIDDEN[:-1]:
        found, learnt = _losses(client, server, _with(terms, codec), count)
        if not learnt:  # too little text to learn axes from: what was measured was not the codec
            continue
        rises = [math.expm1(one - other) for one, other in zip(found, exact, strict=True)]
        rise = statistics.fmean(rises)
        error = statistics.stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 else 0.0
        trials.append(Trial(codec, rise, error, abs(rise) + error <= terms.wire.budget / 2))
        if trials[-1].fits:
            return trials
    return [*trials, Trial(HIDDEN[-1], 0.0, 0.0, True)]


def _losses(client: Client, server: Server, terms: Terms, count: int) -> tuple[list[float], bool]:
    """Mean loss of each of the first batches, after the others have taught the codec; whether it learnt."""
    line = Line(client.name, terms)
    client.evaluation()  # counting begins afresh
    losses = []
    if terms.wire.hidden.startswith("principal"):
        for index in range(count, client.held_out_batches):
            _evaluated(client, server, line, index)
        remembered = (line.ends["client"].tensors(), line.ends["server"].tensors())
        if not all(sum(key.endswith("/basis") for key in tensors) == 2 for tensors in remembered):
            return [], False
    client.evaluation()
    for index in range(count):
        _evaluated(client, server, line, index)
        done = client.evaluation()
        losses.append(done.loss / max(1, done.tokens))
    return losses, True


def _evaluated(client: Client, server: Server, line: Line, index: int) -> None:
    sent = line.up(client.held_out(index))
    client.held_out_head(line.down(server.forward([sent])[client.name]))  # type: ignore[list-item]


def _gradient_trials(client: Client, server: Server, terms: Terms) -> list[Trial]:
    """Candidates until one fits; without the head on the client nothing is measured, and int8 is taken."""
    if terms.labels_travel:
        return [Trial("int8", 0.0, 0.0, True)]
    line = Line(client.name, _with(terms, "fp32"))
    reply = line.down(server.forward([line.up(client.held_out(0))])[client.name])  # type: ignore[list-item]
    assert isinstance(reply, LastHidden)
    gradient = client.held_out_gradient(reply).float()
    inputs = reply.hidden.float()
    inputs = inputs / inputs.norm(dim=1, keepdim=True).clamp_min(1e-30)  # as behind a norm
    wanted = gradient.T @ inputs
    trials: list[Trial] = []
    for name in GRADIENT[:-1]:
        codec, passage = codec_of(name), Passage("gradient", 0, {})
        rounded = codec.decode(codec.encode(gradient, passage), torch.float32, passage)
        noise = 2 * float(
            (rounded.T @ inputs - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)
        )
        rise = math.expm1(EXPECTED_GAIN * noise / (1 + noise))
        trials.append(Trial(name, rise, 0.0, rise <= terms.wire.budget / 2))
        if trials[-1].fits:
            return trials
    return [*trials, Trial(GRADIENT[-1], 0.0, 0.0, True)]


def _first_fitting(trials: Sequence[Trial]) -> str:
    return next(trial.codec for trial in trials if trial.fits)


def _reason(wire: WireSpec, trials: Mapping[str, Sequence[Trial]]) -> str:
    tried = "; ".join(f"{role}: {', '.join(map(str, found))}" for role, found in trials.items())
    return f"estimated rise of perplexity, {100 * wire.budget / 2:.2f} % allowed for each: {tried}"


def _with(terms: Terms, hidden: str) -> Terms:
    """The same terms with this codec for hidden states, and gradients that are not rounded."""
    return replace(terms, wire=terms.wire.model_copy(update={"hidden": hidden, "gradient": "fp32"}))
