"""`lcdd run` that is killed in one stage after the other, and goes on each time with --resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from kills import killed_after

from fixtures.checkpoints import SENTENCES, save_checkpoint, write_jsonl
from lcdd.checkpoint import read_log
from lcdd.cli import main
from lcdd.eraser import TriggerSearch
from lcdd.report import read_report
from lcdd.trainer import loop as trainer

PIPELINE = """
base_model_name_or_path: {base}
data: {{dataset_name: {data}, test_fraction: 0.2}}
sft: {{use_peft: true, learning_rate: 1e-2, max_steps: 4, per_device_train_batch_size: 4}}
train: {{learning_rate: 1e-3, max_steps: 8, warmup_steps: 3, gate_lr: 0.4, dual_lambda_init: 0.02, save_steps: 3,
        per_device_train_batch_size: 4}}
erase: {{max_steps: 5, eval_steps: 2, train_prompts: 4, validation_prompts: 2, max_answer_tokens: 3, save_steps: 2}}
eval: {{num_prompts: 2, max_new_tokens: 3, kl_prompts: 2, random_prefixes: 1}}
"""
RESULTS = ("sft/model", "train/carrier", "erase/trigger", "erase_sft/trigger", "matched_norm/model",
           "erase_matched_norm/trigger")  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's file, and beside it `whole/`, its run without a break."""
    folder = tmp_path_factory.mktemp("pipeline")
    base = save_checkpoint(folder / "base")
    data = write_jsonl(folder / "data.jsonl", list(SENTENCES[:40]))
    (folder / "p.yaml").write_text(PIPELINE.format(base=base, data=data))
    assert main(["run", str(folder / "p.yaml"), "--output_dir", str(folder / "whole")]) == 0
    return folder / "p.yaml"


def run_until_killed(calls: int, target: Any, name: str, argv: list[str]) -> None:
    with killed_after(calls, target, name):
        main(argv)


def test_a_pipeline_killed_in_stage_after_stage_ends_with_the_files_of_one_that_was_not(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = pipeline.parent / "whole", tmp_path / "cut"
    start = ["run", str(pipeline), "--output_dir", str(cut)]
    run_until_killed(4 + 5, trainer, "loss_sum", start)  # the sixth step of train, after sft's four
    assert main(start) == 2
    assert "it has a pipeline's run: --resume goes on with it" in capsys.readouterr().err
    run_until_killed(3, TriggerSearch, "step", [*start, "--resume"])  # the fourth step of erase
    assert sorted(path.name for path in cut.glob("*/checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-6"]
    out = capsys.readouterr().out
    assert "== sft: finished before" in out
    assert "== train\n" in out
    before = {path: (cut / path).stat().st_mtime_ns for path in RESULTS[:2]}
    run_until_killed(3 + 1, TriggerSearch, "step", [*start, "--resume"])  # erase_sft, which has no checkpoint yet
    run_until_killed(2, trainer, "loss_sum", [*start, "--resume"])  # matched_norm, which keeps none
    assert main([*start, "--resume"]) == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 2 + 3 + 4
    assert {path: (cut / path).stat().st_mtime_ns for path in RESULTS[:2]} == before
    for result in RESULTS:
        for file in sorted((whole / result).iterdir()):
            assert (cut / result / file.name).read_bytes() == file.read_bytes(), f"{result}/{file.name}"
    changing = ("seconds", "tokens_per_second", "peak_memory_bytes")
    logs = [[{k: v for k, v in line.items() if k not in changing} for line in read_log(run / "log.jsonl")]
            for run in (whole, cut)]  # fmt: skip
    assert logs[0] == logs[1]
    ours, theirs = (read_report(run) for run in (cut, whole))
    assert all(ours[key] == theirs[key] for key in ("models", "kl", "delta_norm", "gates", "sparsity"))
    assert set(ours["timings"]) == set(theirs["timings"])
    capsys.readouterr()
    assert main([*start, "--resume"]) == 0  # a job that is queued again and again has nothing left to do
    assert capsys.readouterr().out.count("finished before") == 6 + 1
    assert read_report(cut) == ours
    other = tmp_path / "other.yaml"
    other.write_text(pipeline.read_text().replace("eval: {num_prompts: 2", "eval: {num_prompts: 3"))
    assert main(["run", str(other), "--output_dir", str(cut), "--resume"]) == 2
    assert "report.json was made of something else: expected num_prompts" in capsys.readouterr().err
    assert main(start) == 2
    assert "--resume" not in capsys.readouterr().err


def test_a_finished_stage_of_other_settings_models_or_files_is_not_taken(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    start = ["run", str(pipeline), "--output_dir", str(output)]
    run_until_killed(4 + 1, trainer, "loss_sum", start)

    def refused(text: str, replacement: str) -> str:
        (tmp_path / "p.yaml").write_text(pipeline.read_text().replace(text, replacement))
        assert main(["run", str(tmp_path / "p.yaml"), "--output_dir", str(output), "--resume"]) == 2
        return capsys.readouterr().err

    assert "sft was made of something else: expected config.learning_rate 0.01, got 0.03" in refused("1e-2", "3e-2")
    more = refused("max_steps: 4, ", "max_steps: 4, gradient_accumulation_steps: 2, ")
    assert "expected config.gradient_accumulation_steps 1, got 2" in more
    fewer = write_jsonl(tmp_path / "fewer.jsonl", list(SENTENCES[:30]))
    assert "expected examples '" in refused(str(pipeline.parent / "data.jsonl"), str(fewer))
    other = save_checkpoint(tmp_path / "other", seed=3)
    assert "expected inputs.base '" in refused(str(pipeline.parent / "base"), str(other))
    config = output / "sft" / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 1.0}))
    assert "config.json' is damaged" in refused("", "")
    (output / "sft" / "model" / "manifest.json").write_text("{}")
    assert "sft/model/manifest.json' is damaged" in refused("", "")
    assert not (output / "train" / "carrier").exists()


def test_a_base_of_the_hub_is_known_by_its_commit(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cached, base = tmp_path / "models--acme--tiny", pipeline.parent / "base"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for commit in ("c" * 40, "d" * 40):
        shutil.copytree(base, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c" * 40)
    (tmp_path / "p.yaml").write_text(pipeline.read_text().replace(str(base), "acme/tiny"))
    start = ["run", str(tmp_path / "p.yaml"), "--output_dir", str(tmp_path / "out")]
    run_until_killed(4, trainer, "loss_sum", start)  # in train's first step
    (cached / "refs" / "main").write_text("d" * 40)
    assert main([*start, "--resume"]) == 2
    assert "sft was made of something else: expected inputs.base 'ccccc" in capsys.readouterr().err


def test_a_run_killed_in_its_first_save_before_its_first_line_is_resumed(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "sft" / ".checkpoint-2.partial-1").mkdir(parents=True)
    run_until_killed(4, trainer, "loss_sum", ["run", str(pipeline), "--output_dir", str(tmp_path), "--resume"])
    assert (tmp_path / "sft" / "model").exists()
