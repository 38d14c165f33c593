"""Whatever is written is read back equal, and the file to start from explains every key."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from splitft.config import RunConfig, dump, from_mapping, json_schema, load, template

POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
SHARE = st.floats(0, 1, exclude_min=True, exclude_max=True)
COUNT = st.integers(1, 10**9)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries({"name": st.text()}),
        "data": st.fixed_dictionaries(
            {
                "source": st.text(),
                "separator": st.text(),
                "holdout": SHARE,
                "max_examples": st.none() | COUNT,
            },
            optional={"text": st.text()},
        ),
        "clients": st.integers(1, 4).flatmap(
            lambda count: st.fixed_dictionaries(
                {
                    "count": st.just(count),
                    "cuts": COUNT | st.lists(COUNT, min_size=count, max_size=count),
                }
            )
        ),
        "lora": st.fixed_dictionaries(
            {
                "alpha": POSITIVE,
                "targets": st.sampled_from(["attention", "all-linear"]) | st.lists(st.text()),
                "rank_at_cut": st.none() | st.integers(1, 16),
            }
        ),
        "training": st.fixed_dictionaries({"lr": POSITIVE, "rounds": COUNT}),
        "seed": st.integers(0, 2**32 - 1),
    },
).map(from_mapping)


def read(text: str, path) -> RunConfig:
    path.write_text(text, encoding="utf-8", newline="")
    return load(path)


@given(CONFIGS)
def test_a_configuration_survives_its_file(tmp_path_factory, config):
    assert read(dump(config), tmp_path_factory.getbasetemp() / "dumped.yaml") == config


@given(CONFIGS)
def test_a_commented_configuration_says_the_same(tmp_path_factory, config):
    assert read(template(config), tmp_path_factory.getbasetemp() / "commented.yaml") == config


@pytest.mark.parametrize("name", ["5e-4", "12E3", "1e5", "null", "yes", "1:30", "", "a: b # c", "\n", "ünï"])
def test_text_that_looks_like_something_else_stays_text(tmp_path, name):
    config = from_mapping({"model": {"name": name}})
    assert read(dump(config), tmp_path / "run.yaml").model.name == name


@given(CONFIGS, st.sampled_from(["lora", "training", "data", "clients"]))
def test_every_value_can_be_given_as_an_override_instead(config, section):
    values = {key: json.dumps(value) for key, value in config.model_dump(mode="json")[section].items()}
    overrides = [f"{section}.{key}={value}" for key, value in values.items()]
    assert getattr(from_mapping({}, overrides), section) == getattr(config, section)


def test_the_file_to_start_from_has_the_defaults(tmp_path):
    assert read(template(), tmp_path / "run.yaml") == RunConfig()


def test_the_file_to_start_from_has_every_key_with_its_meaning_above_it():
    lines = template().splitlines()
    keys = [index for index, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
    assert [lines[index] for index in keys if not lines[index - 1].strip().startswith("# ")] == []
    written = yaml.safe_load(template())

    def same_keys(spec: BaseModel, data: dict) -> None:
        assert list(data) == list(type(spec).model_fields)
        for key, value in data.items():
            if isinstance(value, dict) and isinstance(getattr(spec, key), BaseModel):
                same_keys(getattr(spec, key), value)

    same_keys(RunConfig(), written)


def test_the_file_to_start_from_says_what_fits():
    assert "rounds: 3  # a whole number, at least 1" in template()
    assert "labels: client  # client | server" in template()
    assert "# Give lte | dsl | fibre | lan, or a section with" in template()
    assert max(len(line) for line in template().splitlines()) <= 100


def test_a_dumped_configuration_spells_out_every_default():
    assert yaml.safe_load(dump(RunConfig())) == RunConfig().model_dump(mode="json")


def test_the_schema_names_every_key_with_its_meaning():
    schema = json.loads(json.dumps(json_schema()))
    objects = [schema, *schema["$defs"].values()]
    fields = [field for one in objects for field in one.get("properties", {}).items()]
    assert [key for key, field in fields if "description" not in field] == []
