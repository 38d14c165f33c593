"""All attacks by name, and what an attacker has to run them with.

    Observations, Attacker --ATTACKS[name].run--> tokens read of each text

    nearest          the input embedding nearest to a hidden state; no training, no model run
    linear           a linear inverter learnt on public text
    transformer      a small transformer learnt on public text
    matching         candidates run through the public model, left to right
    prediction       the likeliest label by the server's own last hidden state, without any gradient
    head gradient    labels off the gradient that the client returns (`labels: client`)
    cut gradient     labels off the gradient at the cut alone, learnt on public text
    mean loss        labels off the exact loss of their batch, if it is sent
    labels           the labels themselves (`labels: server`)

The first four read all tokens of a text off its hidden states, the others read the labels. `prediction` is
the floor of those: defences of gradients and labels cannot bring an attacker below what a well-trained model
predicts by itself. A plug-in adds its own with `ATTACKS.add("mine", Attack(way="hidden", run=function))`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import torch as safetensors
from torch.nn import functional

from splitft.audit.attacks.inverter import (
    Context,
    InverterTraining,
    Linear,
    fit_context,
    fit_linear,
    nearest_embedding,
    read,
)
from splitft.audit.attacks.labels import (
    CutReader,
    GradientObservationModel,
    fit_cut_reader,
    read_head_gradient,
)
from splitft.audit.attacks.matching import Effort, match
from splitft.audit.attacks.mean_loss import read_mean_loss
from splitft.audit.attacks.observation import Observation
from splitft.audit.attacks.observation_model import ObservationModel
from splitft.audit.attacks.public_model import PublicModel
from splitft.cache import KeyedCache
from splitft.errors import PluginError
from splitft.privacy.known_leakage import Way
from splitft.registry import Registry

TOGETHER = 16
"""Public texts run at one time."""
PREDICTED = 128
"""Positions whose logits are in memory at one time."""


@dataclass
class Attacker:
    """Knowledge and resources of an attacker at one cut, and what it has learnt on public text."""

    public_model: PublicModel
    """The public model, with the global adapters."""
    public: torch.Tensor
    """(B, T) tokens of public texts, all of one length."""
    hidden_model: ObservationModel
    """The known part of what happens to hidden states before they are observed."""
    gradient_model: Callable[[Observation], GradientObservationModel] = lambda batch: (
        GradientObservationModel()
    )
    """The same of a batch's gradients."""
    effort: Effort = Effort()  # noqa: RUF009 frozen
    training_steps: int = 150
    """Steps of training the transformer."""
    gradient_texts: int = 32
    """Public texts whose gradients at the cut are computed."""
    cache: Path | None = None
    """Folder in which trained inverters are kept."""
    seed: int = 0
    _learnt: dict[str, object] = field(default_factory=dict)

    def hidden(self) -> torch.Tensor:
        """Return public hidden states as they would be observed without noise, (B, T, D)."""
        if "hidden" not in self._learnt:
            parts = [self.public_model.hidden(part) for part in torch.split(self.public, TOGETHER)]
            rows = torch.cat(parts).float()
            self._learnt["hidden"] = self.hidden_model.without_noise(rows.flatten(0, 1)).view_as(rows)
        found = self._learnt["hidden"]
        assert isinstance(found, torch.Tensor)
        return found

    def linear(self) -> Linear:
        """Return the linear inverter."""
        if "linear" not in self._learnt:
            rows, tokens = self.hidden().flatten(0, 1), self.public.flatten()
            embedding, deviation = self.public_model.embedding, self.hidden_model.deviation
            self._learnt["linear"] = fit_linear(rows, tokens, embedding, deviation)
        found = self._learnt["linear"]
        assert isinstance(found, Linear)
        return found

    def transformer(self) -> Context:
        """Return the transformer, from the cache if it was trained before."""
        if "transformer" not in self._learnt:
            self._learnt["transformer"] = self._cached_transformer()
        found = self._learnt["transformer"]
        assert isinstance(found, Context)
        return found

    def _cached_transformer(self) -> Context:
        linear, hidden, deviation = self.linear(), self.hidden(), self.hidden_model.deviation

        def train() -> Context:
            generator = torch.Generator().manual_seed(self.seed)
            training = InverterTraining(self.training_steps)
            return fit_context(linear, hidden, self.public, generator, deviation, training)

        def load(data: bytes) -> Context:
            context = Context(linear)
            context.load_state_dict(safetensors.load(data))
            return context.eval()

        if self.cache is None:
            return train()
        kept = KeyedCache(self.cache, lambda one: safetensors.save(one.state_dict()), load, ".safetensors")
        facts = repr((hidden.shape, deviation, self.training_steps, self.seed)).encode()
        return kept.cached(facts + hidden[:, ::7].contiguous().numpy().tobytes(), train)

    def best_guesses(self, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return log-probabilities (T_b, V) of the best inverter trained so far, for each sequence."""
        inverter = self._learnt.get("transformer") or self.linear()
        assert isinstance(inverter, Context | Linear)
        return [inverter.logits(one.float()) for one in sequences]

    def cut_reader(self) -> CutReader:
        """Return the map from gradients at the cut to labels, learnt on public texts."""
        if "cut reader" not in self._learnt:
            gradients, labels = [], []
            for part in torch.split(self.public[: self.gradient_texts], 4):
                at_cut = self.public_model.hidden(part).detach().requires_grad_()
                with torch.enable_grad():
                    last = self.public_model.from_cut(at_cut)[:, :-1].flatten(0, 1)
                    loss = functional.cross_entropy(
                        self.public_model.segment.logits(last).float(), part[:, 1:].flatten()
                    )
                gradients.append(torch.autograd.grad(loss, at_cut)[0][:, :-1].flatten(0, 1))
                labels.append(part[:, 1:].flatten())
            found = fit_cut_reader(torch.cat(gradients), torch.cat(labels), self.public_model.embedding)
            self._learnt["cut reader"] = found
        found_reader = self._learnt["cut reader"]
        assert isinstance(found_reader, CutReader)
        return found_reader


Read = list[list[int]]
"""Tokens read of each text."""


@dataclass(frozen=True)
class Attack:
    """An attack: what it reads, what it needs, and the function that runs it."""

    way: Way
    """`hidden` reads whole texts, `labels` the labelled part of texts."""
    run: Callable[[Attacker, Sequence[Observation]], Read]
    """Return the tokens read of each text of all batches, in order."""
    needs: tuple[str, ...] = ()
    """Optional fields of `Observation` without which it is left out, such as `head_gradient`."""
    in_short: bool = True
    """The short audit runs it too."""

    def __post_init__(self) -> None:
        optional = [one.name for one in fields(Observation) if one.default is None]
        if self.way not in ("hidden", "labels") or not set(self.needs) <= set(optional):
            raise PluginError(
                f"an attack of way {self.way!r} that needs {', '.join(self.needs) or 'nothing'} cannot be "
                f"run: way is hidden or labels, needs are among {', '.join(optional)}"
            )

    def possible(self, batches: Sequence[Observation]) -> bool:
        """Return whether all that it needs was observed."""
        return all(getattr(batch, name) is not None for batch in batches for name in self.needs)


def by_nearest(attacker: Attacker, batches: Sequence[Observation]) -> Read:
    """Read the tokens of the nearest input embeddings, by cosine."""
    embedding = attacker.public_model.embedding
    return read([nearest_embedding(embedding, one) for one in _sequences(batches)])


def by_linear(attacker: Attacker, batches: Sequence[Observation]) -> Read:
    """Read with the linear inverter."""
    return read([attacker.linear().logits(one) for one in _sequences(batches)])


def by_transformer(attacker: Attacker, batches: Sequence[Observation]) -> Read:
    """Read with the transformer."""
    return read([attacker.transformer().logits(one) for one in _sequences(batches)])


def by_matching(attacker: Attacker, batches: Sequence[Observation]) -> Read:
    """Read by running candidates."""
    sequences = _sequences(batches)
    guesses = attacker.best_guesses(sequences)
    return match(sequences, attacker.public_model, guesses, attacker.hidden_model, attacker.effort)


def by_prediction(attacker: Attacker, batches: Sequence[Observation]) -> Read:
    """Predict the labels from the last hidden states, which the server itself has computed."""
    found: Read = []
    for batch in batches:
        assert batch.last is not None
        rows = torch.split(batch.last, PREDICTED)
        with torch.no_grad():
            labels = torch.cat([attacker.public_model.segment.logits(part).argmax(-1) for part in rows])
        found += batch.by_sequence(labels)
    return found


def by_head_gradient(attacker: Attacker, batches: Sequence[Observation]) -> Read:
    """Read labels off the gradients that the client returns."""
    found: Read = []
    for batch in batches:
        assert batch.last is not None
        assert batch.head_gradient is not None
        head, model = attacker.public_model.segment, attacker.gradient_model(batch)
        found += batch.by_sequence(read_head_gradient(head, batch.last, batch.head_gradient, model))
    return found


def by_cut_gradient(attacker: Attacker, batches: Sequence[Observation]) -> Read:
    """Read labels off the gradient at the cut alone."""
    found: Read = []
    for batch in batches:
        assert batch.cut_gradient is not None
        found += batch.by_sequence(attacker.cut_reader().read(batch.cut_gradient[batch.labelled_rows()]))
    return found


def by_mean_loss(attacker: Attacker, batches: Sequence[Observation]) -> Read:
    """Read labels off the exact mean loss of their batch."""
    found: Read = []
    for batch in batches:
        assert batch.last is not None
        assert batch.mean_loss is not None
        found += batch.by_sequence(read_mean_loss(attacker.public_model.segment, batch.last, batch.mean_loss))
    return found


def by_labels(attacker: Attacker, batches: Sequence[Observation]) -> Read:
    """Return the labels as they were sent."""
    found: Read = []
    for batch in batches:
        assert batch.labels is not None
        found += batch.by_sequence(batch.labels)
    return found


def _sequences(batches: Sequence[Observation]) -> list[torch.Tensor]:
    return [rows.float() for batch in batches for rows in batch.sequences()]


ATTACKS: Registry[Attack] = Registry(
    "attack",
    "splitft.attacks",
    {
        "nearest": Attack("hidden", by_nearest),
        "linear": Attack("hidden", by_linear),
        "transformer": Attack("hidden", by_transformer, in_short=False),
        "matching": Attack("hidden", by_matching),
        "prediction": Attack("labels", by_prediction, needs=("last",), in_short=False),
        "head gradient": Attack("labels", by_head_gradient, needs=("last", "head_gradient")),
        "cut gradient": Attack("labels", by_cut_gradient, needs=("cut_gradient",), in_short=False),
        "mean loss": Attack("labels", by_mean_loss, needs=("last", "mean_loss")),
        "labels": Attack("labels", by_labels, needs=("labels",)),
    },
)
"""All attacks by name, in the order in which they run: matching uses the inverters trained before it."""
