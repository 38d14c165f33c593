"""The field's methods, each as a configuration of the same round (`training/rounds.py`).

    method      clients hold    server trains              clients' factors         the server can read
    centralized whole model     nothing                    all text in one place    all text lies in one place
    local       whole model     nothing                    never leave              nothing comes to it
    fedlora     whole model     nothing                    averaged every round     adapters
    flexlora    whole model     nothing                    unequal ranks, averaged  adapters
                                                           as products
    split       [0, k), in turn one copy, batch by batch   handed on                the text
    splitfed-v1 [0, k)          a copy for each client     averaged every round     the text
    splitfed-v2 [0, k)          one copy, batch by batch   averaged every round     the text
    splitlora   [0, k)          one copy, all at once      averaged every round     the text
    splitlora-  [0, k)          one copy, batch by batch,  averaged every round     the text
     code                       in the clients' order
    splitft     [0, k_i)        a copy for each client     averaged as products     hidden states

A method fixes the keys of the configuration that define it, and has its own defaults for others. Training
reads only these keys, never the method's name, so a user may combine them freely under `splitft`. No torch
here.

A plug-in adds a method with `METHODS.add("mine", Method(...))`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from splitft.registry import Registry

Sections = Mapping[str, Any]
"""A configuration as nested mappings, without the keys that are left out."""


@dataclass(frozen=True)
class Fixed:
    """The one value that a key has under a method."""

    value: Any
    why: str
    """The reason, as the end of a sentence that begins with `method NAME`."""


@dataclass(frozen=True)
class Method:
    """A method from the literature."""

    source: str
    """The paper that describes it."""
    difference: str
    """Its difference from other methods, in one line."""
    fixes: Mapping[str, Fixed] = field(default_factory=dict)
    """The keys that define it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Its defaults for keys that a user may set."""
    one_cut: bool = False
    """True if all clients have the same cut in all rounds."""
    follows_fleet: bool = False
    """True if the controller `quickest` chooses when machines or links are given, and neither cuts nor a
    controller."""


_SPLIT = {"schedule.controller": Fixed("fixed", "has one cut for all, which stays")}
_ONE_RANK = {"lora.rank_at_cut": Fixed(None, "has one rank in all blocks of a client")}
_FACTORS = {"aggregate.rule": Fixed("factors", "averages factors, if anything")}
_WHOLE = {
    "clients.cuts": Fixed("whole", "keeps the whole model on every client"),
    "split.labels": Fixed("client", "trains where the text is, head and all"),
    "schedule.controller": Fixed("fixed", "has no cuts to choose"),
    **_ONE_RANK,
}
_PLAIN = {"split.labels": "server", "aggregate.rule": "factors"}
"""Split methods before SplitFT: labels and loss on the server, FedAvg of factors."""
_ALONE = {**_FACTORS, "aggregate.federated": Fixed(False, "aggregates nothing")}
_ORDINARY = {"training.optimizer_state": "keep"}
"""One optimizer from beginning to end. By default all methods that average begin a round with new optimizers,
since the factors are new; these average nothing, and a round of theirs is no more than an evaluation."""

_BY_FLEET = {
    "clients.cuts": "auto",
    "schedule.controller": "quickest",
    "split.server_adapters": "auto",
}
"""Left to the controller where a fleet is described, each unless it is given."""

METHODS: Registry[Method] = Registry("method", "splitft.methods", {
    "centralized": Method(
        source="LoRA: Hu et al. 2021, arXiv 2106.09685",
        difference="All clients' text lies in one place, on the server's machine: the upper bound. It has no "
        "rounds that could reset its optimizer.",
        fixes={**_WHOLE, **_ALONE, "clients.pooled": Fixed(True, "has all text in one place")},
        defaults=_ORDINARY,
    ),
    "local": Method(
        source="LoRA without federation: Hu et al. 2021, arXiv 2106.09685",
        difference="Every client trains alone, and is evaluated with its own adapter: the lower bound. It "
        "has no rounds that could reset its optimizer.",
        fixes={**_WHOLE, **_ALONE},
        defaults=_ORDINARY,
    ),
    "fedlora": Method(
        source="FedAvg: McMahan et al. 2017, arXiv 1602.05629, of LoRA factors (FedIT: 2305.05644)",
        difference="The whole model on every client; only adapters travel, once a round.",
        fixes=_WHOLE,
        defaults={"aggregate.rule": "factors"},
    ),
    "flexlora": Method(
        source="FlexLoRA: Bai et al. 2024, arXiv 2402.11505",
        difference="FedLoRA with unequal ranks: products are averaged, and cut down to each client's rank.",
        fixes={**_WHOLE, "aggregate.rule": Fixed("svd", "averages products")},
        defaults={"lora.client_ranks": "halving"},
    ),
    "hlora": Method(
        source="HLoRA: arXiv 2503.00813",
        difference="Reconstructs the full update before averaging, as FlexLoRA does; with equal ranks at "
        "every client the two are the same arithmetic, and here the ranks are assigned alike.",
        fixes={**_WHOLE, "aggregate.rule": Fixed("svd", "averages products")},
        defaults={"lora.client_ranks": "halving"},
    ),
    "split": Method(
        source="Gupta and Raskar 2018, arXiv 1810.06060; Vepakomma et al. 2018, arXiv 1812.00564",
        difference="Clients train in turn: one model, with its optimizer, is handed from each to the next, "
        "round after round.",
        fixes={
            **_SPLIT,
            **_ONE_RANK,
            **_FACTORS,
            "training.order": Fixed("in-turn", "lets clients train one after the other"),
            "split.server_adapters": Fixed("shared", "has one model"),
            "training.participation": Fixed(
                1.0, "hands its one model through all clients, so that each has its turn in every round"
            ),
        },
        defaults={**_PLAIN, **_ORDINARY},
        one_cut=True,
    ),
    "splitfed-v1": Method(
        source="SplitFedV1: Thapa et al. 2020, arXiv 2004.12088",
        difference="Clients train at the same time; the server has a copy for each, and both are averaged.",
        fixes={**_SPLIT,
            **_ONE_RANK, "split.server_adapters": Fixed("per-client", "has a server's copy for each client")},
        defaults=_PLAIN,
        one_cut=True,
    ),
    "splitfed-v2": Method(
        source="SplitFedV2: Thapa et al. 2020, arXiv 2004.12088",
        difference="One copy on the server, stepping once for each client's batch, in random order.",
        fixes={**_SPLIT,
            **_ONE_RANK, "split.server_adapters": Fixed("shared-in-turn", "has one server's copy that steps "
                                                        "client by client"),
            "split.turns": Fixed("random", "draws the order of the clients for each step")},
        defaults=_PLAIN,
        one_cut=True,
    ),
    "splitlora": Method(
        source="SplitLoRA: Lin et al. 2024, arXiv 2407.00952",
        difference="One copy on the server, trained on all clients' activations together; the clients' "
        "adapters are averaged every I steps (training.steps).",
        fixes={**_SPLIT,
            **_ONE_RANK,
            **_FACTORS, "split.server_adapters": Fixed("shared", "has one server's copy for all clients")},
        defaults=_PLAIN,
        one_cut=True,
    ),
    "splitlora-code": Method(
        source="The public code of SplitLoRA: github.com/FDU-INC/Split_LoRA, gpt2_ft_sfl.py (2407.00952)",
        difference="SplitLoRA as its code has it: the server steps once for each client's batch, in the "
        "clients' order. There, optimizers are never reset (training.optimizer_state: keep), all clients "
        "weigh alike in the average, and what is averaged lacks the last step.",
        fixes={**_SPLIT,
            **_ONE_RANK,
            **_FACTORS,
            "split.server_adapters": Fixed("shared-in-turn", "steps the server's copy client by client"),
            "split.turns": Fixed("fixed", "keeps the order of the clients")},
        defaults=_PLAIN,
        one_cut=True,
    ),
    "splitft-fixed": Method(
        source="SplitFT's baseline `same split`: arXiv 2604.26388",
        difference="SplitFT with cut 2 on every client, whatever its machine.",
        fixes=_SPLIT,
        one_cut=True,
    ),
    "splitft": Method(
        source="SplitFT: arXiv 2604.26388",
        difference="Every client has its own cut, and cuts follow machines and links where these are given.",
        follows_fleet=True,
    ),
})  # fmt: skip
"""Every method by the name in `method:`."""


def filled(name: str, given: Sections) -> dict[str, Any]:
    """Return a configuration with the method's values for the keys that it leaves out."""
    method = METHODS[name]
    values = {key: fixed.value for key, fixed in method.fixes.items()} | dict(method.defaults)
    if method.follows_fleet and _has_fleet(given):
        values |= _BY_FLEET
    result = dict(given)
    for key, value in values.items():
        section, _, last = key.partition(".")
        below = result.get(section) or {}
        if isinstance(below, Mapping) and last not in below:
            result[section] = {**below, last: value}
    return result


