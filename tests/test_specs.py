"""What a user may ask of each room: frozen, strict, explained, and no torch to read it."""

from __future__ import annotations

import inspect

import pytest
from pydantic import ValidationError

from splitft import specs
from splitft.specs import DataSpec, LoraSpec, SharesSpec, Spec, TrainingSpec, field_docs

ALL = [
    one for _, one in inspect.getmembers(specs, inspect.isclass) if issubclass(one, Spec) and one is not Spec
]
EVERY = pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.__name__)


@EVERY
def test_every_field_says_what_it_means(spec):
    docs = field_docs(spec)
    assert docs
    assert [name for name, doc in docs.items() if not doc.endswith(".")] == []


@EVERY
def test_every_spec_has_a_sentence_about_itself(spec):
    assert (spec.__doc__ or "").rstrip().endswith((".", ")."))


@EVERY
def test_a_key_that_does_not_exist_is_refused(spec):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        spec(no_such_key=1)


def test_a_spec_stays_as_it_is():
    with pytest.raises(ValidationError, match="frozen"):
        LoraSpec().rank = 3


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        (LoraSpec, {"rank": 4, "rank_at_cut": 8}),
        (LoraSpec, {"rank": 0, "rank_at_cut": None}),
        (DataSpec, {"prompt": "question"}),
        (DataSpec, {"completion": "answer"}),
        (DataSpec, {"holdout": 0.0}),
        (SharesSpec, {"by": "label"}),
        (SharesSpec, {"by": "natural"}),
        (TrainingSpec, {"lr": 0.0}),
        (TrainingSpec, {"participation": 0.0}),
    ],
)
def test_values_out_of_bounds_or_at_odds_are_refused(spec, values):
    with pytest.raises(ValidationError):
        spec(**values)


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        (LoraSpec, {"rank": 8, "rank_at_cut": 8}),
        (LoraSpec, {"rank": 1, "rank_at_cut": None}),
        (DataSpec, {"prompt": "question", "completion": "answer"}),
        (SharesSpec, {"by": "natural", "column": "site"}),
        (TrainingSpec, {"participation": 1.0, "rounds": 1, "steps": 1}),
    ],
)
def test_values_at_their_bounds_are_taken(spec, values):
    assert {key: getattr(spec(**values), key) for key in values} == values
