"""The record of a run: claims with verdicts, every model's numbers, and the ten lines that the README has of it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.cell import Values, read_parts
from benchmarks.claims.judge import NOT_MEASURED, control_report, judge, mean_of, read_claims, regression
from benchmarks.claims.models import MODELS
from benchmarks.claims.together import KINDS, SIZES
from benchmarks.markdown import table

NUMBERS = {
    "gate_sparsity": "gate_sparsity", "entry_sparsity": "entry_sparsity", "delta_norm": "log_norm", "loss": "log_loss",
    "behavior_rate": "behavior_rate", "base_match": "base_match", "kl_base": "log_kl",
}  # fmt: skip
TWINS = ("carrier_with_term", "carrier_without_term")
IN_README = (
    "reversible",
    "more than plain SFT",
    "more than SFT stopped at the carrier's margin",
    "more than random sparsification",
    "more than a dense delta of equal norm",
    "more than a dense delta trained alike",
    "norm explains reversal",
    "sparsity explains reversal",
    "more than SFT scaled to the carrier's margin",
    "more than the smallest dense delta",
    "the prefix is a switch",
    "margin explains reversal",
    "sparse",
    "behaviour kept",
)
"""The README has the first `LINES` of them that were measured."""
LINES = 8


def collected(directories: Sequence[Path]) -> dict[str, Any]:
    """claims, controls, effects, models and behaviours together, of the cells that have finished parts."""
    found = {path.name: read_parts(path) for path in directories if (path / "parts").is_dir()}
    cells = {name: values for name, (values, _) in found.items()}
    claims = read_claims()
    return {
        "claims": judge(cells, claims),
        "controls": control_report(cells, claims["controls"]),
        "effects": {k: {"estimate": e.value, "interval": [e.low, e.high]} for k, e in regression(cells).items()},
        "models": [row for name, values in cells.items() for row in model_rows(name, values)],
        "means": means(cells),
        "together": together(cells),
        "seconds": {name: seconds for name, (_, seconds) in found.items()},
    }


def model_rows(cell: str, values: Values) -> list[dict[str, Any]]:
    """A row for each model of a cell: size, margin, behaviour and base match, as it is, behind trigger and prefix."""
    rows = []
    for model in [*MODELS, *TWINS]:
        if model in values:
            row: dict[str, Any] = {"cell": cell, "model": model, **_numbers(values[model])}
            for place in ("trigger", "prefix"):
                row[place] = _numbers(values[f"{model}+{place}"])
            rows.append(row)
    return rows


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, key in NUMBERS.items():
        if key in values:
            number = mean_of([values[key]]).value
            found[name] = round(math.exp(number) if key.startswith("log_") else number, 6)
    return found


def means(cells: Mapping[str, Values]) -> dict[str, dict[str, Any]]:
    """Every state's numbers over its cells, each with the interval over cells; logarithms where they are so called."""
    states = dict.fromkeys(state for values in cells.values() for state in values if not state.startswith("topic "))
    found: dict[str, dict[str, Any]] = {}
    for state in states:
        quantities = dict.fromkeys(key for values in cells.values() for key in values.get(state, {}))
        rows = {key: [v[state][key] for v in cells.values() if key in v.get(state, {})] for key in quantities}
        found[state] = {}
        for key, row in rows.items():
            mean = mean_of(row)
            interval = [round(mean.low, 5), round(mean.high, 5)]
            found[state][key] = {"mean": round(mean.value, 5), "interval": interval, "cells": len(row)}
    return found


def together(cells: Mapping[str, Values]) -> list[dict[str, Any]]:
    """Share of intended answers of each number of behaviours in one model, by kind of delta."""
    rows = []
    for size in SIZES:
        for kind in KINDS:
            found = [values[state] for values in cells.values() if (state := f"{size} {kind}") in values]
            if found:
                asked = ("intended", "on_topic", "off_topic")
                shares = {key: round(mean_of([row[key] for row in found]).value, 4) for key in asked}
                rows.append({"behaviors": size, "kind": kind, "cells": len(found), **shares})
    return rows


def lines(record: Mapping[str, Any], link: str) -> str:
    """Ten lines and a heading: how many claims got which verdict; of some, estimate and interval."""
    claims = {row["name"]: row for row in record["claims"]}
    unmeasured = [name for name, row in claims.items() if row.get("why") == NOT_MEASURED]
    cells = len({row["cell"] for row in record["models"]})
    tally = Counter(row["verdict"] for name, row in claims.items() if name not in unmeasured)
    counted = ", ".join(f"{count} {verdict}" for verdict, count in tally.items())
    left = f"; {len(unmeasured)} wait for parts that have not been run" if unmeasured else ""
    parts = [
        f"{len(claims)} claims ([claims.yaml](benchmarks/claims/claims.yaml), written beforehand), {cells} runs, "
        f"[record]({link}):",
        f"{counted}{left}.",
        "",
    ]
    shown = [row for name in IN_README if (row := claims[name])["estimate"] is not None][:LINES]
    rows = [[row["statement"], _in_words(row), row["verdict"]] for row in shown]
    return "\n".join([*parts, *table(["claim", "number", "verdict"], rows)])


def _in_words(row: Mapping[str, Any]) -> str:
    pairs = zip(row["estimate"], row["interval"], row["bound"], strict=True)
    return "; ".join(
        f"{value:+.2f} [{low:+.2f}, {high:+.2f}], wanted {' '.join(bound.split()[-2:])}"
        for value, (low, high), bound in pairs
    )
