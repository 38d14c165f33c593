"""Sizes of a model's parts: parameters, operations and kept activations, block by block.

    embedding | block 0 | ... | block L-1 | head (final norm + output matrix)

`sizes_of` derives them from a `ModelShape`: exact for the linear layers of the usual families, without norms
and biases (under 1 %). Where the model is loaded, exact counts replace them (`run.fleet.exact_sizes`).

Operations are floating-point operations (FLOPs); a multiply-add is two. The base is frozen, so its backward
pass computes gradients of inputs only, never of weights: as many operations as the forward pass.
L blocks, D width, I inner width, V vocabulary, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from splitft.errors import ScheduleError
from splitft.geometry import ModelShape

PLAIN_MLP = frozenset({"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "phi"})
"""Families whose feed-forward layer has two matrices; all others have a gate, hence three."""

MAY_BE_ZERO = frozenset({
    "head_parameters", "adapter_parameters_per_rank", "kept_wide_elements_per_token", "magnitudes",
})  # fmt: skip
"""Sizes that a model may lack."""

Targets = Literal["attention", "all-linear"]


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of one model, from which costs are computed."""

    blocks: int
    """L."""
    width: int
    """D, elements of a hidden state of one token."""
    vocab: int
    """V, logits of one position."""
    block_parameters: int
    """Parameters of one block."""
    embedding_parameters: int
    """Parameters of the token embedding (and of learned positions)."""
    head_parameters: int
    """Parameters of the head beside the embedding: with tied embeddings the final norm alone."""
    tied: bool
    """True if the head reads the embedding's matrix."""
    adapter_parameters_per_rank: int
    """Sum over a block's adapted layers of (inputs + outputs); times R, the parameters of its A and B."""
    kept_elements_per_token: int
    """Elements of activations that one block keeps for its backward pass, per padded token, in the type of
    the weights."""
    kept_wide_elements_per_token: int = 0
    """Those that it keeps in float32 for any type of weights: inputs of norms, and attention's."""
    attention_width: int | None = None
    """Width of all heads' queries together where it is not D."""
    magnitudes: int = 0
    """Outputs of a block's adapted layers, each of which has a magnitude with DoRA; 0 without."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in MAY_BE_ZERO else 1
            if field.name not in ("tied", "attention_width") and value < least:
                raise ScheduleError(f"{field.name} is {value}; a model has at least {least}")

    @property
    def output_parameters(self) -> int:
        """Parameters of the output matrix where the head runs without the embedding beside it."""
        return self.head_parameters + (self.embedding_parameters if self.tied else 0)

    def block_flops_per_token(self, context_tokens: float) -> float:
        """Return the FLOPs of a block's forward pass (and of its backward pass) for one token of a sequence.

        2 for each parameter, and 4 D (the width of all queries, where it is another) for each of the
        context_tokens / 2 positions that a causal token sees on average (scores and their sum; Kaplan et al.
        2020, arXiv 2001.08361, table 1).
        """
        return 2.0 * self.block_parameters + 4.0 * (self.attention_width or self.width) * context_tokens / 2

    def head_flops_per_token(self) -> float:
        """Return the FLOPs of the output matrix for a labelled token: forward, and gradient of its input."""
        return 4.0 * self.width * self.vocab

    def adapter_parameters(self, ranks: Sequence[int]) -> int:
        """Return the parameters of the adapters of blocks with these LoRA ranks."""
        return self.adapter_parameters_per_rank * sum(ranks) + self.magnitudes * sum(map(bool, ranks))


def sizes_of(shape: ModelShape, targets: Targets = "attention") -> ModelSizes:
    """Derive the sizes of a model from its shape.

    Kept activations: results of two norms (2 D), attention's output (D, or the width of all queries) and
    those of the feed-forward layer
    (3 I with a gate, 2 I without); in float32 the inputs of two norms (2 D), and attention's queries, keys,
    values and result (`model.attention`).
    """
    D, I = shape.width, shape.inner  # noqa: E741
    q_width, kv_width = shape.query_width, shape.kv_width
    mlp_matrices = 2 if shape.family in PLAIN_MLP else 3
    attention = [(D, q_width), (D, kv_width), (D, kv_width), (q_width, D)]  # q, k, v, o: (inputs, outputs)
    layers = attention + [(D, I)] * mlp_matrices
    adapted = attention if targets == "attention" else layers
    return ModelSizes(
        blocks=shape.blocks,
        width=D,
        vocab=shape.vocab,
        block_parameters=sum(inputs * outputs for inputs, outputs in layers),
        embedding_parameters=D * shape.vocab,
        head_parameters=D if shape.tied else D + D * shape.vocab,
        tied=shape.tied,
        adapter_parameters_per_rank=sum(inputs + outputs for inputs, outputs in adapted),
        kept_elements_per_token=2 * D + q_width + mlp_matrices * I,
        kept_wide_elements_per_token=2 * D + 2 * q_width + 2 * kv_width,
        attention_width=None if q_width == D else q_width,
    )
