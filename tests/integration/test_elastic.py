"""Runs that change their ranks on the way (4, 2, 1, 4), and models that another engine splits; gloo, CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *arguments: str) -> None:
    """A module of `fixtures` in a process of its own, which makes its ranks itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    argv = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]


def test_a_run_on_four_two_one_and_four_ranks_is_the_run_on_four(tmp_path: Path) -> None:
    run("fixtures.elastic", "fsdp2", "dual", "4", str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["steps"] == [1, 2, 3, 4]
    assert 0.02 < found["closed"] < 0.98
    assert found["gates_differ"] == 0
    assert found["lambda"] <= 1e-6
    assert found["delta"] <= 1e-5
    assert found["state_keeps_its_bits"]


def test_a_folded_carrier_answers_under_tensor_parallelism_and_training_there_is_refused(tmp_path: Path) -> None:
    run("fixtures.tensor_parallel", str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["split"] == found["alone"]
    assert "tensor parallelism" in found["refused"]
