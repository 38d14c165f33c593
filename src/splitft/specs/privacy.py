"""What a client does to its messages before they leave, and what a site insists on.

What each defence promises, and for which neighbours, is told where it is computed: `splitft.privacy`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from splitft.specs.base import Spec


class RowDefenceSpec(Spec):
    """How rows (one a token) are treated before they leave a client."""

    defence: Literal["none", "clip", "gaussian", "laplace"] = "none"
    """`clip`: rows longer than clip_norm are scaled down to it; `gaussian`, `laplace`: and noise is added
    (local differential privacy of a row; `laplace` also metric privacy)."""
    clip_norm: Literal["public"] | float = "public"
    """Largest L2 norm of a row; `public` for the median norm on public text, computed anew for each cut."""
    noise: float = Field(0.0, ge=0, le=1e6)
    """Standard deviation of the noise on a coordinate, as a multiple of clip_norm / sqrt(width): 1 is as much
    noise as a row can have signal."""

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
    """What label a client's loss is of, before its gradient returns to the server."""

    defence: Literal["none", "randomised"] = "none"
    """`randomised`: one of the tokens that the model expects, most likely the true one if it is among them
    (local differential privacy of a label)."""
    epsilon: float = Field(0.0, ge=0, le=100)
    """What one pass over a label may tell of it; 3 keeps most of the labels that the model expects."""

    @model_validator(mode="after")
    def _a_promise_has_a_size(self) -> LabelsSpec:
        if (self.defence == "randomised") != (self.epsilon > 0):
            raise ValueError(
                f"defence {self.defence} with epsilon {self.epsilon:g}: give randomised and an epsilon above "
                "0, or neither"
            )
        return self


class UpdatesSpec(Spec):
    """How each client's update of the adapters is bounded and hidden in the mean (DP-FedAvg, 1710.06963)."""

    clip_norm: float | None = Field(None, gt=0)
    """Largest L2 norm of a client's change of the factors in a round, over all blocks; null for no bound."""
    noise_multiplier: float = Field(0.0, ge=0, le=1e6)
    """Standard deviation of the noise on the sum of the updates, as a multiple of clip_norm; with noise all
    participants count alike, whatever text they have."""

    @model_validator(mode="after")
    def _noise_needs_a_bound(self) -> UpdatesSpec:
        if self.noise_multiplier > 0 and self.clip_norm is None:
            raise ValueError("noise_multiplier without clip_norm hides nothing: give clip_norm too")
        return self


class PrivacySpec(Spec):
    """What is done against a curious server, and against who reads the final adapter."""

    hidden: RowDefenceSpec = RowDefenceSpec()
    """Hidden states at the cut, the last stop before they leave; on evaluation's as well."""
    gradient: RowDefenceSpec = RowDefenceSpec()
    """Gradients of the last hidden states that the client sends back; they depend on the labels."""
    labels: LabelsSpec = LabelsSpec()
    """Labels behind those gradients."""
    updates: UpdatesSpec = UpdatesSpec()
    """Updates of the adapters: protects clients from who gets the global adapter, not from the server."""
    private_blocks: int = Field(0, ge=0)
    """Adapters of the client's first so many blocks are never sent: each client keeps its own."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """The delta at which epsilon is reported."""


class SiteBoundsSpec(Spec):
    """What a data owner fixes for its own site, and no server or run may undercut."""

    min_cut: int = Field(1, ge=1)
    """Shallowest cut at which this site takes part."""
    min_noise: float = Field(0.0, ge=0, le=1e6)
    """Least `privacy.hidden.noise` that this site adds, whatever the run asks for."""
    defence: Literal["gaussian", "laplace"] = "gaussian"
    """The noise it adds where the run asks for none."""
