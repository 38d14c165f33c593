"""Write adapters as a PEFT folder or a merged checkpoint, and load a PEFT folder.

    AdapterState --write_peft--> adapter_config.json, adapter_model.safetensors --write_merged--> model folder

Every layer's update is (alpha / rank) B A with one scale for the run, whatever the layer's rank. peft divides
by the layer's own rank, so `alpha_pattern` gives a layer of rank r the alpha scale * r. Magnitudes (DoRA) are
kept as changes; peft expects whole ones, so the norms of the base weight's rows are added.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from splitft.adapters import AdapterState, Factors
from splitft.adapters.dora import whole_magnitudes
from splitft.adapters.targets import is_linear, is_transposed
from splitft.errors import DamagedError, RunError
from splitft.model import Model
from splitft.model.quantized_layers import layer_weight
from splitft.model.whole import compute_as_in_training, load_whole
from splitft.seals import SUMS, changed_files

WEIGHTS_PREFIX = "base_model.model."
"""Prefix of a module's name in peft's files."""


def write_peft(
    state: AdapterState,
    model: Model,
    scale: float,
    folder: Path,
    rslora: bool = False,
    dropout: float = 0.0,
) -> Path:
    """Write an adapter as `peft` saves LoRA, in the tensors' own type. Returns the folder.

    With `rslora` peft divides alpha by the square root of a layer's rank, which the alphas account for.
    `dropout` is that of training, for whoever trains on with peft.
    """
    from peft import LoraConfig

    # layers by the names and at the ranks that peft's configuration gives them
    names = model.block_names()
    layers = {f"{names[block]}.{target}": factors for (block, target), factors in state.items()}
    modules = dict(model.skeleton().named_modules())
    counts = Counter(factors.rank for factors in layers.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank))
    others = {name: factors.rank for name, factors in layers.items() if factors.rank != usual}

    def alpha(rank: int) -> int | float:
        return _number(scale * (math.sqrt(rank) if rslora else rank))

    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.path,
        r=usual,
        use_rslora=rslora,
        lora_dropout=dropout,
        use_dora=any(factors.magnitude is not None for factors in layers.values()),
        lora_alpha=alpha(usual),
        rank_pattern=others,
        alpha_pattern={name: alpha(rank) for name, rank in others.items()},
        target_modules=_shortest_names(state, layers, modules),
        fan_in_fan_out=any(is_transposed(modules[name]) for name in layers),
        inference_mode=True,
    )
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    # tensors under peft's names
    tensors: dict[str, torch.Tensor] = {}
    for name, factors in layers.items():
        tensors[f"{WEIGHTS_PREFIX}{name}.lora_A.weight"] = factors.A.contiguous()
        tensors[f"{WEIGHTS_PREFIX}{name}.lora_B.weight"] = factors.B.contiguous()
    for name, magnitude in whole_magnitudes(layers, _base_weights(layers, model, modules)).items():
        tensors[f"{WEIGHTS_PREFIX}{name}.lora_magnitude_vector"] = magnitude
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    # not by save_file, which makes files that only their owner can read
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    return folder


def with_adapter(adapter: Path, model: Model, full: bool = False) -> Any:
    """Load the whole base model with a PEFT folder on it, quantized as in the run unless `full`.

    Raises RunError if the folder has no adapter, or one that is not as it was written.
    """
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise RunError(
            f"{adapter} holds no adapter; it is written when a run has finished a round "
            "(without federation, each client has its own in the run folder's personal/)"
        )
    check_whole(adapter)
    return compute_as_in_training(PeftModel.from_pretrained(load_whole(model, full), str(adapter)).eval())


def check_whole(adapter: Path) -> None:
    """Raise DamagedError if a file of an adapter's folder differs from its checksum there."""
    if changed := changed_files(adapter):
        raise DamagedError(
            f"{adapter} is not as it was written: {', '.join(changed)} differs from its checksum in {SUMS}; "
            f"`splitft train --resume` of an unfinished run writes it anew from the checkpoint. Remove "
            f"{SUMS} if you have changed the adapter on purpose"
        )


def write_merged(adapter: Path, model: Model, folder: Path) -> Path:
    """Fold the adapter into the full base weights and write a whole checkpoint with its tokenizer."""
    merged = with_adapter(adapter, model, full=True).merge_and_unload()
    merged.save_pretrained(str(folder))
    model.tokenizer().save_pretrained(str(folder))
    return folder


def _base_weights(
    layers: Mapping[str, Factors], model: Model, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights (out, in) of the layers that have magnitudes, as numbers of the model's type."""
    kind = model.quantized if model.spec.quantize_at == "both" else None
    for name in (name for name, factors in layers.items() if factors.magnitude is not None):
        yield name, layer_weight(model.checkpoint, f"{name}.weight", modules[name], kind, model.dtype)


def _shortest_names(state: AdapterState, layers: dict[str, Any], modules: dict[str, nn.Module]) -> list[str]:
    """Return last names (`q_proj`), as most tools expect, if they match no other layer; else longer ones."""
    linear = [name for name, module in modules.items() if is_linear(module)]
    targets = {target for _, target in state}
    for candidate in ({target.rpartition(".")[2] for target in targets}, targets):
        chosen = {name for name in linear if any(name.endswith(f".{one}") for one in candidate)}
        if chosen == set(layers):
            return sorted(candidate)
    return sorted(layers)


def _number(value: float) -> int | float:
    """Return an int if the value is integral, as peft's files have it."""
    return int(value) if value == int(value) else value
