"""The memory of codecs at one end of a client's connection.

    client end   {Activations|train: Memory, HeadGradient|train: Memory, ...}     the same at the server end

A stream is one kind of message for one purpose, so that evaluation does not disturb training. Each end keeps
a `Memory` for each stream, whether it sends or receives; a checkpoint keeps both ends.

Two ends agree if both have begun with the same message (`restart`: a session, or `Join` after an absence) and
have then coded the same messages in the same order. Each end counts those of a stream; the count travels
with a tensor whose codec remembers at both ends, and a receiver that has counted otherwise refuses it.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from splitft.codecs import CodecContext, Memory
from splitft.protocol.adapter_deltas import DeltaState

_CUT = "line/cut"
_COUNTS = "coded/"
_ADAPTERS = "adapters|"
"""Names in checkpoints."""


class CodecState:
    """Everything that codecs remember at one end of a client's connection."""

    def __init__(self, seed: int = 0, client: str = "") -> None:
        self._seed, self._client = seed, client
        self._memories: dict[str, Memory] = {}
        self._coded: Counter[str] = Counter()  # tensors since the last restart, by stream
        self.adapters = DeltaState()
        """The client's factors that both ends hold."""
        self._examples: dict[int, tuple[tuple[int, int, int], ...]] = {}  # by micro-batch
        self._training = True
        self._cut = 0  # 0: no round has begun

    def restart(self) -> None:
        """Forget everything that was learned, as the other end does: the next messages are key frames."""
        self._memories, self._coded = {}, Counter()
        self.adapters.clear()

    def begin_batch(
        self, training: bool, examples: Sequence[tuple[int, int, int]], micro_batch: int = 0
    ) -> None:
        """Begin a batch of sequences (example id, rows, labelled rows); without ids there are none."""
        self._training = training
        self._examples[micro_batch] = tuple(examples)

    def begin_round(self, cut: int) -> None:
        """Begin a round; a new cut clears what was learned of tensors at the old one."""
        if self._cut not in (0, cut):
            self._memories, self._coded = {}, Counter()
        self._cut = cut
        self.adapters.begin_round(cut)

    def context(self, kind: str, role: str, step: int, micro_batch: int = 0) -> CodecContext:
        """Return the context of a message of this kind, step and micro-batch."""
        stream = self._stream(kind)
        all_rows = kind in ("Activations", "CutGradient")  # others have the labelled rows
        examples = tuple(
            (example, rows if all_rows else labelled)
            for example, rows, labelled in self._examples.get(micro_batch, ())
        )
        place = f"{step}.{micro_batch}" if micro_batch else str(step)
        seed = zlib.crc32(f"{self._seed}/{self._client}/{stream}/{place}".encode())
        return CodecContext(role, seed, self._memories.setdefault(stream, {}), examples)

    def learned(self, name: str) -> int:
        """Return the number of streams in whose memory there is something of this name."""
        return sum(name in memory for memory in self._memories.values())

    def coded(self, kind: str) -> int:
        """Return the tensors of this kind and purpose since the last restart."""
        return self._coded[self._stream(kind)]

    def count(self, kind: str) -> None:
        """Count a tensor of this kind and purpose that was coded here."""
        self._coded[self._stream(kind)] += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything remembered, by stream and name, for a checkpoint."""
        remembered = {
            f"{stream}/{name}": tensor
            for stream, memory in self._memories.items()
            for name, tensor in memory.items()
        }
        if not self.adapters.exact:  # exact ones are those of the checkpoint
            remembered |= {_ADAPTERS + name: tensor for name, tensor in self.adapters.tensors().items()}
        if not remembered and not self._coded:
            return {}
        counts = {_COUNTS + stream: torch.tensor(count) for stream, count in self._coded.items()}
        return remembered | counts | {_CUT: torch.tensor(self._cut)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace everything by the tensors of a checkpoint."""
        self._memories, self._coded = {}, Counter()
        adapters = {name: tensor for name, tensor in tensors.items() if name.startswith(_ADAPTERS)}
        self.adapters.restore({name.removeprefix(_ADAPTERS): tensor for name, tensor in adapters.items()})
        self._cut = int(tensors.get(_CUT, torch.tensor(0)))
        for key, tensor in tensors.items():
            if key == _CUT or key in adapters:
                continue
            if key.startswith(_COUNTS):
                self._coded[key.removeprefix(_COUNTS)] = int(tensor)
                continue
            stream, _, name = key.rpartition("/")
            self._memories.setdefault(stream, {})[name] = tensor

    def _stream(self, kind: str) -> str:
        """Return the name of a stream: one kind of message for the purpose of the current batch."""
        return f"{kind}|{'train' if self._training else 'evaluate'}"
