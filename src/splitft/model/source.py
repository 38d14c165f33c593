"""Open a model by name: its configuration, its tokenizer, and segments of it.

A name is an alias of an embedded model, a folder in Hugging Face format, or a hub id; see `open_model`. Only
the configuration is read until a segment is requested.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from splitft.errors import ModelError
from splitft.geometry import ModelShape, Span
from splitft.model.anatomy import locate, shape_of
from splitft.model.devices import CPU
from splitft.model.embedded import EMBEDDED, embedded_model
from splitft.model.precision import DTYPES, resolve
from splitft.model.quantized_layers import quantize_layers, saved_kind, saved_parts
from splitft.model.quantized_weights import library
from splitft.model.segment import Segment
from splitft.model.weights import Checkpoint, in_folder, on_hub
from splitft.specs import ModelSpec

_ONE_AT_A_TIME = threading.Lock()
"""transformers sets torch's default type, which is of the process, while it builds a model."""


@dataclass(frozen=True)
class Model:
    """A pretrained model, from which segments are loaded."""

    spec: ModelSpec
    """The user's specification, with a type instead of `auto`."""
    path: str
    """Folder or hub id that transformers and peft understand."""
    config: Any
    """Hugging Face configuration."""
    shape: ModelShape
    """Its sizes."""
    checkpoint: Checkpoint
    """Its tensors, readable by name."""

    @property
    def dtype(self) -> torch.dtype:
        """Data type of frozen weights, in which blocks compute."""
        return DTYPES[self.spec.dtype]

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Data type of hidden states and gradients outside a segment (`half_precision`)."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    @property
    def quantized(self) -> str | None:
        """How the blocks' linear weights are held, a name in QUANTIZERS; None for numbers of `dtype`."""
        given = None if self.spec.quantize == "none" else self.spec.quantize
        return saved_kind(self.path, self.config) or given

    @property
    def quantized_on_disk(self) -> bool:
        """True if the checkpoint itself is quantized."""
        return saved_kind(self.path, self.config) is not None

    @property
    def rounding(self) -> str:
        """Which weights are quantized, in words that can follow the type; empty if none are."""
        side, kind = self.spec.quantize_at, self.quantized
        blocks = f", blocks in {kind}" if kind else ""
        if kind and side != "both":
            whose = {"clients": "clients'", "server": "server's"}[side]
            blocks = f", the {whose} blocks in {kind}: clients with unequal cuts train on unequal models"
        return blocks + (", rows of embedding and head in int8" if self.spec.embedding == "int8" else "")

    @property
    def quantizes(self) -> tuple[str, ...]:
        """Kinds to which segments quantize tensors of the checkpoint when they read them."""
        blocks = self.spec.quantize if self.spec.quantize != "none" and not self.quantized_on_disk else None
        rows = "int8" if self.spec.embedding == "int8" else None
        return tuple(sorted({kind for kind in (blocks, rows) if kind}))

    def at(self, party: Literal["clients", "server"]) -> Model:
        """Return the model as the segments of one side hold it (`model.quantize_at`)."""
        if self.spec.quantize_at in ("both", party):
            return self
        return replace(self, spec=self.spec.model_copy(update={"quantize": "none", "quantize_at": "both"}))

    def segment(
        self,
        span: Span,
        *,
        embedding: bool = False,
        head: bool = False,
        device: torch.device | Sequence[torch.device] = CPU,
    ) -> Segment:
        """Load one span to a device, or divided among several, with the embedding or the head."""
        return Segment(
            self.held_skeleton(),
            self.checkpoint,
            span,
            embedding=embedding,
            head=head,
            devices=(device,) if isinstance(device, torch.device) else device,
        )

    def skeleton(self) -> Any:
        """Build the whole model on the meta device: names and shapes, no weights."""
        return _on_meta(self.config, self.dtype, self.spec.attention)

    def held_skeleton(self) -> Any:
        """Build the same with the layers that segments have, some of which hold weights in fewer bits."""
        skeleton, kind, rows = self.skeleton(), self.quantized, self.spec.embedding == "int8"
        if not kind and not rows:
            return skeleton
        fits = partial(saved_parts, self.checkpoint) if self.quantized_on_disk else lambda name: True
        return quantize_layers(skeleton, kind, rows, fits)

    def block_names(self) -> list[str]:
        """Return the full name of each block, such as `model.layers.0`."""
        skeleton = self.skeleton()
        names = {module: name for name, module in skeleton.named_modules()}
        return [names[block] for block in locate(skeleton).block_list()]

    def tokenizer(self) -> Any:
        """Load the model's tokenizer. Raises ModelError if it has none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{self.path} has no usable tokenizer: {_first_line(error)}") from error


def open_model(spec: ModelSpec, devices: Sequence[torch.device] = (CPU,), weights: bool = True) -> Model:
    """Find a model by alias, folder or hub id, and check that its family can be split.

    Without `weights` a folder needs none, and no segment can be loaded: for its sizes alone.

    `dtype: auto` becomes the type that the devices of this process compute fastest (`model.precision`).
    Raises ModelError for an unknown name, a family that cannot be split, weights that are quantized otherwise
    than by `model.quantize`, and without bitsandbytes if any are to be.
    """
    spec = resolve(spec, devices)
    path = str(embedded_model(spec.name)) if spec.name in EMBEDDED else spec.name
    config = _configuration(path)
    _check_quantized(spec, saved_kind(path, config), path)
    skeleton = _on_meta(config, DTYPES[spec.dtype], spec.attention)
    locate(skeleton)
    prefixes = (f"{skeleton.base_model_prefix}.",)
    folder = Path(path)
    required = weights or saved_kind(path, config) is not None  # which layers are quantized is written there
    checkpoint = in_folder(folder, prefixes, required) if folder.is_dir() else on_hub(path, prefixes)
    return Model(spec, path, config, shape_of(config), checkpoint)


def _check_quantized(spec: ModelSpec, saved: str | None, path: str) -> None:
    if saved and (spec.quantize not in ("none", saved) or spec.quantize_at != "both"):
        raise ModelError(
            f"model.quantize: {path} has {saved} weights already, for all parties; set quantize to none, and "
            "quantize_at to both"
        )
    if saved or spec.quantize != "none" or spec.embedding != "full":
        library()


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """Suppress the progress bars and warnings of transformers and tokenizers."""
    from transformers.utils import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            warnings.filterwarnings("ignore", r"`past_key_values` is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _configuration(path: str) -> Any:
    from transformers import AutoConfig

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
        raise ModelError(f"{path} is not a model folder: it has no config.json; it holds {held}")
    if folder.is_file():
        raise ModelError(f"{path} is a file; give the folder that holds config.json and the weights")
    near = difflib.get_close_matches(path, EMBEDDED, n=1)
    if near and not folder.is_dir():  # before a request to the hub, which is slow without a network
        raise ModelError(f"there is no model {path!r}; did you mean {near[0]!r}?")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        if folder.is_dir():
            raise ModelError(
                f"{path}: transformers cannot use its config.json: {_first_line(error)}"
            ) from error
        known = ", ".join(EMBEDDED)
        raise ModelError(
            f"no model {path!r}: it is not an embedded model ({known}) and not a local folder, and the hub "
            f"does not provide it ({_first_line(error)})"
        ) from error
    return getattr(config, "text_config", None) or config


def _on_meta(config: Any, dtype: torch.dtype, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    from splitft.model.attention import train_in_float32

    family = getattr(config, "model_type", "?")
    own = copy.deepcopy(config)  # each skeleton changes its configuration to the blocks it has mounted
    own.quantization_config = None
    for attempt in dict.fromkeys((attention, "eager")):  # some families, such as gemma2, have eager only
        try:
            with _ONE_AT_A_TIME, torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation=attempt)
        except ValueError as error:
            refused = error
            continue
        train_in_float32(skeleton)
        return skeleton
    raise ModelError(
        f"family {family!r} cannot be built as a causal language model: looked for its class in "
        f"transformers' AutoModelForCausalLM ({_first_line(refused)})"
    ) from refused


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
