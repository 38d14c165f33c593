"""Federated LoRA as one would write it with peft: every client trains the whole model; factors are averaged.

Shares no code with splitft. It is given numbers only: initial factors, and each client's batches; magnitudes
of DoRA begin as peft begins them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    mask: Callable[[str, int, int], torch.Tensor] | None = None,
    clip: Callable[[int, dict[str, torch.Tensor]], None] = lambda client, parameters: None,
) -> dict[str, torch.Tensor]:
    """Factors by peft's names after the rounds. `batches`: by round, then client, then step.

    `mask` gives what peft's dropout multiplies a layer's input by (layer, client, step of the run), `clip`
    changes the gradients of a client's step.
    """
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_dora=dora)
    model: Any = get_peft_model(base, lora, autocast_adapter_dtype=False).eval()
    now = [0, 0]  # client, step of the run
    if mask is not None:
        model.train()
        for name, module in model.named_modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = _Given(name.removeprefix("base_model.model."), mask, now)
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    factors = {n: initial.get(n.replace(".default", ""), p.detach().clone()) for n, p in parameters.items()}
    for number, clients in enumerate(batches):
        total = {name: torch.zeros_like(value) for name, value in factors.items()}
        tokens_of_all = 0
        for client, steps in enumerate(clients):
            for name, parameter in parameters.items():
                parameter.data = factors[name].clone()
            optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0)
            tokens = 0
            for step, (ids, labels) in enumerate(steps):
                now[:] = client, number * len(steps) + step
                mask = (torch.arange(ids.shape[1]) < _lengths(labels)[:, None]).long()
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                clip(client, parameters)
                optimizer.step()
                tokens += int((labels[:, 1:] != -100).sum())
            for name, parameter in parameters.items():
                total[name] += tokens * parameter.data
            tokens_of_all += tokens
        factors = {name: value / tokens_of_all for name, value in total.items()}
    return {name.replace(".default", ""): value for name, value in factors.items()}


class _Given(torch.nn.Module):
    """Dropout by a mask that is given."""

    def __init__(self, name: str, mask: Callable[[str, int, int], torch.Tensor], now: list[int]) -> None:
        super().__init__()
        self._name, self._mask, self._now = name, mask, now

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self._mask(self._name, *self._now)


def _lengths(labels: torch.Tensor) -> torch.Tensor:
    """Real tokens of each row: its last label is its last token."""
    positions = torch.arange(labels.shape[1]).expand_as(labels)
    return torch.where(labels != -100, positions, -1).max(1).values + 1
