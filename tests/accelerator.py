"""A second torch device in Python alone, to test on a machine without an accelerator: `acc:0` and `acc:1`.

    tensor on acc:1  =  wrapper that says `acc:1`  around numbers in a CPU tensor
    aten op          -->  unwrap, compute on the CPU, wrap again

It shows what a CPU hides: an operand on another device raises as on CUDA (except for numbers of 0 dimensions,
and CPU indices), every copy between devices, its bytes and every wait for a number are counted, and operators
are logged in the order in which they were launched. It cannot show whether a real device has a kernel, races
between its streams, or its rounding. Losses differ from the CPU's in the last digits, since torch takes
another attention path for a device that it does not know. Blocks that a backward pass computes again run on
`acc:0` only.

Importing this registers the devices for the whole process; `available` makes them available, so that `auto`
finds them.
The registration of backends in Python is experimental in torch 2.13.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME, COUNT = "acc", 2
READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
}
"""Operators that wait for numbers of the device."""
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
CONTAINERS = ("sparse", "quantized", "cudnn", "mkldnn", "nested", "_make_dep_token", "from_file")
"""Parts of names of factories for tensors of other kinds."""


@dataclass(eq=False)
class Record:
    """What the devices did since it was begun."""

    copies: Counter[str] = field(default_factory=Counter)
    """Copies by direction: `to`, `from`, `across`."""
    nbytes: Counter[str] = field(default_factory=Counter)
    """Bytes of these copies as they left."""
    waits: int = 0
    """Numbers that were read from a device."""
    log: list[tuple[str, str]] = field(default_factory=list)
    """(device, operator or `to`, `from`, `across`, `wait`, `synchronize`) in order."""

    def note(self, device: torch.device, what: str, nbytes: int = 0) -> None:
        """Add a line to the log, and count copies and waits."""
        self.log.append((str(device), what))
        if what in ("to", "from", "across"):
            self.copies[what] += 1
            self.nbytes[what] += nbytes
        self.waits += what == "wait"


_records: list[Record] = []
_available = False
_libraries: list[torch.library.Library] = []
_working = threading.local()
"""Device of the function that runs in a thread; the C++ parts of torch make tensors for it, such as masks."""


class _Wrapped(torch.Tensor):
    """A tensor that says it is on a fake device."""

    raw: torch.Tensor
    """Its numbers, on the CPU."""
    place: torch.device
    """Its device. To the C++ parts of torch all are on `acc:0`: backends in Python have one device there."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor, place: torch.device) -> _Wrapped:
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        wrapped.raw, wrapped.place = raw, place
        return wrapped

    def __init__(self, raw: torch.Tensor, place: torch.device) -> None:
        pass

    def __repr__(self, **options: Any) -> str:
        return f"tensor{tuple(self.shape)} on {self.place}"

    @property
    def device(self) -> torch.device:
        return self.place

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = getattr(_working, "device", None)
        _working.device = next((x.place for x in args if isinstance(x, _Wrapped)), before)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return (_to if func is torch.Tensor.to else func)(*args, **(kwargs or {}))
        finally:
            _working.device = before

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Across(torch.autograd.Function):
    """A copy from one fake device to another; its gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: _Wrapped, device: torch.device) -> _Wrapped:
        ctx.source = x.place
        _crossing(x, device)
        return _Wrapped(x.raw.clone(), device)

    @staticmethod
    def backward(ctx: Any, gradient: _Wrapped) -> tuple[_Wrapped, None]:
        _crossing(gradient, ctx.source)
        return _Wrapped(gradient.raw.clone(), ctx.source), None


def _to(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Run `x.to(...)` where x or its argument is on a fake device."""
    if isinstance(args[0] if args else None, torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device = options.get("device", args[0] if args and isinstance(args[0], str | torch.device) else None)
    target = None if device is None else _with_index(device)
    if not isinstance(x, _Wrapped) or target is None or not _is_fake(target):
        return torch.Tensor.to(x, *args, **options)
    moved = x if x.place == target else _Across.apply(x, target)
    rest = args[1:] if args and isinstance(args[0], str | torch.device) else args
    options = {key: value for key, value in options.items() if key != "device"}
    dtype = rest[0] if rest else options.pop("dtype", x.dtype)
    return torch.Tensor.to(moved, dtype, copy=bool(options.get("copy")) and moved is x)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator that has a wrapped operand."""
    name = func._schema.name
    if name in COPIES:
        return _copy(func, args, kwargs)
    if name.startswith(("aten::_foreach", "aten::_fused_adam", "aten::_fused_sgd")):
        return _run_on_lists(func, args, kwargs)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    device = _common_place(name, tensors)
    _note(device, "wait" if name in READS else name)
    out = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if func._schema.is_mutable:  # in place and out=: give the very wrapper back
        if kwargs.get("out") is not None:
            return kwargs["out"]
        written = [
            given
            for argument, given in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written and isinstance(written[0], _Wrapped) and not isinstance(out, list | tuple):
            return written[0]
    return tree_map(lambda x: _Wrapped(x, device) if isinstance(x, torch.Tensor) else x, out)


def _run_on_lists(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator of an optimizer, which takes the tensors of each parameter at one place of its lists.

    The C++ parts of torch would have called it once for each device.
    """
    lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], torch.Tensor)]
    places = [_common_place(func._schema.name, list(one)) for one in zip(*lists, strict=True)]
    for place in dict.fromkeys(places):
        _note(place, func._schema.name)
    out = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if not isinstance(out, list | tuple):
        return out
    return [_Wrapped(x, place) for x, place in zip(out, places, strict=True)]


