"""What the cut gives away: record a run's frames in many settings, attack them, and say what was read.

    RunConfig --for each cut, codec, noise--> recorded step --all attacks--> Outcome --> verdict
                                                            --held-out loss--> cost in perplexity

The attacker is an honest but curious server. It holds the public model, the global adapters, public text of
another domain, and what it saw; it knows the run's settings. It does not have the clients' random numbers.
`short` takes about two minutes on two cores for the embedded model; `full` sweeps wider and tries harder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from splitft.adapters import AdapterState
from splitft.audit.attacker import attacker_of, with_noise
from splitft.audit.attacks import HIDDEN_ATTACKS, LABEL_ATTACKS, Effort, PublicModel
from splitft.audit.findings import AuditResult, Finding, table_rows, verdicts
from splitft.audit.public_text import public_tokens
from splitft.audit.recording import Recording, record, recorded_config
from splitft.audit.recovery import recovery
from splitft.codecs import CODECS
from splitft.config import RunConfig, load
from splitft.model.quiet import silence_transformers
from splitft.privacy.known_leakage import Setting
from splitft.run.folder import Run
from splitft.run.inputs import RunInputs, gather
from splitft.training.checkpoint import latest, load_snapshot


@dataclass(frozen=True)
class Depth:
    """How far an audit goes."""

    cuts: tuple[int, ...]
    """Cuts to try, beside the run's own."""
    noises: tuple[float, ...]
    """Noise on hidden states and gradients, as multiples, tried at the first of the run's cuts."""
    codecs: tuple[str, ...]
    """Codecs to try there."""
    texts: int
    """Texts in a batch; two batches are recorded."""
    tokens: int
    """Longest text."""
    public: int
    """Public tokens that the attacker learns on."""
    effort: Effort
    attacks: tuple[str, ...]
    """Attacks to run."""
    inverter_steps: int = 200
    """Steps of training the transformer."""


SHORT = Depth(
    cuts=(4,),
    noises=(0.0, 0.2, 1.0),
    codecs=("bf16",),
    texts=2,
    tokens=48,
    public=16_384,
    effort=Effort(),
    attacks=("nearest", "linear", "matching", "head gradient", "labels"),
)
FULL = Depth(
    cuts=(1, 2, 4, 8, 15),
    noises=(0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 4.0),
    codecs=("bf16", "int8", "int4"),
    texts=4,
    tokens=64,
    public=65_536,
    effort=Effort(whole=True),
    attacks=(*HIDDEN_ATTACKS, *LABEL_ATTACKS),
)
DEPTHS = {"short": SHORT, "full": FULL}
"""Both modes, by name."""
STEPS = 2
"""Recorded local steps: in the second the client's adapters are no longer the global ones."""


@dataclass(frozen=True)
class Audit:
    """What was found, and with what."""

    model: str
    text: str
    public: str
    """Where the attacker's text is from."""
    outcomes: tuple[AuditResult, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.model,
            "text": self.text,
            "public": self.public,
            "seconds": round(self.seconds, 1),
            "rows": table_rows(self.outcomes),
            "verdicts": verdicts(self.outcomes),
        }


def audit(
    target: RunConfig | Path | str,
    depth: Depth = SHORT,
    public: str | None = None,
    settings: Sequence[Setting] | None = None,
    listener: Callable[[AuditResult], None] = lambda outcome: None,
) -> Audit:
    """Audit a configuration, or a run folder with what it has learnt; the settings are those of `depth`.

    Raises what `gather` raises, and RunError for a folder that holds no run.
    """
    began = time.perf_counter()
    with silence_transformers():
        config, adapters, private = _target(target)
        config = _smaller(config, depth)
        gathered = gather(recorded_config(config, 1, STEPS, depth.texts))
        model = gathered.model
        tokens, source = public_tokens(model, public, config.data.source, depth.public)
        auditor = _Auditor(config, gathered, adapters, private, depth, tokens)
        if settings is None:
            settings = settings_of(config, depth, model.shape.blocks)
        outcomes = []
        for setting in settings:
            outcomes.append(auditor.outcome(setting))
            listener(outcomes[-1])
    spent = time.perf_counter() - began
    return Audit(config.model.name, config.data.source, source, tuple(outcomes), spent)


