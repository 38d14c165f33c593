"""Build the attacker of one setting: the run's settings and public text determine what it knows.

    Setting, RunConfig, MessageSerializer --attacker_of--> Attacker(public model and text, observation models)

The attacker applies the client's clipping and rounding to its own candidates, and knows the size of the
noise. Clipping norms are public by design: those that depend on a batch depend on what the server itself has
sent.
"""

from __future__ import annotations

import torch

from splitft.audit.attacks import (
    Attacker,
    GradientObservationModel,
    Observation,
    ObservationModel,
    PublicModel,
    calibrated,
)
from splitft.audit.recording import encoded_and_decoded
from splitft.cache import cache_folder
from splitft.config import RunConfig
from splitft.data.text import Batch
from splitft.model import loss_and_gradient, pack
from splitft.privacy.defence import Defence
from splitft.privacy.known_leakage import Setting
from splitft.privacy.noise import Noise, deviation, typical_norm
from splitft.protocol import MessageSerializer
from splitft.run.setup import public_text
from splitft.specs import PrivacySpec, RowDefenceSpec

TOO_LONG = 1e6
"""A coordinate of rows longer than any clipping norm, to find the norm that they are clipped to."""
CALIBRATION = (4, 24)
"""Public texts, and tokens of each, that are computed twice to measure rounding."""


def attacker_of(
    setting: Setting,
    config: RunConfig,
    public_model: PublicModel,
    public: torch.Tensor,
    serializer: MessageSerializer,
) -> Attacker:
    """Return an attacker on this setting that has learnt nothing yet; `public_model` is at its cut."""
    cut, width = setting.cut, public_model.shape.width
    privacy = with_noise(config.privacy, setting)
    norm_text = public_text(config.model_copy(update={"privacy": privacy}), public_model.model)
    defence = Defence(_only_clipping(privacy), Noise(0, "attacker"), norm_text)

    def base(batch: Batch) -> torch.Tensor:
        return pack(public_model.base_hidden(batch.tokens), batch.lengths)

    def without_noise(rows: torch.Tensor) -> torch.Tensor:
        return encoded_and_decoded(defence.hidden(rows, cut, base), serializer)

    spread = 0.0
    if privacy.hidden.noise:
        norm = typical_norm(defence.hidden(torch.full((1, width), TOO_LONG), cut, base))
        spread = deviation(norm, privacy.hidden.noise, width)
    texts, length = CALIBRATION
    return Attacker(
        public_model=public_model,
        public=public,
        hidden_model=calibrated(
            ObservationModel(deviation=spread, without_noise=without_noise),
            *public_model.hidden_twice(public[:texts, :length]),
        ),
        gradient_model=lambda batch: _gradient_model(defence, privacy, public_model, batch),
        cache=cache_folder() / "inverters",
        seed=config.seed,
    )


def _gradient_model(
    defence: Defence, privacy: PrivacySpec, public_model: PublicModel, batch: Observation
) -> GradientObservationModel:
    last, labels = batch.last, privacy.labels
    epsilon = None if labels.defence == "none" else labels.epsilon
    if privacy.gradient.defence == "none" or last is None:
        return GradientObservationModel(epsilon=epsilon)
    # the norm that rows are clipped to: as many rows as in the batch, all too long
    head = public_model.segment
    clipped = defence.gradient(
        torch.full_like(last, TOO_LONG, dtype=torch.float32),
        last,
        head.shape.vocab,
        lambda hidden, y: loss_and_gradient(head, hidden, y)[1],
    )
    norm = typical_norm(clipped)

    def clip(rows: torch.Tensor) -> torch.Tensor:
        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return rows * torch.clamp(norm / lengths.clamp_min(1e-30), max=1.0)

    return GradientObservationModel(deviation(norm, privacy.gradient.noise, last.shape[-1]), clip, epsilon)


def with_noise(privacy: PrivacySpec, setting: Setting) -> PrivacySpec:
    """Return the run's defences with this setting's noise instead of their own."""
    return privacy.model_copy(
        update={
            "hidden": _noisy(privacy.hidden, setting.noise),
            "gradient": _noisy(privacy.gradient, setting.gradient_noise),
        }
    )


def _noisy(spec: RowDefenceSpec, noise: float) -> RowDefenceSpec:
    if not noise:
        without = "clip" if spec.defence == "clip" else "none"
        return spec.model_copy(update={"defence": without, "noise": 0.0})
    kind = spec.defence if spec.noise else "gaussian"
    return spec.model_copy(update={"defence": kind, "noise": noise})


def _only_clipping(privacy: PrivacySpec) -> PrivacySpec:
    def clipping(spec: RowDefenceSpec) -> RowDefenceSpec:
        kind = "none" if spec.defence == "none" else "clip"
        return spec.model_copy(update={"defence": kind, "noise": 0.0})

    return privacy.model_copy(
        update={"hidden": clipping(privacy.hidden), "gradient": clipping(privacy.gradient)}
    )
