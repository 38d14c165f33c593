"""Hidden states along their principal axes, in as many bits a number as a user gives.

    row x = s u,  s = rms of the row                             1 byte
    y = (u - mean) B, B the principal axes of earlier rows       energy gathers in few numbers (`axes`)
    codes = round(y / step), one step for all D                  the same error wherever it falls
    entropy coding by each axis's spread                         `entropy`: little spread costs little

That is transform coding as textbooks have it: for a normal source and a given mean squared error no other
linear map needs fewer bits (Goyal 2001, Theoretical foundations of transform coding). The first rows of a
stream travel as int4; then its sender sends mean, axes and spreads, D^2 bytes, and again whenever it has
learnt them better. The step follows the bits that the messages before took. Rows that are unlike what was
learnt, and hidden states of tokens that attention rests on, which are hundreds of times longer than others
and alike among themselves, travel apart, as int4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from splitft.codecs import entropy_coder as entropy
from splitft.codecs.encoded import Encoded, Parameter, StoredPart
from splitft.codecs.passage import CodecContext, Memory
from splitft.codecs.principal_axes import Axes, learn
from splitft.codecs.quantize import Packed, scale_bytes, steps_of, top_of
from splitft.codecs.rotation import as_rows, attention_sinks, sizes
from splitft.errors import WireError

LONE = 9.0
"""A row goes apart if its mean square, in units of each axis's spread, is above this."""
LEAST_RANDOM_BITS = 3.0
"""Gradients in fewer bits are rounded to the nearest: random rounding is too coarse there."""
_PLAIN, _FIRST, _CODED = 0, 1, 2


