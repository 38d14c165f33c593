"""Apply one client's defences to its messages before they are sent.

    hidden (N, D) at the cut --------- DEFENCES[privacy.hidden.defence] ---> Activations
    labels (M,) behind the gradient -- randomised, by privacy.labels
    gradient (M, D) of last hidden --- DEFENCES[privacy.gradient.defence] -> HeadGradient
    sum of held-out losses ----------- noise, if labels are protected ------> Evaluation
    loss of a training batch --------- not sent, if labels are protected

`public` clipping norms are computed from what the server knows in any case, so that they reveal nothing:

    hidden     the median norm of the base model's hidden states at this cut over public text
    gradient   the median norm of the gradients that random labels would give at the last hidden states that
               the server itself has sent. Given those, the gradient depends on the labels alone (d loss / d h
               is a function of h, public weights and the label), so its noise is local DP of each label

The guarantees of the noise are in `noise`. Backward passes use the exact gradient of clipping; noise is a
constant in them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from splitft.data.text import Batch
from splitft.errors import ProtocolError
from splitft.privacy.accounting import row_epsilon
from splitft.privacy.held_out_loss import MOST_NATS, held_out_noise
from splitft.privacy.noise import DEFENCES, Noise, typical_norm
from splitft.privacy.randomized_response import randomize_labels
from splitft.specs import PrivacySpec, RowDefenceSpec, SiteBoundsSpec

SAMPLED_ROWS = 64
"""Rows of random labels whose gradients set a public clipping norm; few, since the head is expensive."""

LABELS_AT_ONCE = 128
"""Labels whose logits are in memory at one time."""


class Defence:
    """Defences of one client over a whole run."""

    def __init__(
        self,
        privacy: PrivacySpec,
        noise: Noise,
        public: Batch | None = None,
        site: SiteBoundsSpec | None = None,
    ) -> None:
        """Take public text in `public`, needed if hidden states are clipped to a public norm."""
        self.site = site or SiteBoundsSpec()
        self.privacy = with_site(privacy, self.site)
        self._noise, self._public = noise, public
        self._norms: dict[int, float] = {}

    def check_cut(self, cut: int) -> None:
        """Raise ProtocolError for a cut shallower than the site allows."""
        if cut < self.site.min_cut:
            raise ProtocolError(
                f"cut {cut} was asked for, but this site takes part from cut {self.site.min_cut} on (min_cut)"
            )

    def hidden(
        self, rows: torch.Tensor, cut: int, base: Callable[[Batch], torch.Tensor], *place: object
    ) -> torch.Tensor:
        """Return hidden states (N, D) to send; `base` runs public text through the base model's blocks."""
        spec = self.privacy.hidden
        if spec.defence == "none":
            return rows
        if isinstance(spec.clip_norm, float):
            norm = spec.clip_norm
        else:
            if cut not in self._norms:
                assert self._public is not None, "public text is needed for a public norm"
                with torch.no_grad():
                    self._norms[cut] = typical_norm(base(self._public))
            norm = self._norms[cut]
        return self._apply(spec, rows, norm, "hidden", *place)

    def labels(
        self,
        labels: torch.Tensor,
        last: torch.Tensor,
        logits: Callable[[torch.Tensor], torch.Tensor],
        *place: object,
    ) -> torch.Tensor:
        """Return labels (M,) to compute the loss with; `logits` is the head, of last hidden states (M, D)."""
        spec = self.privacy.labels
        if spec.defence == "none":
            return labels
        generator = self._noise.generator("labels", *place)
        with torch.no_grad():
            return torch.cat([
                randomize_labels(logits(rows), own, spec.epsilon, generator)
                for rows, own in zip(
                    torch.split(last, LABELS_AT_ONCE), torch.split(labels, LABELS_AT_ONCE), strict=True
                )
            ])  # fmt: skip

    def gradient(
        self,
        rows: torch.Tensor,
        last: torch.Tensor,
        vocab: int,
        head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *place: object,
    ) -> torch.Tensor:
        """Return gradients (M, D) of last hidden states to send; `head` computes those of other labels."""
        spec = self.privacy.gradient
        if spec.defence == "none":
            return rows
        if isinstance(spec.clip_norm, float):
            norm = spec.clip_norm / len(rows)  # clip_norm is for the loss of one token; the batch's is a mean
        else:
            sample = last[:SAMPLED_ROWS]
            labels = torch.randint(vocab, (len(sample),), generator=torch.Generator().manual_seed(0))
            scale = len(sample) / len(rows)
            norm = typical_norm(head(sample, labels.to(sample.device))) * scale
        return self._apply(spec, rows, norm, "gradient", *place)

    def held_out_loss(self, total: float, width: int, *place: object) -> float:
        """Return the sum of a client's held-out losses, of `bounded_sum`, to send; D is `width`."""
        noise = held_out_noise(self.privacy, width)
        return total if noise is None else noise.add(total, self._noise.generator("held-out loss", *place))

    def _apply(self, spec: RowDefenceSpec, rows: torch.Tensor, norm: float, *place: object) -> torch.Tensor:
        return DEFENCES[spec.defence](rows, norm, spec.noise, self._noise.generator(*place))


