"""LoRA factors as what changed since the other side last saw them.

    server                                                       client
      G(t)   --- G(t) - last G that the client holds  --->  G'(t) = last + what came
      U(t)   <-- W(t) + owed - what the server holds  ----  W(t), owed = what rounding left out

Both ends of a client's line hold the last factors that passed it each way (`global` from the server, `own`
from the client), as decoded, so the copies are equal to the last bit. A tensor that is one of them does not
travel at all (`same`). Where the codec rounds, its difference to the nearer of the two travels, or the whole
if that is smaller; the receiver adds what came to what it holds.

From the server, what rounding left out is made good by the next difference: it is taken to what the client
really holds. From the client, the sum over rounds is what trains the global factors, so it keeps what was
left out (`owed`) and adds it to what it sends next: error feedback (Seide et al. 2014; Karimireddy et al.
2019, arXiv 1901.09847). The sum of all that was received is then the sum of all that was meant, less the last
debt alone, which is as small as one rounding of one difference. A rule that turns the factors' axes between
rounds (`svd`) makes debts meaningless: none are kept.

The version of a tensor is the checksum of its bytes, and goes with every difference: a receiver that holds
another version refuses, and a sender that does not know what the other side holds sends the whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from splitft.codecs.encoded import Encoded, Parameter
from splitft.errors import WireError

SAME = "same"
"""In place of a codec's name: bit by bit what the receiver holds."""
Way = Literal["global", "own"]
"""Whose factors: from the server, or from the client."""
BASES: tuple[Way, ...] = ("global", "own")
ABOUT = ("base", "version")
"""Parameters that an entry has beside those of its codec."""


def version_of(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def of_codec(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The codec's own among an entry's parameters."""
    return {key: value for key, value in parameters.items() if key not in ABOUT}


@dataclass
class DeltaState:
    """What one end of a client's line knows that the other end holds."""

    exact: bool = True
    """Whether the codec keeps every bit; then whole tensors travel, or none."""
    feedback: bool = False
    """Whether a client carries what rounding left out over to its next upload."""
    held: dict[str, torch.Tensor] = field(default_factory=dict)
    """`global/7.self_attn.q_proj.A`, `own/...`: the last that passed."""
    owed: dict[str, torch.Tensor] = field(default_factory=dict)
    """What rounding left out of the last upload; at the client's end alone."""

    def at_cut(self, cut: int) -> None:
        """A round begins at this cut: factors of blocks beyond are not the client's any more."""
        for kept in (self.held, self.owed):
            for name in [name for name in kept if _block(name) >= cut]:
                del kept[name]

    def sent(
        self,
        way: Way,
        name: str,
        tensor: torch.Tensor,
        write: Callable[[torch.Tensor], Encoded],
        read: Callable[[Encoded], torch.Tensor],
    ) -> Encoded:
        """The tensor as it goes over the line; from then on both ends hold what the other end makes of it."""
        debt = self.owed.get(name) if way == "own" else None
        wanted = tensor.detach()
        if debt is not None and debt.shape == wanted.shape:
            wanted = wanted + debt
        base = self._nearest(name, wanted)
        if base is not None and torch.equal(self.held[base], wanted):
            encoded = Encoded("adapter", SAME, wanted.dtype, tuple(wanted.shape), {}, self._about(base))
            arrived = self.held[base]
        elif base is None or self.exact:
            encoded = write(wanted)
            arrived = read(encoded)
        else:
            encoded = write(wanted - self.held[base])
            encoded = replace(encoded, parameters={**encoded.parameters, **self._about(base)})
            arrived = self.held[base] + read(encoded)
        if way == "own" and self.feedback:
            self.owed[name] = wanted - arrived
        self._hold(way, name, arrived)
        return encoded

    def received(
        self, way: Way, name: str, encoded: Encoded, read: Callable[[Encoded], torch.Tensor]
    ) -> torch.Tensor:
        """The tensor that came; this end holds it from now on. Raises WireError for an unknown version."""
        base = self.base_of(name, encoded.dtype, encoded.shape, encoded.codec, encoded.parameters)
        if encoded.codec == SAME:
            assert base is not None
            arrived = base
        else:
            arrived = read(encoded) if base is None else base + read(encoded)
        self._hold(way, name, arrived)
        return arrived

    def base_of(
        self,
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        codec: str,
        parameters: Mapping[str, Parameter],
    ) -> torch.Tensor | None:
        """What a tensor that is announced so is a difference to; None if it comes whole."""
        if "base" not in parameters and codec != SAME:
            return None
        slot, version = f"{parameters.get('base')}/{name}", parameters.get("version")
        held = self.held.get(slot) if parameters.get("base") in BASES else None
        if held is None or (held.dtype, tuple(held.shape)) != (dtype, shape) or version_of(held) != version:
            has = "none" if held is None else f"{list(held.shape)} of version {version_of(held):08x}"
            wanted = f"{version:08x}" if isinstance(version, int) else repr(version)
            raise WireError(
                f"{name!r} comes as a difference to version {wanted}, but this side holds {has}; "
                "the sender has to send the whole"
            )
        return held

    def forget(self) -> None:
        """The other side is new, or not known: the next factors go whole."""
        self.held, self.owed = {}, {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name, to be kept."""
        return self.held | {f"owed/{name}": tensor for name, tensor in self.owed.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hold what was kept, and nothing else."""
        self.forget()
        for name, tensor in tensors.items():
            if name.startswith("owed/"):
                self.owed[name.removeprefix("owed/")] = tensor
            else:
                self.held[name] = tensor

    def known(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The last factors that came from the server, by name."""
        return ((n.removeprefix("global/"), t) for n, t in self.held.items() if n.startswith("global/"))

    # ----------------------------------------------------------------------------------------------

    def _nearest(self, name: str, wanted: torch.Tensor) -> str | None:
        """Where the held tensor is that leaves the smallest difference, if smaller than the whole."""
        slots = [f"{base}/{name}" for base in BASES]
        fitting = [
            slot
            for slot in slots
            if slot in self.held
            and self.held[slot].shape == wanted.shape
            and self.held[slot].dtype == wanted.dtype
        ]
        if self.exact:
            return next((slot for slot in fitting if torch.equal(self.held[slot], wanted)), None)
        distances = {slot: float((wanted - self.held[slot]).square().sum()) for slot in fitting}
        nearest = min(distances, key=distances.__getitem__, default=None)
        if nearest is None or distances[nearest] >= float(wanted.square().sum()):
            return nearest if nearest is not None and distances[nearest] == 0 else None
        return nearest

    def _about(self, slot: str) -> dict[str, Parameter]:
        return {"base": slot.partition("/")[0], "version": version_of(self.held[slot])}

    def _hold(self, way: Way, name: str, arrived: torch.Tensor) -> None:
        if way == "global" or not self.exact:
            self.held[f"{way}/{name}"] = arrived


def _block(name: str) -> int:
    """Block of `global/7.self_attn.q_proj.A` or `7.self_attn.q_proj.A`."""
    return int(name.rpartition("/")[2].partition(".")[0])
