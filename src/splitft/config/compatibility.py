"""The requirements between sections of a configuration: values that are valid alone and do not fit together.

    clients.count: 3, clients.cuts: [1, 2]  ->  clients.cuts: found 2 cuts for 3 clients; give one ...

Each row of the tables below has its keys, what breaks it, and the message. The keys that a method fixes are
in `splitft.methods`, the properties of aggregation rules in `splitft.specs.rules`. `config.run` imports this
module, so a configuration is `Any` here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from splitft.methods import contradictions
from splitft.specs.rules import RULES, Rule, rules_where

Conflict = tuple[tuple[str, ...], str]
"""The key paths that do not fit together, the first being the one to blame, and the message."""


@dataclass(frozen=True)
class Requirement:
    """One row: keys that must fit together."""

    keys: tuple[str, ...]
    """Key paths, the one to blame first; `{index}` is filled with the index that `broken` returns."""
    broken: Callable[[Any], Any]
    """Returns the value that breaks it, or a mapping from index to value; anything false if none does."""
    message: str | Callable[[Any], str]
    """What was found and what fits, with `{found}` for the value and `{c}` for the configuration."""

    def conflicts(self, config: Any) -> list[Conflict]:
        """Return the conflicts of a configuration: one for each index if `broken` returns a mapping."""
        found = self.broken(config)
        if not found:
            return []
        message = self.message if isinstance(self.message, str) else self.message(config)
        return [
            (tuple(key.format(index=index) for key in self.keys), message.format(found=value, c=config))
            for index, value in (found if isinstance(found, Mapping) else {"": found}).items()
        ]


def conflicts(config: Any) -> list[Conflict]:
    """Return everything in a configuration that does not fit together."""

    def value_of(key: str) -> Any:
        section, _, last = key.partition(".")
        return getattr(getattr(config, section), last)

    against_method = [((key, "method"), message) for key, message in contradictions(config.method, value_of)]
    return [
        *_check(BETWEEN_SECTIONS, config),
        *(against_method or _check(METHODS_KEYS, config)),
        *_check(PRIVACY, config),
    ]


def _check(requirements: Iterable[Requirement], config: Any) -> list[Conflict]:
    return [conflict for requirement in requirements for conflict in requirement.conflicts(config)]


def _rule(config: Any) -> Rule:
    return RULES[config.aggregate.rule]


def _shared(config: Any) -> bool:
    """Return whether clients share the server's factors; with auto they need not."""
    return bool(config.split.way != "per-client")


def _needs_equal_steps(config: Any) -> str:
    """Return the setting with which clients may not take unequal numbers of steps; "" if there is none."""
    training, privacy = config.training, config.privacy
    noisy = any(getattr(privacy, role).defence != "none" for role in ("hidden", "gradient", "labels"))
    broken = {
        f"training.schedule {training.schedule}": training.schedule != "constant",
        f"training.warmup {training.warmup}": training.warmup,
        f"training.order {training.order}": training.order != "together",
        f"split.server_adapters {config.split.way}": _shared(config),
        "aggregate.federated false": not config.aggregate.federated,
        "privacy, which is accounted by the step,": noisy or privacy.updates.clip_norm,
    }
    return next((name for name, found in broken.items() if found), "")


def _with_rank(name: str) -> str:
    return f"{name} (with lora.rank_at_cut: null)" if RULES[name].equal_ranks else name


def _wrong_length(config: Any, given: Any) -> str:
    """Return the length of a list that should have one entry for each client and has not."""
    return str(len(given)) if isinstance(given, tuple) and len(given) != config.clients.count else ""


def _cuts_below_one(config: Any) -> dict[str, int]:
    cuts = config.clients.cuts
    each = {f"[{i}]": cut for i, cut in enumerate(cuts)} if isinstance(cuts, tuple) else {"": cuts}
    return {index: cut for index, cut in each.items() if isinstance(cut, int) and cut < 1}


def _withstood(config: Any) -> int:
    """Return how many hostile clients the rule withstands when all take part."""
    withstands = _rule(config).withstands
    return withstands(config.clients.count) if withstands else 0


