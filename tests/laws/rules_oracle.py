"""The rules that fold, freeze or keep, as one would write them with peft on whole models and dense matrices.

Shares no code with splitft: it is given the first factors, each client's batches, and the fresh rows of A of
each round. What is folded is added to the base weights themselves, as the papers do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from laws.peft_oracle import Batch, _lengths

Tensors = dict[str, torch.Tensor]
"""By the adapted layer's name in the base model."""


@dataclass
class Global:
    """What the clients of a round start from."""

    A: Tensors
    B: Tensors
    folded: Tensors = field(default_factory=dict)
    """Dense, in units of B A."""
    own_b: list[Tensors] | None = None
    """Each client's own B, where B is not shared."""

    def update(self, name: str, client: int | None = None) -> torch.Tensor:
        """Dense B A + folded: the global one, or a client's."""
        B = self.B if client is None or self.own_b is None else self.own_b[client]
        return B[name] @ self.A[name] + self.folded.get(name, 0)


def _mean(weights: Sequence[float], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)


def stack(
    now: Global, A: list[Tensors], B: list[Tensors], weights: Sequence[float], fresh: Tensors
) -> Global:
    folded = {
        n: now.folded.get(n, 0) + _mean(weights, [b[n] @ a[n] for a, b in zip(A, B, strict=True)])
        for n in now.A
    }
    return Global(fresh, {name: torch.zeros_like(B) for name, B in now.B.items()}, folded)


def exact(
    now: Global, A: list[Tensors], B: list[Tensors], weights: Sequence[float], fresh: Tensors
) -> Global:
    mean_a, mean_b = ({n: _mean(weights, [part[n] for part in parts]) for n in now.A} for parts in (A, B))
    folded = {
        n: now.folded.get(n, 0)
        + _mean(weights, [b[n] @ a[n] for a, b in zip(A, B, strict=True)])
        - mean_b[n] @ mean_a[n]
        for n in now.A
    }
    return Global(mean_a, mean_b, folded)


def ffa(now: Global, A: list[Tensors], B: list[Tensors], weights: Sequence[float], fresh: Tensors) -> Global:
    return Global(now.A, {n: _mean(weights, [part[n] for part in B]) for n in now.B})


def fedsa(
    now: Global, A: list[Tensors], B: list[Tensors], weights: Sequence[float], fresh: Tensors
) -> Global:
    return Global({n: _mean(weights, [part[n] for part in A]) for n in now.A}, now.B, own_b=B)


RULES: dict[str, Callable[..., Global]] = {"stack": stack, "exact": exact, "ffa": ffa, "fedsa": fedsa}


def train(
    rule: str,
    folder: Path,
    start: Global,
    batches: Sequence[Sequence[Sequence[Batch]]],
    fresh: Sequence[Tensors],
    targets: list[str],
    alpha: float,
    lr: float,
) -> Global:
    """The global state after the rounds. `batches`: by round, then client, then step."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rank = next(iter(start.A.values())).shape[0]
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora, autocast_adapter_dtype=False).eval()
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")
    }
    weights = {name: layer.base_layer.weight.data.clone() for name, layer in layers.items()}
    now = start
    for clients, rows in zip(batches, fresh, strict=True):
        for name, layer in layers.items():
            layer.base_layer.weight.data = weights[name] + alpha / rank * now.folded.get(name, 0)
        all_a, all_b, tokens = [], [], []
        for index, steps in enumerate(clients):
            for name, layer in layers.items():
                B = now.B if now.own_b is None else now.own_b[index]
                layer.lora_A["default"].weight.data = now.A[name].clone()
                layer.lora_B["default"].weight.data = B[name].clone()
            tokens.append(
                _local(model, [p for n, p in model.named_parameters() if _trains(rule, n)], steps, lr)
            )
            all_a.append({n: layer.lora_A["default"].weight.data.clone() for n, layer in layers.items()})
            all_b.append({n: layer.lora_B["default"].weight.data.clone() for n, layer in layers.items()})
        now = RULES[rule](now, all_a, all_b, tokens, rows)
    return now


def _trains(rule: str, name: str) -> bool:
    return "lora_B" in name or ("lora_A" in name and rule != "ffa")


def _local(model: Any, parameters: list[Any], steps: Sequence[Batch], lr: float) -> int:
    """One client's steps; returns the labelled tokens."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    tokens = 0
    for ids, labels in steps:
        mask = (torch.arange(ids.shape[1]) < _lengths(labels)[:, None]).long()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        model.zero_grad()
        loss.backward()
        optimizer.step()
        tokens += int((labels[:, 1:] != -100).sum())
    return tokens
