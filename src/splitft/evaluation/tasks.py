"""All tasks that a model can be evaluated on, by name.

    TaskInput(model, tokenizer, examples) --TASKS[name].run--> TaskResult(metrics, samples)

    perplexity   loss on each example's labelled tokens, as a run evaluates
    windows      loss on one long text cut into windows, as language models are compared on WikiText-2
    e2e          write what the prompt asks for; BLEU, chrF and ROUGE-L against all references of the prompt
    gsm8k        solve; exact match of the number behind ####

An example whose text was truncated has no whole reference; e2e and gsm8k leave it out and count it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitft.data.text import Example, eval_batches
from splitft.errors import RunError
from splitft.evaluation.generation import continue_all
from splitft.evaluation.likelihood import likelihood
from splitft.evaluation.metrics import FINAL, exact_match, overlap

BATCH_TOKENS = 1024
"""Padded tokens in a batch whose loss is computed; their logits need the most memory."""
SAMPLES = 5
"""Continuations kept as samples."""

Advance = Callable[[int, int], None]
"""Gets the number of examples done, and the number of all."""


@dataclass(frozen=True)
class TaskInput:
    """A model, the examples to evaluate it on, and how."""

    model: Any
    """A whole causal language model, as transformers or peft load it."""
    tokenizer: Any
    examples: Sequence[Example]
    """At least one."""
    max_positions: int
    """Longest sequence of the model, in tokens."""
    batch_size: int = 16
    """Prompts continued at once."""
    max_new_tokens: int | None = None
    """Longest continuation; None for the task's own."""
    advance: Advance = lambda done, total: None


@dataclass(frozen=True)
class TaskResult:
    """Metrics and samples of a task."""

    metrics: dict[str, float]
    """Metrics and counts by name."""
    samples: tuple[dict[str, str], ...] = ()
    """A few prompts, references and continuations."""


def perplexity(task_input: TaskInput) -> TaskResult:
    """Compute loss, perplexity and token accuracy over the labelled tokens of all examples."""
    batches = eval_batches(task_input.examples, len(task_input.examples), BATCH_TOKENS)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        task_input.advance(done, len(task_input.examples))

    found = likelihood(task_input.model, batches, advance)
    metrics = {
        "loss": found.loss, "perplexity": math.exp(min(found.loss, 700.0)), "accuracy": found.accuracy,
    }  # fmt: skip
    return TaskResult({**metrics, "tokens": found.tokens, "examples": len(task_input.examples)})


def e2e(task_input: TaskInput) -> TaskResult:
    """Generate for each different prompt, and compute BLEU, chrF and ROUGE-L."""
    return _generate_and_score(task_input, overlap, 64)


def gsm8k(task_input: TaskInput) -> TaskResult:
    """Generate for each different prompt, and compare the final number."""
    return _generate_and_score(task_input, exact_match, 256)


@dataclass(frozen=True)
class Task:
    """A task, and how its text is read."""

    run: Callable[[TaskInput], TaskResult]
    windows: bool = False
    """The text is read as one, in windows, instead of by example."""


TASKS: Mapping[str, Task] = {
    "perplexity": Task(perplexity),
    "windows": Task(perplexity, windows=True),
    "e2e": Task(e2e),
    "gsm8k": Task(gsm8k),
}
"""All tasks by name."""


def suitable_tasks(examples: Sequence[Example], tokenizer: Any) -> tuple[str, ...]:
    """Return the tasks that suit this text: the loss, and one with generation if there are prompts."""
    prompted = [example for example in examples if example.labelled_from > 1]
    if len(prompted) < len(examples):
        return ("perplexity",)
    final = FINAL in tokenizer.decode(prompted[0].tokens[prompted[0].labelled_from :])
    return ("perplexity", "gsm8k" if final else "e2e")


def _generate_and_score(
    task_input: TaskInput,
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]],
    max_new_tokens: int,
) -> TaskResult:
    """Continue each different prompt and score it against all its references."""
    # the prompts, each with its references
    references: dict[tuple[int, ...], list[str]] = {}
    whole = [example for example in task_input.examples if not example.truncated]
    for example in whole:
        if example.labelled_from < 2:
            raise RunError("there are no prompts to continue; give data.prompt and data.completion")
        prompt, text = example.tokens[: example.labelled_from], example.tokens[example.labelled_from :]
        references.setdefault(prompt, []).append(_text(task_input, text))
    if not references:
        raise RunError(
            f"all {len(task_input.examples)} examples were cut off, so no whole reference is left; "
            f"raise data.max_tokens"
        )
    prompts = list(references)
    room = task_input.max_positions - max(map(len, prompts))
    if room < 1:
        raise RunError(f"the longest prompt fills the model's {task_input.max_positions} positions")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        task_input.advance(done, len(prompts))

    # continue and score them
    continued = continue_all(
        task_input.model,
        prompts,
        end=task_input.tokenizer.eos_token_id,
        max_new_tokens=min(room, task_input.max_new_tokens or max_new_tokens),
        batch_size=task_input.batch_size,
        advance=advance,
    )
    texts = [_text(task_input, tokens) for tokens in continued]
    samples = tuple(
        {"prompt": _text(task_input, prompt), "reference": references[prompt][0], "written": written}
        for prompt, written in zip(prompts[:SAMPLES], texts, strict=False)
    )
    counts = {
        "prompts": len(prompts),
        "references": len(whole),
        "left_out": len(task_input.examples) - len(whole),
        "mean_new_tokens": sum(map(len, continued)) / len(continued),
    }
    return TaskResult({**score(texts, list(references.values())), **counts}, samples)


def _text(task_input: TaskInput, tokens: Sequence[int]) -> str:
    text: str = task_input.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.strip()