def _no_dora(config: Any) -> str:
    if _rule(config).folds:
        reason = "folds updates into the base, whose rows' magnitudes dora has learnt"
    elif _rule(config).up != "AB":
        reason = "lets A or B travel alone, but a magnitude belongs to both"
    else:
        reason = "does not average dora's magnitudes"
    return f"found dora, but aggregate.rule {{c.aggregate.rule}} {reason}; give the rule " + rules_where(
        lambda rule: rule.dora
    )


def _not_bounded(config: Any) -> str:
    if _rule(config).withstands:
        reason = "chooses among updates, so that one more can change the choice"
    elif _rule(config).best_fit:
        reason = "averages products, which clipped factors do not bound"
    else:
        reason = "hands out other than the mean of clipped factors"
    return f"found {{found:g}}, but aggregate.rule {{c.aggregate.rule}} {reason}; give " + rules_where(
        lambda rule: rule.bounded, _with_rank
    )


# fmt: off
BETWEEN_SECTIONS = (
    Requirement(("clients.cuts", "clients.count"), lambda c: _wrong_length(c, c.clients.cuts),
        "found {found} cuts for {c.clients.count} clients; give one number for all, or one a client"),
    Requirement(("clients.cuts{index}", "clients.cuts"), _cuts_below_one,
        "found {found}, which leaves the client no blocks; give at least 1"),
    Requirement(("clients.cuts", "schedule.controller"),
        lambda c: c.clients.cuts == "auto" and c.schedule.controller == "fixed",
        "found auto, but the fixed controller does not choose cuts; give numbers"),
    Requirement(("model.quantize_at", "schedule.controller"),
        lambda c: c.model.quantize_at != "both" and c.schedule.adaptive,
        "found {c.model.quantize_at}, but controller {c.schedule.controller} moves blocks between the sides, "
        "and a block that is quantized on one side alone changes as it moves; give both, or the fixed one"),
    Requirement(("model.quantize_at", "model.quantize"),
        lambda c: c.model.quantize_at != "both" and c.model.quantize == "none",
        "found {c.model.quantize_at}, but nothing is quantized; give both, or model.quantize nf4 or int8"),
    Requirement(("deploy.sites", "clients.count"), lambda c: _wrong_length(c, c.deploy.sites),
        "found {found} names for {c.clients.count} clients; give one a client"),
    Requirement(("deploy.min_clients", "clients.count"), lambda c: c.deploy.min_clients > c.clients.count,
        "found {c.deploy.min_clients}, but there are {c.clients.count} clients"),
    Requirement(("devices.server_replicas", "split.server_adapters"),
        lambda c: c.devices.server_replicas > 1 and _shared(c),
        "found {c.devices.server_replicas}, but with split.server_adapters {c.split.server_adapters} all "
        "clients train one set of factors, which one process holds; give 1, or per-client"),
    Requirement(("devices.server_replicas", "clients.cuts"),
        lambda c: c.devices.server_replicas > 1 and c.clients.cuts == "whole",
        "found {c.devices.server_replicas}, but with clients.cuts whole nothing is on the server; give 1"),
    Requirement(("devices.server_replicas", "clients.count"),
        lambda c: c.devices.server_replicas > max(1, c.clients.count),
        "found {c.devices.server_replicas} for {c.clients.count} clients; give at most one a client"),
    Requirement(("schedule.devices", "clients.count"), lambda c: _wrong_length(c, c.schedule.devices),
        "found {found} for {c.clients.count} clients; give one for all, or one a client"),
    Requirement(("schedule.links", "clients.count"), lambda c: _wrong_length(c, c.schedule.links),
        "found {found} for {c.clients.count} clients; give one for all, or one a client"),
    Requirement(("schedule.recovery", "schedule.max_recovery"),
        lambda c: c.schedule.recovery and c.schedule.max_recovery is None and "recovery",
        "gives figures that nothing asks for; give schedule.max_recovery too"),
    Requirement(("schedule.max_cut", "schedule.min_cut"),
        lambda c: c.schedule.max_cut is not None and c.schedule.max_cut < c.schedule.min_cut,
        "found {c.schedule.max_cut}, below min_cut {c.schedule.min_cut}; give at least {c.schedule.min_cut}"),
    Requirement(("schedule.changes[{index}].client", "clients.count"),
        lambda c: {i: one.client for i, one in enumerate(c.schedule.changes) if one.client > c.clients.count},
        "found client {found}, but there are {c.clients.count} clients"),
    Requirement(("training.optimizer_state", "aggregate.rule"),
        lambda c: c.training.optimizer_state == "keep" and not _rule(c).keeps_axes,
        lambda c: "found keep, which does not fit aggregate.rule {c.aggregate.rule}: it makes new factors "
        "each round, so old moments belong to other factors; give reset, or the rule "
        + rules_where(lambda rule: rule.keeps_axes)),
    Requirement(("aggregate.byzantine", "aggregate.rule"),
        lambda c: c.aggregate.byzantine and not _rule(c).withstands,
        lambda c: "found {c.aggregate.byzantine}, but one client can move the result of aggregate.rule "
        "{c.aggregate.rule} anywhere; give null, or the rule "
        + rules_where(lambda rule: rule.withstands is not None)),
    Requirement(("aggregate.byzantine", "clients.count"),
        lambda c: _rule(c).withstands and (c.aggregate.byzantine or 0) > _withstood(c),
        lambda c: "found {c.aggregate.byzantine}, but aggregate.rule {c.aggregate.rule} withstands at most "
        f"{_withstood(c)} of {c.clients.count} clients; give at most that"),
    Requirement(("aggregate.server_optimizer", "aggregate.rule"),
        lambda c: c.aggregate.server_optimizer != "none" and not _rule(c).steps_on_server,
        lambda c: "found {c.aggregate.server_optimizer}, which goes on from the last factors, but "
        "aggregate.rule {c.aggregate.rule} makes new ones or corrects their mean; give the rule "
        + rules_where(lambda rule: rule.steps_on_server, _with_rank)),
    Requirement(("lora.method", "aggregate.rule"),
        lambda c: c.lora.method == "dora" and not _rule(c).dora, _no_dora),
    Requirement(("training.warmup", "training.rounds", "training.steps"),
        lambda c: c.training.warmup > c.training.rounds * c.training.steps,
        lambda c: f"found {c.training.warmup}, but the run has {c.training.rounds * c.training.steps} local "
        "steps; give at most that"),
    Requirement(("training.steps_by", "training.schedule"),
        lambda c: c.training.steps_by == "time" and _needs_equal_steps(c),
        "found time, but with {found} clients need equal numbers of steps; give count"),
    Requirement(("training.micro_batches", "training.batch_size"),
        lambda c: c.training.batch_tokens is None and c.training.micro_batches > c.training.batch_size,
        "found {c.training.micro_batches} parts of a batch of {c.training.batch_size} sequences; give at "
        "most that"),
    Requirement(("training.micro_batches", "split.server_adapters"),
        lambda c: c.training.micro_batches > 1 and c.split.server_adapters == "shared-in-turn",
        "found {c.training.micro_batches}, but with split.server_adapters shared-in-turn the server steps "
        "after each batch and would mix the gradients of several clients' parts; give 1, or shared or "
        "per-client"),
    Requirement(("aggregate.rule", "split.server_adapters"),
        lambda c: _rule(c).keeps_own_b and _shared(c),
        "found {c.aggregate.rule}, which leaves each client its own B, but split.server_adapters is shared: "
        "all train one on the server; give server_adapters: per-client, or another rule"),
)

