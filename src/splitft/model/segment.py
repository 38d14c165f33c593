"""Run one span of a causal language model's blocks, with the model's own Hugging Face code.

    tokens (B, T) -> [client: embedding, blocks 0..k-1] -> hidden (B, T, D) -> [server: blocks k..L-1]
                  -> hidden at labelled positions (M, D) -> [head: final norm, output matrix] -> logits (M, V)

The model class is built on the meta device, where it needs no memory. The parts that a segment holds are read
from the checkpoint. To run a span, its blocks are mounted in the trunk's block list and the trunk's own
forward is called, with hidden states instead of embeddings and with neutral replacements of the parts that
are elsewhere (position table, final norm). So rotary angles, masks, scalings and soft caps are the family's.

Batches are right-padded. Causal attention never looks right, so real tokens need no padding mask. The segment
is always in evaluation mode: dropout of the base model is off, on both sides of the cut.

Shapes: B sequences, T tokens, D width, L blocks, M labelled positions, V vocabulary.
Split learning: Vepakomma et al. 2018, https://arxiv.org/abs/1812.00564.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from splitft.errors import GeometryError, ModelError
from splitft.geometry import ModelShape, Span
from splitft.model.anatomy import Anatomy, locate, shape_of
from splitft.model.loading import FrozenModule, fill_buffers
from splitft.model.weights import Checkpoint

CPU = torch.device("cpu")


class _NoPositions(nn.Module):
    """Replacement of a position table that is not loaded; adds zero."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


class _AddsOne(nn.Module):
    """Replacement of the final norm, to count how often a trunk uses it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


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
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        """Load the parts of `causal_lm` (on meta) that are held here from `checkpoint` to `device`.

        Raises ModelError if the family is unknown or the checkpoint lacks tensors, GeometryError if
        the span does not fit.
        """
        self.shape: ModelShape = shape_of(causal_lm.config)
        self.dtype, self.device = dtype, device
        self._lm = causal_lm.eval()
        self._checkpoint = checkpoint
        self._anatomy: Anatomy = locate(causal_lm)
        self.blocks: list[nn.Module] = self._anatomy.block_list()
        """All L blocks; those outside `span` are on the meta device."""
        self._layer_types = list(getattr(causal_lm.config, "layer_types", None) or [])
        names = {module: name for name, module in causal_lm.named_modules()}
        self._frozen = [FrozenModule(names[block], block) for block in self.blocks]
        self._mounted: tuple[Span, bool, bool] | None = None
        self._parts = {name: getattr(self._anatomy.trunk, name) for name in self._swappable()}
        self.holds_embedding, self.holds_head = embedding, head
        self.span = Span(0, 0)
        self._fill_shared_parts(names)
        self._check_that_only_blocks_act()
        self.resize(span)

    def device_of(self, block: int) -> torch.device:
        """Return the device that a block is on, or would be if it were held."""
        return self.device

    def resize(self, span: Span) -> int:
        """Load the blocks that `span` adds, and free those that it leaves. Returns the bytes of weights read.

        Raises ModelError, and keeps the old span, if they cannot be read.
        """
        if span.stop > self.shape.blocks:
            raise GeometryError(f"span {span} ends after the model's {self.shape.blocks} blocks")
        read, added = 0, span.minus(self.span)
        try:
            for block in added:
                read += self._frozen[block].fill(self._checkpoint, self.dtype, self._lm, self.device)
        except BaseException:
            for block in added:
                self._frozen[block].free()
            raise
        for block in self.span.minus(span):
            self._frozen[block].free()
        self.span = span
        return read

    def run(self, x: torch.Tensor, through: Span | None = None, cache: Any = None) -> torch.Tensor:
        """Run tokens (B, T), or hidden states (B, T, D), through some of the held blocks: (B, T, D).

        Token ids enter at block 0 only; hidden states enter anywhere, also at block 0 as embeddings with
        positions already added. With a `cache` of transformers that holds the keys and values of earlier
        tokens in all blocks up to the span's end, x continues them and is added to it. Raises GeometryError
        for blocks that are not held. x comes from any device; the result is on the segment's.
        """
        x = x.to(self.device)
        through = self.span if through is None else through  # an empty span is valid
        tokens = not x.is_floating_point()
        if len(through) and through.minus(self.span):
            raise GeometryError(f"a segment that holds {self.span} cannot run blocks {through}")
        if tokens and not (self.holds_embedding and through.start == 0):
            raise GeometryError(f"token ids cannot enter at block {through.start} of {self.span}")
        if not tokens and not len(through):
            return x
        self._mount(through, enters=tokens, leaves=False)
        inputs = {"input_ids": x} if tokens else {"inputs_embeds": x}
        kept = {"use_cache": True, "past_key_values": cache} if cache is not None else {"use_cache": False}
        hidden: torch.Tensor = self._anatomy.trunk(**inputs, **kept)[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (M, V) of hidden states after the last block, at any positions (M, D)."""
        if not self.holds_head:
            raise GeometryError("a segment without the head has no logits")
        last = self.shape.blocks
        self._mount(Span(last, last), enters=False, leaves=True)
        # M sequences of one token: with no blocks mounted, positions do not interact
        logits: torch.Tensor = self._lm(
            inputs_embeds=hidden.to(self.device).unsqueeze(1), use_cache=False
        ).logits
        return logits.squeeze(1)

    def parameter_count(self) -> int:
        """Return the number of frozen parameters in memory, each counted once."""
        held: dict[int, int] = {}
        for frozen in (*self._shared, *self._frozen):
            held.update(frozen.loaded())
        return sum(held.values())

    def _check_that_only_blocks_act(self) -> None:
        """Raise ModelError if the trunk changes hidden states outside its blocks and final norm.

        Some families scale the embeddings (granite's multiplier) or use their norm there too (nanochat); in a
        split that would happen twice, or never. Without blocks, and with a norm that adds one, the trunk must
        add one.
        """
        family, trunk, norm = self.shape.family, self._anatomy.trunk, self._anatomy.norm
        x = torch.linspace(-2, 2, 2 * self.shape.width, dtype=self.dtype).view(1, 2, -1).to(self.device)
        try:
            self._mount(Span(0, 0), enters=False, leaves=False)
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
        for part in self._lm.modules():  # modules without parameters: rotary angles
            if id(part) not in block_parts and not part._parameters:
                fill_buffers(part, self._lm, self.device)

    def _mount(self, through: Span, *, enters: bool, leaves: bool) -> None:
        """Make the trunk's forward run exactly these blocks, with only the parts in use."""
        if self._mounted == (through, enters, leaves):
            return
        anatomy, trunk, config = self._anatomy, self._anatomy.trunk, self._lm.config
        setattr(trunk, anatomy.blocks, nn.ModuleList(self.blocks[block] for block in through))
        config.num_hidden_layers = len(through)
        if self._layer_types:
            config.layer_types = [self._layer_types[block] for block in through]
        if anatomy.norm:
            setattr(trunk, anatomy.norm, self._parts[anatomy.norm] if leaves else nn.Identity())
        if anatomy.positions:
            setattr(trunk, anatomy.positions, self._parts[anatomy.positions] if enters else _NoPositions())
        for name in anatomy.before:
            setattr(trunk, name, self._parts[name] if enters else nn.Identity())
        for name in anatomy.after:
            setattr(trunk, name, self._parts[name] if leaves else nn.Identity())
        self._mounted = (through, enters, leaves)
