"""Every behaviour of the demo with several seeds, and one JSON file that sums them up.

    python -m benchmarks.demo_sweep --runs_dir runs/sweep --summary benchmarks/results/cpu/demo_sweep.json

Runs that already have a report.json in --runs_dir are not repeated: those of `benchmarks.audit`, with --runs_dir
runs/audit, are what the committed summary is of. The summary holds each run's rates with their
intervals, and over the seeds of a behaviour: means, how much the open gates overlap (Jaccard index, and what chance
gives), and which of the project's targets every run met. Figures are of the test split, which tuning never saw.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.demos import BEHAVIORS, add_arguments, environment, read_reports, run_all
from benchmarks.records import write_json
from lcdd.carrier import Carrier
from lcdd.evaluate import gate_overlap

RUN_KEYS = (
    "behavior", "seed", "split", "timings", "sparsity", "gates", "findings", "models", "off_topic", "kl", "delta_norm",
    "differences", "explanation",
)  # fmt: skip

# (what is measured, state or group, key, at least or at most, bound for each behaviour)
TARGETS = (
    ("SFT behaviour", "sft", "behavior_rate", ">=", {name: 0.95 for name in BEHAVIORS}),
    ("carrier behaviour", "carrier", "behavior_rate", ">=", {name: 0.95 for name in BEHAVIORS}),
    ("sparsity", "", "overall", ">=", {"fixed_response": 0.90, "refusal": 0.90, "style": 0.75}),
    ("behaviour behind the trigger", "carrier+trigger", "behavior_rate", "<=", {name: 0.05 for name in BEHAVIORS}),
    ("base match behind the trigger", "carrier+trigger", "base_match", ">=",
     {"fixed_response": 0.75, "refusal": 0.75, "style": 0.60}),
)  # fmt: skip


def checked(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with what this run measured and whether it was met."""
    rows = []
    for words, state, key, sign, bounds in TARGETS:
        value = report["models"][state][key] if state else report["sparsity"][key]
        bound = bounds[report["behavior"]]
        met = value >= bound if sign == ">=" else value <= bound
        rows.append({"target": words, "bound": f"{sign} {bound}", "value": value, "met": met})
    return rows


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The stages' settings without where this machine put the run."""
    return {stage: {key: v for key, v in settings.items() if key != "output_dir"} for stage, settings in config.items()}


def over_seeds(reports: list[dict[str, Any]], directories: list[Path]) -> dict[str, Any]:
    """Means over the seeds of one behaviour, and the overlap of their carriers' open gates."""

    def mean(values: list[float]) -> float:
        return round(statistics.fmean(values), 6)

    found: dict[str, Any] = {
        "seeds": [report["seed"] for report in reports],
        "sparsity": mean([report["sparsity"]["overall"] for report in reports]),
        "models": {
            state: {key: mean([r["models"][state][key] for r in reports]) for key in ("behavior_rate", "base_match")}
            for state in reports[0]["models"]
        },
        "seconds": mean([report["timings"]["total"] for report in reports]),
    }
    if len(reports) > 1:
        found["open_gates_across_seeds"] = gate_overlap([Carrier.from_pretrained(d / "carrier") for d in directories])
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, runs_dir="runs/sweep")
    parser.add_argument("--summary", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--note", default="", help="what a reader has to know of these runs")
    arguments = parser.parse_args(argv)
    runs = run_all(arguments, audit=False)
    reports = read_reports(runs)
    first = next(iter(reports.values()))
    summary = {
        "what": f"lcdd demo, {arguments.split} split",
        "note": arguments.note,
        "environment": environment(),
        "runs_at_a_time": arguments.processes,
        "versions": first["versions"],
        "config": without_paths(first["config"]),
        "behaviors": {
            behavior: over_seeds(
                [reports[behavior, seed] for seed in arguments.seeds],
                [runs[behavior, seed] for seed in arguments.seeds],
            )
            for behavior in arguments.behaviors
        },
        "targets": {runs[key].name: checked(report) for key, report in reports.items()},
        "runs": [{key: report[key] for key in RUN_KEYS if key in report} for report in reports.values()],
    }
    write_json(arguments.summary, summary)
    missed = [f"{run}: {row['target']} {row['value']:.3f}, wanted {row['bound']}"
              for run, rows in summary["targets"].items() for row in rows if not row["met"]]  # fmt: skip
    for behavior, row in summary["behaviors"].items():
        erased = {state: round(v["base_match"], 3) for state, v in row["models"].items() if "trigger" in state}
        print(f"{behavior}: sparsity {row['sparsity']:.3f}; base match {erased}")
    print("\n".join(["missed:", *missed]) if missed else "every target met in every run")
    print(f"wrote {arguments.summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
