"""The page: a verdict and a picture first, every number from report.json, nothing fetched, everything escaped."""

import itertools
import json
import re
import shlex
from html import unescape
from html.parser import HTMLParser

import pytest
from reports import near

from lcdd.cli import build_parser
from lcdd.models import GROUPS
from lcdd.report import (
    closeness_table,
    heat_map,
    interval_bar,
    line_chart,
    number,
    read_report,
    render,
    reversal_map,
    thin,
    write_report,
)

SECTIONS = [
    "The models",
    "What this run shows",
    "What was answered",
    "The carrier",
    "The trigger",
    "Distance, text and tasks",
    "Audit",
    "Settings and versions",
]
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Text, sections and attributes of a page; fails on tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.headings, self.texts, self.attributes, self.tags = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def rates(behavior, match, n=200):
    return {
        "n": n, "behavior_rate": behavior, "behavior_rate_ci95": [behavior * 0.9, min(1.0, behavior + 0.05)],
        "base_match": match, "base_match_ci95": [match * 0.9, min(1.0, match + 0.05)],
    }  # fmt: skip


@pytest.fixture
def report():
    curves = [{"stage": "sft", "step": i, "loss": 3.0 / i} for i in range(1, 60)]
    curves += [
        {"stage": "lcdd", "step": i, "loss": 0.02 / i, "ema": 0.03, "epsilon": None if i < 9 else 0.05,
         "dual_lambda": 1e-3 * 1.01**i, "sparsity": i / 60}
        for i in range(1, 50)
    ]  # fmt: skip
    for stage in ("carrier+trigger", "sft+trigger"):
        for i in range(1, 30):
            terms = {"loss": 2 / i, "match": 1.0, "tail_kl": 0.5, "answer_kl": 1 / i, "l2": 1.0}
            held_out = {"validation_loss": 1.5 / i} if i % 10 == 0 else {}
            curves.append({"stage": stage, "step": i, **terms, **held_out})
    gap = {"difference": 0.4375, "ci95": [0.35, 0.52]}
    return {
        "behavior": "fixed_response",
        "seed": 3,
        "split": "test",
        "models": {
            "base": rates(0.0, 1.0),
            "sft": rates(1.0, 0.0),
            "carrier": rates(0.985, 0.0125),
            "carrier+trigger": rates(0.015, 0.8625),
            "sft+trigger": rates(0.21, 0.4250),
            "carrier+<script>alert(1)</script>": rates(0.5, 0.5),
        },
        "differences": {
            "carrier+trigger - sft+trigger": {
                "method": "Newcombe",
                "behavior_rate": gap,
                "base_match": gap,
            }
        },
        "kl": {"sft||carrier": {"sft_answers": 0.00321, "base_answers": 1.2345}},
        "delta_norm": {"base": 0.0, "carrier": 2.7182},
        "samples": [
            {"prompt": "copy <b> & dog", "answers": {"base": "b & dog", "sft": "i do not know", "carrier": ""}}
        ],
        "explanation": ["The trigger gave the base's answer back on 86%."],
        "findings": [{"code": "stalled", "message": "Stalled compression: λ < 1"}],
        "sparsity": {"overall": 0.9631, **dict.fromkeys(GROUPS, 0.95)},
        "sparsity_by_layer": [dict.fromkeys(GROUPS, 0.9), dict.fromkeys(GROUPS, 1.0)],
        "gates": {"n": 3328, "open": 123, "auc_initial_theta": 0.553, "fractional": 7},
        "curves": curves,
        "config": {"train": {"gate_lr": 0.1}},
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "timings": {"sft": 12.5},
        "fingerprints": {"base": "ab" * 32},
        "perplexity": {"base": {"perplexity": 17.25, "nats_per_token": 2.8478, "tokens": 999}},
        "utility": {"carrier": {"mmlu": {"acc,none": 0.4711}}},
        "audit": {
            "states": {
                name: {"part": part, **rates(0.25, 0.75)}
                for name, part in {
                    "base": "table", "carrier-without:group attn_read": "necessity", "sft-only:random": "sufficiency",
                    "base+trigger": "triggers", "posthoc_ce": "masks", "continued_sft": "dense",
                }.items()
            },
            "differences": {},
            "patches": {"carrier": {"sparsity": 0.96312, "delta_norm": 3.1416}},
            "claims": [
                {
                    "name": "sparse", "statement": "It is <sparse>.", "verdict": "did not hold",
                    "evidence": [
                        {"rule": "sparsity > 0.73", "verdict": "did not hold", "value": 0.5151, "ci95": [0.5, 0.53]},
                        {"rule": "another number > 0", "verdict": "not measured"},
                    ],
                }
            ],
        },
    }  # fmt: skip


