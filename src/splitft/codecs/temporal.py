"""Differences between an example's hidden states now and in the last epoch.

    row unknown            send it
    row changed            send the difference         then both ends keep the row as decoded
    row hardly changed     send nothing

With small learning rates the hidden states of a text change little from epoch to epoch, so differences need
few bits (AQ-SGD: Wang et al. 2022, arXiv 2206.01299) or none (SplitCom: arXiv 2602.10564). Both ends keep the
decoded rows in bfloat16, up to a budget; examples that came first stay. A message says how many examples its
sender keeps, so that a disagreement is found before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from splitft.codecs.encoded import CodecContext, Encoded, Memory, Parameter, StoredPart
from splitft.codecs.quantize import Packed
from splitft.codecs.rotation import as_rows, sizes
from splitft.errors import WireError

NEW, CHANGED, SAME = 0, 1, 2
"""State of a row, in the part `how`."""


@dataclass(frozen=True)
class Temporal:
    """Differences to the last epoch, in an inner codec."""

    skip: float = 0.1
    """A row is not sent if it changed by at most this share of its length."""
    megabytes: float = 256.0
    """Budget of each end of a stream, in MB (10^6 bytes)."""
    inner: Packed = field(default_factory=lambda: Packed(4))
    name: str = "temporal"

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Return the payload in a first epoch; later ones lack the rows that are not sent."""
        return self.inner.bytes_for(shape) + 9 * sizes(shape)[0] / 8

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Return the parts of the rows sent, the state of each row, and the examples with their rows."""
        rows, width = sizes(shape)
        sent, examples = parameters.get("sent"), parameters.get("examples")
        if not isinstance(sent, int) or not isinstance(examples, int):
            raise WireError("temporal: the parameters lack the number of rows sent or of examples")
        if not (0 <= sent <= rows and 0 <= examples <= rows):
            raise WireError(
                f"temporal: {sent} rows sent of {examples} examples do not fit a tensor of {rows} rows"
            )
        return self.inner.layout((sent, width), parameters) | {
            "how": StoredPart(torch.uint8, (rows,)),
            "examples": StoredPart(torch.int64, (examples,)),
            "counts": StoredPart(torch.int32, (examples,)),
        }

    def encode(self, tensor: torch.Tensor, context: CodecContext) -> Encoded:
        """Compare with the rows kept, and send those that changed."""
        rows = as_rows(tensor)
        ids = [example for example, _ in context.examples]
        counts = [count for _, count in context.examples]
        known, kept = _kept_rows(rows, ids, counts, context.memory)
        difference = rows - kept
        same = known & (difference.norm(dim=1) <= self.skip * rows.norm(dim=1))
        nearer = known & (difference.square().sum(1) < rows.square().sum(1))
        how = torch.where(same, SAME, torch.where(nearer, CHANGED, NEW)).to(torch.uint8)
        sent = torch.where((how == CHANGED)[:, None], difference, rows)[how != SAME]
        encoded = self.inner.encode(sent, context)
        parts = {
            **encoded.parts,
            "how": how,
            "examples": torch.tensor(ids, dtype=torch.int64),
            "counts": torch.tensor(counts, dtype=torch.int32),
        }
        parameters = {
            **encoded.parameters,
            "sent": len(sent),
            "examples": len(ids),
            "kept": len(context.memory or {}),
        }
        out = Encoded(context.role, self.name, tensor.dtype, tuple(tensor.shape), parts, parameters)
        self._remember(self._rows(out, kept, context), ids, counts, context.memory)
        return out

    def decode(self, encoded: Encoded, dtype: torch.dtype, context: CodecContext) -> torch.Tensor:
        """Add differences to the rows kept. Raises WireError if the ends do not remember the same."""
        how, rows = encoded.parts["how"], sizes(encoded.shape)[0]
        ids = encoded.parts["examples"].tolist()
        counts = encoded.parts["counts"].tolist()
        own, senders = len(context.memory or {}), encoded.parameters.get("kept")
        if own != senders:
            raise WireError(
                f"temporal: the sender remembers {senders} examples, this side {own}: one of them restarted; "
                "restart the round on both"
            )
        fits = min(counts, default=1) > 0 and sum(counts) in (rows, 0) and len(set(ids)) == len(ids)
        sent = int((how != SAME).sum())
        if not fits or sent != encoded.parameters["sent"] or bool((how > SAME).any()):
            raise WireError("temporal: the rows do not add up to the numbers announced")
        empty = torch.zeros(sizes(encoded.shape))
        known, kept = _kept_rows(empty, ids, counts, context.memory)
        if bool((how[~known] != NEW).any()):
            raise WireError("temporal: a difference refers to a row that is not remembered here")
        decoded = self._rows(encoded, kept, context)
        self._remember(decoded, ids, counts, context.memory)
        return decoded.reshape(encoded.shape).to(dtype)

    def error_bound(self, encoded: Encoded, context: CodecContext) -> torch.Tensor:
        """Return (N,) bounds of the inner codec; infinite for rows not sent, which only `skip` bounds."""
        how = encoded.parts["how"]
        bound = torch.full((len(how),), torch.inf, dtype=torch.float64)
        bound[how != SAME] = self.inner.error_bound(self._sent(encoded), context)
        return bound

    def _sent(self, encoded: Encoded) -> Encoded:
        """Return the rows sent as a tensor of the inner codec."""
        own = ("how", "examples", "counts")
        parts = {name: part for name, part in encoded.parts.items() if name not in own}
        shape = (int(encoded.parameters["sent"]), sizes(encoded.shape)[1])
        return Encoded(encoded.role, self.inner.name, torch.float32, shape, parts, encoded.parameters)

    def _rows(self, encoded: Encoded, kept: torch.Tensor, context: CodecContext) -> torch.Tensor:
        """Return (N, D) as the receiver decodes it."""
        how = encoded.parts["how"]
        sent = self.inner.decode(self._sent(encoded), torch.float32, context)
        rows = torch.where((how == NEW)[:, None], torch.zeros(()), kept)
        rows[how != SAME] += sent
        return rows

    def _remember(self, rows: torch.Tensor, ids: list[int], counts: list[int], memory: Memory | None) -> None:
        """Keep the rows of each example, as far as the budget allows."""
        if memory is None or not ids:
            return
        taken = sum(part.numel() * part.element_size() for part in memory.values())
        for example, part in zip(ids, torch.split(rows, counts), strict=True):
            key, fresh = str(example), part.to(torch.bfloat16)
            old = memory.get(key)
            growth = fresh.numel() * 2 - (0 if old is None else old.numel() * 2)
            if taken + growth <= self.megabytes * 1e6:
                memory[key] = fresh.clone()
                taken += growth


def _kept_rows(
    rows: torch.Tensor, ids: list[int], counts: list[int], memory: Memory | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N,) which rows are remembered with the same length, and (N, D) the rows, 0 elsewhere."""
    known, kept = torch.zeros(len(rows), dtype=torch.bool), torch.zeros_like(rows)
    start = 0
    for example, count in zip(ids, counts, strict=True):
        old = (memory or {}).get(str(example))
        if old is not None and old.shape == (count, rows.shape[1]):
            known[start : start + count] = True
            kept[start : start + count] = old.float()
        start += count
    return known, kept
