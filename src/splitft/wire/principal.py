"""Hidden states along their principal axes, in as many bits as a user gives; 2 are 16 times less than fp32.

    row x = s u,  s = rms of the row                             1 byte
    y = (u - mean) B, B the principal axes of earlier rows       energy gathers in few numbers
    codes = round(y / step), one step for all D                  the same error wherever it falls
    entropy coding by each axis's spread                         `entropy`: little spread costs little

That is transform coding as textbooks have it: for a normal source and a given mean squared error no other
linear map needs fewer bits (Goyal 2001, Theoretical foundations of transform coding). The sender learns
mean, axes and spreads from the first rows of a stream, which travel as int4, and sends them once: D^2 bytes.
The step follows the bits that the messages before took. Rows unlike what was learnt travel apart, as int8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from splitft.errors import WireError
from splitft.wire import entropy
from splitft.wire.parts import Encoded, Parameter, Part
from splitft.wire.passage import Memory, Passage
from splitft.wire.quantise import Int8, Packed, scale_bytes, steps_of, top_of
from splitft.wire.rows import as_rows, sizes

LEARNT_ROWS = 2
"""Rows that axes are learnt from, over the width."""
LONE = 9.0
"""A row goes apart if its mean square, in units of each axis's spread, is above this."""
UNLIKE = 3.0
"""Rows longer than this many times the median are not learnt from."""
LEAST_SPREAD = 0.1
"""Axes of less spread, in steps, are not coded: they are nought."""
LEAST_RANDOM_BITS = 3.0
"""Gradients in fewer bits are rounded to the nearest: random rounding is too coarse there."""
_PLAIN, _FIRST, _CODED = 0, 1, 2


