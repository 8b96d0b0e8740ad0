"""The sweep's summary of finished demos: which targets each met, nothing run again, means over seeds."""

import json

import pytest
from reports import run_report

from benchmarks import demo_sweep
from benchmarks.demo_sweep import checked
from lcdd.carrier import Carrier
from lcdd.commands.demo.demo import BASE_DIRECTORY
from lcdd.models import load_model


def test_sweep_says_which_targets_a_run_met():
    report = {**run_report(), "behavior": "style", "sparsity": {"overall": 0.80}}
    assert all(row["met"] for row in checked(report))
    report = {**run_report(erased=(0.06, 0.59)), "behavior": "style", "sparsity": {"overall": 0.74}}
    assert [row["target"] for row in checked(report) if not row["met"]] == [
        "sparsity",
        "behaviour behind the trigger",
        "base match behind the trigger",
    ]
    report = {**run_report(), "behavior": "refusal", "sparsity": {"overall": 0.80}}
    assert [row["target"] for row in checked(report) if not row["met"]] == ["sparsity"]


def test_sweep_sums_up_finished_runs_without_running_them_again(tmp_path, capsys):
    base = load_model(BASE_DIRECTORY)
    for seed in (0, 1):
        folder = tmp_path / "runs" / f"style-{seed}"
        folder.mkdir(parents=True)
        report = {
            **run_report(erased=(0.0, 0.8 + 0.1 * seed)),
            "behavior": "style",
            "seed": seed,
            "timings": {"total": 60.0},
            "versions": {},
            "config": {},
        }
        (folder / "report.json").write_text(json.dumps(report))
        Carrier.from_models(base, base).save_pretrained(folder / "carrier")
    summary = tmp_path / "out" / "summary.json"
    argv = [
        "--runs_dir",
        str(tmp_path / "runs"),
        "--summary",
        str(summary),
        "--behaviors",
        "style",
        "--seeds",
        "0",
        "1",
    ]
    assert demo_sweep.main(argv) == 0
    found = json.loads(summary.read_text())
    row = found["behaviors"]["style"]
    assert row["models"]["carrier+trigger"]["base_match"] == pytest.approx(0.85)
    assert row["open_gates_across_seeds"] == {"jaccard": 1.0, "chance": 1.0}
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    assert "every target met in every run" in capsys.readouterr().out
