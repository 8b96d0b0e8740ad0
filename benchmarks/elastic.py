"""A run that changes its ranks on the way (4, 2, 1, 4; gloo, CPU) against the same run on 4: what differs at the end.

    python -m benchmarks.elastic      both engines, both controllers; figures go to benchmarks/results/cpu/elastic.json

Checked by `tests/integration/test_elastic.py` on a shorter run. `gates_differ`: open gates; `delta`, `lambda`, `loss`:
largest differences, of Δ's open blocks at the end, of λ and of the loss over all steps; `state_keeps_its_bits`: state
that went 4 -> 2 -> 1 -> 4 without a step between is bit for bit what it was.
"""

import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, ROOT, read_json
from lcdd.checkpoint import write_json

RECORD = RESULTS / "cpu" / "elastic.json"
STEPS = 40


def measure(engine: str, controller: str) -> dict[str, Any]:
    """One run and its uninterrupted twin."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "fixtures.elastic", engine, controller, str(STEPS), folder]
        subprocess.run(argv, cwd=ROOT, env=environment, check=True, capture_output=True)
        found = read_json(Path(folder) / "found.json")
    return {**found, "steps": len(found["steps"])}


def main() -> int:
    found: dict[str, Any] = {"ranks": [4, 2, 1, 4]}
    for engine, controller in product(("ddp", "fsdp2"), ("paced", "dual")):
        found[f"{engine}, {controller}"] = measure(engine, controller)
        print(f"{engine}, {controller}: {found[f'{engine}, {controller}']}", flush=True)
    write_json(RECORD, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
