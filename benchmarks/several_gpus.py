"""The tables of docs/several-gpus.md, between their markers, from the records that they say.

python -m benchmarks.several_gpus      rewrites the page; no number is typed by hand
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "several-gpus.md"
RECORDS = ROOT / "benchmarks" / "results" / "cpu"


def _record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def elastic() -> list[str]:
    """What `benchmarks.elastic` found."""
    head = ["engine, controller", "steps", "closed", "gates that differ", "Δ", "λ", "loss", "state keeps its bits"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, row in _record("elastic").items():
        if name == "ranks":
            continue
        cells = [
            name, str(row["steps"]), f"{row['closed']:.0%}", str(row["gates_differ"]),
            *(f"{row[key]:.1g}" for key in ("delta", "lambda", "loss")), "yes" if row["state_keeps_its_bits"] else "no",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


SECTIONS: dict[str, Callable[[], list[str]]] = {"elastic": elastic}


def rewritten(text: str) -> str:
    """The page with its tables made anew."""
    for name, lines in SECTIONS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        block = "\n".join([begin, "", *lines(), "", end])
        text = re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def main() -> int:
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
