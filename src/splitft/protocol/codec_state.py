"""What one end of a client's line remembers between messages.

    client end   [Activations|train, HeadGradient|train, ...]  -->  <--  the same at the server's end

A stream is one kind of tensor for one purpose, so that evaluation does not disturb training. Each end keeps a
`Memory` for each stream, whether it sends or receives; a checkpoint keeps both ends.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch

from splitft.codecs.passage import CodecContext, Memory
from splitft.protocol.adapter_deltas import DeltaState

_CUT = "line/cut"
_ADAPTERS = "adapters|"


class CodecState:
    """One end of one client's line."""

    def __init__(self, seed: int = 0, client: str = "") -> None:
        self._seed, self._client = seed, client
        self._memories: dict[str, Memory] = {}
        self.adapters = DeltaState()
        """The client's factors that both ends hold."""
        self._underway: dict[int, tuple[tuple[int, int, int], ...]] = {}  # by micro-batch
        self._training = True
        self._cut = 0  # 0: no round has begun

    def begin(self, training: bool, examples: Sequence[tuple[int, int, int]], micro_batch: int = 0) -> None:
        """A batch is underway: (example, rows, labelled rows) of each sequence, where that is told."""
        self._training = training
        self._underway[micro_batch] = tuple(examples)

    def at_cut(self, cut: int) -> None:
        """A round begins at this cut: what was learnt of another cut's tensors is forgotten."""
        if self._cut not in (0, cut):
            self._memories = {}
        self._cut = cut
        self.adapters.at_cut(cut)

    def passage(self, kind: str, role: str, number: int, micro_batch: int = 0) -> CodecContext:
        """Of the message of this kind and step, and its part of the step; `Activations` have all rows."""
        purpose = "train" if self._training else "evaluate"
        name = f"{kind}|{purpose}"
        whole = kind in ("Activations", "CutGradient")
        underway = self._underway.get(micro_batch, ())
        examples = tuple((one, rows if whole else labelled) for one, rows, labelled in underway)
        place = f"{number}.{micro_batch}" if micro_batch else str(number)
        seed = zlib.crc32(f"{self._seed}/{self._client}/{name}/{place}".encode())
        return CodecContext(role, seed, self._memories.setdefault(name, {}), examples)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything remembered, by stream and name, to be kept."""
        remembered = {
            f"{stream}/{name}": tensor
            for stream, memory in self._memories.items()
            for name, tensor in memory.items()
        }
        if not self.adapters.exact:  # exact ones are those of the checkpoint
            remembered |= {_ADAPTERS + name: tensor for name, tensor in self.adapters.tensors().items()}
        return remembered | {_CUT: torch.tensor(self._cut)} if remembered else {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Remember what was kept, and nothing else."""
        self._memories = {}
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith(_ADAPTERS)}
        self.adapters.restore({name.removeprefix(_ADAPTERS): tensor for name, tensor in kept.items()})
        self._cut = int(tensors.get(_CUT, torch.tensor(0)))
        for key, tensor in tensors.items():
            if key == _CUT or key in kept:
                continue
            stream, _, name = key.rpartition("/")
            self._memories.setdefault(stream, {})[name] = tensor
