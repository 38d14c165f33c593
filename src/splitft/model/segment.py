"""Run one span of a causal language model's blocks, with the model's own Hugging Face code.

    tokens (B, T) -> [client: embedding, blocks 0..k-1] -> hidden (B, T, D) -> [server: blocks k..L-1]
                  -> hidden at labelled positions (M, D) -> [head: final norm, output matrix] -> logits (M, V)

The model class is built on the meta device, where it needs no memory. The parts that a segment holds are read
from the checkpoint. To run a span, its blocks are mounted in the trunk's block list and the trunk's own
forward is called, with hidden states instead of embeddings and with neutral replacements of the parts that
are elsewhere (position table, final norm). For the head, the model's own forward is called with the final
norm in the trunk's place. So rotary angles, masks, scalings and soft caps are the family's.

On several devices the held blocks are divided in contiguous ranges, and a pass goes from one to the next. The
embedding and the head are on the last.

    hidden --> [cuda:0: blocks k..m-1] --> [cuda:1: blocks m..L-1, head] --> hidden

Batches are right-padded. Causal attention never looks right, so real tokens need no padding mask. The segment
is always in evaluation mode: dropout of the base model is off, on both sides of the cut.

Shapes: B sequences, T tokens, D width, L blocks, M labelled positions, V vocabulary.
Split learning: Vepakomma et al. 2018, https://arxiv.org/abs/1812.00564.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from splitft.errors import GeometryError, ModelError
from splitft.geometry import ModelShape, Span
from splitft.half_precision import HALF, Pass, keep_in_range, within
from splitft.model.anatomy import Anatomy, locate, shape_of
from splitft.model.devices import CPU, divide_blocks
from splitft.model.loading import FrozenModule, fill_buffers
from splitft.model.weights import Checkpoint


class _NoPositions(nn.Module):
    """Replacement of a position table that is not loaded; adds zero."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


class _AddsOne(nn.Module):
    """Replacement of the final norm, to count how often a trunk uses it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class _Tail(nn.Module):
    """Replacement of the trunk where the head runs: what follows the blocks, without masks and rotary angles.

    To make a mask, transformers reads a number from the device; a head in chunks would wait at each chunk.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.parts(inputs_embeds))