@dataclass(frozen=True)
class Principal:
    """Transform coding, learnt as the stream goes."""

    bits: float = 2.0
    """Bits of a number, all in, once the axes are learnt."""
    name: str = "principal"

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Payload on average, once the axes are known."""
        rows, width = sizes(shape)
        return rows * width * self.bits / 8

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Codes of any length, a scale a row, rows apart, and with new axes the axes."""
        rows, width = sizes(shape)
        stage, lone = parameters.get("stage"), parameters.get("lone")
        if stage == _PLAIN:
            return _INT4.layout(shape, parameters)
        if stage not in (_FIRST, _CODED) or not isinstance(lone, int) or not 0 <= lone <= rows:
            raise WireError(f"principal: no message is of stage {stage!r} with {lone!r} rows apart")
        step = parameters.get("step")
        if not isinstance(step, float) or not 0 < step < math.inf:
            raise WireError(f"principal: the step is {step!r}; it must be a number above 0")
        top_of(parameters)
        parts = {
            "codes": StoredPart(torch.uint8, (4 * rows * width + 64,), at_most=True),
            "scales": StoredPart(torch.uint8, (rows,)),
            "places": StoredPart(torch.int32, (lone,)),
        }
        if lone:
            inner = _INT4.layout((lone, width), {"top": parameters.get("lone_top", "")})
            parts |= {f"lone_{name}": part for name, part in inner.items()}
        if stage == _FIRST:
            parts |= {
                "basis": StoredPart(torch.int8, (width, width)),
                "facts": StoredPart(torch.float32, (3, width)),
            }
        return parts

    def encode(self, tensor: torch.Tensor, passage: CodecContext) -> Encoded:
        """Learn, and code along what is known."""
        rows, memory = as_rows(tensor), passage.memory
        new = memory is not None and bool(rows.numel()) and learn(rows, memory)
        if memory is None or "basis" not in memory:
            early = _INT4.encode(rows, passage)
            parts, parameters = dict(early.parts), {**early.parameters, "stage": _PLAIN}
        else:
            parts, parameters = self._coded(rows, memory, passage, new)
            parameters["stage"] = _FIRST if new else _CODED
            if new:
                parts |= {"basis": memory["basis"], "facts": memory["facts"]}
        return Encoded(passage.role, self.name, tensor.dtype, tuple(tensor.shape), parts, parameters)

    def decode(self, encoded: Encoded, dtype: torch.dtype, passage: CodecContext) -> torch.Tensor:
        """The other way round. Raises WireError for axes that never came, and codes that do not fit them."""
        shape, parts = encoded.shape, encoded.parts
        if encoded.parameters["stage"] == _PLAIN:
            return _INT4.decode(encoded, dtype, passage)
        axes, step = self._axes(encoded, passage), float(encoded.parameters["step"])
        if encoded.parameters["stage"] == _FIRST and passage.memory is not None:
            passage.memory.update(basis=parts["basis"].clone(), facts=parts["facts"].clone())
        rows, places = sizes(shape)[0], parts["places"].long()
        ordered = bool((places[1:] > places[:-1]).all())
        if len(places) and not (int(places[0]) >= 0 and int(places[-1]) < rows and ordered):
            raise WireError(f"principal: places of rows apart must rise within {rows}")
        grid = axes.grid(step)
        y = grid.numbers(_from_lanes(parts["codes"].numpy().tobytes(), grid.classes, rows))
        scales = steps_of(parts["scales"], top_of(encoded.parameters))
        x = torch.addmm(axes.mean, y, axes.basis.T) * scales[:, None]
        if len(places):
            x[places] = _INT4.decode(_lone(encoded), torch.float32, passage)
        return x.reshape(shape).to(dtype)

    def error_bound(self, encoded: Encoded, passage: CodecContext) -> torch.Tensor:
        """(N,): half a step an axis (a whole one at random), and what int8 took from the axes themselves."""
        if encoded.parameters["stage"] == _PLAIN:
            return _INT4.error_bound(encoded, passage)
        axes, step = self._axes(encoded, passage), float(encoded.parameters["step"])
        basis = axes.basis.double()
        slack = float(torch.linalg.matrix_norm(torch.eye(len(basis)) - basis @ basis.T, 2))
        share = 1.0 if encoded.role == "gradient" and self.bits >= LEAST_RANDOM_BITS else 0.5
        rounding = float(torch.linalg.matrix_norm(basis, 2)) * share * step * math.sqrt(len(basis))
        scales = steps_of(encoded.parts["scales"], top_of(encoded.parameters)).double()
        decoded = self.decode(
            encoded, torch.float64, CodecContext(encoded.role, memory=dict(passage.memory or {}))
        )
        u = decoded.reshape(len(scales), -1) / scales[:, None] - axes.mean
        bound: torch.Tensor = (slack * u.norm(dim=1) + rounding) / (1 - slack) * scales * (1 + 1e-4)
        if len(places := encoded.parts["places"].long()):
            bound[places] = _INT4.error_bound(_lone(encoded), passage)
        return bound

    def _axes(self, encoded: Encoded, passage: CodecContext) -> Axes:
        source = encoded.parts if encoded.parameters["stage"] == _FIRST else passage.memory or {}
        if "basis" not in source or len(source["basis"]) != sizes(encoded.shape)[1]:
            raise WireError(
                "principal: the axes of this stream are not known here: one side began anew; begin the round "
                "again on both"
            )
        return Axes.of(source["basis"], source["facts"])

    def _coded(
        self, rows: torch.Tensor, memory: Memory, passage: CodecContext, new: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, Parameter]]:
        """Rows along known axes; `memory` gets the step for the next ones."""
        axes = Axes.of(memory["basis"], memory["facts"])
        scales, top = scale_bytes(rows.square().mean(1).sqrt())
        y = (rows / steps_of(scales, top)[:, None] - axes.mean) @ axes.basis
        apart = (
            attention_sinks(rows) if passage.role == "hidden" else torch.zeros(len(rows), dtype=torch.bool)
        )
        step = self._first_step(axes, y[~apart], passage) if new else float(memory["step"])
        grid, exact = axes.grid(step), y / step
        codes = self._rounded(exact, passage)
        apart |= (y / axes.spread.clamp_min(step / 4)).square().mean(1) > LONE
        apart |= ~grid.within(codes[:, grid.coded]) | (exact[:, ~grid.coded].abs() > 0.5).any(1)
        places = torch.nonzero(apart)[:, 0]
        codes[places] = 0
        packed = _in_lanes(grid.lines(codes[:, grid.coded]), grid.classes)
        parts = {
            "codes": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
            "scales": scales,
            "places": places.to(torch.int32),
        }
        parameters: dict[str, Parameter] = {"step": step, "top": top, "lone": len(places)}
        if len(places):
            inner = _INT4.encode(rows[places], passage)
            parts |= {f"lone_{name}": part for name, part in inner.parts.items()}
            parameters["lone_top"] = inner.parameters["top"]
        taken = 8 * sum(part.numel() * part.element_size() for part in parts.values())
        change = min(1.0, max(-1.0, taken / max(1, rows.numel()) - self.bits))
        weight = min(1.0, len(rows) / rows.shape[1])  # a short message says little of the next
        memory["step"] = torch.tensor(step * 2.0 ** (weight * change), dtype=torch.float64)
        return parts, parameters

    def _first_step(self, axes: Axes, y: torch.Tensor, passage: CodecContext) -> float:
        """The step with which these rows (N, D) take the bits asked for, scales and lanes' states and all."""
        room = self.bits * y.numel() - 24 * len(y)
        low, high = 1e-4, 1e2
        for _ in range(20):
            step = math.sqrt(low * high)
            grid = axes.grid(step)
            taken = grid.bits(self._rounded(y[:, grid.coded] / step, passage))
            low, high = (step, high) if taken > room else (low, step)
        return math.sqrt(low * high)

    def _rounded(self, exact: torch.Tensor, passage: CodecContext) -> torch.Tensor:
        """To the nearest, or at random where that is right on average and bits allow it."""
        at_random = passage.unbiased and self.bits >= LEAST_RANDOM_BITS
        return (exact + passage.uniform(exact)).floor() if at_random else exact.round()


_INT4 = Packed("int4", 4)


def _lone(encoded: Encoded) -> Encoded:
    """The rows apart, as int4 has them."""
    names = ("codes", "scales", "mean", "channels", "apart")
    parts = {name: encoded.parts[f"lone_{name}"] for name in names}
    shape = (len(encoded.parts["places"]), sizes(encoded.shape)[1])
    return Encoded(encoded.role, "int4", torch.float32, shape, parts, {"top": encoded.parameters["lone_top"]})


def _in_lanes(codes: np.ndarray, classes: entropy.Integers) -> bytes:
    """Codes (N, A) coded two rows a lane, so that the lanes' states weigh little."""
    rows, axes = codes.shape
    if not codes.size:
        return b""
    padded = np.concatenate([codes, np.zeros((rows % 2, axes), np.int16)])
    lanes = padded.reshape(2, -1, axes).transpose(0, 2, 1).reshape(2 * axes, -1)
    return entropy.encode(np.ascontiguousarray(lanes), np.tile(classes, 2))


def _from_lanes(data: bytes, classes: entropy.Integers, rows: int) -> np.ndarray:
    """The inverse: (N, A)."""
    axes, lanes = len(classes), -(-rows // 2)
    if not axes or not rows:
        if data:
            raise WireError("principal: codes came where none were due")
        return np.zeros((rows, axes), np.int16)
    codes = entropy.decode(data, np.tile(classes, 2), lanes)
    return codes.reshape(2, axes, lanes).transpose(0, 2, 1).reshape(-1, axes)[:rows]
