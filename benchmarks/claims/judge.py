"""Verdicts from the numbers alone: the predicates of claims.yaml asked of every cell, means and intervals over cells.

A cell's number is a measurement, or the share of prompts with an outcome. A mean over cells has the wider of Student's
interval over the cells and what the cells' own intervals over prompts leave (`over_runs`).
"""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lcdd.evaluate.claims import Estimate, over_runs
from lcdd.report import newcombe_paired_interval, wilson_interval
from lcdd.report.statistics import t975

CLAIMS = Path(__file__).with_name("claims.yaml")
HELD, NOT_HELD, UNDECIDED, NOT_TESTABLE = "held", "not held", "undecided", "not testable here"
NOT_MEASURED = "not measured, or in one cell alone"
COVARIATES = ("log_norm", "log_loss", "log_kl", "entry_sparsity")
"""What base match behind the trigger is explained by; a cell is a fixed effect."""
SHOWN = 0.9
"""Behaviour rate above which a model has a behaviour to be reversed."""
Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""cell -> state -> quantity -> a number, or outcomes of prompts as text."""


# ---------------------------------------------------------------- predicates


@dataclass(frozen=True, kw_only=True)
class Predicate:
    """quantity(first) [- quantity(second)] above or below a bound."""

    text: str
    quantity: str
    first: str
    second: str | None
    above: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Predicate":
        """Raises ValueError for anything but `quantity(STATE) [- quantity(STATE)] >|< number`."""
        term = r"(\w+)\(([^()]+)\)"
        found = re.fullmatch(rf"{term}(?: - {term})? ([<>]) (-?[\d.]+)", text)
        if found is None or found[3] not in (None, found[1]):
            raise ValueError(f"expected quantity(STATE) [- quantity(STATE)] > or < a number, got {text!r}")
        quantity, first, _, second, sign, bound = found.groups()
        return cls(text=text, quantity=quantity, first=first, second=second, above=sign == ">", bound=float(bound))

    @property
    def states(self) -> list[str]:
        return [self.first] if self.second is None else [self.first, self.second]

    @property
    def models(self) -> set[str]:
        """The models that the states are made of."""
        return {re.split(r"\+|-without", state)[0] for state in self.states}

    def estimate(self, cell: Mapping[str, Mapping[str, Any]]) -> Estimate | None:
        """The number and its interval over prompts, None where the cell has not measured it."""
        values = [cell.get(state, {}).get(self.quantity) for state in self.states]
        if any(value is None for value in values):
            return None
        if self.second is None:
            return estimate_of(values[0])
        if isinstance(values[0], str):
            outcomes = ([bit == "1" for bit in value] for value in values)
            value, low, high = newcombe_paired_interval(*outcomes)
            return Estimate(value=value, low=low, high=high)
        return estimate_of(values[0] - values[1])

    def holds(self, cell: Mapping[str, Mapping[str, Any]]) -> bool | None:
        """Whether the cell's number is on the right side; None where it was not measured."""
        found = self.estimate(cell)
        return None if found is None else (operator.gt if self.above else operator.lt)(found.value, self.bound)

    def verdict(self, found: Estimate) -> str:
        low, high, bound = (found.low, found.high, self.bound) if self.above else (-found.high, -found.low, -self.bound)
        return HELD if low > bound else NOT_HELD if high <= bound else UNDECIDED


def read_claims(path: Path = CLAIMS) -> dict[str, Any]:
    """The claims file with its predicates parsed: `controls` name -> (words, is), `claims` a list."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))

    def parsed(texts: Sequence[str]) -> list[Predicate]:
        return [Predicate.parse(text) for text in texts]

    return {
        "controls": {name: {**row, "is": parsed(row["is"])} for name, row in content["controls"].items()},
        "claims": [
            {**row, "if": parsed(row.get("if", [])), "bound": parsed(row["bound"])} for row in content["claims"]
        ],
    }


# ---------------------------------------------------------------- verdicts


def judge(cells: Cells, claims: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every claim with condition, bound, estimate, interval, the cells it is of, and verdict."""
    controls = control_report(cells, claims["controls"])
    effects = regression(cells)
    return [_judged(claim, cells, controls, effects) for claim in claims["claims"]]