@dataclass(frozen=True)
class Axes:
    """What was learnt of a stream, as both ends have it."""

    basis: torch.Tensor
    """(D, D): a column for each axis."""
    mean: torch.Tensor
    """(D,)."""
    spread: torch.Tensor
    """(D,): standard deviation along each axis."""

    @classmethod
    def of(cls, codes: torch.Tensor, facts: torch.Tensor) -> Axes:
        """From int8 columns (D, D) and (3, D): their scales, the mean, the spreads."""
        return cls(codes.float() * facts[0], facts[1], facts[2])

    def coded(self, step: float) -> torch.Tensor:
        """(D,): which axes have enough spread to be coded."""
        return self.spread >= LEAST_SPREAD * step

    def classes(self, step: float) -> entropy.Integers:
        """Of the coded axes."""
        spread: np.ndarray = self.spread[self.coded(step)].double().numpy() / step
        return entropy.class_of(spread)


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

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, Part]:
        """Codes of any length, a scale a row, rows apart, and with the first the axes."""
        rows, width = sizes(shape)
        stage, apart = parameters.get("stage"), parameters.get("apart")
        if stage == _PLAIN:
            return _EARLY.layout(shape, parameters)
        if stage not in (_FIRST, _CODED) or not isinstance(apart, int) or not 0 <= apart <= rows:
            raise WireError(f"principal: no message is of stage {stage!r} with {apart!r} rows apart")
        step = parameters.get("step")
        if not isinstance(step, float) or not 0 < step < math.inf:
            raise WireError(f"principal: the step is {step!r}; it must be a number above 0")
        top_of(parameters)
        inner = Int8().layout((apart, width), {})
        parts = {
            "codes": Part(torch.uint8, (4 * rows * width + 64,), at_most=True),
            "scales": Part(torch.uint8, (rows,)),
            "places": Part(torch.int32, (apart,)),
            "apart_codes": inner["codes"],
            "apart_scales": inner["scales"],
        }
        if stage == _FIRST:
            parts |= {"basis": Part(torch.int8, (width, width)), "facts": Part(torch.float32, (3, width))}
        return parts

    def encode(self, tensor: torch.Tensor, passage: Passage) -> Encoded:
        """Learn until enough is known, then code."""
        rows, memory = as_rows(tensor), passage.memory
        parts: dict[str, torch.Tensor] = {}
        stage = _CODED
        if memory is not None and "basis" not in memory:
            stage = _FIRST if _learn(rows, memory, self.bits) else _PLAIN
            if stage == _FIRST:
                parts = {"basis": memory["basis"], "facts": memory["facts"]}
        if memory is None or stage == _PLAIN:
            early = _EARLY.encode(rows, passage)
            parts, parameters = dict(early.parts), {**early.parameters, "stage": _PLAIN}
        else:
            coded, parameters = self._coded(rows, memory, passage)
            parts |= coded
            parameters["stage"] = stage
        return Encoded(passage.role, self.name, tensor.dtype, tuple(tensor.shape), parts, parameters)

    def decode(self, encoded: Encoded, dtype: torch.dtype, passage: Passage) -> torch.Tensor:
        """The other way round. Raises WireError for axes that never came, and codes that do not fit them."""
        shape, parts = encoded.shape, encoded.parts
        if encoded.parameters["stage"] == _PLAIN:
            return _EARLY.decode(encoded, dtype, passage)
        axes, step = self._axes(encoded, passage), float(encoded.parameters["step"])
        if encoded.parameters["stage"] == _FIRST and passage.memory is not None:
            passage.memory.update(basis=parts["basis"].clone(), facts=parts["facts"].clone())
        rows, places = sizes(shape)[0], parts["places"].long()
        ordered = bool((places[1:] > places[:-1]).all())
        if len(places) and not (int(places[0]) >= 0 and int(places[-1]) < rows and ordered):
            raise WireError(f"principal: places of rows apart must rise within {rows}")
        codes = _from_lanes(parts["codes"].numpy().tobytes(), axes.classes(step), rows)
        y = torch.zeros(rows, len(axes.mean))
        y[:, axes.coded(step)] = torch.from_numpy(codes.astype(np.float32)) * step
        scales = steps_of(parts["scales"], top_of(encoded.parameters))
        x = torch.addmm(axes.mean, y, axes.basis.T) * scales[:, None]
        x[places] = Int8().decode(self._apart(encoded), torch.float32, passage)
        return x.reshape(shape).to(dtype)

    def error_bound(self, encoded: Encoded, passage: Passage) -> torch.Tensor:
        """(N,): half a step an axis (a whole one at random), and what int8 took from the axes themselves."""
        if encoded.parameters["stage"] == _PLAIN:
            return _EARLY.error_bound(encoded, passage)
        axes, step = self._axes(encoded, passage), float(encoded.parameters["step"])
        basis = axes.basis.double()
        slack = float(torch.linalg.matrix_norm(torch.eye(len(basis)) - basis @ basis.T, 2))
        share = 1.0 if encoded.role == "gradient" and self.bits >= LEAST_RANDOM_BITS else 0.5
        rounding = float(torch.linalg.matrix_norm(basis, 2)) * share * step * math.sqrt(len(basis))
        scales = steps_of(encoded.parts["scales"], top_of(encoded.parameters)).double()
        decoded = self.decode(
            encoded, torch.float64, Passage(encoded.role, memory=dict(passage.memory or {}))
        )
        u = decoded.reshape(len(scales), -1) / scales[:, None] - axes.mean
        bound: torch.Tensor = (slack * u.norm(dim=1) + rounding) / (1 - slack) * scales * (1 + 1e-4)
        places = encoded.parts["places"].long()
        bound[places] = Int8().error_bound(self._apart(encoded), passage)
        return bound

    def _axes(self, encoded: Encoded, passage: Passage) -> Axes:
        source = encoded.parts if encoded.parameters["stage"] == _FIRST else passage.memory or {}
        if "basis" not in source or len(source["basis"]) != sizes(encoded.shape)[1]:
            raise WireError(
                "principal: the axes of this stream are not known here: one side began anew; begin the round "
                "again on both"
            )
        return Axes.of(source["basis"], source["facts"])

    def _apart(self, encoded: Encoded) -> Encoded:
        parts = {"codes": encoded.parts["apart_codes"], "scales": encoded.parts["apart_scales"]}
        shape = (len(encoded.parts["places"]), sizes(encoded.shape)[1])
        return Encoded(encoded.role, "int8", torch.float32, shape, parts)

    def _coded(
        self, rows: torch.Tensor, memory: Memory, passage: Passage
    ) -> tuple[dict[str, torch.Tensor], dict[str, Parameter]]:
        """Rows in axes that are known, and the step for the next ones."""
        axes, step = Axes.of(memory["basis"], memory["facts"]), float(memory["step"])
        scales, top = scale_bytes(rows.square().mean(1).sqrt())
        y = (rows / steps_of(scales, top)[:, None] - axes.mean) @ axes.basis
        exact = y / step
        at_random = passage.unbiased and self.bits >= LEAST_RANDOM_BITS
        codes = (exact + passage.uniform(exact)).floor() if at_random else exact.round()
        active = axes.coded(step)
        unlike = (y / axes.spread.clamp_min(step / 4)).square().mean(1) > LONE
        beyond = (codes.abs() > entropy.LARGEST).any(1) | (exact[:, ~active].abs() > 0.5).any(1)
        apart = torch.nonzero(unlike | beyond)[:, 0]
        codes[apart] = 0
        packed = _in_lanes(codes[:, active].to(torch.int16).numpy(), axes.classes(step))
        inner = Int8().encode(rows[apart], passage)
        parts = {
            "codes": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
            "scales": scales,
            "places": apart.to(torch.int32),
            "apart_codes": inner.parts["codes"],
            "apart_scales": inner.parts["scales"],
        }
        bits = 8 * sum(part.numel() * part.element_size() for part in parts.values()) / max(1, rows.numel())
        change = min(1.0, max(-1.0, bits - self.bits))
        memory["step"] = torch.tensor(step * 2.0**change, dtype=torch.float64)
        return parts, {"step": step, "top": top, "apart": len(apart)}


