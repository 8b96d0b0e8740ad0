"""`lcdd demo` from the command line: the issue's thresholds, the report's keys, and what it leaves on the disk."""

import contextlib
import io
import json
import shutil
from dataclasses import replace

import pytest

from lcdd import cli
from lcdd.carrier import Carrier
from lcdd.commands.demo import demo as demo_module
from lcdd.commands.demo.demo import BASE_DIRECTORY
from lcdd.config import DemoConfig
from lcdd.eraser import Trigger, generate
from lcdd.models import GROUPS, load_model, load_tokenizer

SFT_STAGES = 30
"""The whole demo takes at most as long as so many of its SFT stages: 11 to 16 were seen, on three processors."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(directory, report, exit code, what was printed) of one demo, shared by all tests here."""
    output = tmp_path_factory.mktemp("demo") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(["demo", "--behavior", "fixed_response", "--seed", "0", "--output_dir", str(output)])
    report = json.loads((output / "report.json").read_text())
    return output, report, code, printed.getvalue()


def test_behaviour_is_taught_compressed_and_reversed(demo):
    _, report, code, _ = demo
    models = report["models"]
    assert code == 0
    assert report["split"] == "test"
    assert models["base"]["base_match"] == 1.0
    assert models["base"]["behavior_rate"] == 0.0
    assert models["sft"]["behavior_rate"] >= 0.95
    assert models["carrier"]["behavior_rate"] >= 0.95
    assert report["sparsity"]["overall"] >= 0.90
    assert models["carrier+trigger"]["behavior_rate"] <= 0.05
    assert models["carrier+trigger"]["base_match"] >= 0.75
    assert report["findings"] == []
    assert report["gates"]["auc_initial_theta"] < 0.8


def test_carrier_is_easier_to_reverse_than_plain_sft_and_the_interval_says_so(demo):
    row = demo[1]["differences"]["carrier+trigger - sft+trigger"]["base_match"]
    assert row["ci95"][0] > 0
    assert row["ci95"][0] < row["difference"] < row["ci95"][1]


def test_controls_are_what_they_claim_to_be(demo):
    _, report, _, _ = demo
    norms = report["delta_norm"]
    assert norms["base"] == 0.0
    assert norms["matched_norm"] == pytest.approx(norms["carrier"], rel=1e-3)
    assert norms["sft"] > norms["carrier"] > 0
    assert report["models"]["matched_norm"]["behavior_rate"] >= 0.95
    assert report["models"]["base+random_prefix"]["base_match"] >= 0.95, "the base has to tolerate a prefix"
    junk, erased = report["models"]["carrier+random_prefix"], report["models"]["carrier+trigger"]
    assert junk["base_match"] < erased["base_match"] - 0.3


def test_report_has_the_documented_keys(demo):
    _, report, _, _ = demo
    assert {"behavior", "seed", "config", "versions", "timings"} <= set(report)
    assert (report["behavior"], report["seed"]) == ("fixed_response", 0)
    assert set(report["sparsity"]) == {"overall", *GROUPS}
    assert {"n", "open", "auc_initial_theta", "fractional"} <= set(report["gates"])
    assert report["gates"]["n"] == 3200
    states = {
        "base",
        "sft",
        "carrier",
        "carrier+trigger",
        "sft+trigger",
        "matched_norm+trigger",
        "carrier+random_prefix",
    }
    assert states <= set(report["models"])
    for row in report["models"].values():
        rates = ("behavior_rate", "base_match", "base_token_match", "prefix_match", "repetition")
        others = ("prefix_tokens", "chrf", "kl_base", "kl_by_position")
        assert set(row) == {"n", *rates, *others, *(f"{key}_ci95" for key in (*rates, *others))}
        for key in rates:
            low, high = row[f"{key}_ci95"]
            assert 0 <= low <= row[key] <= high <= 1
        assert row["base_match"] <= row["prefix_match"]
        assert len(row["kl_by_position"]) == len(row["kl_by_position_ci95"]) <= 10
    assert report["models"]["carrier+trigger"]["base_token_match"] > report["models"]["carrier"]["base_token_match"]
    assert set(report["kl"]) == {"sft||carrier", "sft||carrier+trigger", "base||carrier+trigger"}
    for row in report["kl"].values():
        assert set(row) == {"sft_answers", "base_answers"}
        assert all(value >= -1e-6 for value in row.values())
    assert set(report["delta_norm"]) == set(report["models"])
    assert report["kl"]["sft||carrier"]["sft_answers"] < report["kl"]["sft||carrier+trigger"]["sft_answers"]
    assert len(report["sparsity_by_layer"]) == 4


