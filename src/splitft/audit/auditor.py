"""Record a run's frames in many settings, attack them, and report what was read.

    RunConfig --for each cut, codec, noise--> Recording --all attacks--> AuditResult --> verdict
                                                        --held-out loss--> cost in perplexity

The attacker is an honest but curious server. It has the public model, the global adapters, public text of
another domain and the frames that it received, and knows the run's settings, but not the clients' random
numbers. `SHORT` takes about two minutes on two cores for the embedded model; `FULL` has more settings and
more effort.
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
from splitft.audit.attacks import ATTACKS, Effort, PublicModel
from splitft.audit.findings import AuditResult, Finding, table_rows, verdict
from splitft.audit.public_text import public_tokens
from splitft.audit.recording import Recording, record, recorded_config
from splitft.audit.recovery import measure_recovery
from splitft.codecs import CODECS
from splitft.config import RunConfig, load
from splitft.errors import PluginError
from splitft.model.source import silence_transformers
from splitft.privacy.known_leakage import Setting
from splitft.run.folder import Run
from splitft.run.inputs import RunInputs, gather
from splitft.training.checkpoint import load_latest


@dataclass(frozen=True)
class Depth:
    """Extent of an audit: its settings, its text and the effort of its attacks."""

    cuts: tuple[int, ...]
    """Cuts to try, besides the run's own."""
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
    short: bool = False
    """Leave out attacks that are not for the short audit."""
    attacks: tuple[str, ...] = ()
    """Attacks to run instead; empty for all."""
    inverter_steps: int = 200
    """Steps of training the transformer."""

    def chosen_attacks(self) -> tuple[str, ...]:
        """Return the names of the attacks to run. Raises PluginError for an unknown one."""
        for name in self.attacks:
            ATTACKS.find(name)
        return self.attacks or tuple(name for name, one in ATTACKS.items() if one.in_short or not self.short)


SHORT = Depth(
    cuts=(4,),
    noises=(0.0, 0.2, 1.0),
    codecs=("bf16",),
    texts=2,
    tokens=48,
    public=16_384,
    effort=Effort(),
    short=True,
)
FULL = Depth(
    cuts=(1, 2, 4, 8, 15),
    noises=(0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 4.0),
    codecs=("bf16", "int8", "int4"),
    texts=4,
    tokens=64,
    public=65_536,
    effort=Effort(whole=True),
)
STEPS = 2
"""Recorded local steps: in the second the client's adapters differ from the global ones."""


@dataclass(frozen=True)
class Audit:
    """Results of an audit, and the model and texts that they hold for."""

    model: str
    text: str
    public: str
    """Source of the attacker's text."""
    results: tuple[AuditResult, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "model": self.model,
            "text": self.text,
            "public": self.public,
            "seconds": round(self.seconds, 1),
            "rows": table_rows(self.results),
            "verdicts": [verdict(result) for result in self.results],
        }


def audit(
    target: RunConfig | Path | str,
    depth: Depth = SHORT,
    public: str | None = None,
    settings: Sequence[Setting] | None = None,
    listener: Callable[[AuditResult], None] = lambda result: None,
) -> Audit:
    """Audit a configuration, or a run folder with its trained adapters.

    `settings` replace those of `depth`. Raises what `gather` raises, RunError for a folder that holds no run,
    and PluginError for an unknown attack.
    """
    began = time.perf_counter()
    with silence_transformers():
        config, adapters, private = _target(target)
        attacks = depth.chosen_attacks()  # known only after the configuration has loaded its plug-ins
        config = _smaller(config, depth)
        gathered = gather(recorded_config(config, 1, STEPS, depth.texts))
        model = gathered.model
        tokens, source = public_tokens(model, public, config.data.source, depth.public)
        auditor = _Auditor(config, gathered, adapters, private, replace(depth, attacks=attacks), tokens)
        if settings is None:
            settings = settings_of(config, depth, model.shape.blocks)
        results = []
        for setting in settings:
            results.append(auditor.attack(setting))
            listener(results[-1])
    seconds = time.perf_counter() - began
    return Audit(config.model.name, config.data.source, source, tuple(results), seconds)


