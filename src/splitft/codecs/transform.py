"""Transform coding of hidden states along their principal axes, in as many bits as a user gives.

    row x = s u,  s = rms of the row                             1 byte
    y = (u - mean) B, B the principal axes of earlier rows       concentrates the energy (`principal_axes`)
    codes = round(y / step), one step for all D                  the same error for every number
    entropy coding by the spread along each axis                 `entropy_coder`: few bits for little spread

For a normal source and a given mean squared error no other linear map needs fewer bits (Goyal 2001,
Theoretical foundations of transform coding). The first rows of a stream travel as int4. Then the sender sends
mean, axes and spreads, D^2 bytes, and again whenever it has learned better ones. The step follows the bits
that earlier messages took. Outlier rows are encoded separately as int4: rows far from what was learned, and
attention sinks, which are hundreds of times longer than other rows and similar to one another. The wire
calls the outlier rows `lone` and their indices `places`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from splitft.codecs import entropy_coder as entropy
from splitft.codecs.encoded import CodecContext, Encoded, Memory, Parameter, StoredPart
from splitft.codecs.principal_axes import Axes, learn
from splitft.codecs.quantize import Packed, scale_bytes, steps_of, top_of
from splitft.codecs.rotation import as_rows, attention_sinks, sizes
from splitft.errors import WireError

OUTLIER = 9.0
"""A row is an outlier if its mean square, in units of the spread along each axis, is above this."""
LEAST_RANDOM_BITS = 3.0
"""With fewer bits gradients are rounded to the nearest: random rounding would be too coarse."""
_PLAIN, _FIRST, _CODED = 0, 1, 2
"""Stage of a message: as int4, with new axes, along known axes."""


@dataclass(frozen=True)
class Principal:
    """Transform coding whose axes are learned during the run."""

    bits: float = 2.0
    """Bits of a number in all, once the axes are learned."""
    name: str = "principal"

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Return the mean payload once the axes are known."""
        rows, width = sizes(shape)
        return rows * width * self.bits / 8

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Return codes, a scale for each row, the outlier rows, and new axes if there are some."""
        rows, width = sizes(shape)
        stage, outliers = parameters.get("stage"), parameters.get("lone")
        if stage == _PLAIN:
            return _INT4.layout(shape, parameters)
        if stage not in (_FIRST, _CODED) or not isinstance(outliers, int) or not 0 <= outliers <= rows:
            raise WireError(f"principal: invalid stage {stage!r} or number of outlier rows {outliers!r}")
        step = parameters.get("step")
        if not isinstance(step, float) or not 0 < step < math.inf:
            raise WireError(f"principal: the step is {step!r}; it must be a number above 0")
        top_of(parameters)
        parts = {
            "codes": StoredPart(torch.uint8, (4 * rows * width + 64,), at_most=True),
            "scales": StoredPart(torch.uint8, (rows,)),
            "places": StoredPart(torch.int32, (outliers,)),
        }
        if outliers:
            inner = _INT4.layout((outliers, width), {"top": parameters.get("lone_top", "")})
            parts |= {f"lone_{name}": part for name, part in inner.items()}
        if stage == _FIRST:
            parts |= {
                "basis": StoredPart(torch.int8, (width, width)),
                "facts": StoredPart(torch.float32, (3, width)),
            }
        return parts

    def encode(self, tensor: torch.Tensor, context: CodecContext) -> Encoded:
        """Learn from the rows, and encode them along the axes that are known."""
        rows, memory = as_rows(tensor), context.memory
        new = memory is not None and bool(rows.numel()) and learn(rows, memory)
        if memory is None or "basis" not in memory:
            plain = _INT4.encode(rows, context)
            parts, parameters = dict(plain.parts), {**plain.parameters, "stage": _PLAIN}
        else:
            parts, parameters = self._coded(rows, memory, context, new)
            parameters["stage"] = _FIRST if new else _CODED
            if new:
                parts |= {"basis": memory["basis"], "facts": memory["facts"]}
        return Encoded(context.role, self.name, tensor.dtype, tuple(tensor.shape), parts, parameters)

    def decode(self, encoded: Encoded, dtype: torch.dtype, context: CodecContext) -> torch.Tensor:
        """Invert `encode`. Raises WireError for axes that never arrived, and codes that do not fit them."""
        shape, parts = encoded.shape, encoded.parts
        if encoded.parameters["stage"] == _PLAIN:
            return _INT4.decode(encoded, dtype, context)
        axes, step = self._axes(encoded, context), float(encoded.parameters["step"])
        if encoded.parameters["stage"] == _FIRST and context.memory is not None:
            context.memory.update(basis=parts["basis"].clone(), facts=parts["facts"].clone())
        rows, outliers = sizes(shape)[0], parts["places"].long()
        rising = bool((outliers[1:] > outliers[:-1]).all())
        if len(outliers) and not (int(outliers[0]) >= 0 and int(outliers[-1]) < rows and rising):
            raise WireError(f"principal: the indices of outlier rows must rise within 0 to {rows - 1}")
        grid = axes.grid(step)
        y = grid.numbers(_from_lanes(parts["codes"].numpy().tobytes(), grid.classes, rows))
        scales = steps_of(parts["scales"], top_of(encoded.parameters))
        x = torch.addmm(axes.mean, y, axes.basis.T) * scales[:, None]
        if len(outliers):
            x[outliers] = _INT4.decode(_outlier_rows(encoded), torch.float32, context)
        return x.reshape(shape).to(dtype)

    def error_bound(self, encoded: Encoded, context: CodecContext) -> torch.Tensor:
        """Return (N,) bounds: half a step an axis, a whole one if random, and the rounding of the axes."""
        if encoded.parameters["stage"] == _PLAIN:
            return _INT4.error_bound(encoded, context)
        axes, step = self._axes(encoded, context), float(encoded.parameters["step"])
        basis = axes.basis.double()
        slack = float(torch.linalg.matrix_norm(torch.eye(len(basis)) - basis @ basis.T, 2))
        share = 1.0 if encoded.role == "gradient" and self.bits >= LEAST_RANDOM_BITS else 0.5
        rounding = float(torch.linalg.matrix_norm(basis, 2)) * share * step * math.sqrt(len(basis))
        scales = steps_of(encoded.parts["scales"], top_of(encoded.parameters)).double()
        decoded = self.decode(
            encoded, torch.float64, CodecContext(encoded.role, memory=dict(context.memory or {}))
        )
        u = decoded.reshape(len(scales), -1) / scales[:, None] - axes.mean
        bound: torch.Tensor = (slack * u.norm(dim=1) + rounding) / (1 - slack) * scales * (1 + 1e-4)
        if len(outliers := encoded.parts["places"].long()):
            bound[outliers] = _INT4.error_bound(_outlier_rows(encoded), context)
        return bound

    def _axes(self, encoded: Encoded, context: CodecContext) -> Axes:
        source = encoded.parts if encoded.parameters["stage"] == _FIRST else context.memory or {}
        if "basis" not in source or len(source["basis"]) != sizes(encoded.shape)[1]:
            raise WireError(
                "principal: the axes of this stream are not known here: one side restarted; "
                "restart the round on both"
            )
        return Axes.of(source["basis"], source["facts"])

    def _coded(
        self, rows: torch.Tensor, memory: Memory, context: CodecContext, new: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, Parameter]]:
        """Encode rows along known axes, and set the step of the next message in `memory`."""
        axes = Axes.of(memory["basis"], memory["facts"])
        scales, top = scale_bytes(rows.square().mean(1).sqrt())
        y = (rows / steps_of(scales, top)[:, None] - axes.mean) @ axes.basis
        outlier = (
            attention_sinks(rows) if context.role == "hidden" else torch.zeros(len(rows), dtype=torch.bool)
        )
        step = self._first_step(axes, y[~outlier], context) if new else float(memory["step"])
        grid, exact = axes.grid(step), y / step
        codes = self._rounded(exact, context)
        # outlier rows: long ones, and those whose codes do not fit
        outlier |= (y / axes.spread.clamp_min(step / 4)).square().mean(1) > OUTLIER
        outlier |= ~grid.within(codes[:, grid.coded]) | (exact[:, ~grid.coded].abs() > 0.5).any(1)
        outliers = torch.nonzero(outlier)[:, 0]
        codes[outliers] = 0
        packed = _in_lanes(grid.lines(codes[:, grid.coded]), grid.classes)
        parts = {
            "codes": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
            "scales": scales,
            "places": outliers.to(torch.int32),
        }
        parameters: dict[str, Parameter] = {"step": step, "top": top, "lone": len(outliers)}
        if len(outliers):
            inner = _INT4.encode(rows[outliers], context)
            parts |= {f"lone_{name}": part for name, part in inner.parts.items()}
            parameters["lone_top"] = inner.parameters["top"]
        # the step of the next message, from the bits that this one took
        taken = 8 * sum(part.numel() * part.element_size() for part in parts.values())
        change = min(1.0, max(-1.0, taken / max(1, rows.numel()) - self.bits))
        weight = min(1.0, len(rows) / rows.shape[1])  # a short message predicts little
        memory["step"] = torch.tensor(step * 2.0 ** (weight * change), dtype=torch.float64)
        return parts, parameters

    def _first_step(self, axes: Axes, y: torch.Tensor, context: CodecContext) -> float:
        """Return the step with which rows (N, D) take the bits asked for, with scales and coder states."""
        budget = self.bits * y.numel() - 24 * len(y)
        low, high = 1e-4, 1e2
        for _ in range(20):
            step = math.sqrt(low * high)
            grid = axes.grid(step)
            taken = grid.bits(self._rounded(y[:, grid.coded] / step, context))
            low, high = (step, high) if taken > budget else (low, step)
        return math.sqrt(low * high)

    def _rounded(self, exact: torch.Tensor, context: CodecContext) -> torch.Tensor:
        """Round to the nearest, or at random if it must be unbiased and the bits allow it."""
        at_random = context.unbiased and self.bits >= LEAST_RANDOM_BITS
        return (exact + context.uniform(exact)).floor() if at_random else exact.round()


_INT4 = Packed(4)


def _outlier_rows(encoded: Encoded) -> Encoded:
    """Return the outlier rows as a tensor of int4."""
    names = ("codes", "scales", "mean", "channels", "apart")
    parts = {name: encoded.parts[f"lone_{name}"] for name in names}
    shape = (len(encoded.parts["places"]), sizes(encoded.shape)[1])
    return Encoded(encoded.role, "int4", torch.float32, shape, parts, {"top": encoded.parameters["lone_top"]})


def _in_lanes(codes: np.ndarray, classes: entropy.Integers) -> bytes:
    """Encode codes (N, A) with two rows in each lane, so that the states of the lanes cost little."""
    rows, axes = codes.shape
    if not codes.size:
        return b""
    padded = np.concatenate([codes, np.zeros((rows % 2, axes), np.int16)])
    lanes = padded.reshape(2, -1, axes).transpose(0, 2, 1).reshape(2 * axes, -1)
    return entropy.encode(np.ascontiguousarray(lanes), np.tile(classes, 2))


def _from_lanes(data: bytes, classes: entropy.Integers, rows: int) -> np.ndarray:
    """Invert `_in_lanes`; returns (N, A)."""
    axes, lanes = len(classes), -(-rows // 2)
    if not axes or not rows:
        if data:
            raise WireError("principal: codes were sent, but no axis is coded")
        return np.zeros((rows, axes), np.int16)
    codes = entropy.decode(data, np.tile(classes, 2), lanes)
    return codes.reshape(2, axes, lanes).transpose(0, 2, 1).reshape(-1, axes)[:rows]