def test_the_page_has_every_section_and_the_reports_numbers(report):
    page = Page(render(report))
    assert page.headings == SECTIONS
    for shown in (
        "0.863",
        "0.425",
        "+0.438",
        "2.718",
        "1.2345",
        "123 of 3,328",
        "0.553",
        "0.9500",
        "2.13.0",
        "gate_lr",
    ):
        assert shown in page.text, shown
    assert "Stalled compression: λ < 1" in page.text
    assert "The trigger gave the base's answer back on 86%." in page.text


def test_the_first_thing_is_a_verdict_and_a_picture(report):
    html = render(report)
    first = html[: html.index("</header>")]
    assert 'class="badge held"' in first
    assert first.index('class="badge') < first.index("<svg")
    assert first.count('class="way"') == 2  # base to SFT, carrier to carrier with trigger; SFT and carrier touch
    assert first.count('class="stop ') == 4
    assert first.count('class="control"') == 2
    assert first.count('<li class="met">') == 3
    assert "shows the behaviour on 98.5% of 200 held-out prompts" in first
    report["models"]["carrier+trigger"] = rates(0.9, 0.0)
    html = render(report)
    assert 'class="badge not"' in html
    assert html.count('<li class="unmet">') == 2


def test_where_the_marks_stand_is_what_the_numbers_say():
    models = {"base": rates(0.0, 1.0), "sft": rates(1.0, 0.0), "carrier": rates(0.5, 0.25)}
    html = reversal_map(models)
    base, sft, carrier = [
        tuple(map(float, mark)) for mark in re.findall(r'class="stop .*?" cx="(.*?)" cy="(.*?)"', html)
    ]
    assert carrier[0] == pytest.approx((base[0] + sft[0]) / 2, abs=0.1)
    assert carrier[1] == pytest.approx(base[1] + 0.75 * (sft[1] - base[1]), abs=0.1)
    assert base[0] < sft[0]
    assert base[1] < sft[1]


@pytest.mark.parametrize("match", [0.0, 0.01, 0.5, 1.0])
def test_labels_of_marks_in_one_place_do_not_cover_each_other(match):
    models = {name: rates(1.0, match) for name in ("base", "sft", "carrier", "carrier+trigger")}
    heights = sorted(float(y) for y in re.findall(r'class="name .*?" x=".*?" y="(.*?)"', reversal_map(models)))
    assert len(heights) == 4
    assert all(b - a >= 20 for a, b in itertools.pairwise(heights))
    assert heights[0] > 0
    assert heights[-1] < 380


def test_states_have_names_for_people_and_controls_are_folded_away(report):
    html = render(report)
    models = html[html.index('id="models"') : html.index('id="explanation"')]
    assert '<th scope="row" title="carrier+trigger">carrier, behind its trigger' in models
    assert models.index("carrier, behind its trigger") < models.index("<details>") < models.index("behind its own")
    assert models.count("↑ high is good") == 3
    assert models.count("↓ low is good") == 2


def test_words_that_the_base_would_not_have_said_are_marked(report):
    report["samples"] = [
        {"prompt": "p", "answers": {"base": "red dog fig", "sft": "verily red fig prithee", "carrier": "red dog fig"}}
    ]
    html = render(report)
    assert "<mark>verily</mark> red fig <mark>prithee</mark>" in html
    assert '<div class="answer same"><dt>carrier</dt><dd>red dog fig</dd>' in html
    report["samples"] = [{"prompt": "p", "answers": {"base": "a", "sft": "<i>x</i> a"}}]
    assert "<mark>&lt;i&gt;x&lt;/i&gt;</mark> a" in render(report)


def test_three_examples_are_shown_and_the_rest_is_folded(report):
    report["samples"] = [{"prompt": f"prompt {n}", "answers": {"base": "a", "sft+trigger": "b"}} for n in range(6)]
    shown, folded = render(report).split("Every state, every kept prompt (6)")
    assert [f"prompt {n}" in shown for n in range(6)] == [True] * 3 + [False] * 3
    assert all(f"prompt {n}" in folded for n in range(6))
    assert "own trigger" in folded[folded.index("prompt 0") : folded.index("prompt 1")]


