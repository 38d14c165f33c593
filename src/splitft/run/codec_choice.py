"""Choose codecs for `wire: auto`: for each client the cheapest whose measured effect is within the budget.

    held-out batches --the run's evaluation, through each codec--> rise of perplexity               hidden
    gradient at the last hidden states --through each codec--> error of a layer's gradient          gradient

The effect is measured with the run's model, on the client's held-out text at its cut. Only hidden states that
the first evaluation sends too are sent. Gradients may use half of the budget, and hidden states the rest:
their mean rise over batches plus its standard error must be within it.

Losses of a few batches vary by more than the budget, so the rise is computed from all predictions: the
divergence of predictions through the codec from exact ones, minus the divergence caused by perturbing hidden
states in their last digit, since rounding in the model causes that much anyway. With `labels: server` there
are no predictions on the client, and losses are compared.

A loss before training does not show the effect of rounded gradients. An error of relative energy w in a
layer's gradient leaves 1 / (1 + w) of a step's descent (as variance does in QSGD, arXiv 1610.02132), and
fine-tuning is assumed to gain EXPECTED_GAIN nats. Gradients are sent on two legs, so w counts twice.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from splitft.codecs import CodecContext, codec_of
from splitft.errors import ForbiddenError, ProtocolError
from splitft.model import divergence
from splitft.protocol import Activations, HeldOutLoss, LastHidden, MessageSerializer, expect
from splitft.protocol.channel import Channel
from splitft.specs import SiteAllowsSpec, WireSpec
from splitft.specs.codecs import kind_of
from splitft.specs.wire import AUTO
from splitft.tracking.events import WireChosen
from splitft.training import Client, Server

HIDDEN = ("principal", "principal:bits=3", "int4", "int8", "bf16")
"""Candidates for hidden states, from the fewest bytes; the last is the fallback."""
GRADIENT = ("int2", "int4", "int8", "bf16")
"""Candidates for gradients likewise."""
MEASURED = 4
"""Largest number of held-out batches to measure on; codecs that learn are trained on the others."""
PERTURBED = 16
"""One number in so many is perturbed; more make no difference, since the model spreads it to all."""
EXPECTED_GAIN = 0.5
"""Nats that fine-tuning is expected to lower the loss by."""


EXACT = "fp32"
"""Codec of the messages that others are compared with, and of gradients while codecs are tried."""


class Line(Protocol):
    """A client's connection to the server, as codecs are tried on it."""

    def begin(self, hidden: str) -> None:
        """Begin anew at both ends, with this codec for hidden states and exact gradients."""

    def ask(self, sent: Activations) -> LastHidden | HeldOutLoss:
        """Send a held-out batch and return the server's reply."""

    def learned(self, name: str) -> int:
        """Return the number of streams in whose memory there is something of this name, at either end."""


@dataclass(frozen=True)
class Candidates:
    """The codecs that a client may choose from; each from the fewest bytes, the last as the fallback."""

    hidden: tuple[str, ...] = HIDDEN
    gradient: tuple[str, ...] = GRADIENT
    exact: str = EXACT
    """Codec of hidden states that others are compared with."""

    @classmethod
    def within(cls, wire: WireSpec, allows: SiteAllowsSpec, ordered: bool) -> Candidates:
        """Return the candidates that a data owner allows; without `ordered`, none that remembers.

        A role whose codec the run names has that one alone.
        """
        hidden = _allowed(HIDDEN, wire.hidden, allows.hidden, ordered)
        gradient = _allowed(GRADIENT, wire.gradient, allows.gradient, ordered)
        exact = EXACT if allows.hidden is None or EXACT in allows.hidden else hidden[-1] if hidden else EXACT
        return cls(hidden, gradient, exact)

    def check(self, hidden: str, gradient: str) -> None:
        """Raise ForbiddenError unless both are candidates: a server may only repeat what was chosen here."""
        for role, asked, known in (("hidden", hidden, self.hidden), ("gradient", gradient, self.gradient)):
            if asked not in known:
                raise ForbiddenError(
                    f"the server asks for {role} in the codec {asked!r}; this site has the choice of "
                    f"{', '.join(known)} (allows.{role})"
                )


def _allowed(
    candidates: tuple[str, ...], named: str, allowed: tuple[str, ...] | None, ordered: bool
) -> tuple[str, ...]:
    if named != AUTO:
        return (named,)
    return tuple(
        one
        for one in candidates
        if (allowed is None or one.partition(":")[0] in allowed)
        and (ordered or kind_of(one).memory == "none")
    )