METHODS_KEYS = (
    # the whole model on every client
    Requirement(("split.labels", "clients.cuts"),
        lambda c: c.clients.cuts == "whole" and c.split.labels == "server",
        "found server, but with clients.cuts whole nothing is on the server; give client"),
    Requirement(("schedule.controller", "clients.cuts"),
        lambda c: c.clients.cuts == "whole" and c.schedule.controller != "fixed",
        "found {c.schedule.controller}, but with clients.cuts whole there is no cut to choose; give fixed"),
    Requirement(("clients.pooled", "clients.cuts"), lambda c: c.clients.pooled and c.clients.cuts != "whole",
        "found true, which is for whole models; give clients.cuts: whole"),
    Requirement(("aggregate.federated", "clients.cuts"),
        lambda c: not c.aggregate.federated and c.clients.cuts != "whole",
        "found false, which is for whole models; give clients.cuts: whole"),
    # clients one after the other
    Requirement(("training.order", "split.server_adapters"),
        lambda c: c.training.order == "in-turn" and c.split.server_adapters != "shared",
        "found in-turn, which hands one model on; give split.server_adapters: shared"),
    Requirement(("training.order", "clients.cuts"),
        lambda c: c.training.order == "in-turn"
        and (not isinstance(c.clients.cuts, int) or c.schedule.controller != "fixed"),
        "found in-turn, which hands the same blocks to each client; give clients.cuts one number"),
    Requirement(("aggregate.rule", "training.order"),
        lambda c: c.training.order == "in-turn" and c.aggregate.rule != "factors",
        "found {c.aggregate.rule}, but with training.order in-turn nothing is averaged; give factors"),
    Requirement(("aggregate.server_optimizer", "training.order"),
        lambda c: c.training.order == "in-turn" and c.aggregate.server_optimizer != "none",
        "found {c.aggregate.server_optimizer}, but with training.order in-turn nothing is averaged; give "
        "none"),
    Requirement(("privacy.private_blocks", "training.order"),
        lambda c: c.training.order == "in-turn" and c.privacy.private_blocks,
        "found {found}, but with training.order in-turn all blocks are handed on; give 0"),
    # a rank for each client
    Requirement(("lora.client_ranks", "clients.count"), lambda c: _wrong_length(c, c.lora.client_ranks),
        "found {found} ranks for {c.clients.count} clients; give one a client"),
    Requirement(("lora.client_ranks", "split.server_adapters"),
        lambda c: c.lora.client_ranks is not None and _shared(c),
        "needs the server's adapters apart for each client; give split.server_adapters: per-client"),
    Requirement(("training.optimizer_state", "lora.client_ranks"),
        lambda c: c.lora.client_ranks is not None and c.training.optimizer_state == "keep",
        "found keep, but factors of unequal ranks are cut anew each round; give reset"),
)