def control_report(cells: Cells, controls: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of every control what it has to be, and the cells in which it is not: those say which predicate failed."""
    found = {}
    for name, row in controls.items():
        measured = {cell: values for cell, values in cells.items() if name in values}
        wrong = {
            cell: failed
            for cell, values in measured.items()
            if (failed := [p.text for p in row["is"] if p.holds(values) is False])
        }
        found[name] = {"words": row["words"], "is": [p.text for p in row["is"]], "cells": len(measured), "not": wrong}
    return found


def _judged(
    claim: Mapping[str, Any], cells: Cells, controls: Mapping[str, Any], effects: Mapping[str, Estimate]
) -> dict[str, Any]:
    bounds: Sequence[Predicate] = claim["bound"]
    row: dict[str, Any] = {
        "name": claim["name"], "statement": claim["statement"], "condition": [p.text for p in claim["if"]],
        "bound": [p.text for p in bounds],
    }  # fmt: skip
    if bounds[0].quantity == "effect":
        found = [effects.get(p.first) for p in bounds]
        return {**row, "cells": None, **_verdict(bounds, found)}
    measured = {name: cell for name, cell in cells.items() if all(p.estimate(cell) is not None for p in bounds)}
    excluded = {name: why for name, cell in measured.items() if (why := _why_not(name, cell, claim, controls))}
    left = {name: cell for name, cell in measured.items() if name not in excluded}
    row |= {"cells": len(left), "left_out": excluded}
    if len(left) < 2 or 2 * len(left) < len(measured):
        why = f"its condition holds in {len(left)} of {len(measured)} cells" if len(measured) > 1 else NOT_MEASURED
        return {**row, "estimate": None, "interval": None, "verdict": NOT_TESTABLE, "why": why}
    found = [over_runs([e for cell in left.values() if (e := p.estimate(cell)) is not None]) for p in bounds]
    return {**row, **_verdict(bounds, found)}


def _why_not(name: str, cell: Mapping[str, Any], claim: Mapping[str, Any], controls: Mapping[str, Any]) -> list[str]:
    """Conditions that this cell does not meet, and controls of the claim that are not what their names say."""
    models = set().union(*(p.models for p in claim["bound"]))
    failed = [
        f"{model}: {text}" for model in sorted(models) for text in controls.get(model, {}).get("not", {}).get(name, [])
    ]
    own = {p.text for p in claim["bound"]}
    failed = [text for text in failed if text.split(": ", 1)[1] not in own]
    return failed + [p.text for p in claim["if"] if p.holds(cell) is not True]


def _verdict(bounds: Sequence[Predicate], found: Sequence[Estimate | None]) -> dict[str, Any]:
    if any(estimate is None for estimate in found):
        return {"estimate": None, "interval": None, "verdict": NOT_TESTABLE, "why": NOT_MEASURED}
    known = [estimate for estimate in found if estimate is not None]
    verdicts = [bound.verdict(estimate) for bound, estimate in zip(bounds, known, strict=True)]
    overall = next((word for word in (NOT_HELD, UNDECIDED) if word in verdicts), HELD)
    return {
        "estimate": [round(estimate.value, 4) for estimate in known],
        "interval": [[round(estimate.low, 4), round(estimate.high, 4)] for estimate in known],
        "verdict": overall,
    }


# ---------------------------------------------------------------- what explains reversal


def regression(cells: Cells) -> dict[str, Estimate]:
    """Partial effects on base match behind the trigger of each of `COVARIATES`, in match per standard deviation.

    Ordinary least squares over the models of all cells that show the behaviour, a fixed effect a cell; intervals are
    the jackknife's over cells. Empty where there are fewer than three cells or too few models.
    """
    rows = {name: _rows(cell) for name, cell in cells.items()}
    rows = {name: found for name, found in rows.items() if len(found) > 1}
    if len(rows) < 3 or sum(map(len, rows.values())) < 2 * len(COVARIATES) + len(rows):
        return {}
    spread = np.concatenate([_centred(found)[:, 1:] for found in rows.values()]).std(axis=0)
    whole = _slopes(list(rows.values())) * spread
    left_out = [_slopes([found for other, found in rows.items() if other != name]) * spread for name in rows]
    n = len(rows)
    error = np.sqrt((n - 1) / n * np.square(np.array(left_out) - np.mean(left_out, axis=0)).sum(axis=0))
    return {
        name: Estimate(value=float(b), low=float(b - t975(n - 1) * e), high=float(b + t975(n - 1) * e))
        for name, b, e in zip(COVARIATES, whole, error, strict=True)
    }


def _rows(cell: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
    """[models, 1 + covariates]: base match behind the trigger, then what it is explained by; each model once."""
    found: dict[tuple[float, ...], list[float]] = {}
    for name, values in cell.items():
        covariates = [values[key] for key in COVARIATES if key in values]
        described = f"{name}+trigger" in cell and len(covariates) == len(COVARIATES)
        if described and share(values["behavior_rate"]) > SHOWN:
            found[tuple(covariates)] = [
                share(cell[f"{name}+trigger"]["base_match"]),
                *covariates,
            ]  # the carrier has two names
    return np.array(list(found.values()), dtype=np.float64).reshape(len(found), 1 + len(COVARIATES))


def _centred(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(axis=0)


def _slopes(groups: Sequence[np.ndarray]) -> np.ndarray:
    stacked = np.concatenate([_centred(rows) for rows in groups])
    return np.linalg.lstsq(stacked[:, 1:], stacked[:, 0], rcond=None)[0]


def share(outcomes: str) -> float:
    """Of outcomes that are yes."""
    return outcomes.count("1") / len(outcomes)


def estimate_of(value: Any) -> Estimate:
    """A number, which is exact, or the share of outcomes with its interval over prompts."""
    if not isinstance(value, str):
        return Estimate(value=float(value), low=float(value), high=float(value))
    low, high = wilson_interval(value.count("1"), len(value))
    return Estimate(value=share(value), low=low, high=high)


def mean_of(values: Sequence[Any]) -> Estimate:
    """Mean over cells of numbers, or of shares of outcomes."""
    return over_runs([estimate_of(value) for value in values])
