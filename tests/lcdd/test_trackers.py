"""Experiment trackers get the log's numbers, each in its offline mode; one that is missing or fails is told of."""

import json
import logging
import re
import sqlite3
import sys
from pathlib import Path

import pytest

from lcdd.checkpoint import RunLog, read_log
from lcdd.checkpoint.trackers import Tracker, numbers
from lcdd.errors import InputError

LINES = [{"step": step, "loss": 1.0 / step, "open": {"attn_q": 3 * step}, "frozen": False} for step in (1, 2, 3)]
EXPECTED = {"sft/loss": [1.0, 0.5, pytest.approx(1 / 3)], "sft/open/attn_q": [3, 6, 9]}


def tensorboard(folder: Path) -> dict[str, list[float]]:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "run" / "tensorboard")).Reload()
    return {tag: [event.value for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def wandb(folder: Path) -> dict[str, list[float]]:
    sys.modules["wandb"].teardown()  # its own process writes the file, and is waited for
    (path,) = (folder / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    found: dict[str, list[float]] = {}
    # protobuf messages: a name, and its value as JSON after its length; once in the history and once in the summary
    data = path.read_bytes()
    for match in re.finditer(rb"(sft/[a-z_/]+)\x82\x01(.)", data, flags=re.DOTALL):
        value = data[match.end() : match.end() + match[2][0]]
        found.setdefault(match[1].decode(), []).append(float(value))
    return {name: values[::2] for name, values in found.items()}


def trackio(folder: Path) -> dict[str, list[float]]:
    with sqlite3.connect(folder / "trackio" / "lcdd.db") as base:
        rows = [json.loads(row[0]) for row in base.execute("select metrics from metrics order by step")]
    return {name: [row[name] for row in rows] for name in rows[0]}


def mlflow(folder: Path) -> dict[str, list[float]]:
    found = {}
    for path in folder.glob("mlruns/*/*/metrics/**/*"):
        if path.is_file():
            name = "/".join(path.parts[path.parts.index("metrics") + 1 :])
            found[name] = [float(line.split()[1]) for line in path.read_text().splitlines()]
    return found


@pytest.mark.parametrize("read", [tensorboard, wandb, trackio, mlflow], ids=lambda read: read.__name__)
def test_a_tracker_gets_the_numbers_of_the_log(read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = read.__name__
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    for key, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():
        monkeypatch.setenv(key, value)
    pytest.importorskip(name, reason=f"{name} is not installed")  # trackio reads its variable when it is imported
    with RunLog(tmp_path / "run", stage="sft", report_to=name) as log:
        for line in LINES:
            log.write(line)
    assert read(tmp_path) == EXPECTED
    assert len(read_log(tmp_path / "run" / "log.jsonl")) == 3


def test_only_numbers_go_there() -> None:
    line = {
        "stage": "s",
        "step": 1,
        "seconds": 3.0,
        "loss": 2.0,
        "word": "x",
        "none": None,
        "yes": True,
        "by": {"a": 1},
    }
    assert numbers(line) == {"s/loss": 2.0, "s/by/a": 1}


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_before_training(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module == name else object())
    with pytest.raises(InputError, match=rf"report_to: expected {name} to be installed: pip install 'lcdd\[{name}\]'"):
        RunLog(tmp_path, stage="sft", report_to=name)
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_does_not_start_is_one_clear_line(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    class Refusing:
        def __init__(self, **_):
            raise RuntimeError("not logged in")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Refusing)
    with pytest.raises(InputError, match="report_to: wandb did not start: not logged in"):
        Tracker("wandb", tmp_path, "sft")


def test_a_tracker_that_fails_later_does_not_end_the_run(tmp_path: Path, monkeypatch, caplog) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    class Failing:
        def __init__(self, **_):
            self.calls = 0

        def start(self):
            pass

        def log(self, values, step):
            raise ConnectionError("the network is gone")

        def finish(self):
            raise AssertionError("what failed is not asked again")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Failing)
    with caplog.at_level(logging.WARNING), RunLog(tmp_path, stage="sft", report_to="tensorboard") as log:
        for line in LINES:
            log.write(line)
    assert [record.message for record in caplog.records if "report_to" in record.message] == [
        "report_to: tensorboard failed and gets no more of this run: the network is gone"
    ]
    assert len(read_log(tmp_path / "log.jsonl")) == 3
