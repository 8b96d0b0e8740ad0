"""The audit of the embedded model: every behaviour with several seeds, on held-out prompts of the test split.

    python -m benchmarks.audit --seeds 0 1 2 --runs_dir runs/audit --output benchmarks/results/cpu/audit

One `lcdd demo --audit` for each behaviour and seed, as many at a time as there are processes (one thread each), about
20 minutes on two idle cores; runs that already have a report are not repeated. Written are audit.json (for each
behaviour: means over seeds with intervals over seeds, the claims judged on them, and every run's own states,
differences and claims) and audit.md (the same to read). One run:
`lcdd report --output_dir runs/audit/BEHAVIOR-SEED`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.demos import add_arguments, command, environment, read_reports, run_all
from benchmarks.markdown import table
from benchmarks.records import timestamp, write_json

RUN_KEYS = ("behavior", "seed", "split", "sparsity", "gates", "findings", "timings", "fingerprints")


def summary(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What audit.json holds of one behaviour's runs."""
    from lcdd.evaluate import combine

    runs = [
        {
            **{key: report[key] for key in RUN_KEYS if key in report},
            **{key: report["audit"][key] for key in ("n_prompts", "states", "differences", "patches", "claims")},
        }
        for report in reports
    ]
    return {**combine([report["audit"] for report in reports]), "seeds": [r["seed"] for r in reports], "each": runs}


def as_markdown(content: Mapping[str, Any]) -> str:
    """Claims by behaviour side by side, then each behaviour's numbers."""
    found = content["behaviors"]
    lines = [
        "# Audit of the embedded model",
        "",
        f"Made by `{content['command']}` at commit {content['environment']['commit']} on {content['date']}; "
        f"seeds {', '.join(map(str, content['seeds']))}, {content['split']} split, {content['prompts']} prompts a run. "
        "Intervals (95%) are over seeds: Student's t, or what the runs' own intervals over prompts leave, whichever is "
        "wider. Verdicts come from the numbers alone (`lcdd/evaluate/claims.py`).",
        "",
    ]
    verdicts = [{claim["name"]: claim for claim in part["claims"]} for part in found.values()]
    judged = [
        [claim["statement"], *(of_part[name]["verdict"] for of_part in verdicts)] for name, claim in verdicts[0].items()
    ]
    lines += table(["claim", *found], judged)
    for name, part in found.items():
        states = [
            [state, *(_in_words(row[key], row[f"{key}_ci95"], "") for key in ("behavior_rate", "base_match"))]
            for state, row in part["states"].items()
        ]
        evidence = [
            [row["rule"], _in_words(row["value"], row["ci95"], "+") if "value" in row else "–", row["verdict"]]
            for claim in part["claims"] for row in claim["evidence"]
        ]  # fmt: skip
        lines += ["", f"## {name}", "", *table(["state", "behaviour rate", "base match"], states)]
        lines += ["", *table(["claim's number", "value", "verdict"], evidence)]
    return "\n".join(lines) + "\n"


def _in_words(value: float, interval: Sequence[float], sign: str) -> str:
    low, high = interval
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, runs_dir="runs/audit")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu/audit"), help="without suffix")
    arguments = parser.parse_args(argv)
    reports = read_reports(run_all(arguments, audit=True))
    first = next(iter(reports.values()))
    content = {
        "command": command("audit", sys.argv[1:] if argv is None else argv),
        "seeds": arguments.seeds,
        "split": arguments.split,
        "prompts": first["audit"]["n_prompts"],
        "date": timestamp()[:10],
        "environment": environment(),
        "processes": arguments.processes,
        "versions": first["versions"],
        "config": first["config"],
        "behaviors": {name: summary([reports[name, seed] for seed in arguments.seeds]) for name in arguments.behaviors},
    }
    write_json(arguments.output.with_suffix(".json"), content)
    arguments.output.with_suffix(".md").write_text(as_markdown(content), encoding="utf-8")
    for name, part in content["behaviors"].items():
        print(f"\n{name}")
        for claim in part["claims"]:
            print(f"  {claim['verdict']}: {claim['statement']}")
    print(f"wrote {arguments.output.with_suffix('.json')} and {arguments.output.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
