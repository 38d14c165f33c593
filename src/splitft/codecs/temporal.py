"""What the same example's hidden states were last time, and how they differ.

    row unknown            send it
    row changed            send the difference         both ends: kept row = what the receiver now has
    row hardly changed     send nothing

With small learning rates a text's hidden states move little from epoch to epoch, so differences need few
bits (AQ-SGD: Wang et al. 2022, arXiv 2206.01299) or none (SplitCom: arXiv 2602.10564). Both ends keep the
rows that the receiver has, in bfloat16, up to a budget; what came first stays. A message says how much its
sender keeps, so that ends that disagree find out before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from splitft.codecs.encoded import Encoded, Parameter, StoredPart
from splitft.codecs.passage import CodecContext, Memory
from splitft.codecs.quantize import Packed
from splitft.codecs.rotation import as_rows, sizes
from splitft.errors import WireError

NEW, CHANGED, SAME = 0, 1, 2


@dataclass(frozen=True)
class Temporal:
    """Differences to the last epoch, in the codec inside."""

    skip: float = 0.1
    """A row is not sent if it changed by less than this share of its length."""
    megabytes: float = 256.0
    """What each end of a stream may keep, in MB (10^6 bytes)."""
    inner: Packed = field(default_factory=lambda: Packed("int4", 4))
    name: str = "temporal"

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Of a first epoch, when nothing is known; later ones are shorter by the rows not sent."""
        return self.inner.bytes_for(shape) + 9 * sizes(shape)[0] / 8

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """The rows that are sent, as the codec inside has them; what each row is; whose they are."""
        rows, width = sizes(shape)
        sent, examples = parameters.get("sent"), parameters.get("examples")
        if not isinstance(sent, int) or not isinstance(examples, int):
            raise WireError("temporal: the message does not say how many rows it sends, of how many examples")
        if not (0 <= sent <= rows and 0 <= examples <= rows):
            raise WireError(f"temporal: {sent} rows of {examples} examples are sent of {rows}")
        return self.inner.layout((sent, width), parameters) | {
            "how": StoredPart(torch.uint8, (rows,)),
            "examples": StoredPart(torch.int64, (examples,)),
            "counts": StoredPart(torch.int32, (examples,)),
        }

    def encode(self, tensor: torch.Tensor, passage: CodecContext) -> Encoded:
        """Compare with what is kept, send what is worth it."""
        rows = as_rows(tensor)
        names, counts = _examples(passage)
        known, kept = _known(rows, names, counts, passage.memory)
        difference = rows - kept
        same = known & (difference.norm(dim=1) <= self.skip * rows.norm(dim=1))
        nearer = known & (difference.square().sum(1) < rows.square().sum(1))
        how = torch.where(same, SAME, torch.where(nearer, CHANGED, NEW)).to(torch.uint8)
        sent = torch.where((how == CHANGED)[:, None], difference, rows)[how != SAME]
        encoded = self.inner.encode(sent, passage)
        parts = {
            **encoded.parts,
            "how": how,
            "examples": torch.tensor(names, dtype=torch.int64),
            "counts": torch.tensor(counts, dtype=torch.int32),
        }
        parameters = {
            **encoded.parameters,
            "sent": len(sent),
            "examples": len(names),
            "kept": len(passage.memory or {}),
        }
        out = Encoded(passage.role, self.name, tensor.dtype, tuple(tensor.shape), parts, parameters)
        self._remember(self._rows(out, kept, passage), names, counts, passage.memory)
        return out

    def decode(self, encoded: Encoded, dtype: torch.dtype, passage: CodecContext) -> torch.Tensor:
        """Add differences to what is kept. Raises WireError if the ends do not remember the same."""
        how, rows = encoded.parts["how"], sizes(encoded.shape)[0]
        names = encoded.parts["examples"].tolist()
        counts = encoded.parts["counts"].tolist()
        here, there = len(passage.memory or {}), encoded.parameters.get("kept")
        if here != there:
            raise WireError(
                f"temporal: the sender remembers {there} examples, this side {here}: one of them began anew; "
                "begin the round again on both"
            )
        fits = min(counts, default=1) > 0 and sum(counts) in (rows, 0) and len(set(names)) == len(names)
        sent = int((how != SAME).sum())
        if not fits or sent != encoded.parameters["sent"] or bool((how > SAME).any()):
            raise WireError("temporal: the rows do not add up to what was announced")
        empty = torch.zeros(sizes(encoded.shape))
        known, kept = _known(empty, names, counts, passage.memory)
        if bool((how[~known] != NEW).any()):
            raise WireError("temporal: a difference came to a row that is not remembered here")
        decoded = self._rows(encoded, kept, passage)
        self._remember(decoded, names, counts, passage.memory)
        return decoded.reshape(encoded.shape).to(dtype)

    def error_bound(self, encoded: Encoded, passage: CodecContext) -> torch.Tensor:
        """(N,): of the codec inside where a row was sent; infinite here where none was (`skip` bounds it)."""
        how = encoded.parts["how"]
        bound = torch.full((len(how),), torch.inf, dtype=torch.float64)
        bound[how != SAME] = self.inner.error_bound(self._sent(encoded), passage)
        return bound

    def _sent(self, encoded: Encoded) -> Encoded:
        """The rows sent, as a tensor of the codec inside."""
        own = ("how", "examples", "counts")
        parts = {name: part for name, part in encoded.parts.items() if name not in own}
        shape = (int(encoded.parameters["sent"]), sizes(encoded.shape)[1])
        return Encoded(encoded.role, self.inner.name, torch.float32, shape, parts, encoded.parameters)

    def _rows(self, encoded: Encoded, kept: torch.Tensor, passage: CodecContext) -> torch.Tensor:
        """(N, D) as the receiver has it."""
        how = encoded.parts["how"]
        sent = self.inner.decode(self._sent(encoded), torch.float32, passage)
        rows = torch.where((how == NEW)[:, None], torch.zeros(()), kept)
        rows[how != SAME] += sent
        return rows

    def _remember(
        self, rows: torch.Tensor, names: list[int], counts: list[int], memory: Memory | None
    ) -> None:
        if memory is None or not names:
            return
        taken = sum(part.numel() * part.element_size() for part in memory.values())
        for name, part in zip(names, torch.split(rows, counts), strict=True):
            key, fresh = str(name), part.to(torch.bfloat16)
            old = memory.get(key)
            growth = fresh.numel() * 2 - (0 if old is None else old.numel() * 2)
            if taken + growth <= self.megabytes * 1e6:
                memory[key] = fresh.clone()
                taken += growth


def _examples(passage: CodecContext) -> tuple[list[int], list[int]]:
    return [name for name, _ in passage.examples], [count for _, count in passage.examples]


def _known(
    rows: torch.Tensor, names: list[int], counts: list[int], memory: Memory | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) which rows are remembered with the same length, and (N, D) what they were; 0 elsewhere."""
    known, kept = torch.zeros(len(rows), dtype=torch.bool), torch.zeros_like(rows)
    start = 0
    for name, count in zip(names, counts, strict=True):
        old = (memory or {}).get(str(name))
        if old is not None and old.shape == (count, rows.shape[1]):
            known[start : start + count] = True
            kept[start : start + count] = old.float()
        start += count
    return known, kept
