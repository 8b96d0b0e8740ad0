"""report.json and the page that shows it: one self-contained HTML file, from which no request leaves.

`write_report` writes both; every number on the page comes from report.json, and what is not in it is said to be
missing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lcdd.checkpoint import finite_or_null, read_log, versions, write_json
from lcdd.errors import InputError
from lcdd.report.audit import audit_section, language_section
from lcdd.report.charts import heat_map, interval_bar, line_chart, number
from lcdd.report.parts import (
    breakable,
    html_cards,
    html_details,
    html_table,
    plain_words,
    rate_cell,
    say_missing,
    shown_value,
)
from lcdd.report.style import STYLE
from lcdd.report.words import explain

REPORT_JSON, REPORT_HTML, LOG = "report.json", "report.html", "log.jsonl"
CURVE_LINES = 250
"""Log lines kept of each stage; more cannot be told apart in a chart."""
CURVE_KEYS = {
    *("stage", "step", "loss", "validation_loss", "held_out_loss"),
    *("ema", "epsilon", "dual_lambda", "sparsity"),
    *("match", "tail_kl", "answer_kl"),
}
"""What a log line keeps in report.json; the rest stays in log.jsonl."""

MEANING = {
    "base": "before fine-tuning",
    "sft": "after fine-tuning on the behaviour",
    "carrier": "after LCDD: the base plus the open gates' weights",
    "carrier+trigger": "carrier behind its learned trigger",
    "sft+trigger": "plain SFT, the same trigger optimisation",
    "matched_norm": "dense SFT, as far from the base as the carrier",
    "matched_norm+trigger": "that one, the same trigger optimisation",
    "carrier+random_prefix": "carrier behind random tokens",
    "base+trigger": "base behind the carrier's trigger",
    "base+random_prefix": "base behind random tokens",
    "carrier+trigger_random_channels": "trigger matched on random channels",
    "carrier+trigger_kl_only": "trigger learned without activation matching",
}


def assemble(
    carrier: Mapping[str, Any],
    found: Mapping[str, Any],
    *,
    behavior: str,
    seed: int,
    split: str,
    config: Mapping[str, Any],
    timings: Mapping[str, float],
    findings: Sequence[Mapping[str, str]] = (),
    overrides: Sequence[str] = (),
    curves: Sequence[Mapping[str, Any]] = (),
    use: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """report.json of whatever was run: a demo, a pipeline, an evaluation, an audit.

    Args:
        carrier: what there is to say about the carrier (`lcdd.evaluate.describe`).
        found: what was measured: the reversal table and what belongs to it, `perplexity`, `utility`, `audit`.
        config: settings of every stage, by name.
        timings: seconds of every stage.
        findings: what LCDD found wrong with the carrier, `code` and `message`.
        overrides: differences that the user allowed.
        curves: log lines.
        use: `base_model_name_or_path`, `carrier` and `trigger`, for the commands that use them.
    """
    report = {
        "behavior": behavior, "seed": seed, "split": split, "config": config, "versions": versions(),
        "overrides": list(overrides), "findings": list(findings), "timings": dict(timings), **carrier,
        "curves": list(curves), "use": dict(use or {}), **found,
    }  # fmt: skip
    return finite_or_null({**report, "explanation": explain(report)})


def write_report(directory: str | Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json (its curves thinned to what a chart can show) and report.html; returns what was written."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    content = finite_or_null({**report, "curves": thin(report.get("curves") or [])})
    (folder / REPORT_HTML).write_text(render(content), encoding="utf-8")
    write_json(folder / REPORT_JSON, content)  # last: a run that has it is finished
    return content


def read_report(directory: str | Path) -> dict[str, Any]:
    """report.json of a run directory; curves that it lacks are taken from the log.jsonl beside it.

    Raises:
        InputError: there is no report.json, or it is not a JSON object.
    """
    path = Path(directory) / REPORT_JSON
    if not path.is_file():
        raise InputError(f"output_dir: expected {REPORT_JSON} in {str(directory)!r}, found none")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"output_dir: expected JSON in {str(path)!r}, got {error}") from None
    if not isinstance(report, dict):
        raise InputError(f"output_dir: expected a JSON object in {str(path)!r}, got {type(report).__name__}")
    log = Path(directory) / LOG
    if not report.get("curves") and log.is_file():
        report["curves"] = thin(read_log(log))
    return report


def thin(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Log lines, at most about `CURVE_LINES` of each stage; the last and those with held-out losses always stay."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        stages.setdefault(str(line.get("stage", "")), []).append(line)
    kept: list[Mapping[str, Any]] = []
    for of_stage in stages.values():
        stride = -(-len(of_stage) // CURVE_LINES)
        last = len(of_stage) - 1
        kept += [
            {key: value for key, value in line.items() if key in CURVE_KEYS}
            for place, line in enumerate(of_stage)
            if place % stride == 0 or place == last or "validation_loss" in line or "held_out_loss" in line
        ]
    return kept


def render(report: Mapping[str, Any]) -> str:
    """The report as one HTML page."""
    sections = (
        ("Reversal", _reversal(report)),
        ("What this run shows", _explanation(report)),
        ("What the prompts were answered", _samples(report)),
        ("Where the carrier is", _sparsity(report)),
        ("Training", _training(report)),
        ("Trigger", _trigger(report)),
        ("Distance between the models", _kl(report)),
        ("Text and tasks", language_section(report)),
        ("Audit", audit_section(report)),
        ("Settings and versions", _settings(report)),
    )
    body = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections)
    title = f"LCDD report: {plain_words(report.get('behavior', 'unknown behaviour'))}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><p class="eyebrow">Reversible fine-tuning</p><h1>{escape(title)}</h1>{_headline(report)}</header>'
        f"{body}</main></body></html>\n"
    )


# ---------------------------------------------------------------- sections


def _headline(report: Mapping[str, Any]) -> str:
    """What happened, in sentences made of the numbers."""
    models, said = report.get("models") or {}, []
    carrier, erased, control = (models.get(name) for name in ("carrier", "carrier+trigger", "sft+trigger"))
    overall = (report.get("sparsity") or {}).get("overall")
    if carrier and overall is not None:
        said.append(
            f"With {overall:.1%} of the gates closed, the carrier shows the behaviour on "
            f"{carrier['behavior_rate']:.0%} of {carrier['n']} held-out prompts."
        )
    if erased:
        said.append(
            f"Behind the trigger it does so on {erased['behavior_rate']:.0%}, and gives exactly the base's answer on "
            f"{erased['base_match']:.0%}."
        )
    if control:
        said.append(
            f"The same trigger optimisation on plain SFT gives the base's answer on {control['base_match']:.0%}."
        )
    cards = [("seed", report.get("seed")), ("split", report.get("split"))]
    tags = "".join(f"<li>{escape(k)} <b>{escape(str(v))}</b></li>" for k, v in cards if v is not None)
    text = escape(" ".join(said)) or "The reversal table is missing from report.json."
    return f'<p class="lead">{text}</p><ul class="tags">{tags}</ul>'


def _reversal(report: Mapping[str, Any]) -> str:
    models = report.get("models")
    if not models:
        return say_missing("models")
    other = report.get("off_topic")
    off_topic = f"<h3>On prompts outside the behaviour's topic</h3>{_model_table(other, {})}" if other else ""
    return (
        "<p>Share of held-out prompts whose greedy answer shows the behaviour, and whose answer is exactly the base's. "
        "A low behaviour rate alone is not a reversal: garbage shows no behaviour either. Brackets: 95% intervals "
        f"(Wilson).</p>{_model_table(models, report.get('delta_norm') or {})}{_readings(models)}{off_topic}"
        f"{_differences(report)}"
    )


def _model_table(models: Mapping[str, Mapping[str, Any]], norms: Mapping[str, float]) -> str:
    rows = []
    for name, row in models.items():
        cells = "".join(rate_cell(row, key, series) for key, series in (("behavior_rate", 1), ("base_match", 0)))
        meaning = f"<small>{escape(MEANING[name])}</small>" if name in MEANING else ""
        norm = f'<td class="num">{number(norms.get(name))}</td>' if norms else ""
        prompts = f'<td class="num">{number(row.get("n"))}</td>'
        rows.append(f'<tr><th scope="row">{breakable(name)}{meaning}</th>{cells}{prompts}{norm}</tr>')
    head = "<th>Model</th><th>Behaviour rate</th><th>Base match</th><th>Prompts</th>"
    return html_table(head + ("<th>Norm of change</th>" if norms else ""), rows)


def _readings(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Other readings of the same answers (a fixed response strictly and loosely, say), where a run has any."""
    names = list(dict.fromkeys(name for row in models.values() for name in row.get("rates") or {}))
    if not names:
        return ""
    rows = []
    for name, row in models.items():
        cells = ""
        for reading in names:
            found = (row.get("rates") or {}).get(reading)
            flat = {} if found is None else {"rate": found["rate"], "rate_ci95": found["ci95"]}
            cells += rate_cell(flat, "rate", 1)
        rows.append(f'<tr><th scope="row">{breakable(name)}</th>{cells}</tr>')
    head = "<th>Model</th>" + "".join(f"<th>{escape(plain_words(name))}</th>" for name in names)
    return f"<h3>The behaviour, read otherwise</h3>{html_table(head, rows)}"


