"""The report as one self-contained HTML page, from which no request leaves: a verdict, a picture, then the rest.

Every number on it comes from report.json; what is not in there is not on the page.
"""

import difflib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from lcdd.report.charts import Points, heat_map, interval_bar, line_chart, reversal_map
from lcdd.report.labels import GOOD, MAIN, MEANING, closeness_of, differences_of, label, models_of
from lcdd.report.rendering import environment, plain, style_sheet
from lcdd.report.tables import markdown_table
from lcdd.report.words import verdict

EXAMPLES = 3
"""Answers shown at once; the others are folded away."""
RATIO_CAP = 2.0
"""The chart of budget and sparsity is cut where the loss is this many times its budget."""
PARTS = {
    "table": "The models",
    "necessity": "Necessity: with parts taken out",
    "sufficiency": "Sufficiency: the carrier's channels alone, and random masks",
    "triggers": "Triggers: random, elsewhere, and learned otherwise",
    "masks": "Masks found afterwards, with frozen weights",
    "dense": "SFT continued for as long as LCDD trained",
}
KNOWN = (
    "seed", "split", "delta_norm", "off_topic", "explanation", "gates", "findings", "sparsity", "kl", "perplexity",
    "utility", "audit", "versions", "timings", "fingerprints", "overrides",
)  # fmt: skip
"""What the templates take from report.json itself; a name that is not among these is a mistake in a template."""
VERDICTS = ("held", "did not hold", "undecided", "not measured")
RATES = (("behavior_rate", 1), ("base_match", 0))
"""Rates of a state, and the colour of each."""


def render(report: Mapping[str, Any]) -> str:
    """The report as HTML."""
    models, audit = models_of(report), report.get("audit") or {}
    page: dict[str, Any] = {
        "report": {**dict.fromkeys(KNOWN), **report},
        "style": style_sheet(),
        "behavior": report.get("behavior"),
        "verdict": verdict(report),
        "map": reversal_map(models) if models else None,
        "main": [(name, MEANING[name], models[name]) for name in MAIN if name in models],
        "controls": {name: row for name, row in models.items() if name not in MAIN},
        "readings": _readings(models),
        "closeness": closeness_of(report),
        "positions": _positions(models),
        "differences": differences_of(report),
        "examples": [_example(sample) for sample in report.get("samples") or []],
        "shown": EXAMPLES,
        "closing": list(_closing_charts(report)),
        "curves": list(_training_charts(report)),
        "trigger": list(_trigger_charts(report)),
        "heat": _heat(report),
        "claims": _scoreboard(audit),
        "parts": _parts(audit),
        "commands": _commands(report),
        "markdown": markdown_table(report) if models else "",
        "settings": json.dumps(report["config"], indent=2, ensure_ascii=False) if report.get("config") else "",
        "bar": _bar,
        "good": GOOD,
        "rates": RATES,
    }
    return environment().get_template("page.html").render(page)


def _bar(value: float, bounds: Sequence[float], series: int, minimum: float = 0.0) -> Markup:
    return interval_bar(value, *bounds, series=series, minimum=minimum)


# ---------------------------------------------------------------- the table and what was answered