_EARLY = Packed("int4", 4)


def _learn(rows: torch.Tensor, memory: Memory, bits: float) -> bool:
    """Take in rows; with enough of them, settle mean, axes, spreads and the first step."""
    width = rows.shape[1]
    length = rows.square().mean(1).sqrt()
    if len(rows):
        like = length <= UNLIKE * length.median()
        u = (rows / length.clamp_min(1e-30)[:, None])[like]
        fresh = {"count": torch.tensor(float(len(u))), "sum": u.sum(0), "outer": u.T @ u}
        for name, value in fresh.items():
            memory[name] = memory[name] + value if name in memory else value
    if float(memory.get("count", torch.zeros(()))) < LEARNT_ROWS * width:
        return False
    count, total, outer = (memory.pop(name).double() for name in ("count", "sum", "outer"))
    mean = total / count
    energy, axes = torch.linalg.eigh(outer / count - torch.outer(mean, mean))
    columns = axes.abs().amax(0) / 127
    codes = (axes / columns).round().to(torch.int8)
    spread = energy.clamp_min(1e-12).sqrt()
    memory["basis"] = codes
    memory["facts"] = torch.stack([columns, mean, spread]).float()
    memory["step"] = _first_step(spread, bits)
    return True


def _first_step(spread: torch.Tensor, bits: float) -> torch.Tensor:
    """The step with which rows as they were learnt take these bits, scales and all."""
    low, high = 1e-4, 1e2
    numbers = spread.double().numpy()
    for _ in range(30):
        step = math.sqrt(low * high)
        coded = numbers[numbers >= LEAST_SPREAD * step] / step
        found = (
            entropy.expected_bits(entropy.class_of(coded)) * len(coded) / len(numbers) if len(coded) else 0
        )
        low, high = (step, high) if found + 24 / len(numbers) > bits else (low, step)
    return torch.tensor(math.sqrt(low * high), dtype=torch.float64)


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
