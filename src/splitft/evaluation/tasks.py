"""Every task that a model can be tried on, by name.

    Reader(model, tokenizer, examples) --task--> Outcome(metrics, samples)

    perplexity   loss on each example's labelled tokens, as a run evaluates
    windows      loss on one long text cut into windows, as language models are compared on WikiText-2
    e2e          write what the prompt asks for; BLEU, chrF and ROUGE-L against all references of the prompt
    gsm8k        solve; exact match of the number behind ####

An example whose text was cut off has no whole reference; it is left out of what is written, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitft.data.text import Example, eval_batches
from splitft.errors import RunError
from splitft.evaluation.generation import continue_all
from splitft.evaluation.likelihood import mean_loss
from splitft.evaluation.metrics import FINAL, exact_match, overlap

BATCH_TOKENS = 1024
"""Padded tokens in a batch whose loss is measured; their logits are the largest thing in memory."""
SAMPLES = 5
"""Continuations kept as they are, for the reader."""

Advance = Callable[[int, int], None]
"""Told how many of how many examples are done."""


@dataclass(frozen=True)
class Reader:
    """A model and what it is to be tried on."""

    model: Any
    """A whole causal language model, as transformers or peft load it."""
    tokenizer: Any
    examples: Sequence[Example]
    """At least one."""
    max_positions: int
    """Tokens that the model takes at most."""
    batch_size: int = 16
    """Prompts continued at once."""
    max_new_tokens: int | None = None
    """Longest continuation; None for the task's own."""
    advance: Advance = lambda done, total: None
    """Told of progress."""


@dataclass(frozen=True)
class TaskResult:
    """What came out of a task."""

    metrics: dict[str, float]
    """By name; counts among them."""
    samples: tuple[dict[str, str], ...] = ()
    """A few prompts, references and continuations."""


def perplexity(reader: Reader) -> TaskResult:
    """Loss and perplexity over the labelled tokens of all examples."""
    batches = eval_batches(reader.examples, len(reader.examples), BATCH_TOKENS)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        reader.advance(done, len(reader.examples))

    loss, tokens = mean_loss(reader.model, batches, advance)
    counts = {"tokens": tokens, "examples": len(reader.examples)}
    return TaskResult({"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **counts})


def e2e(reader: Reader) -> TaskResult:
    """BLEU, chrF and ROUGE-L of what is written for each different prompt."""
    return _written(reader, overlap, 64)


def gsm8k(reader: Reader) -> TaskResult:
    """Exact match of the final number."""
    return _written(reader, exact_match, 256)


TASKS: Mapping[str, Callable[[Reader], TaskResult]] = {
    "perplexity": perplexity,
    "windows": perplexity,
    "e2e": e2e,
    "gsm8k": gsm8k,
}
"""Every task by name; `windows` differs from `perplexity` in how the text is read."""

WRITING = ("e2e", "gsm8k")
"""Tasks that need prompts."""


def suitable_tasks(examples: Sequence[Example], tokenizer: Any) -> tuple[str, ...]:
    """The tasks that this text allows: the loss, and what fits if there are prompts."""
    prompted = [example for example in examples if example.labelled_from > 1]
    if len(prompted) < len(examples):
        return ("perplexity",)
    final = FINAL in tokenizer.decode(prompted[0].tokens[prompted[0].labelled_from :])
    return ("perplexity", "gsm8k" if final else "e2e")


def _written(
    reader: Reader,
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]],
    longest: int,
) -> TaskResult:
    """Continue each different prompt and score it against all its references."""
    references: dict[tuple[int, ...], list[str]] = {}
    whole = [example for example in reader.examples if not example.truncated]
    for example in whole:
        if example.labelled_from < 2:
            raise RunError("there are no prompts to continue; give data.prompt and data.completion")
        prompt, text = example.tokens[: example.labelled_from], example.tokens[example.labelled_from :]
        references.setdefault(prompt, []).append(_text(reader, text))
    if not references:
        raise RunError(
            f"all {len(reader.examples)} examples were cut off, so no whole reference is left; "
            f"raise data.max_tokens"
        )
    prompts = list(references)
    room = reader.max_positions - max(map(len, prompts))
    if room < 1:
        raise RunError(f"the longest prompt fills the model's {reader.max_positions} positions")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        reader.advance(done, len(prompts))

    said = continue_all(
        reader.model,
        prompts,
        end=reader.tokenizer.eos_token_id,
        max_new_tokens=min(room, reader.max_new_tokens or longest),
        batch_size=reader.batch_size,
        advance=advance,
    )
    texts = [_text(reader, tokens) for tokens in said]
    samples = tuple(
        {"prompt": _text(reader, prompt), "reference": references[prompt][0], "written": written}
        for prompt, written in zip(prompts[:SAMPLES], texts, strict=False)
    )
    counts = {
        "prompts": len(prompts),
        "references": len(whole),
        "left_out": len(reader.examples) - len(whole),
        "mean_new_tokens": sum(map(len, said)) / len(said),
    }
    return TaskResult({**score(texts, list(references.values())), **counts}, samples)


def _text(reader: Reader, tokens: Sequence[int]) -> str:
    text: str = reader.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.strip()
