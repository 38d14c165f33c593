"""Compute in float16 with hidden states, gradients and losses in range.

    x float32 --enter--> [float16: blocks, or head] --leave--> y float32         one pass
    backward:            gradients times S           <-- S = 2^-k, by the largest of the gradient

Float16 ends at 65,504, and below 6e-8 it is zero. Gradients of a mean loss are smaller than that. So each
pass multiplies the gradient that comes back by a power of two, such that its largest number is about one, and
divides again at the other end (loss scaling, Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, with
a scale for each pass). Outside a pass all numbers are float32: messages, losses, and the small products of
LoRA, which leave the pass and come back, so that gradients of the factors are true ones.

Hidden states of some models have channels beyond the range. They are clamped to it at each block and before
each norm, which would make them NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

HALF = torch.float16
LARGEST = torch.finfo(HALF).max


class Pass:
    """One run of blocks or head in float16, and the scale of the gradients in it."""

    def __init__(self) -> None:
        self.scale: torch.Tensor | None = None
        """S, known as soon as the backward pass begins."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Return x in float16; its gradient leaves the pass, and is divided by S."""
        narrow: torch.Tensor = _Narrow.apply(x, self)  # type: ignore[no-untyped-call]
        return narrow

    def leave(self, y: torch.Tensor, last: bool = False) -> torch.Tensor:
        """Return y in float32; its gradient enters the pass, and is multiplied by S.

        `last` is true at the end of the pass: the gradient that comes there decides about S.
        """
        wide: torch.Tensor = _Widen.apply(y, self, last)  # type: ignore[no-untyped-call]
        return wide


_current: ContextVar[Pass | None] = ContextVar("pass in float16", default=None)


def current_pass() -> Pass | None:
    """Return the pass that runs now in this thread, if one does."""
    return _current.get()


@contextmanager
def within(one: Pass | None) -> Iterator[Pass | None]:
    """Run modules as part of a pass, such as those that are computed again (checkpointing)."""
    token = _current.set(one)
    try:
        yield one
    finally:
        _current.reset(token)


def keep_in_range(blocks: Sequence[nn.Module], others: Sequence[nn.Module] = ()) -> None:
    """Clamp what leaves these blocks, and what enters the norms in them and in `others`."""
    for block in blocks:
        block.register_forward_hook(_clamp_output)
    for module in (*blocks, *others):
        for part in module.modules():
            weight = getattr(part, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.dim() == 1:
                part.register_forward_pre_hook(_clamp_input)


def _clamped(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-LARGEST, LARGEST) if x.dtype == HALF else x


def _clamp_output(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return _clamped(output)
    return (_clamped(output[0]), *output[1:])


def _clamp_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_clamped(inputs[0]), *inputs[1:]) if inputs else inputs


class _Narrow(torch.autograd.Function):
    """float32 to float16; the gradient back to float32, without the scale."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, one: Pass) -> torch.Tensor:
        ctx.one, ctx.dtype = one, x.dtype
        return x.clamp(-LARGEST, LARGEST).to(HALF)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        finite = torch.nan_to_num(gradient.float(), nan=0.0, posinf=LARGEST, neginf=-LARGEST)
        return (finite / ctx.one.scale.to(finite.device)).to(ctx.dtype), None


class _Widen(torch.autograd.Function):
    """float16 to float32; the gradient to float16, with the scale."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, one: Pass, last: bool) -> torch.Tensor:
        ctx.one, ctx.last = one, last
        return y.float()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.last:
            largest = gradient.abs().amax() if gradient.numel() else gradient.new_ones(())
            exponent = torch.where(largest > 0, largest.log2().ceil(), 0.0).clamp(-120, 120)
            ctx.one.scale = torch.exp2(-exponent)
        scaled = gradient * ctx.one.scale.to(gradient.device)
        return scaled.clamp(-LARGEST, LARGEST).to(HALF), None, None
