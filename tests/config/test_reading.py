"""From a file and overrides to a configuration, with YAML as people write it."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.config import RunConfig, from_mapping, load
from splitft.errors import ConfigError


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a configuration, and returns its path as a user would give it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, encoding: str = "utf-8") -> str:
        (tmp_path / "run.yaml").write_text(text, encoding=encoding)
        return "run.yaml"

    return write


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "training:\n", "lora: {}\nclients:\n"])
def test_what_is_left_out_has_its_default(file, text):
    assert load(file(text)) == RunConfig()


def test_a_file_says_what_it_says_and_nothing_else_changes(file):
    config = load(file("training: {rounds: 7}\nclients:\n  count: 2\n  cuts: [1, 3]\n"))
    assert config.training.rounds == 7
    assert config.clients.cuts == (1, 3)
    assert config.training.steps == RunConfig().training.steps


@pytest.mark.parametrize("number", ["5e-4", "5E-4", "5.0e-4", "+5e-4", ".5e-3", "0.0005", "5_0e-5"])
def test_numbers_are_read_as_people_write_them(file, number):
    assert load(file(f"training: {{lr: {number}}}")).training.lr == 5e-4
    assert from_mapping({}, [f"training.lr={number}"]).training.lr == 5e-4


def test_a_byte_order_mark_and_foreign_line_ends_do_no_harm(file):
    config = load(file("training:\r\n  rounds: 7\r\nseed: 3\r\n", encoding="utf-8-sig"))
    assert (config.training.rounds, config.seed) == (7, 3)


def test_overrides_win_over_the_file_and_the_last_one_over_those_before(file):
    path = file("training: {rounds: 7, steps: 5}\nseed: 1\n")
    config = load(path, ["training.rounds=8", "seed=2", "seed=3", "lora.targets=[q_proj, v_proj]"])
    assert (config.training.rounds, config.training.steps, config.seed) == (8, 5, 3)
    assert config.lora.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("lora.rank_at_cut=null", None),
        ("lora.rank_at_cut= 4", 4),
        (" lora . rank_at_cut =4", 4),
        ("data.separator=\" = \"", " = "),
        ("data.source=a=b.txt", "a=b.txt"),
        ("clients.shares={by: iid}", "iid"),
    ],
)  # fmt: skip
def test_the_value_of_an_override_is_yaml(override, value):
    config = from_mapping({}, [override])
    found = (config.lora.rank_at_cut, config.data.separator, config.data.source, config.clients.shares.by)
    assert value in found


@pytest.mark.parametrize("override", ["training.rounds", "=5", ".=5", "training.=5", "training..rounds=5"])
def test_what_is_no_override_is_refused_with_an_example(override):
    with pytest.raises(ConfigError, match=r"write key\.path=value, such as training\.rounds=5"):
        from_mapping({}, [override])


def test_an_override_whose_value_is_not_yaml_is_refused():
    with pytest.raises(ConfigError, match=r"'lora\.rank=\[': the value is not YAML; quote it"):
        from_mapping({}, ["lora.rank=["])


def test_an_override_below_a_plain_value_is_refused():
    with pytest.raises(ConfigError, match=r"rounds is not a section; it holds 3"):
        from_mapping({"training": {"rounds": 3}}, ["training.rounds.first=5"])


def test_a_callers_own_mapping_stays_as_it_is():
    given = {"training": {"rounds": 3}, "clients": {"shares": {"by": "iid"}}}
    from_mapping(given, ["training.rounds=4", "clients.shares.by=length", "seed=5"])
    assert given == {"training": {"rounds": 3}, "clients": {"shares": {"by": "iid"}}}


def test_python_values_are_as_good_as_those_of_a_file(file):
    mapping = {"clients": {"count": 2, "cuts": (1, 3)}, "lora": {"targets": ["q_proj"]}, "data": None}
    text = "clients: {count: 2, cuts: [1, 3]}\nlora: {targets: [q_proj]}\ndata:\n"
    assert from_mapping(mapping) == load(file(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlora: {rank: 4}\nseed: 2\n", "run.yaml:3: .*'seed' stands here twice; keep one"),
        ("lora:\n  rank: 4\n  alpha: 8\n  rank: 8\n", "run.yaml:4: .*'rank' stands here twice"),
        ("seed: 1\nlora: [\n", "run.yaml:3: not YAML that can be read"),
        ("seed: 'one\n", "run.yaml:2: not YAML that can be read"),
        ("? [a]\n: 1\n", "run.yaml:1: .*a key must be one word"),
        ("data: &all {text: *all}\n", r"run.yaml:1: .*aliases \(\*name\) are not read; write it out"),
        ("seed: !!python/object/apply:os.getpid []\n", "run.yaml:1: not YAML that can be read"),
        ("- seed\n", "run.yaml: found a list; a configuration is `key: value` lines"),
        ("seed\n", "run.yaml: found 'seed'; a configuration is `key: value` lines"),
        ("seed: \x00\n", "run.yaml: not YAML that can be read"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_line(file, text, message):
    with pytest.raises(ConfigError, match=message):
        load(file(text))


def test_a_file_that_is_not_there_leads_to_the_command_that_writes_one(tmp_path):
    with pytest.raises(ConfigError, match=r"No such file.*write one with `splitft init`"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read.*give a YAML file"):
        load(tmp_path)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load(tmp_path / "model.bin")


SIGNS = "abe 01.:-,[]{}&*!?|>'\"#%@`~<=\n\t\x1f\ud7ff"
WORDS = [": ", "- ", "\n  ", "lora", "rank", "seed", "training", "lr", "e-4", "<<", "cuts", "clients", "null"]
PIECES = st.sampled_from([*SIGNS, *WORDS])


@settings(max_examples=500)
@given(st.lists(PIECES).map("".join), st.lists(PIECES).map("".join))
def test_whatever_is_read_the_answer_is_a_configuration_or_a_list_of_faults(tmp_path_factory, text, value):
    path = tmp_path_factory.getbasetemp() / "anything.yaml"
    path.write_text(text, encoding="utf-8")
    for overrides in ([], [value], [f"training.lr={value}"]):
        with suppress(ConfigError):
            assert isinstance(load(path, overrides), RunConfig)