def with_site(privacy: PrivacySpec, site: SiteBoundsSpec) -> PrivacySpec:
    """Return the run's defences, with at least the noise that the site requires."""
    hidden = privacy.hidden
    if hidden.noise >= site.min_noise:
        return privacy
    kind = hidden.defence if hidden.noise else site.defence
    raised = hidden.model_copy(update={"defence": kind, "noise": site.min_noise})
    return privacy.model_copy(update={"hidden": raised})


def promises(privacy: PrivacySpec, width: int, tokens: int, passes: float, evaluations: int) -> list[str]:
    """Say what a run's defences guarantee, one sentence each, with epsilon for a row and for a whole text.

    `tokens` is the longest text, `passes` how often a client sends a text, `evaluations` how often it reports
    its held-out loss.
    """
    said = [
        _promise_of_rows(kind, spec, width, privacy.delta, tokens, passes)
        for kind, spec in (("hidden states", privacy.hidden), ("returning gradients", privacy.gradient))
        if spec.defence != "none"
    ]
    if privacy.labels.defence == "randomised":
        epsilon = privacy.labels.epsilon
        said.append(
            "Labels are randomised before the loss: local differential privacy with epsilon "
            f"{epsilon:,.3g} for one label in one pass, {epsilon * passes:,.3g} over the whole run"
            f"{_caveat(epsilon * passes)}, of what gradients reveal; hidden states contain the tokens too."
        )
    if privacy.protects_labels:
        said.append(_promise_of_losses(privacy, width, evaluations))
    updates = privacy.updates
    if updates.clip_norm is not None and not updates.noise_multiplier:
        said.append(f"Updates of adapters are clipped to norm {updates.clip_norm:g}, without noise.")
    if updates.noise_multiplier:
        said.append(
            f"Updates of adapters are clipped to norm {updates.clip_norm:g} and averaged with noise "
            f"{updates.noise_multiplier:g}: client-level differential privacy against who gets the adapter, "
            "not against the server."
        )
    if privacy.private_blocks:
        said.append(
            f"Adapters of the first {privacy.private_blocks} blocks never leave their client; the global "
            "adapter does not have them, and each client is evaluated with its own."
        )
    return said


def _promise_of_rows(
    kind: str, spec: RowDefenceSpec, width: int, delta: float, tokens: int, passes: float
) -> str:
    norm = "the public median norm" if isinstance(spec.clip_norm, str) else f"norm {spec.clip_norm:g}"
    if spec.defence == "clip":
        return f"Rows of {kind} are clipped to {norm}, which by itself guarantees nothing."
    one, whole = (
        row_epsilon(spec.defence, spec.noise, width, delta, rows)
        for rows in (1, max(1, round(tokens * passes)))
    )
    at = f" at delta {delta:g}" if spec.defence == "gaussian" else ""
    labels_only = "" if kind == "hidden states" else ", of its labels alone"
    return (
        f"Rows of {kind} are clipped to {norm} and have {spec.defence} noise {spec.noise:g}: local "
        f"differential privacy with epsilon {one:,.3g} for one row{at}, {whole:,.3g} for a text "
        f"of {tokens} tokens over the whole run{labels_only}{_caveat(one)}."
    )


def _promise_of_losses(privacy: PrivacySpec, width: int, evaluations: int) -> str:
    noise = held_out_noise(privacy, width)
    assert noise is not None
    one, whole = (noise.epsilon(times, privacy.delta) for times in (1, evaluations))
    at = f" at delta {privacy.delta:g}" if noise.kind == "gaussian" else ""
    return (
        "Losses of training batches are not reported. A client's loss on held-out text, the sum over its "
        f"labels of {MOST_NATS:g} nats at most each, has {noise.kind} noise of {noise.deviation:,.3g} nats: "
        f"local differential privacy with epsilon {one:,.3g} for one held-out label in one evaluation{at}, "
        f"{whole:,.3g} over the {evaluations} of the run{_caveat(one)}, of what that sum reveals."
    )


def _caveat(epsilon: float) -> str:
    return " (no meaningful promise: judge it by attacks)" if epsilon > 10 else ""
