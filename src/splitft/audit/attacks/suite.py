"""All attacks, by name, on what a server has seen of a run.

    Seen, and what the attacker knows --ATTACKS[name]--> what was read of each text, in tokens

    nearest          the input embedding nearest to a hidden state; no training, no model run
    linear           a linear inverter learnt on public text
    transformer      a small transformer learnt on public text
    matching         candidates run through the public model, left to right
    prediction       the likeliest label by the server's own last hidden state: reads no gradient at all
    head gradient    labels off the gradient that the client returns (`labels: client`)
    cut gradient     labels off the gradient at the cut alone, learnt on public text
    labels           read as they are (`labels: server`)

The first four read all tokens of a text, from its hidden states; the others read the labels. `prediction` is
the floor of those: what is done to gradients and labels cannot bring an attacker below what a model that was
worth training says by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch.nn import functional

from splitft.audit.attacks.channel import ObservationModel
from splitft.audit.attacks.inverter import Context, Linear, fit_context, fit_linear, nearest_embedding, read
from splitft.audit.attacks.labels import (
    CutReader,
    GradientObservationModel,
    fit_cut_reader,
    read_head_gradient,
)
from splitft.audit.attacks.matching import Effort, match
from splitft.audit.attacks.observation import Observation
from splitft.audit.attacks.replica import PublicModel

TOGETHER = 16
"""Public texts run at one time."""
PREDICTED = 128
"""Positions whose logits exist at one time."""


@dataclass
class Attacker:
    """What the attacker knows and can do at one cut, and what it has learnt on public text."""

    replica: PublicModel
    """The public model, with the global adapters."""
    public: torch.Tensor
    """(B, T) tokens of public texts, all of one length."""
    channel: ObservationModel
    """What is known of the way of hidden states."""
    gradients: Callable[[Observation], GradientObservationModel] = lambda seen: GradientObservationModel()
    """What is known of the way of a batch's gradients."""
    effort: Effort = Effort()  # noqa: RUF009 frozen
    training_steps: int = 150
    """Of the transformer."""
    gradient_texts: int = 32
    """Public texts whose gradients at the cut are computed."""
    cache: Path | None = None
    """Folder where trained inverters are kept."""
    seed: int = 0
    _learnt: dict[str, object] = field(default_factory=dict)

    def hidden(self) -> torch.Tensor:
        """Public hidden states as they would be seen, but for the noise, (B, T, D)."""
        if "hidden" not in self._learnt:
            rows = torch.cat(
                [self.replica.hidden(part) for part in torch.split(self.public, TOGETHER)]
            ).float()
            self._learnt["hidden"] = self.channel.repeated(rows.flatten(0, 1)).view_as(rows)
        found = self._learnt["hidden"]
        assert isinstance(found, torch.Tensor)
        return found

    def linear(self) -> Linear:
        """The linear inverter."""
        if "linear" not in self._learnt:
            rows = self.hidden().flatten(0, 1)
            embedding = self.replica.embedding
            self._learnt["linear"] = fit_linear(
                rows, self.public.flatten(), embedding, self.channel.deviation
            )
        found = self._learnt["linear"]
        assert isinstance(found, Linear)
        return found

    def transformer(self) -> Context:
        """The transformer, from the cache if it was trained before."""
        if "transformer" not in self._learnt:
            self._learnt["transformer"] = self._cached_transformer()
        found = self._learnt["transformer"]
        assert isinstance(found, Context)
        return found

    def _cached_transformer(self) -> Context:
        linear, hidden = self.linear(), self.hidden()
        facts = (hidden.shape, self.channel.deviation, self.training_steps, self.seed)
        digest = hashlib.sha256(repr(facts).encode() + hidden[:, ::7].contiguous().numpy().tobytes())
        file = None if self.cache is None else self.cache / f"{digest.hexdigest()[:24]}.safetensors"
        if file is not None and file.is_file():
            context = Context(linear)
            try:
                context.load_state_dict(safetensors.load_file(file))
                return context.eval()
            except (SafetensorError, RuntimeError, OSError):
                pass  # torn or of another version: train it anew
        generator = torch.Generator().manual_seed(self.seed)
        context = fit_context(
            linear, hidden, self.public, generator, self.channel.deviation, self.training_steps
        )
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(f".{id(context)}.draft")
            safetensors.save_file(context.state_dict(), draft)
            draft.replace(file)
        return context

    def best_guesses(self, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Log-probabilities of the best inverter that there is already."""
        inverter = self._learnt.get("transformer") or self.linear()
        assert isinstance(inverter, Context | Linear)
        return [inverter.logits(one.float()) for one in sequences]

    def cut_reader(self) -> CutReader:
        """The map from gradients at the cut to labels, learnt on public texts."""
        if "cut reader" not in self._learnt:
            gradients, labels = [], []
            for part in torch.split(self.public[: self.gradient_texts], 4):
                at_cut = self.replica.hidden(part).detach().requires_grad_()
                with torch.enable_grad():
                    last = self.replica.from_cut(at_cut)[:, :-1].flatten(0, 1)
                    loss = functional.cross_entropy(
                        self.replica.segment.logits(last).float(), part[:, 1:].flatten()
                    )
                gradients.append(torch.autograd.grad(loss, at_cut)[0][:, :-1].flatten(0, 1))
                labels.append(part[:, 1:].flatten())
            found = fit_cut_reader(torch.cat(gradients), torch.cat(labels), self.replica.embedding)
            self._learnt["cut reader"] = found
        found_reader = self._learnt["cut reader"]
        assert isinstance(found_reader, CutReader)
        return found_reader


Read = list[list[int]]
"""Tokens read of each text."""
Attack = Callable[[Attacker, Sequence[Observation]], Read | None]
"""What was read; None where what the attack needs was not seen."""


def by_nearest(attacker: Attacker, seen: Sequence[Observation]) -> Read:
    """By cosine with the input embeddings."""
    return read([nearest_embedding(attacker.replica.embedding, one) for one in _sequences(seen)])


def by_linear(attacker: Attacker, seen: Sequence[Observation]) -> Read:
    """With the linear inverter."""
    return read([attacker.linear().logits(one.float()) for one in _sequences(seen)])


def by_transformer(attacker: Attacker, seen: Sequence[Observation]) -> Read:
    """With the transformer."""
    return read([attacker.transformer().logits(one.float()) for one in _sequences(seen)])


def by_matching(attacker: Attacker, seen: Sequence[Observation]) -> Read:
    """By running candidates."""
    sequences = _sequences(seen)
    return match(
        sequences, attacker.replica, attacker.best_guesses(sequences), attacker.channel, attacker.effort
    )


def by_prediction(attacker: Attacker, seen: Sequence[Observation]) -> Read | None:
    """What the model expects, at the last hidden states that the server itself has made."""
    found: Read = []
    for batch in seen:
        if batch.last is None:
            return None
        rows = torch.split(batch.last, PREDICTED)
        with torch.no_grad():
            labels = torch.cat([attacker.replica.segment.logits(part).argmax(-1) for part in rows])
        found += batch.by_sequence(labels)
    return found


def by_head_gradient(attacker: Attacker, seen: Sequence[Observation]) -> Read | None:
    """Labels off what the client returns."""
    found: Read = []
    for batch in seen:
        if batch.last is None or batch.head_gradient is None:
            return None
        head = attacker.replica.segment
        labels = read_head_gradient(head, batch.last, batch.head_gradient, attacker.gradients(batch))
        found += batch.by_sequence(labels)
    return found


def by_cut_gradient(attacker: Attacker, seen: Sequence[Observation]) -> Read | None:
    """Labels off the gradient at the cut alone."""
    found: Read = []
    for batch in seen:
        if batch.cut_gradient is None:
            return None
        found += batch.by_sequence(attacker.cut_reader().read(batch.cut_gradient[batch.labelled_rows()]))
    return found


def by_labels(attacker: Attacker, seen: Sequence[Observation]) -> Read | None:
    """The labels as they came."""
    found: Read = []
    for batch in seen:
        if batch.labels is None:
            return None
        found += batch.by_sequence(batch.labels)
    return found


HIDDEN_ATTACKS: Mapping[str, Attack] = {
    "nearest": by_nearest,
    "linear": by_linear,
    "transformer": by_transformer,
    "matching": by_matching,
}
"""Attacks on hidden states at the cut; each reads whole texts."""
LABEL_ATTACKS: Mapping[str, Attack] = {
    "prediction": by_prediction,
    "head gradient": by_head_gradient,
    "cut gradient": by_cut_gradient,
    "labels": by_labels,
}
"""Attacks on what depends on the labels; each reads the labelled part of texts."""
ATTACKS: Mapping[str, Attack] = {**HIDDEN_ATTACKS, **LABEL_ATTACKS}
"""Every attack by name."""


def _sequences(seen: Sequence[Observation]) -> list[torch.Tensor]:
    return [rows.float() for batch in seen for rows in batch.sequences()]
