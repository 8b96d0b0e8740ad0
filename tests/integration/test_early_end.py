"""A run says from its first second what comes of it, and ends where the rest would be a waste."""

import json
from pathlib import Path

import pytest

from fixtures.checkpoints import SENTENCES, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.checkpoint import read_log
from lcdd.cli import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_checkpoint(folder / "base", tokenizer=make_tokenizer())
    write_jsonl(folder / "data.jsonl", list(SENTENCES))
    return folder


def pipeline(made: Path, *, learning_rate: float, **sft: object) -> Path:
    content = {
        "base_model_name_or_path": str(made / "base"),
        "data": {"dataset_name": str(made / "data.jsonl"), "validation_fraction": 0.2, "test_fraction": 0.2},
        "sft": {"max_steps": 12, "learning_rate": learning_rate, "device": "cpu", "eval_steps": 4, **sft},
        "train": {"max_steps": 2, "warmup_steps": 1, "device": "cpu"},
    }
    path = made / f"{learning_rate}-{len(sft)}.yaml"
    path.write_text(json.dumps(content))
    return path


def test_a_run_whose_sft_learned_nothing_ends_there_with_what_to_change(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(["run", str(pipeline(made, learning_rate=0.0)), "--output_dir", str(output)]) == 1
    printed = capsys.readouterr()
    assert "stopped after sft: SFT did not learn the behaviour: the held-out loss did not fall" in printed.err
    assert "only 0 of" in printed.err
    assert "--learning_rate (now 0)" in printed.err
    assert "--min_behavior_rate" in printed.err
    assert not (output / "train").exists()
    assert (output / "sft" / "model" / "config.json").exists()  # what there is stays
    # the first words come before the first step, with a loss, a rate and an answer
    assert printed.out.index("step 0 of 12: held-out loss") < printed.out.index("step 4 of 12: held-out loss")
    assert "answers show the behaviour: '" in printed.out
    assert "SFT: 0 of" in printed.out
    summary = json.loads((output / "sft" / "summary.json").read_text())
    assert summary["validation_behavior"]["rate"] == 0.0
    assert summary["validation_behavior"]["ci95"][0] == 0.0
    lines = read_log(output / "log.jsonl")
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 4, 8, 12]
    assert [line["step"] for line in lines if "validation_behavior" in line] == [0, 4, 8]


def test_min_behavior_rate_0_goes_on(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    path = pipeline(made, learning_rate=0.0, min_behavior_rate=0.0)
    small = {"erase": {"max_steps": 1, "train_prompts": 2, "validation_prompts": 2, "num_virtual_tokens": 2},
             "eval": {"num_prompts": 2, "max_new_tokens": 2}, "controls": False}  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | small))
    assert main(["run", str(path), "--output_dir", str(output)]) == 0
    printed = capsys.readouterr()
    assert "did not learn" not in printed.err + printed.out
    assert "LCDD closes gates for as long as the loss keeps within a budget. SFT's held-out loss is" in printed.out