def settings_of(config: RunConfig, depth: Depth, blocks: int) -> list[Setting]:
    """Return the run's own settings, then noises and codecs at its shallowest cut, then other cuts."""
    codec, privacy = config.wire.hidden, config.privacy
    own = sorted({cut for cut in config.cuts or () if cut < blocks}) or [min(2, blocks - 1)]
    first, known = own[0], [one for one in depth.codecs if one in CODECS]
    found = [Setting(cut, codec, privacy.hidden.noise, privacy.gradient.noise) for cut in own]
    found += [Setting(first, codec, noise, noise) for noise in depth.noises]
    found += [Setting(first, other, 0.0, 0.0) for other in known]
    found += [Setting(cut, codec, 0.0, 0.0) for cut in depth.cuts]
    return [one for one in dict.fromkeys(found) if one.cut < blocks]


class _Auditor:
    """Attacks on one setting after the other, of one model and one text."""

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
        self._adapters, self._private = adapters, private
        self._public_model = PublicModel(
            gathered.model, 1, adapters or AdapterState(), config.lora.targets, gathered.ranks.scale
        )
        self._at_cut: dict[int, PublicModel] = {}
        self._clean_loss: dict[int, float] = {}  # by cut
        tokenizer = gathered.model.tokenizer()
        self._piece: Callable[[int], str] = lambda token: str(tokenizer.decode([token]))

    def attack(self, setting: Setting) -> AuditResult:
        """Record the setting and run all attacks on it."""
        # record it, and once for each cut without noise
        recording = self._recorded(setting)
        if setting.cut not in self._clean_loss:
            clean = replace(setting, noise=0.0, gradient_noise=0.0)
            same = clean == setting
            self._clean_loss[setting.cut] = recording.loss if same else self._recorded(clean).loss
        # run the attacks whose needs were observed
        public_model = self._at_cut.setdefault(setting.cut, self._public_model.at(setting.cut))
        attacker = attacker_of(setting, self._config, public_model, self._public, recording.serializer)
        attacker.effort, attacker.training_steps = self._depth.effort, self._depth.inverter_steps
        found = []
        for name in self._depth.attacks:
            attack = ATTACKS[name]
            if attack.possible(recording.batches):
                began = time.perf_counter()
                read = attack.run(attacker, recording.batches)
                seconds = time.perf_counter() - began
                truth = recording.texts if attack.way == "hidden" else recording.labels
                _check_read(name, read, truth)
                recovery = measure_recovery(truth, read, self._piece)
                found.append(Finding(setting, name, attack.way, recovery, seconds))
        return AuditResult(setting, tuple(found), recording.loss, self._clean_loss[setting.cut])

    def _recorded(self, setting: Setting) -> Recording:
        config = recorded_config(self._config, setting.cut, STEPS, self._depth.texts)
        config = config.model_copy(
            update={
                "privacy": with_noise(config.privacy, setting),
                "wire": config.wire.model_copy(update={"hidden": setting.codec}),
            }
        )
        return record(config, replace(self._gathered, config=config), self._adapters, self._private)


def _check_read(name: str, read: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]) -> None:
    """Raise PluginError if an attack has not returned one token for each token of each text."""
    lengths, wanted = [len(text) for text in read], [len(text) for text in truth]
    if lengths != wanted:
        raise PluginError(
            f"the attack {name!r} returned texts of {lengths} tokens, but there are {wanted}: return one "
            "token for each row of `sequences()`, or for each label"
        )


def _target(target: RunConfig | Path | str) -> tuple[RunConfig, AdapterState | None, AdapterState | None]:
    """Return the configuration, and of a trained run the global adapters and the first client's own."""
    if isinstance(target, RunConfig):
        return target, None, None
    path = Path(target)
    if not path.is_dir():
        return load(path), None, None
    run, snapshot = Run(path), load_latest(path)
    if snapshot is None:
        return run.config, None, None
    return run.config, snapshot.state.adapters, next(iter(snapshot.private.values()), None)


def _smaller(config: RunConfig, depth: Depth) -> RunConfig:
    """Return the run with no more text than is attacked."""
    most = 8 * depth.texts * STEPS
    wanted = min(config.data.max_examples or most, most)
    data = {
        "max_examples": max(4, wanted),
        "max_tokens": min(config.data.max_tokens, depth.tokens),
        "eval_examples": 2 * depth.texts * STEPS,
        "holdout": 0.5,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=data)})
