"""The report's audit: claims with their verdicts and evidence, bars of every state; perplexities and utility."""

from collections.abc import Mapping
from html import escape
from typing import Any

from lcdd.report.charts import number
from lcdd.report.parts import breakable, html_details, html_table, plain_words, rate_cell, say_missing

PARTS = {
    "table": "The models",
    "necessity": "Necessity: with parts taken out",
    "sufficiency": "Sufficiency: the carrier's channels alone, and random masks",
    "triggers": "Triggers: random, elsewhere, and learned otherwise",
    "masks": "Masks found afterwards, with frozen weights",
    "dense": "SFT continued for as long as LCDD trained",
}
VERDICT_CLASS = {"held": "held", "did not hold": "failed"}


def audit_section(report: Mapping[str, Any]) -> str:
    """Claims first, then the states they rest on, part by part; a part that was not audited is said to be missing."""
    audit = report.get("audit")
    if not audit:
        return say_missing("audit")
    runs = audit.get("runs")
    over = f", over {runs} runs" if runs else ""
    return (
        "<p>Each claim is a set of conditions on numbers. It held if the whole 95% interval of every number is "
        "on the right side of its bound, did not hold if one is wholly on the wrong side, and is undecided otherwise"
        f"{escape(over)}.</p>{_claims(audit)}{_parts(audit)}{_patches(audit)}"
    )


def _claims(audit: Mapping[str, Any]) -> str:
    claims = audit.get("claims")
    if not claims:
        return say_missing("claims of the audit")
    counts = [
        f"{sum(c['verdict'] == word for c in claims)} {word}" for word in dict.fromkeys(c["verdict"] for c in claims)
    ]
    cards = []
    for claim in claims:
        rows = []
        for row in claim["evidence"]:
            found = "not measured"
            if row.get("value") is not None:
                low, high = row["ci95"]
                found = f"{row['value']:.3f} <small>[{low:.3f}, {high:.3f}]</small>"
            verdict = f"<small>{escape(row['verdict'])}</small>" if len(claim["evidence"]) > 1 else ""
            rows.append(f'<tr><th scope="row">{breakable(row["rule"])}{verdict}</th><td class="num">{found}</td></tr>')
        kind = VERDICT_CLASS.get(claim["verdict"], "open")
        cards.append(
            f'<article class="claim {kind}"><p class="prompt"><span class="verdict">{escape(claim["verdict"])}</span> '
            f'{escape(claim["statement"])}</p><div class="evidence">'
            f"{html_table('', rows)}</div></article>"
        )
    return f"<h3>Claims: {escape(', '.join(counts))}</h3><div class='claims'>{''.join(cards)}</div>"


def _parts(audit: Mapping[str, Any]) -> str:
    states = audit.get("states")
    if not states:
        return say_missing("states of the audit")
    found = []
    for part, title in PARTS.items():
        rows = []
        for name, row in states.items():
            if row.get("part") == part:
                bars = "".join(rate_cell(row, key, series) for key, series in (("behavior_rate", 1), ("base_match", 0)))
                rows.append(f'<tr><th scope="row">{breakable(name)}</th>{bars}</tr>')
        content = (
            html_table("<th>State</th><th>Behaviour rate</th><th>Base match</th>", rows)
            if rows
            else say_missing(f"states of the audit's part {part}")
        )
        found.append(f"<h3>{escape(title)}</h3>{content}")
    return "".join(found)


def _patches(audit: Mapping[str, Any]) -> str:
    patches = audit.get("patches")
    if not patches:
        return say_missing("patches of the audit")
    rows = [
        f'<tr><th scope="row">{breakable(name)}</th><td class="num">{number(row.get("sparsity"), 4)}</td>'
        f'<td class="num">{number(row.get("delta_norm"))}</td></tr>'
        for name, row in patches.items()
    ]
    head = "<th>Patch</th><th>Closed gates</th><th>Norm of change</th>"
    return html_details("Sparsity and size of every patch", html_table(head, rows))


def language_section(report: Mapping[str, Any]) -> str:
    """Perplexity of held-out text, and utility, of each state."""
    return _perplexity(report) + _utility(report)


def _perplexity(report: Mapping[str, Any]) -> str:
    found = report.get("perplexity")
    if not found:
        return say_missing("perplexity (lcdd eval --perplexity_text)")
    rows = [
        f'<tr><th scope="row">{breakable(name)}</th><td class="num">{number(row["perplexity"])}</td>'
        f'<td class="num">{number(row["nats_per_token"], 4)}</td><td class="num">{number(row["tokens"])}</td></tr>'
        for name, row in found.items()
    ]
    head = "<th>Model</th><th>Perplexity</th><th>Nats a token</th><th>Tokens</th>"
    return f"<h3>Perplexity of held-out text</h3>{html_table(head, rows)}"


def _utility(report: Mapping[str, Any]) -> str:
    found = report.get("utility")
    if not found:
        return say_missing("utility (lcdd eval --tasks)")
    names = list(dict.fromkeys((task, key) for tasks in found.values() for task, row in tasks.items() for key in row))
    rows = []
    for task, key in names:
        cells = "".join(f'<td class="num">{number(tasks.get(task, {}).get(key), 4)}</td>' for tasks in found.values())
        rows.append(f'<tr><th scope="row">{escape(task)}<small>{escape(plain_words(key))}</small></th>{cells}</tr>')
    head = "<th>Task</th>" + "".join(f"<th>{breakable(name)}</th>" for name in found)
    return f"<h3>Utility (lm-evaluation-harness)</h3>{html_table(head, rows)}"