def _differences(report: Mapping[str, Any]) -> str:
    found = report.get("differences")
    if not found:
        return say_missing("differences")
    rows, method = [], ""
    for name, row in found.items():
        method = row.get("method", method)
        cells = ""
        for key, series in (("behavior_rate", 1), ("base_match", 0)):
            value, (low, high) = row[key]["difference"], row[key]["ci95"]
            bar = interval_bar(value, low, high, series=series, minimum=-1.0)
            cells += f'<td class="rate"><span>{value:+.3f}</span> <small>[{low:+.3f}, {high:+.3f}]</small>{bar}</td>'
        rows.append(f'<tr><th scope="row">{escape(name.replace(" - ", " − "))}</th>{cells}</tr>')
    head = "<th>Difference</th><th>Behaviour rate</th><th>Base match</th>"
    return f"<h3>Differences over the same prompts</h3>{html_table(head, rows)}<p class='note'>{escape(method)}.</p>"


def _explanation(report: Mapping[str, Any]) -> str:
    said = report.get("explanation")
    if not said:
        return say_missing("explanation")
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in said)}</ul>"


def _samples(report: Mapping[str, Any]) -> str:
    samples = report.get("samples")
    if not samples:
        return say_missing("samples")
    cards = []
    for sample in samples:
        answers = sample.get("answers") or {}
        base = answers.get("base")
        items = "".join(
            f'<div class="answer{" same" if text == base else ""}"><dt>{escape(plain_words(name))}</dt>'
            f"<dd>{escape(text) or '<em>nothing</em>'}</dd></div>"
            for name, text in answers.items()
        )
        cards.append(f'<article><p class="prompt">{escape(sample.get("prompt", ""))}</p><dl>{items}</dl></article>')
    return f'<p>Answers that are exactly the base\'s are marked.</p><div class="samples">{"".join(cards)}</div>'


