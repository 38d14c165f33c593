"""Federated LoRA as one would write it with peft: every client trains the whole model; factors are averaged.

Shares no code with splitft. It is given numbers only: initial factors, and each client's batches; magnitudes
of DoRA begin as peft begins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

Batch = tuple[torch.Tensor, torch.Tensor]
"""Right-padded token ids (B, T), and the same with -100 where there is no loss."""


def train(
    folder: Path,
    initial: dict[str, torch.Tensor],
    batches: Sequence[Sequence[Sequence[Batch]]],
    targets: list[str],
    rank: int,
    alpha: float,
    lr: float,
    dora: bool = False,
) -> dict[str, torch.Tensor]:
    """Factors by peft's names after the rounds. `batches`: by round, then client, then step."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_dora=dora)
    model: Any = get_peft_model(base, lora, autocast_adapter_dtype=False).eval()
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    factors = {n: initial.get(n.replace(".default", ""), p.detach().clone()) for n, p in parameters.items()}
    for clients in batches:
        total = {name: torch.zeros_like(value) for name, value in factors.items()}
        tokens_of_all = 0
        for steps in clients:
            for name, parameter in parameters.items():
                parameter.data = factors[name].clone()
            optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0)
            tokens = 0
            for ids, labels in steps:
                mask = (torch.arange(ids.shape[1]) < _lengths(labels)[:, None]).long()
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                tokens += int((labels[:, 1:] != -100).sum())
            for name, parameter in parameters.items():
                total[name] += tokens * parameter.data
            tokens_of_all += tokens
        factors = {name: value / tokens_of_all for name, value in total.items()}
    return {name.replace(".default", ""): value for name, value in factors.items()}


def _lengths(labels: torch.Tensor) -> torch.Tensor:
    """Real tokens of each row: its last label is its last token."""
    positions = torch.arange(labels.shape[1]).expand_as(labels)
    return torch.where(labels != -100, positions, -1).max(1).values + 1