def check_trial(hidden: str, wire: WireSpec) -> None:
    """Raise ProtocolError for a codec of hidden states that a client cannot try in this run."""
    if not wire.chooses or hidden not in {*HIDDEN, EXACT, wire.hidden} - {AUTO}:
        raise ProtocolError(f"the codec {hidden!r} cannot be tried in this run")


def check_choice(hidden: str, gradient: str, wire: WireSpec) -> None:
    """Raise ProtocolError for codecs that a client cannot choose in this run."""
    for role, chosen, named, candidates in (
        ("hidden", hidden, wire.hidden, HIDDEN),
        ("gradient", gradient, wire.gradient, GRADIENT),
    ):
        if not wire.chooses or chosen not in (candidates if named == AUTO else (named,)):
            raise ProtocolError(f"the codec {chosen!r} cannot be chosen for {role} in this run")


@dataclass(frozen=True)
class CodecTrial:
    """One candidate on one client."""

    codec: str
    rise: float
    """Estimated rise of perplexity, as a share."""
    error: float
    """Standard error of the rise; 0 if the rise is not a mean."""
    fits: bool

    def __str__(self) -> str:
        return f"{self.codec} {100 * self.rise:+.2f} %" + (
            f" (+- {100 * self.error:.2f})" if self.error else ""
        )


def choose_wires(
    clients: Sequence[Client], server: Server, serializer: MessageSerializer
) -> tuple[dict[str, WireSpec], tuple[WireChosen, ...]]:
    """Return the codecs of each client, and events with the reasons; takes seconds for each client."""
    server.place({client.name: client.plan.client.stop for client in clients})
    server.install(server.initial())
    wires, events = {}, []
    for client in clients:
        line = _InProcess(client, server, serializer)
        wire, reason = choose_codecs(client, line, serializer.wire, Candidates())
        wires[client.name] = wire
        events.append(
            WireChosen(client=client.name, hidden=wire.hidden, gradient=wire.gradient, reason=reason)
        )
    return wires, tuple(events)


def choose_codecs(client: Client, line: Line, wire: WireSpec, candidates: Candidates) -> tuple[WireSpec, str]:
    """Return one client's codecs and the reason; hidden states may use what gradients leave of the budget."""
    left, trials = wire.budget, dict[str, list[CodecTrial]]()
    if wire.gradient == AUTO:
        allowed = left / 2 if wire.hidden == AUTO else left
        trials["gradient"] = _gradient_trials(client, line, candidates, allowed)
        left -= _fitting(trials["gradient"]).rise
    if wire.hidden == AUTO:
        trials["hidden"] = _hidden_trials(client, line, candidates, left)
    chosen = {role: _fitting(tried).codec for role, tried in trials.items()}
    return wire.model_copy(update=chosen), _reason(wire, trials)


class _InProcess:
    """The line between a client and a server of this process."""

    def __init__(self, client: Client, server: Server, serializer: MessageSerializer) -> None:
        self._name, self._server, self._serializer = client.name, server, serializer

    def begin(self, hidden: str) -> None:
        self._channel = Channel(self._name, with_codecs(self._serializer, hidden, EXACT))

    def ask(self, sent: Activations) -> LastHidden | HeldOutLoss:
        arrived = expect(self._channel.up(sent), Activations)
        reply = self._server.forward([arrived])[self._name]
        return expect(self._channel.down(reply), LastHidden, HeldOutLoss)

    def learned(self, name: str) -> int:
        return min(end.learned(name) for end in self._channel.ends.values())


def with_codecs(serializer: MessageSerializer, hidden: str, gradient: str) -> MessageSerializer:
    """Return the serializer of a client with these codecs."""
    wire = serializer.wire.model_copy(update={"hidden": hidden, "gradient": gradient})
    return replace(serializer, wire=wire)