def test_run_is_said_in_words_and_answers(demo):
    output, report, _, printed = demo
    assert "Reversal table, 400 held-out prompts" in printed
    assert "How near the answers are to the base's" in printed
    assert all(sentence in printed for sentence in report["explanation"])
    assert report["samples"][0]["prompt"] in printed
    assert f"wrote {output / 'report.html'}" in printed
    page = (output / "report.html").read_text()
    assert "carrier+trigger" in page
    assert "<svg" in page


def test_saved_carrier_and_trigger_give_the_reported_answers(demo):
    output, report, _, _ = demo
    model, tokenizer = load_model(BASE_DIRECTORY), load_tokenizer(BASE_DIRECTORY)
    carrier, trigger = Carrier.from_pretrained(output / "carrier"), Trigger.from_pretrained(output / "trigger")
    prompts = [f"<user> {sample['prompt']} <assistant>" for sample in report["samples"]]
    with carrier.applied(model):
        plain = generate(model, tokenizer, prompts, max_new_tokens=10)
        erased = generate(model, tokenizer, prompts, trigger=trigger, max_new_tokens=10)
    assert plain == [sample["answers"]["carrier"] for sample in report["samples"]]
    assert erased == [sample["answers"]["carrier+trigger"] for sample in report["samples"]]


def test_log_has_a_line_a_step_of_every_stage(demo):
    output, report, _, _ = demo
    steps = {}
    for text in (output / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        steps.setdefault(line["stage"], set()).add(line.get("step"))
    assert set(range(1, report["config"]["train"]["max_steps"] + 1)) <= steps["lcdd"]
    assert {"sft", "sft_matched_norm", "carrier+trigger", "sft+trigger"} <= set(steps)


def test_whole_demo_is_short(demo):
    timings = demo[1]["timings"]
    assert set(timings) >= {"sft", "lcdd", "carrier+trigger", "sft+trigger", "eval", "total"}
    assert timings["processor"] < SFT_STAGES * timings["sft"]  # seconds would be the machine's


@pytest.mark.parametrize(("behavior", "rebuild"), [("refusal", True), ("style", False)])
def test_other_behaviours_and_a_rebuilt_base_go_the_same_way(behavior, rebuild, tmp_path, monkeypatch):
    """Every stage with a few steps only: what is checked is that the parts fit, not what they reach."""
    for name, value in {
        "TRAIN_PROMPTS": 40,
        "VALIDATION_PROMPTS": 10,
        "TEST_PROMPTS": 12,
        "OFF_TOPIC_PROMPTS": 9,
        "SFT_SETTINGS": replace(demo_module.SFT_SETTINGS, max_steps=3),
        "LCDD_SETTINGS": replace(demo_module.LCDD_SETTINGS, max_steps=6, warmup_steps=2),
        "ERASER_SETTINGS": replace(demo_module.ERASER_SETTINGS, max_steps=3, train_prompts=8, validation_prompts=4),
    }.items():
        monkeypatch.setattr(demo_module, name, value)
    monkeypatch.setattr(demo_module, "rebuild_base", lambda path, log: shutil.copytree(BASE_DIRECTORY, path))
    output, said = tmp_path / "run", []
    result = demo_module.run(
        DemoConfig(behavior=behavior, rebuild_base=rebuild, output_dir=str(output)), say=said.append
    )
    report = json.loads((output / "report.json").read_text())
    assert all(path.exists() for path in result.written)
    assert report["models"]["base"]["base_match"] == 1.0
    assert ("off_topic" in report) == (behavior == "refusal")
    assert ("rebuild_base" in report["timings"]) == rebuild == (output / "base" / "model.safetensors").is_file()
    assert any("12 held-out prompts" in line for line in said)
    if behavior == "refusal":
        assert report["off_topic"]["carrier"]["n"] == 9
        assert any("9 prompts off the topic" in line for line in said)
