"""Corpora by name: what is read, and the error when it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from splitft.data.corpora import Record, read_records
from splitft.errors import DataError
from splitft.specs import DataSpec
from splitft.specs.data import SOURCES

ROWS = [
    {"q": "one and one?", "a": "two", "site": "north"},
    {"q": "Größe?", "a": 'groß,\n"sehr"', "site": "süd"},
]


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows in the format of the suffix; csv by hand, every field quoted."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        quoted = [separator.join('"' + value.replace('"', '""') + '"' for value in line) for line in lines]
        path.write_text("\r\n".join(quoted) + "\r\n", encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_prompt_completion_and_label_come_from_the_named_columns(tmp_path, suffix):
    path = _write(tmp_path / f"rows{suffix}", ROWS)
    records = read_records(DataSpec(source=str(path), prompt="q", completion="a"), column="site")
    assert records == tuple(Record(text=row["a"], prompt=row["q"], label=row["site"]) for row in ROWS)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_one_column_gives_plain_text_without_prompt_or_label(tmp_path, suffix):
    path = _write(tmp_path / f"rows{suffix}", ROWS)
    assert read_records(DataSpec(source=str(path), text="q")) == tuple(Record(row["q"]) for row in ROWS)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=5), suffix=st.sampled_from([".jsonl", ".csv", ".parquet"]))
def test_any_text_survives_any_table_format(tmp_path_factory, texts, suffix):
    path = _write(tmp_path_factory.mktemp("any") / f"t{suffix}", [{"text": text, "n": "1"} for text in texts])
    assert [record.text for record in read_records(DataSpec(source=str(path)))] == texts


def test_the_embedded_text_is_the_language_reference_by_topic():
    records = read_records(DataSpec(), column="topic")
    assert len(records) > 1000
    assert {record.label for record in records} <= set(topics)
    assert all(len(record.text) >= 20 for record in records)
    assert not any(
        line.strip("*=-") == "" for record in records for line in record.text.split("\n") if len(line) > 4
    )
    assert len({" ".join(record.text.split()) for record in records}) == len(records)
    assert records == read_records(DataSpec(), column="topic")
    flat = {topic: " ".join(text.split()) for topic, text in topics.items()}
    assert all(" ".join(record.text.split()) in flat[record.label or ""] for record in records)


def test_a_text_file_is_read_by_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff\n one\nline two \n \t\n\n\ntwo\n\nthree\n\n", encoding="utf-8")
    records = read_records(DataSpec(source=str(tmp_path / "a.txt")))
    assert [record.text for record in records] == ["one\nline two", "two", "three"]


def test_a_text_file_without_blank_lines_is_read_by_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\r\nthree")
    assert [record.text for record in read_records(DataSpec(source=str(tmp_path / "a.txt")))] == [
        "one",
        "two",
        "three",
    ]


def test_blank_and_missing_text_stays_a_record_to_be_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": null}\n{"text": " "}\n')
    assert [record.text for record in read_records(DataSpec(source=str(path)))] == ["a", "", " "]


def test_a_field_longer_than_the_csv_librarys_limit_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_records(DataSpec(source=str(tmp_path / "a.csv")))[0].text) == 200_000


def test_a_number_can_be_a_label(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "site": 3}\n')
    assert read_records(DataSpec(source=str(tmp_path / "a.jsonl")), column="site")[0].label == "3"


def test_max_examples_draws_a_sample_by_the_seed_in_the_sources_order():
    whole = read_records(DataSpec())
    drawn = [read_records(DataSpec(max_examples=50), seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    places = [whole.index(record) for record in drawn[0]]
    assert len(places) == 50
    assert places == sorted(places)
    assert places[-1] > 1000
    assert read_records(DataSpec(max_examples=10**6)) == whole


def test_reading_a_local_file_leaves_no_trace_in_the_hub_cache(tmp_path):
    path = _write(tmp_path / "a.parquet", ROWS)
    code = (
        "import sys; from splitft.data.corpora import read_records; from splitft.specs import DataSpec; "
        f"read_records(DataSpec(source={str(path)!r}, text='a')); print('datasets' in sys.modules)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert run.stdout == "False\n"
    assert not (tmp_path / "hf").exists()


def test_a_hub_data_set_is_loaded_by_id_configuration_and_split(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    spec = DataSpec(source="owner/name", text="q", hub_config="raw", hub_split="test")
    assert [record.text for record in read_records(spec)] == [row["q"] for row in ROWS]
    assert asked == [(("owner/name", "raw"), {"split": "test"})]
    with pytest.raises(DataError, match=r"owner/name has no column 'text'; it has 'q', 'a', 'site'"):
        read_records(DataSpec(source="owner/name"))


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    def load(*args, **options):
        raise ConnectionError("couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        DataError, match=r"'owner/name' is neither .*python-docs.* nor a file.*couldn't reach the hub"
    ):
        read_records(DataSpec(source="owner/name"))


BAD_FILES = {
    "empty.txt": ("", "holds no text"),
    "empty.jsonl": ("", "holds no text"),
    "empty.csv": ("", "holds no text"),
    "header.csv": ("text\n", "holds no text"),
    "blank.txt": ("\n \n\n", "holds no text"),
    "blank.jsonl": ('{"text": ""}\n', r"holds only blank text \(1 rows\).*column 'text'"),
    "broken.jsonl": ('{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "deep.jsonl": ("[" * 100_000, "line 1 is not JSON"),
    "list.jsonl": ('["a"]\n', "line 1 is a JSON list; each line must be an object"),
    "number.jsonl": ('{"text": "a"}\n\n{"text": 42}\n', r"line 3 holds a int in the column 'text' \(42\)"),
    "nested.jsonl": ('{"text": {"x": 1}}\n', "line 1 holds a dict"),
    "surrogate.jsonl": ('{"text": "\\ud800"}\n', "line 1, column 'text', is not valid text"),
    "typo.jsonl": (
        '{"texts": "a", "id": 1}\n',
        r"line 1 has no column 'text'; it has 'texts', 'id'; did you mean 'texts'",
    ),
    "typo.csv": (
        "id,Text\n1,a\n",
        r"typo.csv has no column 'text'; it has 'id', 'Text'; did you mean 'Text'",
    ),
    "twice.csv": ("text,text\n1,a\n", "has 2 columns named 'text'"),
    "ragged.csv": ("text,n\na,1\nb\n", "line 3 has 1 fields, but the header names 2"),
    "quote.csv": ('text\n"a\n', "line 2 is not csv"),
    "false.parquet": ("text\n", "is not a readable parquet file"),
    "what.docx": ("text\n", r"suffix '.docx'; files may be .txt, .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used_says_where_and_why(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_records(DataSpec(source=str(tmp_path / name)))


def test_bytes_that_are_not_utf8_are_named_with_their_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"a.txt is not UTF-8 text: .* at byte 3"):
        read_records(DataSpec(source=str(tmp_path / "a.txt")))


def test_a_missing_file_is_answered_with_the_nearest_name_beside_it(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"no file .*trian.jsonl; did you mean 'train.jsonl'"):
        read_records(DataSpec(source=str(tmp_path / "trian.jsonl")))
    with pytest.raises(DataError, match=r"no file .*nowhere/a.csv$"):
        read_records(DataSpec(source=str(tmp_path / "nowhere" / "a.csv")))


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(DataError, match="is a folder; give one file in it"):
        read_records(DataSpec(source=str(tmp_path)))


def test_a_mistyped_embedded_name_does_not_ask_the_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(DataError, match="no text named 'python-doc'; did you mean 'python-docs'"):
        read_records(DataSpec(source="python-doc"))


def test_a_row_without_the_label_to_divide_by_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "site": "x"}\n{"text": "b", "site": null}\n')
    with pytest.raises(DataError, match=r"line 2 has None in the column 'site'"):
        read_records(DataSpec(source=str(tmp_path / "a.jsonl")), column="site")


def test_an_unreadable_file_is_one_clear_error(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.jsonl", ROWS)

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read_records(DataSpec(source=str(path)))


@pytest.fixture
def added():
    yield lambda source: SOURCES.add("mine", source)
    SOURCES._things.pop("mine", None)


def test_a_source_of_a_plug_in_is_read_by_its_name_with_what_follows_the_colon(added):
    calls = []

    def rows(spec, wanted):
        calls.append((spec.source_argument, list(wanted)))
        return ROWS

    added(rows)
    for source in ("mine", "mine:a b:c"):
        records = read_records(DataSpec(source=source, prompt="q", completion="a"), column="site")
        assert records == tuple(Record(row["a"], row["q"], row["site"]) for row in ROWS)
    assert calls == [("", ["a", "q", "site"]), ("a b:c", ["a", "q", "site"])]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a"], "mine:x: row 1 is a str; the data source 'mine' must give mappings"),
        ([{"text": "a"}, {"texts": "b"}], "row 2 has no column 'text'; .* did you mean 'texts'"),
        ([{"text": 3}], "row 1 holds a int in the column 'text'"),
        ([], "holds no text"),
    ],
)
def test_rows_of_a_plug_in_that_cannot_be_used_are_named(added, rows, message):
    added(lambda spec, wanted: rows)
    with pytest.raises(DataError, match=message):
        read_records(DataSpec(source="mine:x"))


def test_the_embedded_text_takes_nothing_after_a_colon():
    with pytest.raises(DataError, match="python-docs takes nothing after a colon"):
        read_records(DataSpec(source="python-docs:x"))
