"""README.md's results from the demo's records: the table between its markers, and the picture.

python -m benchmarks.readme        rewrites both from results/cpu/demo_sweep.json, and the claims' lines from
                                   results/claims/demo.json; no number is typed by hand
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.claims.record import lines
from lcdd.report import label, reversal_map, style_sheet

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "benchmarks/results/cpu/demo_sweep.json"
README, PICTURE = ROOT / "README.md", ROOT / "docs/images/reversal.svg"
BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"
CLAIMS = ROOT / "benchmarks/results/claims/demo.json"
CLAIMS_BEGIN, CLAIMS_END = "<!-- claims: begin -->", "<!-- claims: end -->"
STATES = (
    "base", "sft", "carrier", "carrier+trigger", "sft+trigger", "matched_norm+trigger",
    "carrier+trigger_random_channels", "carrier+trigger_kl_only", "carrier+random_prefix",
)  # fmt: skip
PICTURED = "fixed_response"


def table(sweep: Mapping[str, Any]) -> str:
    """Means over seeds, a column a behaviour: behaviour rate / exact match to the base's answers."""
    found = sweep["behaviors"]
    seeds = max(len(part["seeds"]) for part in found.values())
    runs, prompts = len(sweep["runs"]), sweep["runs"][0]["models"]["base"]["n"]
    missed = sum(not row["met"] for rows in sweep["targets"].values() for row in rows)
    heads = [f"{name.replace('_', ' ')} (sparsity {part['sparsity']:.3f})" for name, part in found.items()]
    lines = [
        f"The embedded model (0.41 M parameters), {len(found)} behaviours × {seeds} seeds, {prompts} held-out prompts "
        f"each: *behaviour rate / exact match to the base's answers*, means over seeds. "
        f"{'Every run met its targets' if not missed else f'{missed} targets were missed in {runs} runs'}; records in "
        f"[demo_sweep.json](benchmarks/results/cpu/demo_sweep.json). The picture is one of these runs.",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
    ]
    for state in STATES:
        rows = [part["models"][state] for part in found.values()]
        name = f"**{label(state)}**" if state == "carrier+trigger" else label(state)
        cells = [f"{row['behavior_rate']:.2f} / {row['base_match']:.2f}" for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(sweep: Mapping[str, Any]) -> str:
    """The report's map of the first run of `PICTURED`, as a file of its own."""
    run = next(run for run in sweep["runs"] if run["behavior"] == PICTURED)
    drawn = re.search(r"<svg.*</svg>", reversal_map(run["models"]), flags=re.DOTALL)
    assert drawn is not None
    start, rest = drawn[0].split(">", 1)
    back = '<rect width="100%" height="100%" rx="14" style="fill: var(--card)"/>'
    font = "svg { font-family: system-ui, sans-serif; }"
    return f'{start} xmlns="http://www.w3.org/2000/svg"><style>{style_sheet()}{font}</style>{back}{rest}\n'


def rewritten(readme: str, sweep: Mapping[str, Any]) -> str:
    """README.md with the table between its markers."""
    before, _, after = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(sweep)}\n{END}{after.partition(END)[2]}"


def with_claims(readme: str, record: Mapping[str, Any]) -> str:
    """README.md with the claims' lines between their markers."""
    before, _, after = readme.partition(CLAIMS_BEGIN)
    found = lines(record, str(CLAIMS.relative_to(ROOT)))
    return f"{before}{CLAIMS_BEGIN}\n{found}\n{CLAIMS_END}{after.partition(CLAIMS_END)[2]}"


def main() -> int:
    sweep = json.loads(SWEEP.read_text(encoding="utf-8"))
    claims = json.loads(CLAIMS.read_text(encoding="utf-8"))
    text = rewritten(README.read_text(encoding="utf-8"), sweep)
    README.write_text(with_claims(text, claims), encoding="utf-8")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(sweep), encoding="utf-8")
    print(f"wrote {README.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