class Segment:
    """A span of a model's blocks, with the embedding or the head if they are held here."""

    def __init__(
        self,
        causal_lm: Any,
        checkpoint: Checkpoint,
        span: Span,
        *,
        embedding: bool,
        head: bool,
        devices: Sequence[torch.device] = (CPU,),
    ) -> None:
        """Load the parts of `causal_lm` (on meta) that are held here from `checkpoint` to these devices.

        Numbers have the skeleton's type. Raises ModelError if the family is unknown or the checkpoint lacks
        tensors, GeometryError if the span does not fit.
        """
        self.shape: ModelShape = shape_of(causal_lm.config)
        self.dtype: torch.dtype = causal_lm.dtype
        self._devices = tuple(devices)
        self.device = self._devices[-1]
        """Device of the embedding, the head and the results."""
        self._device_of: dict[int, torch.device] = {}
        self._lm = causal_lm.eval()
        self._checkpoint = checkpoint
        self._anatomy: Anatomy = locate(causal_lm)
        self.blocks: list[nn.Module] = self._anatomy.block_list()
        """All L blocks; those outside `span` are on the meta device."""
        self._layer_types = list(getattr(causal_lm.config, "layer_types", None) or [])
        names = {module: name for name, module in causal_lm.named_modules()}
        self._frozen = [FrozenModule(names[block], block) for block in self.blocks]
        self._mounted: tuple[Span, bool] | None = None
        self._parts = {name: getattr(self._anatomy.trunk, name) for name in self._swappable()}
        after = (self._anatomy.norm, *self._anatomy.after)
        self._tail = _Tail([self._parts[name] for name in after if name])
        holder, _, attribute = names[self._anatomy.trunk].rpartition(".")
        self._trunk_place = causal_lm.get_submodule(holder), attribute
        self.holds_embedding, self.holds_head = embedding, head
        self.span = Span(0, 0)
        self._fill_shared_parts(names)
        self._check_that_only_blocks_act()
        self.resize(span)
        if self.dtype == HALF:
            keep_in_range(self.blocks, [self._tail])

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices, in the order of their blocks."""
        return self._devices

    def device_of(self, block: int) -> torch.device:
        """Return the device that a block is on, or would be if it were held."""
        return self._device_of.get(block, self.device)

    def resize(self, span: Span) -> int:
        """Load the blocks that `span` adds, and free those that it leaves. Returns the bytes of weights read.

        Raises ModelError, and keeps the old span, if they cannot be read.
        """
        if span.stop > self.shape.blocks:
            raise GeometryError(f"span {span} ends after the model's {self.shape.blocks} blocks")
        read, added, places = 0, span.minus(self.span), divide_blocks(span, self._devices)
        try:
            for block in added:
                read += self._frozen[block].fill(self._checkpoint, self.dtype, self._lm, places[block])
        except BaseException:
            for block in added:
                self._frozen[block].free()
            raise
        for block in self.span.minus(span):
            self._frozen[block].free()
        for block, device in self._device_of.items():  # blocks that stay, and change the device
            if places.get(block, device) != device:
                read += self._frozen[block].fill(self._checkpoint, self.dtype, self._lm, places[block])
        self.span, self._device_of = span, places
        return read

    def run(self, x: torch.Tensor, through: Span | None = None, cache: Any = None) -> torch.Tensor:
        """Run tokens (B, T), or hidden states (B, T, D), through some of the held blocks: (B, T, D).

        Token ids enter at block 0 only; hidden states enter anywhere, also at block 0 as embeddings with
        positions already added. With a `cache` of transformers that holds the keys and values of earlier
        tokens in all blocks up to the span's end, x continues them and is added to it. x comes from any
        device; the result is on that of the last block. Raises GeometryError for blocks that are not held,
        and for a cache on several devices.
        """
        through = self.span if through is None else through  # an empty span is valid
        tokens = not x.is_floating_point()
        if len(through) and through.minus(self.span):
            raise GeometryError(f"a segment that holds {self.span} cannot run blocks {through}")
        if tokens and not (self.holds_embedding and through.start == 0):
            raise GeometryError(f"token ids cannot enter at block {through.start} of {self.span}")
        ranges = list(self._ranges(through, tokens))
        if cache is not None and len(ranges) > 1:
            raise GeometryError("generation with a cache needs all blocks on one device")
        if not ranges:
            return x
        with within(Pass() if self.dtype == HALF else None) as half:
            x = x if half is None or tokens else half.enter(x)
            for device, part in ranges:
                x = self._run_on_one(x.to(device), part, cache)
            return x if half is None else half.leave(x, last=True)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (M, V) of hidden states after the last block, at any positions (M, D)."""
        if not self.holds_head:
            raise GeometryError("a segment without the head has no logits")
        holder, name = self._trunk_place
        setattr(holder, name, self._tail)
        half = Pass() if self.dtype == HALF else None
        rows = hidden.to(self.device)
        rows = rows if half is None else half.enter(rows)
        try:  # M sequences of one token
            output = self._lm(inputs_embeds=rows.unsqueeze(1), use_cache=False)
        finally:
            setattr(holder, name, self._anatomy.trunk)
        logits: torch.Tensor = output.logits.squeeze(1)
        return logits if half is None else half.leave(logits, last=True)

    def parameter_count(self) -> int:
        """Return the number of frozen parameters in memory, each counted once."""
        held: dict[int, int] = {}
        for frozen in (*self._shared, *self._frozen):
            held.update(frozen.loaded())
        return sum(held.values())

    def _ranges(self, through: Span, tokens: bool) -> Iterator[tuple[torch.device, Span]]:
        """Yield the devices of these blocks with their ranges; the embedding is on the last device."""
        if tokens and (not len(through) or self.device_of(0) != self.device):
            yield self.device, Span(0, 0)
        for device, blocks in groupby(through, self.device_of):
            held = list(blocks)
            yield device, Span(held[0], held[-1] + 1)

    def _run_on_one(self, x: torch.Tensor, through: Span, cache: Any) -> torch.Tensor:
        """Run blocks of one device."""
        tokens = not x.is_floating_point()
        self._mount(through, enters=tokens)
        if len(self._devices) > 1:  # a copy from another device would wait for that device's work
            for part, name, buffer in self._buffers_on[x.device]:
                part._buffers[name] = buffer
        inputs = {"input_ids": x} if tokens else {"inputs_embeds": x}
        kept = {"use_cache": True, "past_key_values": cache} if cache is not None else {"use_cache": False}
        hidden: torch.Tensor = self._anatomy.trunk(**inputs, **kept)[0]
        return hidden

    def _check_that_only_blocks_act(self) -> None:
        """Raise ModelError if the trunk changes hidden states outside its blocks and final norm.

        Some families scale the embeddings (granite's multiplier) or use their norm there too (nanochat); in a
        split that would happen twice, or never. Without blocks, and with a norm that adds one, the trunk must
        add one.
        """
        family, trunk, norm = self.shape.family, self._anatomy.trunk, self._anatomy.norm
        x = torch.linspace(-2, 2, 2 * self.shape.width, dtype=self.dtype).view(1, 2, -1).to(self.device)
        try:
            self._mount(Span(0, 0), enters=False)
            if norm:
                setattr(trunk, norm, _AddsOne())
            with torch.no_grad():
                out = trunk(inputs_embeds=x, use_cache=False)[0]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"family {family!r} cannot run in parts: {error}") from error
        self._mounted = None
        if not torch.equal(out, x + 1 if norm else x):
            raise ModelError(
                f"family {family!r} cannot be split: {type(trunk).__name__} changes hidden states outside "
                "its blocks"
            )

    def _swappable(self) -> list[str]:
        anatomy = self._anatomy
        names = (anatomy.norm, anatomy.positions, *anatomy.before, *anatomy.after)
        return [name for name in names if name is not None]

    def _fill_shared_parts(self, names: dict[nn.Module, str]) -> None:
        anatomy, held = self._anatomy, dict[str, nn.Module]()
        if self.holds_embedding:
            held["embedding"] = anatomy.embedding
            held.update((n, self._parts[n]) for n in (anatomy.positions, *anatomy.before) if n)
        if self.holds_head:
            held.update((n, self._parts[n]) for n in (anatomy.norm, *anatomy.after) if n)
            # a tied head is loaded as the embedding: the checkpoint has the matrix under that name only
            held["head"] = anatomy.embedding if self.shape.tied else anatomy.head
        self._shared = [FrozenModule(names[module], module) for module in dict.fromkeys(held.values())]
        for frozen in self._shared:
            frozen.fill(self._checkpoint, self.dtype, self._lm, self.device)
        if self.holds_head and self.shape.tied:
            anatomy.head._parameters["weight"] = anatomy.embedding._parameters["weight"]
        block_parts = {id(part) for block in self.blocks for part in block.modules()}
        shared: list[tuple[nn.Module, str, torch.Tensor]] = []
        for part in self._lm.modules():  # modules without parameters: rotary angles
            if id(part) not in block_parts and not part._parameters:
                fill_buffers(part, self._lm, self.device)
                shared += [(part, name, one) for name, one in part._buffers.items() if one is not None]
        self._buffers_on = {
            device: [(part, name, buffer.to(device)) for part, name, buffer in shared]
            for device in self._devices
        }

    def _mount(self, through: Span, *, enters: bool) -> None:
        """Make the trunk's forward run exactly these blocks, with only the parts in use."""
        if self._mounted == (through, enters):
            return
        anatomy, trunk, config = self._anatomy, self._anatomy.trunk, self._lm.config
        setattr(trunk, anatomy.blocks, nn.ModuleList(self.blocks[block] for block in through))
        config.num_hidden_layers = len(through)
        if self._layer_types:
            config.layer_types = [self._layer_types[block] for block in through]
        if anatomy.norm:
            setattr(trunk, anatomy.norm, nn.Identity())
        if anatomy.positions:
            setattr(trunk, anatomy.positions, self._parts[anatomy.positions] if enters else _NoPositions())
        for name in anatomy.before:
            setattr(trunk, name, self._parts[name] if enters else nn.Identity())
        for name in anatomy.after:
            setattr(trunk, name, nn.Identity())
        self._mounted = (through, enters)
