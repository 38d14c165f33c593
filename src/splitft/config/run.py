"""`RunConfig`: the rooms' specifications side by side, and what must fit together between them.

Each section is a room's own spec (`splitft.specs`), which knows its bounds and defaults. Here are only
the rules that need two sections at once; `assemble` checks what needs the model or the text.
"""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from splitft.config.compatibility import method_conflicts
from splitft.methods import MethodName
from splitft.specs import (
    AggregateSpec,
    ClientsSpec,
    DataSpec,
    DeploySpec,
    LoraSpec,
    ModelSpec,
    PrivacySpec,
    ScheduleSpec,
    Spec,
    SplitSpec,
    TrainingSpec,
    WireSpec,
)
from splitft.specs.plugins import PluginSpec, TrackerName, TrackerSpec

Conflict = tuple[tuple[str, ...], str]
"""The key paths that do not fit together, the first being the one to blame, and why with what to do."""


class RunConfig(Spec):
    """Everything a run depends on."""

    model: ModelSpec = ModelSpec()
    """The language model."""
    data: DataSpec = DataSpec()
    """The text."""
    clients: ClientsSpec = ClientsSpec()
    """The clients, their cuts and their shares of the text."""
    lora: LoraSpec = LoraSpec()
    """The adapters."""
    split: SplitSpec = SplitSpec()
    """Where labels and the server's adapters live."""
    training: TrainingSpec = TrainingSpec()
    """Rounds, steps, batches and the optimizer."""
    aggregate: AggregateSpec = AggregateSpec()
    """How the clients' adapters become one."""
    schedule: ScheduleSpec = ScheduleSpec()
    """Who chooses the cuts."""
    wire: WireSpec = WireSpec()
    """How tensors travel."""
    privacy: PrivacySpec = PrivacySpec()
    """What clients do to their messages before they leave."""
    deploy: DeploySpec = DeploySpec()
    """Sites and waiting times, when the run is on real machines."""
    trackers: tuple[TrackerName | TrackerSpec, ...] = ()
    """What is told of the run while it trains, beside its folder: `csv`, or a plug-in's name."""
    plugins: tuple[PluginSpec, ...] = ()
    """Python files that add rules, controllers, codecs and the like by name (docs/write-your-own.md). They
    are code that runs with your rights: name only files that you have read."""
    method: MethodName = "splitft"
    """The method to run: it sets what defines it, and has defaults of its own (`splitft.methods`)."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Fixes shares, initial factors and batches: equal seeds give equal runs on one machine."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> RunConfig:
        if found := conflicts(self):
            text = "; ".join(f"{paths[0]}: {message}" for paths, message in found)
            raise PydanticCustomError("conflict", "{text}", {"text": text, "found": found})
        return self

    @property
    def cuts(self) -> tuple[int, ...] | None:
        """One cut a client, or None where the controller decides or every client has the whole model."""
        given = self.clients.cuts
        if isinstance(given, str):
            return None
        return (given,) * self.clients.count if isinstance(given, int) else given


def conflicts(config: RunConfig) -> list[Conflict]:
    """Everything that is fine by itself and does not fit together."""
    found: list[Conflict] = []
    cuts, count = config.clients.cuts, config.clients.count
    if isinstance(cuts, tuple) and len(cuts) != count:
        message = f"found {len(cuts)} cuts for {count} clients; give one number for all, or one a client"
        found.append((("clients.cuts", "clients.count"), message))
    for index, cut in enumerate(cuts if isinstance(cuts, tuple) else [cuts]):
        if isinstance(cut, int) and cut < 1:
            place = f"clients.cuts[{index}]" if isinstance(cuts, tuple) else "clients.cuts"
            message = f"found {cut}, which leaves the client no blocks; give at least 1"
            found.append(((place, "clients.cuts"), message))
    if config.clients.cuts == "auto" and config.schedule.controller == "fixed":
        message = "found auto, but the fixed controller does not choose cuts; give numbers"
        found.append((("clients.cuts", "schedule.controller"), message))
    sites = config.deploy.sites
    if sites is not None and len(sites) != count:
        message = f"found {len(sites)} names for {count} clients; give one a client"
        found.append((("deploy.sites", "clients.count"), message))
    if config.deploy.min_clients > count:
        message = f"found {config.deploy.min_clients}, but there are {count} clients"
        found.append((("deploy.min_clients", "clients.count"), message))
    schedule = config.schedule
    for key, value in (("devices", schedule.devices), ("links", schedule.links)):
        if isinstance(value, tuple) and len(value) != count:
            message = f"found {len(value)} for {count} clients; give one for all, or one a client"
            found.append(((f"schedule.{key}", "clients.count"), message))
    if schedule.recovery and schedule.max_recovery is None:
        message = "gives figures that nothing asks for; give schedule.max_recovery too"
        found.append((("schedule.recovery", "schedule.max_recovery"), message))
    if schedule.max_cut is not None and schedule.max_cut < schedule.min_cut:
        least = schedule.min_cut
        message = f"found {schedule.max_cut}, below min_cut {least}; give at least {least}"
        found.append((("schedule.max_cut", "schedule.min_cut"), message))
    for index, change in enumerate(schedule.changes):
        if change.client > count:
            message = f"found client {change.client}, but there are {count} clients"
            found.append(((f"schedule.changes[{index}].client", "clients.count"), message))
    rule = config.aggregate.rule
    if config.training.optimizer_state == "keep" and rule in ("svd", "stack"):
        message = (
            f"found keep, which does not fit aggregate.rule {rule}: it makes new factors each round, so old "
            "moments belong to other factors; give reset, or the rule factors, zero-pad, exact, ffa or fedsa"
        )
        found.append((("training.optimizer_state", "aggregate.rule"), message))
    if config.aggregate.server_optimizer != "none" and rule in ("svd", "stack", "exact"):
        message = (
            f"found {config.aggregate.server_optimizer}, which goes on from the last factors, but "
            f"aggregate.rule {rule} makes new ones or corrects their mean; give the rule factors (with "
            "lora.rank_at_cut: null), zero-pad, ffa or fedsa"
        )
        found.append((("aggregate.server_optimizer", "aggregate.rule"), message))
    if config.lora.method == "dora" and rule not in ("factors", "zero-pad", "svd"):
        why = (
            "folds updates into the base, whose rows' magnitudes dora has learnt"
            if rule in ("stack", "exact")
            else "lets A or B travel alone, but a magnitude belongs to both"
        )
        message = f"found dora, but aggregate.rule {rule} {why}; give the rule factors, zero-pad or svd"
        found.append((("lora.method", "aggregate.rule"), message))
    total = config.training.rounds * config.training.steps
    if config.training.warmup > total:
        message = f"found {config.training.warmup}, but the run has {total} local steps; give at most that"
        found.append((("training.warmup", "training.rounds", "training.steps"), message))
    parts, training = config.training.micro_batches, config.training
    if training.batch_tokens is None and parts > training.batch_size:
        message = f"found {parts} parts of a batch of {training.batch_size} sequences; give at most that"
        found.append((("training.micro_batches", "training.batch_size"), message))
    if parts > 1 and config.split.server_adapters == "shared-in-turn":
        message = (
            f"found {parts}, but with split.server_adapters shared-in-turn the server steps after each batch "
            "and would mix the gradients of several clients' parts; give 1, or shared or per-client"
        )
        found.append((("training.micro_batches", "split.server_adapters"), message))
    if rule == "fedsa" and config.split.server_adapters != "per-client":
        message = (
            "found fedsa, which leaves each client its own B, but split.server_adapters is shared: all train "
            "one on the server; give server_adapters: per-client, or another rule"
        )
        found.append((("aggregate.rule", "split.server_adapters"), message))
    return [*found, *method_conflicts(config), *_privacy_conflicts(config)]


def _privacy_conflicts(config: RunConfig) -> list[Conflict]:
    """Promises that the rest of the configuration would break."""
    found: list[Conflict] = []
    updates, private = config.privacy.updates, config.privacy.private_blocks
    if updates.clip_norm is not None and config.aggregate.rule == "svd":
        message = (
            f"found {updates.clip_norm:g}, but aggregate.rule svd averages products, which clipped factors "
            "do not bound; give the rule factors (with lora.rank_at_cut: null) or zero-pad"
        )
        found.append((("privacy.updates.clip_norm", "aggregate.rule"), message))
    if updates.clip_norm is not None and config.aggregate.rule in ("stack", "exact", "fedsa"):
        message = (
            f"found {updates.clip_norm:g}, but aggregate.rule {config.aggregate.rule} hands out other than "
            "the mean of clipped factors; give factors (with lora.rank_at_cut: null), zero-pad or ffa"
        )
        found.append((("privacy.updates.clip_norm", "aggregate.rule"), message))
    if updates.clip_norm is not None and config.lora.method == "dora":
        message = (
            f"found {updates.clip_norm:g}, but the bound is on A and B, and lora.method dora trains "
            "magnitudes too; give lora.method: lora"
        )
        found.append((("privacy.updates.clip_norm", "lora.method"), message))
    if updates.clip_norm is not None and config.split.server_adapters == "shared":
        message = (
            f"found {updates.clip_norm:g}, but with split.server_adapters shared all clients train one set "
            "of factors, so no client has an update to bound; give per-client"
        )
        found.append((("privacy.updates.clip_norm", "split.server_adapters"), message))
    for role in ("hidden", "gradient", "labels"):
        if config.split.labels == "server" and getattr(config.privacy, role).defence != "none":
            message = (
                "protects nothing with split.labels server, which sends the text itself; give labels client"
            )
            found.append(((f"privacy.{role}.defence", "split.labels"), message))
    cuts = config.cuts or ()
    if cuts and config.schedule.controller == "fixed" and private > min(cuts):
        message = f"found {private}, but a client holds {min(cuts)} blocks; give at most that, or deeper cuts"
        found.append((("privacy.private_blocks", "clients.cuts"), message))
    if config.schedule.controller != "fixed" and private > config.schedule.min_cut:
        least = config.schedule.min_cut
        message = (
            f"found {private}, but a controller may go down to cut {least}, and private blocks never leave "
            "their client; raise schedule.min_cut"
        )
        found.append((("privacy.private_blocks", "schedule.min_cut"), message))
    return found
