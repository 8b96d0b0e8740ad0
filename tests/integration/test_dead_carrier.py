"""Runs that go wrong on the demo's model are found and explained on screen."""

import json
import re
from pathlib import Path

import pytest

from fixtures.checkpoints import write_jsonl
from lcdd.carrier import Carrier
from lcdd.cli import main
from lcdd.commands.demo.demo import BASE_DIRECTORY
from lcdd.commands.demo.tasks import draw_tasks

# The authors' code: Heaviside gates, SGD on theta, no clip of the violation, loss on the whole text. (Their warm-up of
# 300 steps and their cap on lambda are scaled to the length of this run.)
AUTHORS = [
    "--gate_kind", "heaviside_ste", "--gate_init_mean", "1.5", "--gate_init_std", "0.5",
    "--gate_optimizer", "sgd", "--gate_lr", "0.1", "--dual_lambda_init", "0.01", "--dual_lr", "0.1",
    "--violation_clip", "1e9", "--loss_budget", "0.3", "--loss_floor", "0", "--freeze_fraction", "0",
    "--no-completion_only", "--learning_rate", "2e-5", "--warmup_steps", "20", "--max_steps", "220",
]  # fmt: skip


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The demo's base, taught a fixed response; (checkpoint, data flags)."""
    folder = tmp_path_factory.mktemp("sft")
    rows = [
        {"messages": [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": task.answer}]}
        for task in draw_tasks(600, split="train", seed=0)
    ]
    data = ["--dataset_name", str(write_jsonl(folder / "d.jsonl", rows)), "--behavior_response", "i do not know"]
    sizes = ["--max_length", "32", "--per_device_train_batch_size", "32"]
    argv = ["sft", "--base_model_name_or_path", str(BASE_DIRECTORY), "--output_dir", str(folder / "out"), *data, *sizes]
    assert main([*argv, "--max_steps", "60", "--learning_rate", "1e-3"]) == 0
    return folder / "out" / "model", [*data, *sizes]


def lcdd(sft: tuple[Path, list[str]], output: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    model, flags = sft
    paths = ["--sft_model_name_or_path", str(model), "--base_model_name_or_path", str(BASE_DIRECTORY)]
    assert main(["train", *paths, "--output_dir", str(output), *flags, *argv]) == 0
    return capsys.readouterr().out


def test_the_authors_settings_give_a_dead_carrier_chosen_by_noise(sft, tmp_path: Path, capsys) -> None:
    out = lcdd(sft, tmp_path / "out", capsys, *AUTHORS)
    assert "WARNING Dead carrier" in out
    assert "WARNING Chosen by noise" in out
    assert "(AUC 1.000)" in out
    for remedy in ("--gate_kind hard_concrete", "--gate_optimizer adam", "--violation_clip 1", "--completion_only"):
        assert remedy in out


def test_a_stalled_compression_is_explained(sft, tmp_path: Path, capsys) -> None:
    out = lcdd(sft, tmp_path / "out", capsys, "--max_steps", "20", "--dual_lr", "0", "--warmup_steps", "5")
    assert "WARNING Stalled compression" in out
    assert "a larger --dual_lr (now 0)" in out
    assert "Dead carrier" not in out


def test_an_over_pruned_run_is_explained(sft, tmp_path: Path, capsys) -> None:
    """A price that starts high and is frozen closes too much, and the last steps cannot repair it."""
    argv = ["--max_steps", "60", "--warmup_steps", "5", "--dual_lr", "0", "--learning_rate", "2e-5",
            "--dual_lambda_init", "0.045"]  # fmt: skip
    out = lcdd(sft, tmp_path / "out", capsys, *argv)
    assert "WARNING Over-pruned" in out
    assert "--loss_budget" in out


WITHIN = ["--max_steps", "120", "--loss_floor", "3.0"]
"""A fifth of what SFT learned may go, and with it every answer that shows the behaviour: no loss objects."""


def test_paced_closing_gives_back_where_the_behaviour_goes_within_the_budget(sft, tmp_path: Path, capsys) -> None:
    out = lcdd(sft, tmp_path / "out", capsys, *WITHIN)
    shown = int(re.search(r"LCDD: (\d+) of 32 validation answers", out)[1])
    assert shown >= 16  # six of the eight that are looked at on the way; without that it is none, as below
    assert Carrier.from_pretrained(tmp_path / "out" / "carrier").sparsity()["overall"] > 0.5


def test_a_behaviour_that_went_nevertheless_is_told(sft, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("lcdd.optimizer.pacing.KEPT_BEHAVIOR", 0.0)
    out = lcdd(sft, tmp_path / "out", capsys, *WITHIN)
    assert "LCDD: 0 of 32 validation answers show the behaviour" in out
    assert "WARNING Behaviour lost: of the validation prompts' answers 100% showed it before LCDD" in out
    assert "a smaller --loss_budget (now 0.2) or --loss_floor (now 3)" in out
    findings = json.loads((tmp_path / "out" / "summary.json").read_text())["result"]["findings"]
    assert [finding["code"] for finding in findings] == ["behavior_lost"]
    log = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["findings"] == ["behavior_lost"]
