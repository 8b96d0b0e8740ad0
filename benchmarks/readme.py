"""Results in README.md and docs/models.md from the records: the tables between their markers, and the pictures.

python -m benchmarks.readme    from results/cpu/{demo_sweep,families}.json, results/claims/demo.json, results/smollm2

No number is typed by hand.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.claims import frontier
from benchmarks.claims.record import lines
from benchmarks.families import record as families
from benchmarks.markdown import rewritten
from benchmarks.markdown import table as markdown_table
from benchmarks.records import RESULTS, ROOT, read_json
from lcdd.report import label, reversal_map, style_sheet

SWEEP, CLAIMS, REAL = RESULTS / "cpu/demo_sweep.json", RESULTS / "claims/demo.json", RESULTS / "smollm2"
README, MODELS, IMAGES = ROOT / "README.md", ROOT / "docs/models.md", ROOT / "docs/images"
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


def small_table(small: Mapping[str, Any]) -> str:
    """How small carriers of the real model are: a row a run."""
    head = ["behaviour, seed", "open gates", "sparsity", "entries of Δ", "held-out loss: SFT, carrier (ε)"]
    rows = []
    for run in small["runs"]:
        loss, rates = run["held_out_loss"], (run["sft_behavior"]["rate"], run["carrier_behavior"]["rate"])
        rows.append([
            f"{run['behavior'].replace('_', ' ')}, {run['seed']}", f"{run['open_gates']:,} of {run['n_gates']:,}",
            f"{run['sparsity']:.4f}", f"{run['entries']:,}",
            f"{loss['sft']:.4f}, {loss['carrier']:.4f} ({run['epsilon']:.4f})", f"{rates[0]:.2f}, {rates[1]:.2f}",
        ])  # fmt: skip
    lines = markdown_table([*head, "behaviour: SFT, carrier"], rows)
    if across := small.get("open_gates_across_seeds"):
        index = f"{across['jaccard']:.2f} ({across['chance']:.4f} by chance)"
        lines += ["", f"Open gates of the seeds have a Jaccard index of {index}."]
    return "\n".join(lines)


def switched_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """What a trigger makes of a carrier of the real model, and what is to be compared with it."""
    lines = [
        "| | behaviour | base's tokens first choice | begins as the base's (tokens) | chrF | KL to the base |",
        "|---|---|---|---|---|---|",
    ]
    for behavior, report in reports.items():
        head = f"{behavior.replace('_', ' ')}, sparsity {report['sparsity']['overall']:.2f}"
        for state in ("sft", "carrier", "carrier+trigger", "carrier+random_prefix", "base+random_prefix"):
            row = report["models"][state]
            lines.append(
                f"| {head}: {label(state)} | {row['behavior_rate']:.2f} | {row['base_token_match']:.2f} | "
                f"{row['prefix_tokens']:.1f} | {row['chrf']:.0f} | {row['kl_base']:.2f} |"
            )
    return "\n".join(lines)


def real(directory: Path) -> str:
    """The real model's tables, of what is on record."""
    reports = {path.parent.name: read_json(path) for path in sorted(directory.glob("*/report.json"))}
    counts = ", ".join(f"{name.replace('_', ' ')} {r['models']['base']['n']}" for name, r in reports.items())
    words = f"Switched off, at the sparsity of `examples/smollm2` (greedy answers to held-out prompts: {counts}):"
    return "\n".join((small_table(read_json(directory / "small.json")), "", words, "", switched_table(reports)))


def blocks() -> dict[Path, dict[str, str]]:
    """Every block of every page that comes from records."""
    tried = read_json(families.RECORD)
    return {
        README: {
            "demo": table(read_json(SWEEP)),
            "claims": lines(read_json(CLAIMS), str(CLAIMS.relative_to(ROOT))),
            "smollm2": real(REAL),
            "families": families.short_table(tried),
        },
        MODELS: {"families": families.table(tried)},
    }


def pictures() -> dict[Path, str]:
    """Every picture that comes from records."""
    drawn = frontier.draw(frontier.dots(read_json(CLAIMS)))
    return {IMAGES / "reversal.svg": picture(read_json(SWEEP)), IMAGES / "frontier.svg": drawn}


def main() -> int:
    for page, parts in blocks().items():
        page.write_text(rewritten(page.read_text(encoding="utf-8"), parts), encoding="utf-8")
    drawn = pictures()
    for path, svg in drawn.items():
        path.write_text(svg, encoding="utf-8")
    print("wrote", ", ".join(str(path.relative_to(ROOT)) for path in (README, MODELS, *drawn)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