def _copy(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a copy, which may cross between devices."""
    name = func._schema.name
    if name == "aten::_to_copy":
        [source], target = args, kwargs.get("device")
        device = source.device if target is None or _is_fake(torch.device(target)) else torch.device(target)
        _crossing(source, device)
        out = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
        if out.data_ptr() and out.data_ptr() == _unwrapped(source).data_ptr():
            out = out.clone()  # on the CPU it would have been the same tensor
        return _Wrapped(out, device) if _is_fake(device) else out
    target, source = args[:2] if name == "aten::copy_" else (args[1], args[0])
    _crossing(source, target.device)
    _unwrapped(target).copy_(_unwrapped(source))
    return target


def _common_place(name: str, tensors: list[torch.Tensor]) -> torch.device:
    """Return the device of the wrapped operands. Raises RuntimeError, as torch does, for one elsewhere.

    Numbers of no dimension fit everywhere: gradients of some operators make them, on `acc:0`.
    """
    wrapped = [x for x in tensors if isinstance(x, _Wrapped)]
    devices = {x.place for x in wrapped if x.dim()} or {x.place for x in wrapped[:1]}
    plain = [x for x in tensors if not isinstance(x, _Wrapped) and x.dim()]
    if len(devices) > 1 or (plain and not name.startswith("aten::index")):
        found = ", ".join(sorted({str(x.device) for x in (*tensors, *plain)}))
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {found}")
    return devices.pop()


def _is_fake(device: torch.device) -> bool:
    return device.type == NAME


def _with_index(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(NAME, device.index or 0) if _is_fake(device) else device


def _unwrapped(x: Any) -> Any:
    if isinstance(x, torch.device) and _is_fake(x):
        return torch.device("cpu")
    return x.raw if isinstance(x, _Wrapped) else x


def _note(device: torch.device, what: str, nbytes: int = 0) -> None:
    for record in _records:
        record.note(device, what, nbytes)


def _crossing(x: torch.Tensor, target: torch.device) -> None:
    """Count a copy of x, unless it is on its target."""
    source, nbytes = x.device, x.numel() * x.dtype.itemsize
    if source == target:
        return
    if _is_fake(source) and _is_fake(target):
        _note(target, "across", nbytes)
    else:
        _note(target if _is_fake(target) else source, "to" if _is_fake(target) else "from", nbytes)


def _synchronize(device: object = None) -> None:
    _note(_with_index(device or NAME), "synchronize")


def _factories() -> Iterator[tuple[str, Any]]:
    """Yield the aten operators that make tensors on a device from none."""
    for full in torch._C._dispatch_get_all_op_names():
        if not full.startswith("aten::") or any(part in full for part in CONTAINERS):
            continue
        name, _, overload = full[6:].partition(".")
        try:
            operator = getattr(getattr(torch.ops.aten, name), overload or "default")
        except (AttributeError, RuntimeError):
            continue
        schema = operator._schema
        makes_one = len(schema.returns) == 1 and "Tensor" in str(schema.returns[0].type)
        takes_none = not any("Tensor" in str(argument.type) for argument in schema.arguments)
        if makes_one and takes_none and any(argument.name == "device" for argument in schema.arguments):
            yield full[6:], operator


def _register() -> None:
    """Make the devices known to torch, once in a process."""
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: _available  # type: ignore[attr-defined]
    module.is_initialized = lambda: True  # type: ignore[attr-defined]
    module.device_count = lambda: COUNT if _available else 0  # type: ignore[attr-defined]
    module.current_device = lambda: 0  # type: ignore[attr-defined]
    module.set_device = lambda device: None  # type: ignore[attr-defined]
    module.synchronize = _synchronize  # type: ignore[attr-defined]
    module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]
    module.get_rng_state = lambda device=None: torch.zeros(0)  # type: ignore[attr-defined]
    module.set_rng_state = lambda state, device=None: None  # type: ignore[attr-defined]
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    module.get_device_name = lambda device=None: "fake device"  # type: ignore[attr-defined]
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    library = torch.library.Library("aten", "IMPL")

    def factory(operator: Any) -> Any:
        def make(*args: Any, **options: Any) -> _Wrapped:
            device = getattr(_working, "device", None) or _with_index(options.get("device") or NAME)
            made = operator(*args, **{**options, "device": torch.device("cpu"), "pin_memory": None})
            return _Wrapped(made, device)

        return make

    for name, operator in _factories():
        library.impl(name, factory(operator), "PrivateUse1")

    def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        _crossing(source, target.device)
        _unwrapped(target).copy_(_unwrapped(source))
        return target

    library.impl("_copy_from", copy_from, "PrivateUse1")
    _libraries.append(library)


@contextlib.contextmanager
def available() -> Iterator[None]:
    """Make the devices available."""
    global _available
    before, _available = _available, True
    try:
        with torch.autograd.set_multithreading_enabled(False):  # an error in a backward pass is raised here
            yield
    finally:
        _available = before


@contextlib.contextmanager
def enabled() -> Iterator[Record]:
    """Make the devices available, and record what they do."""
    record = Record()
    _records.append(record)
    try:
        with available():
            yield record
    finally:
        _records.remove(record)


_register()
FIRST, SECOND = (torch.device(NAME, index) for index in range(COUNT))
