"""Tokenise records into examples, and count what is truncated or dropped.

    text                 -> [bos] text eos                    every token but the first carries loss
    prompt, completion   -> [bos] prompt separator | completion eos     loss on the completion

Examples are truncated to `max_tokens`. A record without a token that carries loss is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from splitft.data.corpora import Record
from splitft.data.text import Example
from splitft.errors import DataError

TOKENISED_AT_ONCE = 1024
"""Records of one call of the tokenizer: enough for its threads, little in memory."""


@dataclass(frozen=True)
class Tokenised:
    """The examples of a corpus, and the counts of what was lost."""

    examples: tuple[Example, ...]
    """In the order of the records."""
    dropped: int
    """Records without an example: blank, under two tokens, or with a prompt that fills max_tokens."""

    @property
    def truncated(self) -> int:
        """Number of examples truncated to max_tokens."""
        return sum(example.truncated for example in self.examples)

    @property
    def tokens(self) -> int:
        """Number of tokens of all examples."""
        return sum(len(example) for example in self.examples)


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-text token, if there is one."""

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """Return a mapping whose `input_ids` holds a list of token ids for each text."""


def tokenise(
    records: Sequence[Record], tokenizer: Tokenizer, max_tokens: int, separator: str = "\n"
) -> Tokenised:
    """Turn records into examples of at most `max_tokens` tokens (at least 2).

    A prompt and its completion are tokenised separately, so that the prompt has the same tokens as when a
    model generates from it; `separator` belongs to the prompt. Each example ends with the tokenizer's
    end-of-text token, if it has one and the example was not truncated.

    Raises DataError if no record gives an example.
    """
    if max_tokens < 2:
        raise DataError(f"max_tokens is {max_tokens}: a token and the next one to predict make at least 2")
    examples, dropped = [], 0
    for record, prompt, text in _token_ids(records, tokenizer, separator):
        tokens = tuple(prompt + text)
        labelled_from = max(1, len(prompt))
        if not record.text.strip() or min(len(tokens), max_tokens) <= labelled_from:
            dropped += 1
            continue
        examples.append(Example(tokens[:max_tokens], labelled_from, record.label, len(tokens) > max_tokens))
    if not examples:
        raise DataError(
            f"none of {len(records)} records gives an example: each is blank, under two tokens, or has a "
            f"prompt that leaves no room for its completion in max_tokens {max_tokens}; raise max_tokens or "
            f"check the columns"
        )
    return Tokenised(tuple(examples), dropped)


def _token_ids(
    records: Sequence[Record], tokenizer: Tokenizer, separator: str
) -> Iterator[tuple[Record, list[int], list[int]]]:
    """Yield each record, the token ids of its prompt (none for plain text), and of its text and end."""
    end = tokenizer.eos_token_id
    appends_end = end is not None and _appends_end(tokenizer, end)

    def ids(texts: list[str], special: bool) -> Iterator[list[int]]:
        return iter(tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else [])

    for start in range(0, len(records), TOKENISED_AT_ONCE):
        part = records[start : start + TOKENISED_AT_ONCE]
        prompts = ids([f"{one.prompt}{separator}" for one in part if one.prompt is not None], special=True)
        completions = ids([one.text for one in part if one.prompt is not None], special=False)
        plain = ids([one.text for one in part if one.prompt is None], special=True)
        for record in part:
            prompt = [] if record.prompt is None else next(prompts)
            text = next(plain if record.prompt is None else completions)
            if appends_end and prompt[-1:] == [end]:
                prompt = prompt[:-1]
            if end is not None and text[-1:] != [end]:
                text = [*text, end]
            yield record, prompt, text


def _appends_end(tokenizer: Tokenizer, end: int) -> bool:
    """Return whether the tokenizer itself appends the end-of-text token, as T5's does."""
    with_special, bare = (
        tokenizer(["a"], add_special_tokens=special, verbose=False)["input_ids"][0]
        for special in (True, False)
    )
    return bool(with_special[-1:] == [end] != bare[-1:])
