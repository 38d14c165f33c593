"""Every fault at once, each with its line, what was found, what fits, and the nearest name."""

from __future__ import annotations

import pytest

from splitft.config import from_mapping, load
from splitft.errors import ConfigError

FAULTY = """\
model: {name: 3}
lora:
  rank: 0
  targts: attention
training:
  rouns: 3
  lr: fast
  rank: 4
clients:
  count: 3
  cuts: [1, 2]
  shares: {by: lenght}
sed: 1
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """The lines of the error that a file and overrides lead to."""
    monkeypatch.chdir(tmp_path)

    def found(text: str, *overrides: str) -> list[str]:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load("run.yaml", overrides)
        return str(caught.value).splitlines()

    return found


def test_all_faults_are_told_at_once_with_their_lines(faults):
    assert sorted(faults(FAULTY), key=lambda line: int(line.split(":")[1])) == [
        "run.yaml:1: model.name: found 3; give text",
        "run.yaml:3: lora.rank: found 0; give a whole number, at least 1",
        "run.yaml:4: lora.targts: no such key; did you mean targets?",
        "run.yaml:6: training.rouns: no such key; did you mean rounds?",
        "run.yaml:7: training.lr: found 'fast'; give a number, above 0",
        "run.yaml:8: training.rank: no such key here; did you mean lora.rank?",
        "run.yaml:11: clients.cuts: found 2 cuts for 3 clients; give one number for all, or one a client",
        "run.yaml:12: clients.shares.by: found 'lenght'; "
        "give length | iid | label | quantity | natural; did you mean length?",
        "run.yaml:13: sed: no such key; did you mean seed?",
    ]


def test_a_fault_of_an_override_is_told_with_the_override(faults):
    assert faults("training: {rounds: 3}", "training.rounds=0", "lora.rnk=3", "nonsense", "seed.x=1") == [
        "'nonsense' is not an override; write key.path=value, such as training.rounds=5",
        "lora.rnk=3: lora.rnk: no such key; did you mean rank?",
        "training.rounds=0: training.rounds: found 0; give a whole number, at least 1",
        "seed.x=1: seed: found {\"x\": 1}; give a whole number, at least 0 and below 4294967296",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("training: 3", "training: found 3; give a section with rounds, steps, "),
        ("lora: {targets: atention}", "or a list of (text); did you mean attention?"),
        ("lora: {targets: [q_proj, 3]}", "lora.targets[1]: found 3; give text"),
        (
            "lora: {cut_sides: [client, sever]}",
            "lora.cut_sides[1]: found 'sever'; give client | server; did you",
        ),
        ("clients: {cuts: [1, x, 2, 3]}", "clients.cuts[1]: found 'x'; give a whole number"),
        ("clients: {count: true}", "clients.count: found true; give a whole number, at least 1"),
        ("clients: {count: 2.5}", "clients.count: found 2.5; give a whole number, at least 1"),
        ("clients: {count: '2'}", "clients.count: found '2'; give a whole number, at least 1"),
        ("training: {lr: .inf}", "training.lr: found 'inf'; give a number, above 0"),
        ("training: {lr: .nan}", "training.lr: found 'nan'; give a number, above 0"),
        ("data: {holdout: 1}", "data.holdout: found 1; give a number, above 0 and below 1"),
        ("data: {source: null}", "data.source: found null; give text"),
        ("data: {max_examples: none}", "found 'none'; give a whole number, at least 1, or null"),
        ("wire: {hidden: fp3}", "did you mean fp32?"),
        (
            "schedule: {links: {up_mbit_per_s: 3}}",
            "links.down_mbit_per_s: is missing; give a number, above 0",
        ),
        ("schedule: {devices: [laptop, lapto]}", "schedule.devices[1]: found 'lapto'; give phone | laptop"),
        (
            "schedule: {links: [fibre, 3]}",
            "schedule.links[1]: found 3; give lte | dsl | fibre | lan, or a",
        ),
        ("schedule: {links: fibr}", "latency_ms, or a list of these; did you mean fibre?"),
        ("12: 3", "12: no such key; give one of model, data, "),
        ("lora: {12: 3}", "lora.12: no such key; give one of rank, "),
    ],
)
def test_a_fault_says_what_was_found_and_what_fits(faults, text, fault):
    (line,) = faults(text)
    assert line.startswith("run.yaml:1: ")
    assert fault in line


def test_a_section_among_several_kinds_of_value_has_its_own_keys(faults):
    given = "up_mbit_per_s: 3, down_mbit_per_s: 3"
    assert faults(f"schedule: {{links: {{{given}, latency: 5}}}}") == [
        "run.yaml:1: schedule.links.latency: no such key; did you mean latency_ms?"
    ]
    (line,) = faults(f"schedule: {{links: [{{{given}, jitter: 5}}]}}")
    assert line.endswith(
        "links[0].jitter: no such key; give one of up_mbit_per_s, down_mbit_per_s, latency_ms"
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("lora: {rank: 4, rank_at_cut: 8}", "lora: rank_at_cut 8 is above rank 4"),
        (
            "data: {prompt: question}",
            "data: prompt and completion come together: give both columns, or neither",
        ),
        ("clients: {shares: {by: label}}", "clients.shares: by: label divides by the values of a column"),
        ("clients: {cuts: 0}", "clients.cuts: found 0, which leaves the client no blocks; give at least 1"),
        ("clients: {count: 2, cuts: [1, 0]}", "clients.cuts[1]: found 0, which leaves the client no blocks"),
        ("training: {optimizer_state: keep}", "training.optimizer_state: found keep, which does not fit"),
    ],
)
def test_what_is_fine_alone_and_does_not_fit_together_is_told(faults, text, fault):
    (line,) = faults(text)
    assert line.startswith(f"run.yaml:1: {fault}")


def test_what_does_not_fit_together_is_told_beside_other_faults(faults):
    lines = faults("lora: {rank: 4, rank_at_cut: 8}\nclients:\n  cuts: [0, 3]\ntraining: {lr: -1}\n")
    assert sorted(lines) == [
        "run.yaml:1: lora: rank_at_cut 8 is above rank 4",
        "run.yaml:3: clients.cuts: found 2 cuts for 4 clients; give one number for all, or one a client",
        "run.yaml:3: clients.cuts[0]: found 0, which leaves the client no blocks; give at least 1",
        "run.yaml:4: training.lr: found -1; give a number, above 0",
    ]


def test_a_faulty_value_is_not_judged_by_its_default_as_well(faults):
    assert len(faults("clients: {count: x, cuts: [1, 2]}")) == 1
    assert len(faults("lora: {rank: x, rank_at_cut: 20}")) == 1


def test_a_long_value_is_shown_in_one_line(faults):
    (line,) = faults("training: {optimizer: '" + "x" * 500 + "'}")
    assert len(line) < 150


def test_a_mapping_from_python_has_the_same_faults_without_lines():
    with pytest.raises(ConfigError) as caught:
        from_mapping({"training": {"rouns": 3}, "seed": "one"})
    assert sorted(str(caught.value).splitlines()) == [
        "seed: found 'one'; give a whole number, at least 0 and below 4294967296",
        "training.rouns: no such key; did you mean rounds?",
    ]


def test_a_name_of_a_pattern_is_told_by_an_example(faults):
    text = "deploy: {sites: [a.b], server: x_y}\nclients: {count: 1, cuts: [1]}"
    assert faults(text) == [
        "run.yaml:1: deploy.sites[0]: found 'a.b'; give text such as north-clinic",
        "run.yaml:1: deploy.server: found 'x_y'; give text such as splitft.example.org",
    ]
