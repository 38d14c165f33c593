"""Find the parts of a Hugging Face causal language model.

    causal LM ─┬─ trunk ─┬─ embedding     (wte, embed_tokens, embed_in, word_embeddings)
               │         ├─ positions     (wpe, embed_positions: learned tables; rotary ones are not here)
               │         ├─ blocks 0..L-1 (h, layers)
               │         └─ final norm    (ln_f, norm, final_layer_norm, norm_f)
               └─ output matrix           (lm_head, embed_out; often tied to the embedding)

The families differ in names only, so the parts are found by name, without copies of modelling files. An
unknown family is refused with the names that were looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from splitft.errors import ModelError
from splitft.geometry import ModelShape

BLOCK_NAMES = ("layers", "h", "blocks")
NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f", "layer_norm")
POSITION_NAMES = ("wpe", "embed_positions")
BEFORE_NAMES = ("project_in", "word_embeddings_layernorm")
AFTER_NAMES = ("project_out",)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one causal language model, by attribute name of its trunk."""

    trunk: nn.Module
    """The module whose forward runs the blocks."""
    blocks: str
    """Attribute of the trunk that holds the block list."""
    norm: str | None
    """Attribute of the final norm; None for models that have none (OPT-350M)."""
    positions: str | None
    """Attribute of a learned absolute position table, if there is one."""
    before: tuple[str, ...]
    """Attributes that act between embedding and block 0 (OPT's `project_in`, BLOOM's norm)."""
    after: tuple[str, ...]
    """Attributes that act between the final norm and the output matrix (OPT's `project_out`)."""
    embedding: nn.Module
    """The token embedding."""
    head: nn.Module
    """The output matrix."""

    def block_list(self) -> list[nn.Module]:
        """Return the L blocks."""
        return list(getattr(self.trunk, self.blocks))


def locate(causal_lm: Any) -> Anatomy:
    """Find the parts of a causal language model. Raises ModelError, with the names tried, if it cannot."""
    trunk = causal_lm.base_model
    trunk = getattr(trunk, "decoder", trunk)  # OPT wraps its trunk once more
    family = getattr(causal_lm.config, "model_type", type(causal_lm).__name__)
    blocks = _first(trunk, BLOCK_NAMES, nn.ModuleList)
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    norm = _first(trunk, NORM_NAMES, nn.Module)
    names_a_norm = any(hasattr(trunk, name) for name in NORM_NAMES)
    missing = [
        what
        for what, found in (
            (f"a block list named one of {', '.join(BLOCK_NAMES)}", blocks is not None),
            (f"a final norm named one of {', '.join(NORM_NAMES)}", norm is not None or names_a_norm),
            ("an input embedding", embedding is not None),
            ("an output matrix", head is not None),
        )
        if not found
    ]
    if missing or blocks is None:
        held = ", ".join(name for name, _ in trunk.named_children()) or "nothing"
        raise ModelError(
            f"cannot split a model of family {family!r}: looked in {type(trunk).__name__} for "
            f"{'; '.join(missing)}; it holds {held}"
        )
    positions = _first(trunk, POSITION_NAMES, nn.Module)
    before = tuple(name for name in BEFORE_NAMES if getattr(trunk, name, None) is not None)
    after = tuple(name for name in AFTER_NAMES if getattr(trunk, name, None) is not None)
    known = {blocks, norm, positions, *before, *after}
    strange = [
        name
        for name, part in trunk.named_children()
        if name not in known and part is not embedding and any(True for _ in part.parameters())
    ]
    if strange:
        raise ModelError(
            f"cannot split a model of family {family!r}: its trunk {type(trunk).__name__} also holds "
            f"{', '.join(strange)}, and splitft does not know which side needs that"
        )
    return Anatomy(trunk, blocks, norm, positions, before, after, embedding, head)


def shape_of(config: Any) -> ModelShape:
    """Return a model's sizes from its Hugging Face configuration. Raises ModelError if some are missing."""
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    absent = [name for name in sizes if getattr(config, name, None) is None]
    if absent:
        raise ModelError(
            f"family {config.model_type!r} cannot be split: its configuration lacks {', '.join(absent)}"
        )
    width = int(config.hidden_size)
    heads = int(config.num_attention_heads)
    head_width = _number(config, ("head_dim",), width // heads)
    inner = _number(config, ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 4 * width)
    return ModelShape(
        family=str(config.model_type),
        blocks=int(config.num_hidden_layers),
        width=width,
        vocab=int(config.vocab_size),
        inner=inner,
        heads=heads,
        kv_heads=_number(config, ("num_key_value_heads",), heads),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        max_positions=_number(config, ("max_position_embeddings", "n_positions"), 2**31),
        head_width=None if head_width == width // heads else head_width,
    )


def _first(module: nn.Module, names: Sequence[str], kind: type[nn.Module]) -> str | None:
    return next((name for name in names if isinstance(getattr(module, name, None), kind)), None)


def _number(config: Any, names: Sequence[str], default: int) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((int(value) for value in values if value is not None), default)
