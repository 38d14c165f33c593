"""Plug-in files: what they add works by name, their content is checked, and their faults are said."""

from __future__ import annotations

import hashlib
import sys

import pytest

import splitft
from runs import adapter_bytes, invoke, settings, settings_file
from splitft.config import from_mapping, load
from splitft.errors import ConfigError, RunError
from splitft.specs.extensions import TRACKERS
from splitft.tracking.events import Evaluated
from splitft.tracking.trackers import CsvTracker

TRACKER = """
from splitft.specs.extensions import TRACKERS

class Names:
    def __init__(self, folder, config, mark="-"):
        self.file = (folder / "names.txt").open("a")
        self.mark = mark
    def __call__(self, event):
        print(event.event, file=self.file, end=self.mark)
    def close(self):
        self.file.close()

TRACKERS.add("names", Names)
"""


@pytest.fixture
def plugin(tmp_path):
    def write(code: str, name: str = "mine.py"):
        path = tmp_path / name
        path.write_text(code, encoding="utf-8")
        return path

    yield write
    TRACKERS._things.pop("names", None)
    for name in [name for name in sys.modules if name.startswith("splitft_plugin_")]:
        del sys.modules[name]


def test_a_table_that_an_earlier_version_began_keeps_its_columns(tmp_path):
    evaluated = Evaluated(round=1, loss=2.0, by_client={"a": 2.0}, accuracy_by_client={"a": 0.25})
    file = tmp_path / "metrics.csv"
    older = "round,client,cut,loss,bytes_up,bytes_down\n"
    for earlier, last in ((older, "1,a,,2.0,0,0"), ("", "1,a,,2.0,0,0,0.25")):
        file.unlink(missing_ok=True)
        if earlier:
            file.write_text(earlier, encoding="utf-8")
        tracker = CsvTracker(tmp_path, {})
        tracker(evaluated)
        tracker.close()
        assert file.read_text(encoding="utf-8").splitlines()[1] == last


def test_a_plugin_is_found_beside_its_configuration_and_kept_with_the_run(tmp_path, tiny_llama, plugin):
    path = plugin(TRACKER)
    file = settings_file(
        tmp_path, tiny_llama, plugins=["mine.py"], trackers=["csv", {"name": "names", "mark": " "}]
    )
    run = splitft.train(file, tmp_path / "run")
    assert (run.folder / "names.txt").read_text().split()[0] == "RunStarted"
    assert (run.folder / "plugins/mine.py").read_text() == TRACKER
    lines = (run.folder / "metrics.csv").read_text().splitlines()
    assert lines[0] == "round,client,cut,loss,bytes_up,bytes_down,accuracy"
    assert all(0 <= float(line.rpartition(",")[2]) <= 1 for line in lines[1:])
    assert len(lines) == 1 + 3 * (run.config.training.rounds + 1)

    digest = hashlib.sha256(TRACKER.encode()).hexdigest()
    assert [(one.file, one.sha256) for one in run.config.plugins] == [(str(path), digest)]
    path.unlink()  # the run folder has its own copy
    assert splitft.Run(run.folder).config.trackers[1].name == "names"


def test_a_run_is_resumed_with_the_plugin_that_it_began_with_and_no_other(tmp_path, tiny_llama, plugin):
    plugin(TRACKER)
    file = settings_file(tmp_path, tiny_llama, plugins=["mine.py"])
    run = splitft.train(file, tmp_path / "run")
    again = splitft.train(file, tmp_path / "run", resume=True)
    assert adapter_bytes(again.folder) == adapter_bytes(run.folder)
    plugin(TRACKER + "# changed\n")
    with pytest.raises(RunError, match="plugins"):
        splitft.train(file, tmp_path / "run", resume=True)


