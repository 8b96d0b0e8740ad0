"""What is said of a run: words follow the numbers, nothing is rounded into a claim, tables fit their place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import rates, run_report

from lcdd.commands.stage import tell
from lcdd.report import (
    claims_table,
    explain,
    markdown_table,
    paragraph,
    reversal_table,
    samples_table,
    text_table,
    verdict,
)
from lcdd.report.labels import label, share


def test_words_follow_the_numbers_and_not_the_hope():
    good = " ".join(explain(run_report()))
    assert "base is back almost everywhere" in good
    assert "easier to reverse than plain SFT" in good
    assert "does not explain the carrier's reversal" in good
    assert "hardly predicts" in good

    bad = " ".join(explain(run_report(erased=(0.0, 0.1), plain=(0.0, 0.4), against_matched=(-0.7, -0.5), auc=0.99)))
    assert "That is no reversal" in bad
    assert "harder to reverse than plain SFT" in bad
    assert "even easier to reverse" in bad
    assert "noise chose this carrier" in bad

    still_there = " ".join(explain(run_report(erased=(0.9, 0.0))))
    assert "does not switch the behaviour off" in still_there

    unclear = " ".join(explain(run_report(plain=(0.0, 0.9), against_matched=(-0.05, 0.05))))
    assert "no difference can be told" in unclear
    assert "sparsity adds nothing that shows" in unclear


def test_free_answers_are_held_against_what_the_base_says_behind_random_tokens():
    report = run_report(erased=(0.05, 0.1))
    report["models"]["base+random_prefix"] = rates(0.0, 0.2) | {"chrf": 59.0}
    for chrf, words in ((52.0, "hardly more so than the base's own behind random tokens (chrF 52 against 59)"),
                        (20.0, "That is no reversal")):  # fmt: skip
        report["models"]["carrier+trigger"]["chrf"] = chrf
        assert words in " ".join(explain(report))


def test_a_trigger_that_switches_off_what_random_tokens_leave_has_learned_something():
    said = " ".join(explain(run_report(erased=(0.05, 0.01))))  # neither gives the base back
    assert "it is what the trigger says that counts" in said
    useless = run_report(erased=(0.85, 0.01))
    assert "any prefix would have done" in " ".join(explain(useless))


def test_findings_and_off_topic_answers_are_said():
    report = run_report()
    report["findings"] = [{"code": "dead_carrier", "message": "Dead carrier: everything is closed."}]
    report["off_topic"] = {name: rates(0.0, 0.75, n=123) for name in ("base", "sft", "carrier", "carrier+trigger")}
    said = explain(report)
    assert "WARNING Dead carrier: everything is closed." in said
    assert any("123 prompts off the topic" in sentence and "75.0%" in sentence for sentence in said)


@pytest.mark.parametrize("part", ["models", "gates", "differences", "kl", "delta_norm", "sparsity"])
def test_what_was_not_measured_is_not_spoken_of(part):
    report = run_report()
    if part == "sparsity":
        del report["gates"]
    del report[part]
    said = " ".join(explain(report))
    assert {"models": "SFT taught", "gates": "LCDD left", "differences": "carrier minus", "kl": "KL in nats",
            "delta_norm": "plain SFT 8.00", "sparsity": "LCDD left"}[part] not in said  # fmt: skip
    for state in ("sft", "carrier", "carrier+trigger", "sft+trigger", "carrier+random_prefix"):
        smaller = run_report()
        del smaller["models"][state]
        smaller["differences"] = {k: v for k, v in smaller["differences"].items() if state not in k.split(" - ")}
        assert explain(smaller)


def test_an_audit_alone_is_explained_as_a_demo_is():
    report = run_report()
    states = {name: {"part": "table", **row} for name, row in report.pop("models").items()}
    states["sft-only:random"] = {"part": "sufficiency", **rates(0.5, 0.5)}
    report["audit"] = {"states": states, "differences": report.pop("differences")}
    assert explain(report) == explain(run_report())
    assert verdict(report) == verdict(run_report())


# ---------------------------------------------------------------- verdict


@pytest.mark.parametrize(
    ("changes", "badge"),
    [
        ({}, "held"),
        ({"erased": (0.16, 0.9)}, "held"),  # the whole interval lies below 0.2
        ({"erased": (0.18, 0.9)}, "partly"),
        ({"erased": (0.0, 0.52)}, "partly"),
        ({"erased": (0.9, 0.0)}, "not"),
        ({"carrier": 0.89}, "not"),
        ({"carrier": 0.9}, "held"),
    ],
)
def test_the_badge_needs_whole_intervals_on_the_right_side(changes, badge):
    found = verdict(run_report(**changes))
    assert found.badge == badge
    assert (badge == "held") == all(found.checks.values())


def test_a_prefix_of_anything_is_no_off_switch():
    report = run_report()
    report["models"]["carrier+random_prefix"] = rates(0.0, 0.9)
    assert verdict(report).badge == "partly"
    del report["models"]["carrier+random_prefix"]
    assert verdict(report).badge == "held"
    del report["models"]["carrier+trigger"]
    assert verdict(report) is None


def test_the_sentence_is_made_of_the_numbers():
    assert verdict(run_report(carrier=0.995)).sentence == (
        "With 96.9% of the gates closed, the carrier shows the behaviour on 99.5% of 400 held-out prompts; behind its "
        "trigger on 0%, and there it gives exactly the base's answer on 90.0%."
    )


@given(st.floats(0, 1))
def test_a_share_is_all_or_nothing_only_if_it_is(value):
    text = share(value)
    assert (text == "100%") == (value == 1)
    assert (text == "0%") == (value == 0)
    assert text.startswith((">", "<")) or abs(float(text[:-1]) / 100 - value) <= 0.00051


def test_shares_at_the_ends():
    assert [share(v) for v in (0.0, 1e-9, 0.995, 0.9996, 1.0)] == ["0%", "<0.1%", "99.5%", ">99.9%", "100%"]


# ---------------------------------------------------------------- tables


def test_every_state_has_a_name_for_people():
    assert label("carrier+trigger") == "carrier, behind its trigger"
    assert label("matched_norm+trigger") == "dense SFT of equal norm, behind its own trigger"
    assert label("carrier-without:group attn_read") == "carrier without group attn read"


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_a_table_is_never_wider_than_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    report = run_report()
    report["samples"][0]["answers"]["sft"] = "a very long answer " * 20
    claim = {"rule": "base match of carrier+trigger minus that of sft+trigger > 0", "verdict": "held", "value": 0.1}
    evidence = [{**claim, "ci95": [0.05, 0.15]}, {"rule": "sparsity " * 20, "verdict": "not measured"}]
    audit = {"claims": [{"name": "n", "statement": "A long one. " * 20, "verdict": "held", "evidence": evidence}]}
    said = "\n".join(paragraph(sentence, first="- ") for sentence in explain(report))
    for text in (reversal_table(report), samples_table(report), claims_table(audit), said):
        assert max(len(line) for line in text.splitlines()) <= columns
    text = " ".join(reversal_table(report).split())
    assert "400 held-out prompts" in text


def test_tables_have_every_state_and_number(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    lines = reversal_table(run_report()).splitlines()
    assert len(lines) == 3 + 7
    assert [line.split("  ")[0] for line in lines[3:7]] == ["base", "sft", "carrier", "carrier+trigger"]
    assert lines[6].split()[1:] == ["0.000", "[0.000,", "0.030]", "0.900", "[0.870,", "0.930]"]
    assert "5.000" in lines[5]
    markdown = markdown_table(run_report()).splitlines()
    assert len(markdown) == 2 + 7
    assert all(line.count("|") == 5 for line in markdown)
    assert markdown[5] == "| carrier, behind its trigger | 0.000 [0.000, 0.030] | 0.900 [0.870, 0.930] |  |"


def test_samples_stand_side_by_side(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    lines = samples_table(run_report()).splitlines()
    assert lines[0].split()[:3] == ["prompt", "base", "sft"]
    assert lines[-1].count("red dog") == 6


def test_brackets_in_answers_are_text_and_not_markup(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "[bold]x[/bold] :smile:" in text_table(["a"], [["[bold]x[/bold] :smile:"]])


def test_without_a_terminal_nothing_is_broken_into_lines(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "word " * 100 + "end"
    assert paragraph(long, first="- ") == f"- {long}"
    tell(f"  {long}")
    assert capsys.readouterr().out == f"  {long}\n"
    report = run_report()
    report["samples"][0]["prompt"] = "cat green rake cow lemon"
    assert "cat green rake cow lemon" in samples_table(report)


def test_what_is_told_fits_the_terminal_and_keeps_its_indentation(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    tell(f"short\n  {'word ' * 40}\n")
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "short"
    assert max(map(len, lines)) <= 60
    assert all(line.startswith("  word") for line in lines[1:-2])
