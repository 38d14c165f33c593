"""Specifications of a client's defences of its messages, and of a site's own minimum.

The guarantee of each defence, and for which neighbours, is in `splitft.privacy`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from splitft.specs.base import Spec


class RowDefenceSpec(Spec):
    """Defence of rows (one for each token) before a client sends them."""

    defence: Literal["none", "clip", "gaussian", "laplace"] = "none"
    """`clip` scales rows longer than clip_norm down to it; `gaussian` and `laplace` also add noise
    (local differential privacy of a row; `laplace` also metric privacy)."""
    clip_norm: Literal["public"] | float = "public"
    """Largest L2 norm of a row; `public` for the median norm on public text, computed for each cut."""
    noise: float = Field(0.0, ge=0, le=1e6)
    """Standard deviation of the noise on a coordinate, as a multiple of clip_norm / sqrt(width): at 1 the
    noise is as large as the largest row."""

    @model_validator(mode="after")
    def _noise_and_its_kind_come_together(self) -> RowDefenceSpec:
        noisy = self.defence in ("gaussian", "laplace")
        if noisy and self.noise == 0:
            raise ValueError(
                f"defence {self.defence} adds no noise with noise 0: give noise, or defence clip"
            )
        if not noisy and self.noise > 0:
            raise ValueError(f"noise {self.noise:g} with defence {self.defence}: give gaussian or laplace")
        if not isinstance(self.clip_norm, str) and not 0 < self.clip_norm < float("inf"):
            raise ValueError(f"clip_norm {self.clip_norm} clips nothing to be sent: give a number above 0")
        return self


class LabelsSpec(Spec):
    """Defence of the labels that a client computes its loss and the returning gradient with."""

    defence: Literal["none", "randomised"] = "none"
    """`randomised` replaces a label by one of the tokens that the model expects, most likely the true one if
    it is among them (local differential privacy of a label)."""
    epsilon: float = Field(0.0, ge=0, le=100)
    """Epsilon of one pass over a label; 3 keeps most labels that the model expects."""

    @model_validator(mode="after")
    def _epsilon_and_its_defence_come_together(self) -> LabelsSpec:
        if (self.defence == "randomised") != (self.epsilon > 0):
            raise ValueError(
                f"defence {self.defence} with epsilon {self.epsilon:g}: give randomised and an epsilon above "
                "0, or neither"
            )
        return self


class UpdatesSpec(Spec):
    """Clipping and noise of each client's update of the adapters (DP-FedAvg, arXiv 1710.06963)."""

    clip_norm: float | None = Field(None, gt=0)
    """Largest L2 norm of a client's change of the factors in a round, over all blocks; null for no bound."""
    noise_multiplier: float = Field(0.0, ge=0, le=1e6)
    """Standard deviation of the noise on the sum of the updates, as a multiple of clip_norm. With noise all
    participants have the same weight, independent of the size of their text."""

    @model_validator(mode="after")
    def _noise_needs_a_bound(self) -> UpdatesSpec:
        if self.noise_multiplier > 0 and self.clip_norm is None:
            raise ValueError("noise_multiplier without clip_norm hides nothing: give clip_norm too")
        return self


class PrivacySpec(Spec):
    """Defences against a curious server, and against readers of the final adapter."""

    hidden: RowDefenceSpec = RowDefenceSpec()
    """Hidden states at the cut, in training and in evaluation."""
    gradient: RowDefenceSpec = RowDefenceSpec()
    """Gradients of the last hidden states that the client returns; they depend on the labels."""
    labels: LabelsSpec = LabelsSpec()
    """Labels behind those gradients."""
    updates: UpdatesSpec = UpdatesSpec()
    """Updates of the adapters: protects against readers of the global adapter, not against the server."""
    private_blocks: int = Field(0, ge=0)
    """Number of first blocks whose adapters are never sent: each client keeps its own."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """The delta at which epsilon is reported."""

    @property
    def protects_labels(self) -> bool:
        """True if labels have an epsilon, so that no exact loss may leave a client."""
        return self.gradient.noise > 0 or self.labels.defence != "none"


class SiteBoundsSpec(Spec):
    """Minimum that a data owner sets for its own site, which no server or run can lower."""

    min_cut: int = Field(1, ge=1)
    """Shallowest cut at which this site takes part."""
    min_noise: float = Field(0.0, ge=0, le=1e6)
    """Least `privacy.hidden.noise` that this site adds, even if the run sets less."""
    defence: Literal["gaussian", "laplace"] = "gaussian"
    """Distribution of the noise that it adds if the run has none."""
