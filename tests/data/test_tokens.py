"""Records to examples: what carries loss, what is cut off, what is dropped, all against small hand counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from splitft.data.corpora import Record
from splitft.data.text import Example
from splitft.data.tokens import tokenise
from splitft.errors import DataError

END, START = 0, 1


def _tokenizer(template: str | None = None, eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: a byte's id is its rank in the byte alphabet plus 2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": END, "<start>": START} | {letter: i + 2 for i, letter in enumerate(letters)}
    rust = RustTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<end>", "<start>"])
    if template:
        rust.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<end>", END), ("<start>", START)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<end>" if eos else None)


@pytest.fixture(scope="module")
def bytes_as_tokens() -> PreTrainedTokenizerFast:
    return _tokenizer()


def _ids(text: str) -> tuple[int, ...]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = {letter: i + 2 for i, letter in enumerate(letters)} | {" ": letters.index("Ġ") + 2}
    return tuple(plain[letter] for letter in text)


def test_plain_text_carries_loss_from_its_second_token_and_ends(bytes_as_tokens):
    done = tokenise([Record("abc", label="x")], bytes_as_tokens, 8)
    assert done.examples == (Example((*_ids("abc"), END), 1, "x"),)
    assert (done.truncated, done.dropped, done.tokens) == (0, 0, 4)


def test_only_the_completion_carries_loss(bytes_as_tokens):
    done = tokenise([Record("yes", prompt="ok?")], bytes_as_tokens, 20, separator=" => ")
    assert done.examples == (Example((*_ids("ok? => yes"), END), labelled_from=7),)


def test_plain_and_prompted_records_keep_their_order_across_calls_of_the_tokenizer(bytes_as_tokens):
    records = [Record(f"{i}a", prompt=f"{i}q" if i % 3 else None) for i in range(2500)]
    done = tokenise(records, bytes_as_tokens, 20, separator="")
    assert [bytes_as_tokens.decode(one.tokens[:-1]) for one in done.examples] == [
        f"{i}q{i}a" if i % 3 else f"{i}a" for i in range(2500)
    ]


def test_an_empty_prompt_leaves_the_first_token_without_loss(bytes_as_tokens):
    done = tokenise([Record("yes", prompt="")], bytes_as_tokens, 20, separator="")
    assert done.examples == (Example((*_ids("yes"), END), 1),)


def test_a_text_cut_off_has_no_end_and_is_counted(bytes_as_tokens):
    done = tokenise([Record("abcd"), Record("abc"), Record("ab")], bytes_as_tokens, 3)
    assert [one.tokens for one in done.examples] == [_ids("abc"), _ids("abc"), (*_ids("ab"), END)]
    assert (done.truncated, done.dropped) == (2, 0)


def test_what_cannot_be_learnt_is_dropped_and_counted(bytes_as_tokens):
    records = [Record(""), Record(" \n"), Record("a", prompt="long"), Record("", prompt="q"), Record("good")]
    done = tokenise(records, bytes_as_tokens, 4, separator="")
    assert [one.tokens for one in done.examples] == [_ids("good")]
    assert (done.truncated, done.dropped) == (1, 4)


def test_without_an_end_token_nothing_is_appended_and_one_token_is_too_few():
    done = tokenise([Record("ab"), Record("a")], _tokenizer(eos=False), 4)
    assert done.examples == (Example(_ids("ab")),)
    assert done.dropped == 1


@pytest.mark.parametrize("template", ["<start> $A", "<start> $A <end>"])
def test_special_tokens_of_the_tokenizer_frame_the_whole_not_its_parts(template):
    tokenizer = _tokenizer(template)
    done = tokenise([Record("b", prompt="a"), Record("c")], tokenizer, 9, separator="")
    assert done.examples == (Example((START, *_ids("ab"), END), 2), Example((START, *_ids("c"), END), 1))


def test_an_end_token_that_the_user_wrote_is_kept_and_not_doubled(bytes_as_tokens):
    done = tokenise([Record("b<end>", prompt="a<end>")], bytes_as_tokens, 9, separator="")
    assert done.examples == (Example((*_ids("a"), END, *_ids("b"), END), 2),)


def test_nothing_left_is_an_error_with_the_counts(bytes_as_tokens):
    with pytest.raises(DataError, match=r"none of 2 records gives an example.*max_tokens 4"):
        tokenise([Record(""), Record("a", prompt="long")], bytes_as_tokens, 4)
    with pytest.raises(DataError, match="max_tokens is 1"):
        tokenise([Record("abc")], bytes_as_tokens, 1)


RECORDS = st.builds(Record, st.text("ab ", max_size=9), st.none() | st.text("ab ", max_size=9))


@settings(deadline=None)
@given(records=st.lists(RECORDS, min_size=1, max_size=6), max_tokens=st.integers(2, 12))
def test_every_record_is_an_example_or_counted_as_dropped(bytes_as_tokens, records, max_tokens):
    full = [((one.prompt or "") + one.text, len(one.prompt or ""), one) for one in records]
    kept = [
        (text, max(1, first))
        for text, first, one in full
        if one.text.strip() and min(len(text) + 1, max_tokens) > max(1, first)
    ]
    if not kept:
        with pytest.raises(DataError):
            tokenise(records, bytes_as_tokens, max_tokens, separator="")
        return
    done = tokenise(records, bytes_as_tokens, max_tokens, separator="")
    assert [(one.tokens, one.labelled_from) for one in done.examples] == [
        ((*_ids(text), END)[:max_tokens], first) for text, first in kept
    ]
    assert done.truncated == sum(len(text) + 1 > max_tokens for text, _ in kept)
    assert done.dropped == len(records) - len(kept)