def _hidden_trials(client: Client, line: Line, candidates: Candidates, allowed: float) -> list[CodecTrial]:
    """Try candidates until one fits."""
    count = min(MEASURED, max(1, len(client.held_out) // 2))
    if len(candidates.hidden) == 1:
        return [CodecTrial(candidates.hidden[0], 0.0, 0.0, True)]
    exact = _replies(client, line, candidates.exact, count)
    perturbed = _replies(client, line, candidates.exact, count, perturbed=True)
    trials: list[CodecTrial] = []
    for codec in candidates.hidden[:-1]:
        found = _replies(client, line, codec, count)
        if not found:  # too little text for the codec to learn from
            continue
        rises = [_rise(client, *replies) for replies in zip(exact, found, perturbed, strict=True)]
        rise = statistics.fmean(rises)
        error = statistics.stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 else 0.0
        trials.append(CodecTrial(codec, rise, error, abs(rise) + error <= allowed))
        if trials[-1].fits:
            return trials
    return [*trials, CodecTrial(candidates.hidden[-1], 0.0, 0.0, True)]


def _replies(
    client: Client, line: Line, codec: str, count: int, perturbed: bool = False
) -> list[LastHidden | HeldOutLoss]:
    """Return the replies to the first batches; none if the codec cannot learn from the other batches."""
    line.begin(codec)
    learned = kind_of(codec).learned
    if learned is not None:
        for index in range(count, len(client.held_out)):
            line.ask(client.held_out.forward(index))
        legs = 1 if client.plan.labels == "server" else 2
        if line.learned(learned) < legs:
            return []
    return [_reply(client, line, index, perturbed) for index in range(count)]


def _reply(client: Client, line: Line, index: int, perturbed: bool = False) -> LastHidden | HeldOutLoss:
    sent = client.held_out.forward(index)
    if perturbed:
        sent = sent.model_copy(update={"hidden": _perturb(sent.hidden.cpu())})
    return line.ask(sent)


def _perturb(hidden: torch.Tensor) -> torch.Tensor:
    """Return hidden states (N, D) with one number in `PERTURBED` moved by its last digit."""
    flat = hidden.flatten().clone()
    some = flat[::PERTURBED]
    flat[::PERTURBED] = torch.nextafter(some, torch.full_like(some, math.inf))
    return flat.reshape(hidden.shape)


def _rise(
    client: Client,
    exact: LastHidden | HeldOutLoss,
    found: LastHidden | HeldOutLoss,
    perturbed: LastHidden | HeldOutLoss,
) -> float:
    """Return the rise of one batch's perplexity, as a share."""
    if isinstance(exact, LastHidden) and isinstance(found, LastHidden) and isinstance(perturbed, LastHidden):
        by_codec, by_rounding = (
            divergence(client.segment, exact.hidden, one.hidden) for one in (found, perturbed)
        )
        return math.expm1(by_codec - by_rounding)
    exact, found = expect(exact, HeldOutLoss), expect(found, HeldOutLoss)
    return math.expm1((found.loss - exact.loss) / max(1, exact.tokens))


def _gradient_trials(client: Client, line: Line, candidates: Candidates, allowed: float) -> list[CodecTrial]:
    """Try candidates until one fits; with `labels: server` nothing can be measured, and int8 is taken."""
    if client.plan.labels == "server":
        unmeasured = "int8" if "int8" in candidates.gradient else candidates.gradient[-1]
        return [CodecTrial(unmeasured, 0.0, 0.0, True)]
    if len(candidates.gradient) == 1:
        return [CodecTrial(candidates.gradient[0], 0.0, 0.0, True)]
    line.begin(candidates.exact)
    reply = expect(_reply(client, line, 0), LastHidden)
    gradient = client.held_out.gradient(reply).float()
    inputs = reply.hidden.float()
    inputs = inputs / inputs.norm(dim=1, keepdim=True).clamp_min(1e-30)  # as behind a norm
    exact = gradient.T @ inputs
    trials: list[CodecTrial] = []
    for name in candidates.gradient[:-1]:
        codec, context = codec_of(name), CodecContext("gradient", 0, {})
        rounded = codec.decode(codec.encode(gradient, context), torch.float32, context)
        noise = 2 * float((rounded.T @ inputs - exact).square().sum() / exact.square().sum().clamp_min(1e-30))
        rise = math.expm1(EXPECTED_GAIN * noise / (1 + noise))
        trials.append(CodecTrial(name, rise, 0.0, rise <= allowed))
        if trials[-1].fits:
            return trials
    return [*trials, CodecTrial(candidates.gradient[-1], 0.0, 0.0, True)]


def _fitting(trials: Sequence[CodecTrial]) -> CodecTrial:
    return next(trial for trial in trials if trial.fits)


def _reason(wire: WireSpec, trials: Mapping[str, Sequence[CodecTrial]]) -> str:
    tried = "; ".join(f"{role}: {', '.join(map(str, found))}" for role, found in trials.items())
    return f"estimated rise of perplexity, {100 * wire.budget:.2f} % allowed in all: {tried}"
