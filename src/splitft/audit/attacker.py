"""What an attacker knows of a setting: the run's settings, and with public text what they do to rows.

    Setting, RunConfig, Terms --attacker_of--> Attacker(replica, public text, channels)

It does the clipping and the rounding of a client to its own candidates, and knows how large the noise is. The
clipping norms are public by design; where they are computed from a batch, it is from what the server sent.
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
from splitft.audit.recording import as_it_travels
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
"""A coordinate of rows that any clipping norm cuts down, to see what it cuts them down to."""
CALIBRATION = (4, 24)
"""Public texts, and tokens of each, that are computed twice to measure rounding."""


def attacker_of(
    setting: Setting, config: RunConfig, replica: PublicModel, public: torch.Tensor, terms: MessageSerializer
) -> Attacker:
    """An attacker on this setting, with nothing learnt yet; `replica` is at the setting's cut."""
    cut, width = setting.cut, replica.shape.width
    privacy = with_noise(config.privacy, setting)
    norm_text = public_text(config.model_copy(update={"privacy": privacy}), replica.model)
    defence = Defence(_only_clipping(privacy), Noise(0, "attacker"), norm_text)

    def base(batch: Batch) -> torch.Tensor:
        return pack(replica.base_hidden(batch.tokens), batch.lengths)

    def repeated(rows: torch.Tensor) -> torch.Tensor:
        return as_it_travels(defence.hidden(rows, cut, base), terms)

    spread = 0.0
    if privacy.hidden.noise:
        norm = typical_norm(defence.hidden(torch.full((1, width), TOO_LONG), cut, base))
        spread = deviation(norm, privacy.hidden.noise, width)
    texts, length = CALIBRATION
    channel = calibrated(
        ObservationModel(deviation=spread, repeated=repeated), *replica.twice(public[:texts, :length])
    )
    return Attacker(
        replica=replica,
        public=public,
        channel=channel,
        gradients=lambda seen: _gradient_channel(defence, privacy, replica, seen),
        cache=cache_folder() / "inverters",
        seed=config.seed,
    )


def _gradient_channel(
    defence: Defence, privacy: PrivacySpec, replica: PublicModel, seen: Observation
) -> GradientObservationModel:
    last, labels = seen.last, privacy.labels
    epsilon = None if labels.defence == "none" else labels.epsilon
    if privacy.gradient.defence == "none" or last is None:
        return GradientObservationModel(epsilon=epsilon)
    head = replica.segment
    norms: list[float] = []

    def clipped(rows: torch.Tensor) -> torch.Tensor:
        if not norms:  # read off what it does to rows that are too long, as many as in the batch
            huge = torch.full_like(last, TOO_LONG, dtype=torch.float32)
            cut_down = defence.gradient(
                huge, last, head.shape.vocab, lambda h, y: loss_and_gradient(head, h, y)[1]
            )
            norms.append(typical_norm(cut_down))
        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return rows * torch.clamp(norms[0] / lengths.clamp_min(1e-30), max=1.0)

    clipped(torch.zeros(1, last.shape[-1]))
    spread = deviation(norms[0], privacy.gradient.noise, last.shape[-1])
    return GradientObservationModel(spread, clipped, epsilon)


def with_noise(privacy: PrivacySpec, setting: Setting) -> PrivacySpec:
    """The run's defences with this noise instead of its own."""
    return privacy.model_copy(
        update={
            "hidden": _noisy(privacy.hidden, setting.noise),
            "gradient": _noisy(privacy.gradient, setting.gradient_noise),
        }
    )


def _noisy(spec: RowDefenceSpec, noise: float) -> RowDefenceSpec:
    if not noise:
        quiet_kind = spec.defence if spec.defence == "clip" else "none"
        return spec.model_copy(update={"defence": quiet_kind, "noise": 0.0})
    kind = spec.defence if spec.defence in ("gaussian", "laplace") else "gaussian"
    return spec.model_copy(update={"defence": kind, "noise": noise})


def _only_clipping(privacy: PrivacySpec) -> PrivacySpec:
    def clipping(spec: RowDefenceSpec) -> RowDefenceSpec:
        kind = "none" if spec.defence == "none" else "clip"
        return spec.model_copy(update={"defence": kind, "noise": 0.0})

    return privacy.model_copy(
        update={"hidden": clipping(privacy.hidden), "gradient": clipping(privacy.gradient)}
    )