def test_trackers_may_change_when_a_run_is_resumed(tmp_path, tiny_llama):
    file = settings_file(tmp_path, tiny_llama, training={"rounds": 1})
    splitft.train(file, tmp_path / "run")
    more = settings_file(tmp_path, tiny_llama, training={"rounds": 2}, trackers=["csv"])
    splitft.train(more, tmp_path / "run", resume=True)
    assert [line[0] for line in (tmp_path / "run/metrics.csv").read_text().splitlines()[1:]] == ["2"] * 3


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_thing\n", r"mine.py:1: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("x = 1\nif x\n", r"mine.py:2: SyntaxError"),
        ("\n\nraise ValueError('odd')\n", r"mine.py:3: ValueError: odd"),
        (
            "from splitft.specs.extensions import TRACKERS\nTRACKERS.add('csv', print)\n",
            r"mine.py:2: PluginError: the tracker 'csv' is built in; give yours another name",
        ),
    ],
)
def test_a_fault_in_a_plugin_is_said_with_its_line_and_without_a_traceback(
    tmp_path, tiny_llama, plugin, code, said
):
    plugin(code)
    file = settings_file(tmp_path, tiny_llama, plugins=["mine.py"])
    with pytest.raises(ConfigError, match=said):
        load(file)
    result = invoke("train", file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "Traceback" not in result.output + result.stderr
    assert not (tmp_path / "run").exists()


def test_a_plugin_that_is_not_there_is_said_with_the_key_and_line(tmp_path, tiny_llama):
    file = settings_file(tmp_path, tiny_llama, plugins=["nowhere.py"])
    with pytest.raises(ConfigError, match=r"run.yaml:\d+: plugins: the plug-in .*nowhere.py is not there"):
        load(file)


def test_names_of_plugins_and_trackers_are_checked_like_all_others(tmp_path, tiny_llama):
    file = settings_file(tmp_path, tiny_llama, trackers=["cvs"])
    with pytest.raises(ConfigError, match=r"trackers\[0\]: found 'cvs'; give csv"):
        load(file)
    file = settings_file(tmp_path, tiny_llama, plugins=[3])
    with pytest.raises(ConfigError, match=r"plugins"):
        load(file)


def test_a_run_from_elsewhere_gets_only_plugins_that_the_owner_approved_by_content(tmp_path, plugin):
    plugin(TRACKER)
    digest = hashlib.sha256(TRACKER.encode()).hexdigest()
    asked = {"plugins": [{"file": str(tmp_path / "mine.py"), "sha256": digest}]}
    owner = tmp_path / "local"
    with pytest.raises(ConfigError, match=rf"mine.py \(SHA-256 {digest}\), which the owner .* not approved"):
        from_mapping(asked, owner=owner)
    (owner / "plugins").mkdir(parents=True)
    (owner / "plugins/mine.py").write_text(TRACKER + "# another content\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not approved"):
        from_mapping(asked, owner=owner)
    with pytest.raises(ConfigError, match="not approved"):  # a path and no hash is not enough
        from_mapping({"plugins": [str(tmp_path / "mine.py")]}, owner=owner)
    assert "names" not in TRACKERS
    (owner / "plugins/any_name.py").write_text(TRACKER, encoding="utf-8")
    found = from_mapping(asked, owner=owner).plugins[0]
    assert (found.file, found.sha256) == (str(owner / "plugins/any_name.py"), digest)
    assert "names" in TRACKERS


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, tiny_llama, caplog):
    seen = []

    class Broken:
        def __init__(self, folder, config):
            pass

        def __call__(self, event):
            seen.append(event.event)
            raise OSError("gone")

        def close(self):
            raise OSError("gone")

    TRACKERS.add("broken", Broken)
    file = settings_file(tmp_path, tiny_llama, trackers=["broken"], training={"rounds": 1})
    run = splitft.train(file, tmp_path / "run", listeners=[lambda event: None])
    assert run.summary["finished"]
    assert seen == ["RunStarted"]
    assert "the tracker broken failed and is left out: gone" in caplog.text


def test_a_tracker_that_cannot_be_set_up_is_said_before_the_run_begins(tmp_path, tiny_llama):
    once = settings(tiny_llama, settings_file(tmp_path, tiny_llama).parent / "notes.jsonl")
    config = from_mapping({**once, "trackers": [{"name": "csv", "colour": "red"}]})
    with pytest.raises(ConfigError, match=r"csv cannot be set up with {'colour': 'red'}"):
        splitft.train(config, tmp_path / "run")
    escaped = from_mapping({**once, "trackers": [{"name": "csv", "file": "../x.csv"}]})
    with pytest.raises(ConfigError, match="give a name without folders"):
        splitft.train(escaped, tmp_path / "other")
    assert not (tmp_path / "x.csv").exists()


def test_events_reach_listeners_and_trackers_alike(tmp_path, tiny_llama):
    heard = []
    file = settings_file(tmp_path, tiny_llama, trackers=["csv"], training={"rounds": 1})
    splitft.train(file, tmp_path / "run", listeners=[heard.append])
    losses = [e.by_client["client-1"] for e in heard if isinstance(e, Evaluated)]
    rows = [line.split(",") for line in (tmp_path / "run/metrics.csv").read_text().splitlines()[1:]]
    assert [float(row[3]) for row in rows if row[1] == "client-1"] == losses


def test_two_plugins_of_one_name_are_both_kept_with_the_run(tmp_path, tiny_llama):
    files = ["a/mine.py", "b/Mine.py", "c/mine.py"]
    for number, file in enumerate(files):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(f"NUMBER = {number}\n", encoding="utf-8")
    configuration = settings_file(tmp_path, tiny_llama, training={"rounds": 1, "steps": 1}, plugins=files)
    run = splitft.train(configuration, tmp_path / "run")
    kept = {path.name: path.read_text(encoding="utf-8") for path in (run.folder / "plugins").iterdir()}
    assert len({name.casefold() for name in kept}) == len(set(kept.values())) == 3
    for file in files:
        (tmp_path / file).unlink()
    assert len(load(run.folder / "config.yaml").plugins) == 3
