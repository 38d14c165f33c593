"""The memory of codecs at one end of a client's connection.

    client end   {Activations|train: Memory, HeadGradient|train: Memory, ...}     the same at the server end

A stream is one kind of message for one purpose, so that evaluation does not disturb training. Each end keeps
a `Memory` for each stream, whether it sends or receives; a checkpoint keeps both ends.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch

from splitft.codecs import CodecContext, Memory
from splitft.protocol.adapter_deltas import DeltaState

_CUT = "line/cut"
_ADAPTERS = "adapters|"
"""Names in checkpoints."""


class CodecState:
    """Everything that codecs remember at one end of a client's connection."""

    def __init__(self, seed: int = 0, client: str = "") -> None:
        self._seed, self._client = seed, client
        self._memories: dict[str, Memory] = {}
        self.adapters = DeltaState()
        """The client's factors that both ends hold."""
        self._examples: dict[int, tuple[tuple[int, int, int], ...]] = {}  # by micro-batch
        self._training = True
        self._cut = 0  # 0: no round has begun

    def begin_batch(
        self, training: bool, examples: Sequence[tuple[int, int, int]], micro_batch: int = 0
    ) -> None:
        """Begin a batch of sequences (example id, rows, labelled rows); without ids there are none."""
        self._training = training
        self._examples[micro_batch] = tuple(examples)

    def begin_round(self, cut: int) -> None:
        """Begin a round; a new cut clears what was learned of tensors at the old one."""
        if self._cut not in (0, cut):
            self._memories = {}
        self._cut = cut
        self.adapters.begin_round(cut)

    def context(self, kind: str, role: str, step: int, micro_batch: int = 0) -> CodecContext:
        """Return the context of a message of this kind, step and micro-batch."""
        purpose = "train" if self._training else "evaluate"
        stream = f"{kind}|{purpose}"
        all_rows = kind in ("Activations", "CutGradient")  # others have the labelled rows
        examples = tuple(
            (example, rows if all_rows else labelled)
            for example, rows, labelled in self._examples.get(micro_batch, ())
        )
        place = f"{step}.{micro_batch}" if micro_batch else str(step)
        seed = zlib.crc32(f"{self._seed}/{self._client}/{stream}/{place}".encode())
        return CodecContext(role, seed, self._memories.setdefault(stream, {}), examples)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything remembered, by stream and name, for a checkpoint."""
        remembered = {
            f"{stream}/{name}": tensor
            for stream, memory in self._memories.items()
            for name, tensor in memory.items()
        }
        if not self.adapters.exact:  # exact ones are those of the checkpoint
            remembered |= {_ADAPTERS + name: tensor for name, tensor in self.adapters.tensors().items()}
        return remembered | {_CUT: torch.tensor(self._cut)} if remembered else {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace everything by the tensors of a checkpoint."""
        self._memories = {}
        adapters = {name: tensor for name, tensor in tensors.items() if name.startswith(_ADAPTERS)}
        self.adapters.restore({name.removeprefix(_ADAPTERS): tensor for name, tensor in adapters.items()})
        self._cut = int(tensors.get(_CUT, torch.tensor(0)))
        for key, tensor in tensors.items():
            if key == _CUT or key in adapters:
                continue
            stream, _, name = key.rpartition("/")
            self._memories.setdefault(stream, {})[name] = tensor
