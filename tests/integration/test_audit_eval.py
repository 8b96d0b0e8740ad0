"""`lcdd audit`, the pipeline's audit, and `lcdd eval`'s text, tasks and own rules, on a tiny checkpoint.

The models are small and random: what is tested is that every control is trained, evaluated and judged as it says.
"""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from fixtures.checkpoints import instruction_rows, save_checkpoint, write_jsonl
from lcdd.carrier import Carrier
from lcdd.checkpoint import read_log
from lcdd.cli import main
from lcdd.models import GROUPS
from lcdd.report import read_report

PIPELINE = """
base_model_name_or_path: {base}
output_dir: {output}
run_audit: true
data: {{dataset_name: {data}, test_fraction: 0.2}}
sft: {{learning_rate: 1e-2, max_steps: 20}}
train: {{learning_rate: 1e-3, max_steps: 20, warmup_steps: 5, gate_lr: 0.4, dual_lambda_init: 0.02}}
erase: {{max_steps: 2, eval_steps: 2, train_prompts: 6, validation_prompts: 3, max_answer_tokens: 4, num_starts: 2,
        save_steps: 1}}
eval: {{num_prompts: 4, max_new_tokens: 5, kl_prompts: 2, random_prefixes: 2, perplexity_text: {text}}}
audit: {{num_prompts: 4, max_new_tokens: 5, random_draws: 2}}
"""
CONTROLS = {
    "sft", "carrier", "carrier+trigger", "matched_norm", "matched_norm+trigger", "sft+trigger", "sft+carrier_trigger",
    "base+trigger", "base+random_prefix", "carrier+random_prefix", "carrier+trigger_random_channels",
    "carrier+trigger_kl_only", "carrier+trigger_matching_only", "sft-without:carrier", "sft-without:random",
    "sft-only:carrier", "sft-only:random", "random_mask", "random_mask+trigger", "posthoc_ce", "posthoc_ce+trigger",
    "posthoc_kl", "posthoc_kl+trigger", "continued_sft", "continued_sft+trigger",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(base, data, directory) of one pipeline with an audit, shared by all tests here."""
    folder = tmp_path_factory.mktemp("audited")
    base = save_checkpoint(folder / "base", "qwen3", tied=True)
    rows = [row for row in instruction_rows() if len("".join(row.values())) < 300][:60]
    data = write_jsonl(folder / "data.jsonl", rows)
    text = write_jsonl(folder / "text.jsonl", [{"text": row["output"]} for row in rows[:5]])
    (folder / "p.yaml").write_text(PIPELINE.format(base=base, data=data, output=folder / "out", text=text))
    assert main(["run", str(folder / "p.yaml")]) == 0
    return base, data, folder / "out"


def test_every_state_is_answered_and_every_claim_judged_on_its_numbers(run):
    base, _, output = run
    audit = read_report(output)["audit"]
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    parts = {f"carrier-without:group {group}" for group in GROUPS}
    parts |= {f"carrier-without:layer {layer}" for layer in range(layers)}
    assert set(audit["states"]) == CONTROLS | parts | {"base"}
    assert all(row["n"] == 4 for row in audit["states"].values())
    assert audit["states"]["base"]["base_match"] == 1.0
    assert {claim["verdict"] for claim in audit["claims"]} <= {"held", "did not hold", "undecided"}
    for claim in audit["claims"]:
        for row in claim["evidence"]:
            low, high = row["ci95"]
            assert low <= row["value"] <= high
    html = (output / "report.html").read_text(encoding="utf-8")
    assert all(claim["verdict"] in html for claim in audit["claims"])
    assert "no audit" not in html


def test_controls_are_of_the_carriers_size_and_training(run):
    _, _, output = run
    patches = read_report(output)["audit"]["patches"]
    carrier = Carrier.from_pretrained(output / "train" / "carrier")
    assert patches["carrier"]["n_open"] == patches["random_mask"]["n_open"] == carrier.n_open
    assert patches["sft"]["sparsity"] == patches["continued_sft"]["sparsity"] == 0.0
    assert patches["posthoc_ce"]["n_open"] > 0
    stages = {}
    for line in read_log(output / "log.jsonl"):
        stages.setdefault(line["stage"], []).append(line["step"])
    for stage in ("audit_random_mask", "audit_posthoc_ce", "audit_posthoc_kl", "audit_continued_sft"):
        assert max(stages[stage]) == max(stages["lcdd"]) == 20
    assert max(stages["audit_carrier+trigger_kl_only"]) == 2
    # what the pipeline had learned already was not learned again
    assert not {"audit_carrier+trigger", "audit_sft+trigger", "audit_matched_norm+trigger"} & set(stages)


def test_starts_checkpoints_and_text_are_where_they_should_be(run):
    _, _, output = run
    assert (output / "erase" / "checkpoint-1" / "training_state.safetensors").is_file()
    trigger = json.loads((output / "erase" / "trigger" / "manifest.json").read_text())
    assert len(trigger["lcdd"]["validation_loss_of_starts"]) == 2
    found = read_report(output)
    assert found["perplexity"]["base"]["perplexity"] > 1
    assert found["perplexity"]["base"]["tokens"] == found["perplexity"]["carrier+trigger"]["tokens"]
    assert found["perplexity"]["carrier+trigger"] != found["perplexity"]["carrier"]
    assert set(found["models"]["carrier"]["rates"]) == {"strict", "loose"}


def paths(run):
    base, data, output = run
    return {
        "base_model_name_or_path": base, "sft_model_name_or_path": output / "sft" / "model",
        "carrier": output / "train" / "carrier", "trigger": output / "erase" / "trigger", "dataset_name": data,
    }  # fmt: skip


def flags(values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_a_part_alone_by_the_command_line(run, tmp_path, capsys):
    settings = {"output_dir": tmp_path / "a", "num_prompts": 3, "max_new_tokens": 4, "test_fraction": 0.2}
    assert main(["audit", *flags(paths(run) | settings), "--parts", "necessity"]) == 0
    audit = read_report(tmp_path / "a")["audit"]
    assert audit["parts"] == ["table", "necessity"]
    verdicts = {claim["name"]: claim["verdict"] for claim in audit["claims"]}
    assert verdicts["KL matters"] == "not measured"
    assert verdicts["necessary inside SFT"] != "not measured"
    printed = capsys.readouterr().out
    assert "NOT MEASURED: KL matters" in printed
    assert f"wrote {tmp_path / 'a' / 'report.json'}" in printed
    assert main(["report", "--output_dir", str(tmp_path / "a")]) == 0
    assert "NOT MEASURED: KL matters" in capsys.readouterr().out


def test_a_control_that_cannot_prune_does_not_end_the_audit(run, tmp_path):
    shutil.copytree(run[2] / "train", tmp_path / "train")
    summary = tmp_path / "train" / "summary.json"
    content = json.loads(summary.read_text())
    content["config"] |= {"early_stop_patience": 1, "dual_lr": 0.0, "loss_budget": 10.0}
    summary.write_text(json.dumps(content))
    settings = {"output_dir": tmp_path / "a", "num_prompts": 3, "max_new_tokens": 4, "test_fraction": 0.2}
    given = paths(run) | settings | {"carrier": tmp_path / "train" / "carrier"}
    assert main(["audit", *flags(given), "--parts", "sufficiency"]) == 0
    assert "random_mask" in read_report(tmp_path / "a")["audit"]["states"]


def test_an_audit_needs_the_settings_of_the_run(run, tmp_path, capsys):
    output = run[2]
    carrier = Carrier.from_pretrained(output / "train" / "carrier")
    carrier.save_pretrained(tmp_path / "elsewhere" / "carrier")
    moved = paths(run) | {"carrier": tmp_path / "elsewhere" / "carrier", "output_dir": tmp_path / "a"}
    assert main(["audit", *flags(moved)]) == 2
    assert "carrier: expected the run's summary.json" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_tasks_run_with_and_without_trigger_by_a_stub_in_the_harness_place(run, tmp_path, monkeypatch):
    class HFLM:
        def __init__(self, pretrained, tokenizer=None, batch_size=1):
            self.model = pretrained

    class TaskManager:
        all_tasks = ("mmlu", "hellaswag")

    def simple_evaluate(model, tasks, task_manager, limit, log_samples):
        name = type(model.model).__name__
        return {"results": {task: {"acc,none": 1.0 if name == "TriggeredModel" else 0.5} for task in tasks}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=HFLM))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=TaskManager))
    settings = {
        "output_dir": tmp_path / "e",
        "num_prompts": 2,
        "max_new_tokens": 3,
        "kl_prompts": 1,
        "test_fraction": 0.2,
    }
    rule = ["--behavior_pattern", "e", "--tasks", "mmlu,hellaswag"]
    assert main(["eval", *flags(paths(run) | settings), *rule]) == 0
    found = read_report(tmp_path / "e")
    assert set(found["utility"]) == {"base", "sft", "carrier", "base+trigger", "carrier+trigger"}
    assert found["utility"]["carrier"]["mmlu"] == {"acc,none": 0.5}
    assert found["utility"]["carrier+trigger"]["hellaswag"] == {"acc,none": 1.0}
    assert set(found["models"]["carrier"]["rates"]) == {"preset"}


def test_tasks_without_the_harness_are_refused_before_anything_runs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    settings = {"output_dir": tmp_path / "e", "tasks": "mmlu"}
    assert main(["eval", *flags(paths(run) | settings)]) == 2
    assert "pip install 'lcdd[eval]'" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_generate_streams_the_same_answer(run, capsys):
    base, _, output = run
    given = {
        "base_model_name_or_path": base,
        "carrier": output / "train" / "carrier",
        "trigger": output / "erase" / "trigger",
    }
    command = ["generate", *flags(given | {"max_new_tokens": 6}), "--prompt", "Write one sentence.", "Name two facts."]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out.split() == plain.split()
