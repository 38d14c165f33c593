"""LoRA factors as differences to what the other side holds.

    server                                                       client
      G(t)   --- G(t) - base, which the client holds  --->  G'(t) = base + difference
      U(t)   <-- W(t) + residual - base  -----------------  W(t), residual = rounding error of this upload

Both ends of a client's connection hold the last factors sent each way (`global` from the server, `own` from
the client), as decoded, so that the copies are equal bit by bit. A tensor equal to one of them is not sent
(`same`). If the codec rounds, the difference to the nearer of the two is sent, or the whole tensor if that is
smaller.

The rounding error of the server is corrected by its next difference, whose base is what the client really
holds. The global factors are trained by the sum of uploads over rounds, so a client keeps the rounding error
of an upload and adds it to the next: error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv
1901.09847). The sum of the uploads received then differs from the exact sum only by the last residual. Rules
that rotate the axes of the factors between rounds (`svd`) make a residual meaningless; then none is kept.

The version of a tensor is the checksum of its bytes and goes with every difference. A receiver that holds
another version refuses it; a sender that does not know what the other side holds sends the whole tensor.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from splitft.codecs.encoded import Encoded, Parameter, TensorEntry
from splitft.errors import WireError

SAME = "same"
"""Codec name of a tensor that the receiver already holds."""
Origin = Literal["global", "own"]
"""Sender of factors: the server, or the client."""
BASES: tuple[Origin, ...] = ("global", "own")
_RESIDUAL = "owed/"
"""Prefix of residuals in checkpoints."""
DELTA_PARAMETERS = ("base", "version")
"""Parameters of an entry that are not its codec's."""


def version_of(tensor: torch.Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def codec_parameters(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Return those parameters of an entry that are its codec's."""
    return {key: value for key, value in parameters.items() if key not in DELTA_PARAMETERS}


@dataclass
class DeltaState:
    """A client's factors that both ends of its connection hold."""

    exact: bool = True
    """True if the codec does not round; then only whole tensors are sent."""
    feedback: bool = False
    """True if a client adds the rounding error of an upload to its next one."""
    held: dict[str, torch.Tensor] = field(default_factory=dict)
    """Last factors sent each way, by `global/7.self_attn.q_proj.A` or `own/...`."""
    residuals: dict[str, torch.Tensor] = field(default_factory=dict)
    """Rounding error of the last upload, by name; only at the client's end."""

    def begin_round(self, cut: int) -> None:
        """Begin a round; blocks from the cut on are not the client's any more."""
        for kept in (self.held, self.residuals):
            for name in [name for name in kept if _block(name) >= cut]:
                del kept[name]

    def encode(
        self,
        origin: Origin,
        name: str,
        tensor: torch.Tensor,
        write: Callable[[torch.Tensor], Encoded],
        read: Callable[[Encoded], torch.Tensor],
    ) -> Encoded:
        """Return the tensor as it travels, and hold what the receiver will decode.

        `write` and `read` encode and decode a whole tensor.
        """
        residual = self.residuals.get(name) if origin == "own" else None
        wanted = tensor.detach()
        if residual is not None and residual.shape == wanted.shape:
            wanted = wanted + residual
        base = self._nearest(name, wanted)
        if base is not None and torch.equal(self.held[base], wanted):
            encoded = Encoded("adapter", SAME, wanted.dtype, tuple(wanted.shape), {}, self._parameters(base))
            arrived = self.held[base]
        elif base is None or self.exact:
            encoded = write(wanted)
            arrived = read(encoded)
        else:
            encoded = write(wanted - self.held[base])
            encoded = replace(encoded, parameters={**encoded.parameters, **self._parameters(base)})
            arrived = self.held[base] + read(encoded)
        if origin == "own" and self.feedback:
            self.residuals[name] = wanted - arrived
        self._hold(origin, name, arrived)
        return encoded

    def decode(
        self, origin: Origin, name: str, encoded: Encoded, read: Callable[[Encoded], torch.Tensor]
    ) -> torch.Tensor:
        """Return the tensor received, and hold it. Raises WireError for a base that is not held here."""
        base = self.base_of(name, encoded)
        if encoded.codec == SAME:
            assert base is not None
            arrived = base
        else:
            arrived = read(encoded) if base is None else base + read(encoded)
        self._hold(origin, name, arrived)
        return arrived

    def base_of(self, name: str, announced: TensorEntry | Encoded) -> torch.Tensor | None:
        """Return the base of a tensor, or None if it is sent whole.

        Raises WireError unless this side holds the base in the type, shape and version announced.
        """
        parameters = announced.parameters
        if "base" not in parameters and announced.codec != SAME:
            return None
        slot, version = f"{parameters.get('base')}/{name}", parameters.get("version")
        held = self.held.get(slot) if parameters.get("base") in BASES else None
        fits = held is not None and (held.dtype, tuple(held.shape)) == (announced.dtype, announced.shape)
        if held is None or not fits or version_of(held) != version:
            has = "none" if held is None else f"{list(held.shape)} of version {version_of(held):08x}"
            wanted = f"{version:08x}" if isinstance(version, int) else repr(version)
            raise WireError(
                f"{name!r} comes as a difference to version {wanted}, but this side holds {has}; "
                "the sender has to send the whole tensor"
            )
        return held

    def clear(self) -> None:
        """Forget everything, so that the next factors are sent whole."""
        self.held, self.residuals = {}, {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything by name, for a checkpoint."""
        return self.held | {_RESIDUAL + name: tensor for name, tensor in self.residuals.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace everything by the tensors of a checkpoint."""
        self.clear()
        for name, tensor in tensors.items():
            if name.startswith(_RESIDUAL):
                self.residuals[name.removeprefix(_RESIDUAL)] = tensor
            else:
                self.held[name] = tensor

    def global_factors(self) -> dict[str, torch.Tensor]:
        """Return the last factors that came from the server, by name."""
        return {n.removeprefix("global/"): t for n, t in self.held.items() if n.startswith("global/")}

    # ----------------------------------------------------------------------------------------------

    def _nearest(self, name: str, wanted: torch.Tensor) -> str | None:
        """Return the name of the nearest held tensor; None if its difference is no smaller than the whole."""
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

    def _parameters(self, slot: str) -> dict[str, Parameter]:
        return {"base": slot.partition("/")[0], "version": version_of(self.held[slot])}

    def _hold(self, origin: Origin, name: str, arrived: torch.Tensor) -> None:
        if origin == "global" or not self.exact:
            self.held[f"{origin}/{name}"] = arrived


def _block(name: str) -> int:
    """Return the block of `global/7.self_attn.q_proj.A` or `7.self_attn.q_proj.A`."""
    return int(name.rpartition("/")[2].partition(".")[0])