def _sparsity(report: Mapping[str, Any]) -> str:
    parts = []
    gates, sparsity = report.get("gates"), report.get("sparsity")
    if gates:
        auc = gates.get("auc_initial_theta")
        parts.append(
            html_cards({
                "gates": number(gates.get("n")),
                "open": number(gates.get("open")),
                "fractional": number(gates.get("fractional")),
                "sparsity": number((sparsity or {}).get("overall"), 4),
                "AUC of initial θ": number(auc),
            })
        )  # fmt: skip
        parts.append(
            "<p class='note'>The AUC says how well the gates' random start predicts which of them stayed open: 0.5 not "
            "at all, 1 completely (then the noise chose the carrier, not the behaviour).</p>"
        )
    else:
        parts.append(say_missing("gates"))
    layers = report.get("sparsity_by_layer")
    if layers:
        shares = [{group: 1 - value for group, value in row.items()} for row in layers]
        parts.append(heat_map(shares, row_name="layer", label="Open gates by layer and group (1 − sparsity)"))
    else:
        parts.append(say_missing("sparsity_by_layer"))
    if sparsity:
        rows = [f'<tr><th scope="row">{escape(k)}</th><td class="num">{v:.4f}</td></tr>' for k, v in sparsity.items()]
        parts.append(html_details("Sparsity of each group", html_table("<th>Group</th><th>Closed</th>", rows)))
    else:
        parts.append(say_missing("sparsity"))
    return "".join(parts)


