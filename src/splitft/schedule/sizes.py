"""How large a model's parts are: parameters, operations and kept activations, block by block.

    embedding | block 0 | ... | block L-1 | head (final norm + output matrix)

Who can count exactly (the model is at hand) gives the numbers; `sizes_of` derives them from a `ModelShape`,
which is right for the linear layers of the usual families and leaves out norms and biases (under 1 %).

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
    """What one model weighs, as plain numbers that a cost can be computed from."""

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
    """Parameters that the head needs beside the embedding: with tied embeddings only the final norm."""
    tied: bool
    """Whether the head reads the embedding's matrix."""
    adapter_parameters_per_rank: int
    """Sum over a block's adapted layers of (inputs + outputs): times R it is the block's A and B."""
    kept_elements_per_token: int
    """Elements of activations that one block keeps for its backward pass, per padded token, in the type of
    the weights."""
    kept_wide_elements_per_token: int = 0
    """Those that it keeps in float32, whatever the weights are: inputs of norms, and attention's."""

    magnitudes: int = 0
    """Outputs of a block's adapted layers, each of which has a magnitude with DoRA; 0 without."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in MAY_BE_ZERO else 1
            if field.name != "tied" and value < least:
                raise ScheduleError(f"{field.name} is {value}; a model has at least {least}")

    @property
    def output_parameters(self) -> int:
        """Parameters of the output matrix where the head runs without the embedding beside it."""
        return self.head_parameters + (self.embedding_parameters if self.tied else 0)

    def block_flops_per_token(self, context_tokens: float) -> float:
        """FLOPs of a block's forward pass (and of its backward pass) for one token of a sequence.

        2 for each parameter, and 4 D for each of the context_tokens / 2 positions that a causal token sees on
        average (scores and their sum; Kaplan et al. 2020, arXiv 2001.08361, table 1).
        """
        return 2.0 * self.block_parameters + 4.0 * self.width * context_tokens / 2

    def head_flops_per_token(self) -> float:
        """FLOPs of the output matrix for one labelled token, forward and the gradient of its input."""
        return 4.0 * self.width * self.vocab

    def adapter_parameters(self, ranks: Sequence[int]) -> int:
        """Parameters of the adapters of blocks with these LoRA ranks."""
        return self.adapter_parameters_per_rank * sum(ranks) + self.magnitudes * sum(map(bool, ranks))


def sizes_of(
    shape: ModelShape,
    targets: Targets = "attention",
    block_parameters: int | None = None,
    embedding_parameters: int | None = None,
    head_parameters: int | None = None,
    adapter_parameters_per_rank: int | None = None,
    kept_elements_per_token: int | None = None,
    kept_wide_elements_per_token: int | None = None,
) -> ModelSizes:
    """Sizes of a model, derived from its shape where no exact number is given.

    Kept activations: results of two norms and attention's output (3 D) and what the feed-forward layer keeps
    (3 I with a gate, 2 I without); in float32 the inputs of two norms (2 D), and attention's queries, keys,
    values and result (`model.attention`).
    """
    D, I = shape.width, shape.inner  # noqa: E741
    kv_width = D * shape.kv_heads // shape.heads
    mlp_matrices = 2 if shape.family in PLAIN_MLP else 3
    layers = [(D, D), (D, kv_width), (D, kv_width), (D, D)]  # q, k, v, o: (inputs, outputs)
    attention = len(layers)
    layers += [(D, I)] * mlp_matrices
    adapted = layers[:attention] if targets == "attention" else layers
    derived_block = sum(inputs * outputs for inputs, outputs in layers)
    derived_head = D if shape.tied else D + D * shape.vocab
    derived_kept = 3 * D + mlp_matrices * I
    derived_wide = 2 * D + 2 * D + 2 * kv_width
    return ModelSizes(
        blocks=shape.blocks,
        width=D,
        vocab=shape.vocab,
        block_parameters=_known(block_parameters, derived_block),
        embedding_parameters=_known(embedding_parameters, D * shape.vocab),
        head_parameters=_known(head_parameters, derived_head),
        tied=shape.tied,
        adapter_parameters_per_rank=_known(
            adapter_parameters_per_rank, sum(inputs + outputs for inputs, outputs in adapted)
        ),
        kept_elements_per_token=_known(kept_elements_per_token, derived_kept),
        kept_wide_elements_per_token=_known(kept_wide_elements_per_token, derived_wide),
    )


def _known(exact: int | None, derived: int) -> int:
    return derived if exact is None else exact