def settings_of(config: RunConfig, depth: Depth, blocks: int) -> list[Setting]:
    """The run's own settings first, then noises and codecs at its shallowest cut, then other cuts."""
    codec, privacy = config.wire.hidden, config.privacy
    own = sorted({cut for cut in config.cuts or () if cut < blocks}) or [min(2, blocks - 1)]
    first, known = own[0], [one for one in depth.codecs if one in CODECS]
    found = [Setting(cut, codec, privacy.hidden.noise, privacy.gradient.noise) for cut in own]
    found += [Setting(first, codec, noise, noise) for noise in depth.noises]
    found += [Setting(first, other, 0.0, 0.0) for other in known]
    found += [Setting(cut, codec, 0.0, 0.0) for cut in depth.cuts]
    return [one for one in dict.fromkeys(found) if one.cut < blocks]


class _Auditor:
    """Runs settings one after the other over one model and one text."""

    def __init__(
        self,
        config: RunConfig,
        gathered: RunInputs,
        adapters: AdapterState | None,
        private: AdapterState | None,
        depth: Depth,
        public: torch.Tensor,
    ) -> None:
        self._config, self._gathered, self._depth, self._public = config, gathered, depth, public
        ranks = gathered.ranks
        self._adapters, self._private = adapters, private
        self._replica = PublicModel(
            gathered.model, 1, adapters or AdapterState(), config.lora.targets, ranks.scale
        )
        self._replicas: dict[int, PublicModel] = {}
        self._clean: dict[int, float] = {}
        tokenizer = gathered.model.tokenizer()
        self._piece: Callable[[int], str] = lambda token: str(tokenizer.decode([token]))

    def outcome(self, setting: Setting) -> AuditResult:
        """Record the setting and attack it."""
        recording = self._recorded(setting)
        if setting.cut not in self._clean:
            quiet_setting = replace(setting, noise=0.0, gradient_noise=0.0)
            same = quiet_setting == setting
            self._clean[setting.cut] = recording.loss if same else self._recorded(quiet_setting).loss
        attacker = attacker_of(
            setting,
            self._config,
            self._replicas.setdefault(setting.cut, self._replica.at(setting.cut)),
            self._public,
            recording.terms,
        )
        attacker.effort, attacker.training_steps = self._depth.effort, self._depth.inverter_steps
        found = []
        for name in self._depth.attacks:
            began = time.perf_counter()
            attack = HIDDEN_ATTACKS.get(name) or LABEL_ATTACKS[name]
            read = attack(attacker, recording.seen)
            if read is None:
                continue
            spent = time.perf_counter() - began
            hidden = name in HIDDEN_ATTACKS
            truth = recording.texts if hidden else recording.labels
            result = recovery(truth, read, self._piece)
            found.append(Finding(setting, name, "hidden" if hidden else "labels", result, spent))
        return AuditResult(setting, tuple(found), recording.loss, self._clean[setting.cut])

    def _recorded(self, setting: Setting) -> Recording:
        config = recorded_config(self._config, setting.cut, STEPS, self._depth.texts)
        config = config.model_copy(
            update={
                "privacy": with_noise(config.privacy, setting),
                "wire": config.wire.model_copy(update={"hidden": setting.codec}),
            }
        )
        return record(config, replace(self._gathered, config=config), self._adapters, self._private)


def _target(target: RunConfig | Path | str) -> tuple[RunConfig, AdapterState | None, AdapterState | None]:
    """A configuration; the global adapters, and what the first client keeps, if it is a run that has some."""
    if isinstance(target, RunConfig):
        return target, None, None
    path = Path(target)
    if not path.is_dir():
        return load(path), None, None
    run, number = Run(path), latest(path)
    if number is None:
        return run.config, None, None
    snapshot = load_snapshot(path, number)
    return run.config, snapshot.state.adapters, next(iter(snapshot.private.values()), None)


def _smaller(config: RunConfig, depth: Depth) -> RunConfig:
    """No more text than is attacked."""
    most = 8 * depth.texts * STEPS
    wanted = min(config.data.max_examples or most, most)
    data = {
        "max_examples": max(4, wanted),
        "max_tokens": min(config.data.max_tokens, depth.tokens),
        "eval_examples": 2 * depth.texts * STEPS,
        "holdout": 0.5,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=data)})