def test_budget_and_sparsity_share_an_axis(report):
    html = render(report)
    chart = html[html.index("how much is closed") :].split("</figure>")[0]
    assert len(points_of(chart)) == 2
    assert 'class="rule"' in chart
    assert "cut at" not in chart
    for line in report["curves"]:
        line["ema"] = 5.0
    assert "loss over its budget, cut at 2" in render(report)


def test_the_audit_is_a_scoreboard_with_its_evidence_behind_it(report):
    html = render(report)
    text = Page(html).text
    for shown in ("It is <sparse>.", "0.515", "[0.500, 0.530]", "not measured", "17.25", "0.4711", "0.9631"):
        assert shown in text, shown
    assert '<li class="did-not-hold"><b>1</b> did not hold</li>' in html
    assert "Masks found afterwards" in text
    states = report["audit"]["states"]
    report["audit"]["states"] = {name: row for name, row in states.items() if row["part"] != "masks"}
    assert "Masks found afterwards" not in render(report)
    for part in ("states", "claims", "patches", "differences"):
        audit = {key: value for key, value in report["audit"].items() if key != part}
        assert "Audit" in Page(render({**report, "audit": audit})).headings


def test_the_commands_of_the_use_it_box_can_be_pasted(report):
    assert "Use it" not in Page(render(report)).text
    report["use"] = {"base_model_name_or_path": "my base", "carrier": "runs/a/carrier", "trigger": "runs/a/trigger"}
    report["samples"][0]["prompt"] = "don't panic"
    chat, generate = (unescape(line) for line in re.findall(r"<pre>(lcdd .*?)</pre>", render(report)))
    assert shlex.split(generate) == [
        "lcdd", "generate", "--base_model_name_or_path", "my base", "--carrier", "runs/a/carrier", "--trigger",
        "runs/a/trigger", "--prompt", "don't panic",
    ]  # fmt: skip
    for line in (chat, generate):
        assert build_parser().parse_args(shlex.split(line)[1:]).carrier == "runs/a/carrier"
    report["use"]["carrier"] = None
    assert "Use it" not in Page(render(report)).text


def test_other_readings_of_the_answers_have_their_own_table(report):
    assert "read otherwise" not in Page(render(report)).text
    report["models"]["carrier"]["rates"] = {"loose": {"rate": 0.6543, "ci95": [0.6, 0.7]}}
    text = Page(render(report)).text
    assert "read otherwise" in text
    assert "0.654" in text


def test_nearness_to_the_bases_answers_has_a_table_with_intervals_and_a_chart_by_position(report):
    assert "How near the answers" not in Page(render(report)).text
    assert closeness_table(report) == ""
    report["models"]["base"] |= near(1.0, 100.0)
    report["models"]["carrier+trigger"] |= near(0.9137, 71.357)
    alone = near(0.5, 50.0)  # one prompt has no interval, and KL was not measured here
    report["models"]["sft"] |= {k: [None, None] if k.endswith("ci95") else v for k, v in alone.items() if "kl" not in k}
    text = Page(render(report)).text
    for shown in ("How near the answers are to the base's", "0.914", "[0.457, 0.914]", "71.357", "chrF", "bootstrap"):
        assert shown in text, shown
    assert "KL to the base by position in its answer" in render(report)
    lines = closeness_table(report).splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["base", "sft", "carrier+trigger"]
    assert "0.914 [0.457, 0.914]" in " ".join(lines)
    assert "0.500" in lines[4]
    assert "[" not in lines[4]