def without_contradictions(name: str, given: Sections) -> dict[str, Any]:
    """Return a configuration without the keys that contradict a method, which overrides them.

    If the method has one cut for all, unequal cuts become the shallowest of them, which fits every client.
    """
    method = METHODS[name]
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in given.items()}
    for key, fixed in method.fixes.items():
        section, _, last = key.partition(".")
        if isinstance(result.get(section), dict) and result[section].get(last, fixed.value) != fixed.value:
            del result[section][last]
    clients = result.get("clients")
    if method.one_cut and isinstance(clients, dict) and not isinstance(clients.get("cuts", 0), int):
        cuts = clients.pop("cuts")
        if isinstance(cuts, list | tuple) and cuts and all(isinstance(cut, int) for cut in cuts):
            clients["cuts"] = min(cuts)
    return result


def contradictions(name: str, value_of: Callable[[str], Any]) -> list[tuple[str, str]]:
    """Return the keys whose value the method does not allow, each with the message."""
    method, found = METHODS[name], []
    for key, fixed in method.fixes.items():
        if (value := value_of(key)) != fixed.value:
            others = [
                other
                for other, one in METHODS.items()
                if other != name and one.fixes.get(key, Fixed(value, "")).value == value
            ]
            message = f"found {_written(value)}, but method {name} {fixed.why}"
            fits = f"give {_written(fixed.value)} or leave it out, or choose {_listed(others)}"
            found.append((key, f"{message}; {fits}"))
    if method.one_cut and not isinstance(cuts := value_of("clients.cuts"), int):
        message = f"found {_written(cuts)}, but method {name} has one cut for all clients"
        found.append(("clients.cuts", f"{message}; give one number, or choose splitft"))
    return found


def _has_fleet(given: Sections) -> bool:
    """Return True if machines or links are given, and neither cuts nor a controller."""
    schedule, clients = given.get("schedule") or {}, given.get("clients") or {}
    if not isinstance(schedule, Mapping) or not isinstance(clients, Mapping):
        return False
    fleet = "devices" in schedule or "links" in schedule
    return fleet and "controller" not in schedule and "cuts" not in clients


def _written(value: Any) -> str:
    """Return a value as a user writes it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(names: list[str]) -> str:
    return " or ".join(["splitft"] if "splitft" in names else names[:2]) or "another method"
