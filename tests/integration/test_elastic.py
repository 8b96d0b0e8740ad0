"""A run that goes on with another number of ranks (4, 2, 1, 4; gloo, CPU) is the run that 4 ranks make."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_on_four_two_one_and_four_ranks_is_the_run_on_four(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    argv = [sys.executable, "-m", "fixtures.elastic", "fsdp2", "dual", "4", str(tmp_path)]
    result = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["steps"] == [1, 2, 3, 4]
    assert 0.02 < found["closed"] < 0.98
    assert found["gates_differ"] == 0
    assert found["lambda"] <= 1e-6
    assert found["delta"] <= 1e-5
    assert found["state_keeps_its_bits"]