def _readings(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Other readings of the same answers (a fixed response strictly and loosely, say): state -> reading -> rate."""
    found = {name: row["rates"] for name, row in models.items() if row.get("rates")}
    names = dict.fromkeys(reading for rates in found.values() for reading in rates)
    return {state: {reading: rates.get(reading) for reading in names} for state, rates in found.items()}


def _positions(models: Mapping[str, Mapping[str, Any]]) -> Markup | None:
    """KL to the base by the position in its answer, of the main states."""
    series = {
        label(name): list(enumerate(models[name]["kl_by_position"], start=1))
        for name in MAIN[1:]
        if models.get(name, {}).get("kl_by_position")
    }
    return line_chart(series, label="KL to the base by position in its answer, nats") if series else None


def _example(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with its answers, each word marked that the base's answer does not have there."""
    answers = sample.get("answers") or {}
    base = answers.get("base")
    rows = [
        {"state": name, "same": text == base, "text": _marked(text, base), "main": name in MAIN}
        for name, text in answers.items()
    ]
    return {"prompt": sample.get("prompt", ""), "rows": rows}


def _marked(text: str, base: str | None) -> Markup:
    words = text.split()
    if base is None or not words or text == base:
        return escape(text)
    matcher = difflib.SequenceMatcher(None, base.split(), words, autojunk=False)
    pieces = []
    for operation, _, _, start, end in matcher.get_opcodes():
        if start < end:
            piece = " ".join(words[start:end])
            pieces.append(escape(piece) if operation == "equal" else Markup("<mark>{}</mark>").format(piece))
    return Markup(" ").join(pieces)


# ---------------------------------------------------------------- curves


def _stages(report: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in report.get("curves") or []:
        stages.setdefault(str(line.get("stage", "run")), []).append(line)
    return stages


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> Points:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None and "step" in line]


def _series(lines: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, Points]:
    return {name: _points(lines, key) for name, key in keys.items()}


def _closes_gates(lines: Sequence[Mapping[str, Any]]) -> bool:
    return any("dual_lambda" in line for line in lines)


def _learns_trigger(lines: Sequence[Mapping[str, Any]]) -> bool:
    return any("tail_kl" in line for line in lines)


def _closing_charts(report: Mapping[str, Any]) -> Iterator[Markup]:
    """Budget and sparsity of a run on one axis: the share of the allowed loss, and the share of closed gates."""
    for stage, lines in _stages(report).items():
        if not _closes_gates(lines):
            continue
        used = [
            (line["step"], line["ema"] / line["epsilon"])
            for line in lines
            if line.get("epsilon") and line.get("ema") is not None and "step" in line
        ]
        cut = f", cut at {RATIO_CAP:g}" if any(ratio > RATIO_CAP for _, ratio in used) else ""
        series = {
            "share of gates closed": _points(lines, "sparsity"),
            f"loss over its budget{cut}": [(step, min(ratio, RATIO_CAP)) for step, ratio in used],
        }
        words = f"{plain(stage)}: how much is closed, and what it costs"
        yield line_chart(series, label=words, mark=1.0, linear=True)


def _training_charts(report: Mapping[str, Any]) -> Iterator[Markup]:
    for stage, lines in _stages(report).items():
        name = plain(stage)
        if _closes_gates(lines):
            losses = {"loss": "loss", "moving average": "ema", "budget ε": "epsilon", "held out": "held_out_loss"}
            yield line_chart(_series(lines, losses), label=f"{name}: loss, nats a token")
            yield line_chart(_series(lines, {"λ": "dual_lambda"}), label=f"{name}: price λ of an open gate")
        elif not _learns_trigger(lines):
            yield line_chart(
                _series(lines, {"loss": "loss", "held out": "held_out_loss"}), label=f"{name}: loss, nats a token"
            )


def _trigger_charts(report: Mapping[str, Any]) -> Iterator[Markup]:
    """First the held-out loss of every optimisation, then the terms of each."""
    stages = {name: lines for name, lines in _stages(report).items() if _learns_trigger(lines)}
    if stages:
        held_out = {plain(name): _points(lines, "validation_loss") for name, lines in stages.items()}
        yield line_chart(held_out, label="Held-out loss of each trigger optimisation")
    for name, lines in stages.items():
        terms = {"loss": "loss", "match": "match", "KL, prompt's tail": "tail_kl", "KL, base's answers": "answer_kl"}
        yield line_chart(_series(lines, terms), label=f"{plain(name)}: loss and its unweighted terms")


def _heat(report: Mapping[str, Any]) -> Markup | None:
    layers = report.get("sparsity_by_layer")
    if not layers:
        return None
    shares = [{group: 1 - value for group, value in row.items()} for row in layers]
    return heat_map(shares, row_name="layer", label="Open gates by layer and group (1 − sparsity)")


# ---------------------------------------------------------------- audit and use


def _scoreboard(audit: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Claims by their verdict."""
    claims = audit.get("claims") or []
    return {word: found for word in VERDICTS if (found := [c for c in claims if c["verdict"] == word])}


def _parts(audit: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Title of each audited part -> its states."""
    states = audit.get("states") or {}
    found = {title: {n: row for n, row in states.items() if row.get("part") == part} for part, title in PARTS.items()}
    return {title: rows for title, rows in found.items() if rows}


def _commands(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader can do with carrier and trigger: words and a command that can be pasted."""
    use = {name: path for name, path in (report.get("use") or {}).items() if path}
    if not {"base_model_name_or_path", "carrier"} <= set(use):
        return []
    given = " ".join(f"--{name} {shlex.quote(str(path))}" for name, path in use.items())
    prompt = next((sample["prompt"] for sample in report.get("samples") or [] if sample.get("prompt")), "Hello")
    return [
        ("Ask base, carrier and carrier with trigger side by side", f"lcdd chat {given}"),
        ("Answer one prompt", f"lcdd generate {given} --prompt {shlex.quote(prompt)}"),
    ]
