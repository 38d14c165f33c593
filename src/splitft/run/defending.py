"""Each client's defences, from the configuration: its noise, and the public text that sets clipping norms.

In simulation a client's noise follows from the run's seed, so that a run can be repeated; whoever starts a
real client passes `secret=True`, and the noise comes from the operating system's entropy.
"""

from __future__ import annotations

from splitft.config import RunConfig
from splitft.data.corpora import read_records
from splitft.data.text import Batch
from splitft.data.tokens import tokenise
from splitft.errors import ConfigError
from splitft.model import Model
from splitft.privacy.accounting import accountant_missing
from splitft.privacy.defence import Defence
from splitft.privacy.noise import Noise
from splitft.specs import DataSpec, PrivacySpec, SiteBoundsSpec

PUBLIC_EXAMPLES, PUBLIC_TOKENS = 16, 64
"""Paragraphs of the embedded text, which everyone has, and their longest: enough for a median of norms."""


def defence_of(
    config: RunConfig,
    client: str,
    public: Batch | None,
    *,
    site: SiteBoundsSpec | None = None,
    secret: bool = False,
) -> Defence:
    """The defences of one client; `site` raises what the run asks for, `secret` is for real deployments."""
    return Defence(config.privacy, Noise(config.seed, client, secret), public, site)


def privacy_of(config: RunConfig, blocks: int) -> PrivacySpec:
    """What clients keep to themselves: what the user says, or all blocks where nothing is aggregated."""
    if config.aggregate.federated:
        return config.privacy
    return config.privacy.model_copy(update={"private_blocks": blocks})


def public_text(config: RunConfig, model: Model, site: SiteBoundsSpec | None = None) -> Batch | None:
    """The text for public clipping norms, the same for every client; None if no norm needs it."""
    hidden = config.privacy.hidden
    treated = hidden.defence != "none" or (site is not None and site.min_noise > 0)
    if not treated or hidden.clip_norm != "public":
        return None
    records = read_records(DataSpec(source="python-docs", max_examples=PUBLIC_EXAMPLES))
    longest = min(PUBLIC_TOKENS, model.shape.max_positions)
    return Batch.of(tokenise(records, model.tokenizer(), longest).examples)


def check_accountant(config: RunConfig) -> None:
    """Raise ConfigError if noise is asked for whose promise could not be told."""
    privacy = config.privacy
    noisy = privacy.hidden.noise or privacy.gradient.noise or privacy.updates.noise_multiplier
    if noisy and (missing := accountant_missing()):
        raise ConfigError(f"privacy: {missing}")