PRIVACY = (
    Requirement(("privacy.updates.clip_norm", "aggregate.rule"),
        lambda c: not _rule(c).bounded and c.privacy.updates.clip_norm, _not_bounded),
    Requirement(("privacy.updates.clip_norm", "lora.method"),
        lambda c: c.lora.method == "dora" and c.privacy.updates.clip_norm,
        "found {found:g}, but the bound is on A and B, and lora.method dora trains magnitudes too; give "
        "lora.method: lora"),
    Requirement(("privacy.updates.clip_norm", "split.server_adapters"),
        lambda c: _shared(c) and c.privacy.updates.clip_norm,
        "found {found:g}, but with split.server_adapters {c.split.server_adapters} all clients train one set "
        "of factors, so no client has an update to bound; give per-client"),
    Requirement(("privacy.{index}.defence", "split.labels"),
        lambda c: {role: defence for role in ("hidden", "gradient", "labels")
                   if (defence := getattr(c.privacy, role).defence) != "none" and c.split.labels == "server"},
        "protects nothing with split.labels server, which sends the text itself; give labels client"),
    Requirement(("privacy.private_blocks", "clients.cuts"),
        lambda c: c.cuts and c.schedule.controller == "fixed" and c.privacy.private_blocks > min(c.cuts),
        lambda c: f"found {c.privacy.private_blocks}, but a client holds {min(c.cuts)} blocks; give at most "
        "that, or deeper cuts"),
    Requirement(("privacy.private_blocks", "schedule.min_cut"),
        lambda c: c.schedule.controller != "fixed" and c.privacy.private_blocks > c.schedule.min_cut,
        "found {c.privacy.private_blocks}, but a controller may go down to cut {c.schedule.min_cut}, and "
        "private blocks never leave their client; raise schedule.min_cut"),
)
# fmt: on