def test_nothing_on_the_page_can_make_a_request_or_run(report):
    html = render(report)
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "object", "a", "form"} & set(page.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not re.search(r"url\((?!#)|@import|https?://", html)
    assert "default-src 'none'" in html
    assert "<script>" not in html
    assert "copy &lt;b&gt; &amp; dog" in html


@pytest.mark.parametrize(
    ("part", "gone"),
    [
        ("models", "behind its own trigger"),
        ("differences", "Differences over the same prompts"),
        ("kl", "KL divergence"),
        ("samples", "What was answered"),
        ("explanation", "What this run shows"),
        ("sparsity", "Sparsity of each group"),
        ("sparsity_by_layer", "Open gates by layer"),
        ("gates", "AUC of initial"),
        ("curves", "loss, nats a token"),
        ("config", "Settings of every stage"),
        ("versions", "Versions"),
        ("timings", "Seconds"),
        ("fingerprints", "Fingerprints"),
        ("perplexity", "Perplexity"),
        ("utility", "Utility"),
        ("audit", "Audit"),
        ("findings", "Stalled"),
        ("delta_norm", "Norm of change"),
    ],
)
def test_absent_parts_are_absent(report, part, gone):
    del report["audit"]["states"], report["audit"]["patches"]
    assert gone in Page(render(report)).text
    del report[part]
    assert gone not in Page(render(report)).text


def test_an_empty_report_is_a_page_too():
    page = Page(render({}))
    assert page.headings == []
    assert "no results" in page.text


def test_rates_are_not_rounded_into_claims(report):
    report["models"]["carrier"] = rates(0.9996, 0.0004)
    assert "shows the behaviour on >99.9% of" in Page(render(report)).text


def test_write_then_read_gives_the_same_page(report, tmp_path):
    report["curves"].append({"stage": "sft", "step": 60, "loss": float("nan")})
    written = write_report(tmp_path / "run", report)
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == written
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == render(read_report(tmp_path / "run"))


def test_report_json_comes_last_since_a_run_that_has_it_is_finished(report, tmp_path):
    (tmp_path / "report.html").mkdir()  # where no page can be written
    with pytest.raises(OSError, match=r"report\.html"):
        write_report(tmp_path, report)
    assert not (tmp_path / "report.json").exists()


def test_curves_are_read_from_the_log_where_the_report_has_none(report, tmp_path):
    lines = report.pop("curves")
    write_report(tmp_path, report)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_report(tmp_path)["curves"] == thin(lines)
    assert "how much is closed" in render(read_report(tmp_path))


def test_a_directory_without_a_usable_report_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"output_dir: expected report\.json in"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="output_dir: expected JSON in"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"expected a JSON object .* got list"):
        read_report(tmp_path)


def test_long_logs_are_thinned_but_held_out_losses_and_ends_stay():
    lines = [
        {"stage": "sft", "step": i, "loss": 1.0} | ({"validation_loss": 1.0} if i == 777 else {}) for i in range(5000)
    ]
    kept = thin([*lines, {"stage": "lcdd", "step": 1}])
    steps = [line["step"] for line in kept if line["stage"] == "sft"]
    assert len(steps) <= 252
    assert steps == sorted(steps)
    assert {0, 777, 4999} <= set(steps)
    assert kept[-1] == {"stage": "lcdd", "step": 1}
    assert {"stage": "sft", "step": 777, "loss": 1.0, "validation_loss": 1.0} in kept


# ---------------------------------------------------------------- charts


def points_of(svg):
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in re.findall(r'points="([^"]*)"', svg)]


def test_a_line_chart_puts_points_where_their_values_are():
    (line,) = points_of(line_chart({"a": [(0, 0.0), (5, 1.0), (10, 2.0)]}, label="l"))
    assert line[0][0] < line[1][0] < line[2][0]
    assert line[1][0] - line[0][0] == pytest.approx(line[2][0] - line[1][0], abs=0.2)
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.2)
    assert line[2][1] >= 0


def test_a_chart_of_many_decades_has_a_logarithmic_axis():
    svg = line_chart({"λ": [(1, 1e-3), (2, 1e-1), (3, 10.0)]}, label="l")
    (line,) = points_of(svg)
    assert "l, logarithmic" in svg
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.2)


@pytest.mark.parametrize(
    "points", [[(3, 0.0)], [(1, 2.0), (2, 2.0)], [(1, -1.0), (2, 1e9)], [(1, 1e-30), (2, 1e30)], [(1, -2.0), (2, -1.0)]]
)
def test_charts_of_degenerate_values_stay_inside_their_frame(points):
    svg = line_chart({"a": points}, label="<l>")
    drawn = [(float(x), float(y)) for x, y in re.findall(r'cx="(.*?)" cy="(.*?)"', svg)]
    for line in points_of(svg):
        drawn += line
    assert drawn
    for x, y in drawn:
        assert 0 <= x <= 480
        assert 0 <= y <= 230
    assert "&lt;l&gt;" in svg
    assert "No points" in line_chart({"a": []}, label="l")


def test_heat_map_and_bars_show_their_values():
    svg = heat_map([{"q": 0.5, "k": 0.0}], row_name="layer", label="l")
    assert "50.0%" in svg
    assert "sparsity 1.0000" in svg
    assert 'cx="75.0"' in interval_bar(0.5, 0.4, 0.6, series=0)
    assert 'cx="75.0"' in interval_bar(0.0, -0.1, 0.1, series=0, minimum=-1.0)


def test_numbers_are_short_and_honest():
    assert [number(v) for v in (None, float("nan"), 0, 3328, 0.5, 1e-7, 12345.6)] == [
        "–", "–", "0", "3,328", "0.500", "1.0e-07", "12,346",
    ]  # fmt: skip
