"""Small versions of the robustness commands, whose full ones make the README's figures."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.bad_inputs import run_cases
from benchmarks.corrupt_files import fuzz
from benchmarks.robustness import accumulation

ROOT = Path(__file__).resolve().parents[2]


def test_kill_9_three_times() -> None:
    argv = [sys.executable, "-m", "benchmarks.crash_test", "--kills", "3", "--no_record"]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads(result.stdout[result.stdout.index("{") :])
    assert record["kills"] == 3
    assert (record["lost"], record["half_written_accepted"], record["resumed_runs_that_differ"]) == (0, 0, 0)


def test_corrupt_files_are_refused_by_name(tmp_path: Path) -> None:
    record = fuzz(tmp_path, mutations=51, seed=1)
    assert record["accepted"] == []
    assert record["mutations"] == record["refused"] == record["message_names_the_file"] == 51


def test_malformed_inputs_are_refused_clearly(tmp_path: Path) -> None:
    record = run_cases(tmp_path, every=9, seed=1)
    assert record["wrong"] == []
    assert record["inputs"] > 35


def test_gate_gradients_do_not_depend_on_accumulation() -> None:
    assert all(error <= 1e-6 for error in accumulation().values())