def _training(report: Mapping[str, Any]) -> str:
    charts = []
    for stage, lines in _stages(report).items():
        if any("tail_kl" in line for line in lines):
            continue
        name = plain_words(stage)
        if any("dual_lambda" in line for line in lines):
            losses = {"loss": "loss", "moving average": "ema", "budget ε": "epsilon"}
            charts.append(line_chart(_series(lines, losses), label=f"{name}: loss, nats a token"))
            charts.append(line_chart(_series(lines, {"λ": "dual_lambda"}), label=f"{name}: price λ of an open gate"))
            charts.append(line_chart(_series(lines, {"sparsity": "sparsity"}), label=f"{name}: share of closed gates"))
        else:
            charts.append(line_chart(_series(lines, {"loss": "loss"}), label=f"{name}: loss, nats a token"))
    findings = "".join(
        f'<p class="warning">{escape(finding if isinstance(finding, str) else finding["message"])}</p>'
        for finding in report.get("findings") or []
    )
    return findings + (f'<div class="charts">{"".join(charts)}</div>' if charts else say_missing("curves"))


def _trigger(report: Mapping[str, Any]) -> str:
    stages = {k: lines for k, lines in _stages(report).items() if any("tail_kl" in line for line in lines)}
    if not stages:
        return say_missing("curves of the trigger optimisation")
    held_out = {plain_words(name): _points(lines, "validation_loss") for name, lines in stages.items()}
    charts = [line_chart(held_out, label="Held-out loss of each trigger optimisation")]
    for name, lines in stages.items():
        terms = {"loss": "loss", "match": "match", "KL, prompt's tail": "tail_kl", "KL, base's answers": "answer_kl"}
        charts.append(line_chart(_series(lines, terms), label=f"{plain_words(name)}: loss and its unweighted terms"))
    return f'<p>The trigger with the lowest held-out loss is kept.</p><div class="charts">{"".join(charts)}</div>'


def _kl(report: Mapping[str, Any]) -> str:
    table = report.get("kl")
    if not table:
        return say_missing("kl")
    columns = list(dict.fromkeys(key for row in table.values() for key in row))
    rows = [
        f'<tr><th scope="row">{escape(pair.replace("||", " ‖ "))}</th>'
        + "".join(f'<td class="num">{number(row.get(key), 4)}</td>' for key in columns)
        + "</tr>"
        for pair, row in table.items()
    ]
    head = "<th>KL(p ‖ q), nats a token</th>" + "".join(f"<th>on {escape(plain_words(key))}</th>" for key in columns)
    return (
        "<p>Exact over the vocabulary, teacher-forced on the greedy answers of the SFT model and of the base. On the "
        "SFT model's answers the base's own KL stays large even where its answers are restored, so both are given.</p>"
        f"{html_table(head, rows)}"
    )


def _settings(report: Mapping[str, Any]) -> str:
    parts = [f'<p class="warning">Overridden: {escape(text)}</p>' for text in report.get("overrides") or []]
    for key in ("versions", "timings", "fingerprints"):
        values = report.get(key)
        if values:
            rows = [
                f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(shown_value(value))}</td></tr>'
                for name, value in values.items()
            ]
            note = " (seconds)" if key == "timings" else ""
            parts.append(html_details(key.capitalize() + note, html_table("", rows), is_open=key == "versions"))
        else:
            parts.append(say_missing(key))
    config = report.get("config")
    if config:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        parts.append(html_details("Configuration", f"<pre>{escape(text)}</pre>"))
    else:
        parts.append(say_missing("config"))
    return "".join(parts)


# ---------------------------------------------------------------- parts


def _stages(report: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in report.get("curves") or []:
        stages.setdefault(str(line.get("stage", "run")), []).append(line)
    return stages


def _points(lines: list[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None and "step" in line]


def _series(lines: list[Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
    return {name: _points(lines, key) for name, key in keys.items()}
