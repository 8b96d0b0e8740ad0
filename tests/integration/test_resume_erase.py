"""`lcdd erase` that is stopped, fails or is killed, and what the same directory is good for afterwards."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fixtures.checkpoints import SENTENCES, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.carrier import Carrier, carrier
from lcdd.checkpoint import read_log
from lcdd.cli import main
from lcdd.eraser import SFTEraser, Trigger, TriggerSearch
from lcdd.errors import InputError
from lcdd.models import load_model

Erase = Callable[..., int]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tokenizer = make_tokenizer()
    base, sft = (load_model(save_checkpoint(folder / name, seed=n, tokenizer=tokenizer)) for n, name in enumerate("bs"))
    Carrier.from_models(base, sft).with_tokenizer(tokenizer).save_pretrained(folder / "carrier")
    write_jsonl(folder / "data.jsonl", list(SENTENCES[:24]))
    return folder


@pytest.fixture
def erase(made: Path) -> Erase:
    """erase(output, "--flag", ...): the command's exit code."""
    argv = ["--base_model_name_or_path", made / "b", "--carrier", made / "carrier", "--dataset_name",
            made / "data.jsonl", "--train_prompts", 6, "--validation_prompts", 3, "--max_answer_tokens", 3,
            "--max_steps", 9, "--eval_steps", 2, "--per_device_train_batch_size", 4, "--device", "cpu"]  # fmt: skip
    return lambda output, *more: main(["erase", *map(str, argv), "--output_dir", str(output), *map(str, more)])


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Do something in the middle of the search's step number `step`."""
    original = TriggerSearch.step

    def interrupted(self: TriggerSearch) -> None:
        if self.completed_steps + 1 == step:
            action()
        original(self)

    monkeypatch.setattr(TriggerSearch, "step", interrupted)


def lines(output: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(output / "log.jsonl")]


def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_bit_for_bit(
    erase: Erase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert erase(whole, "--save_steps", 2) == 0
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    for step, number, code in ((3, signal.SIGTERM, 143), (5, signal.SIGINT, 130)):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda number=number: os.kill(os.getpid(), number))
            before = signal.getsignal(number)
            assert erase(cut, "--save_steps", 4, *(["--resume"] if cut.exists() else [])) == code
            assert signal.getsignal(number) is before
        message = capsys.readouterr().err.splitlines()[-1]
        last = cut / f"checkpoint-{step}"
        assert (
            message == f"lcdd erase: terminated after step {step}; the last checkpoint is {last}; go on with --resume"
        )
    (cut / ".checkpoint-6.partial-1").mkdir()  # what a killed process leaves
    assert erase(cut, "--save_steps", 2, "--resume") == 0
    assert sorted(path.name for path in cut.iterdir()) == sorted(path.name for path in whole.iterdir())
    for file in sorted((whole / "trigger").iterdir()):
        assert (cut / "trigger" / file.name).read_bytes() == file.read_bytes()
    assert lines(cut) == lines(whole)


def test_a_signal_in_the_last_step_is_not_lost(erase: Erase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert erase(whole) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert erase(cut, "--save_steps", 4) == 143
    assert not (cut / "trigger").exists()
    with monkeypatch.context() as patch:  # safetensors gives blocks without an entry in an order of the process
        patch.setattr(carrier, "load_file", lambda path: dict(reversed(load_file(path).items())))
        assert erase(cut, "--save_steps", 4, "--resume") == 0
    for file in sorted((whole / "trigger").iterdir()):
        assert (cut / "trigger" / file.name).read_bytes() == file.read_bytes()
    assert lines(cut) == lines(whole)


def test_other_settings_are_refused_unless_overridden_and_recorded(
    erase: Erase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert erase(output, "--save_steps", 2) == 143
    assert erase(output, "--save_steps", 2) == 2
    assert "it has checkpoints: --resume goes on from the newest" in capsys.readouterr().err
    before = lines(output)
    changed = ["--save_steps", 2, "--resume", "--learning_rate", 0.02]
    with monkeypatch.context() as patch:  # said before the base answers every prompt
        patch.setattr(SFTEraser, "targets", lambda *_, **__: pytest.fail("the targets were made first"))
        assert erase(output, *changed) == 2
    assert "expected config.learning_rate 0.01, got 0.02. To go on nevertheless" in capsys.readouterr().err
    assert lines(output) == before
    assert erase(output, *changed, "--resume_override") == 0
    expected = ["expected config.learning_rate 0.01, got 0.02"]
    assert json.loads((output / "summary.json").read_text())["overrides"] == expected
    assert Trigger.from_pretrained(output / "trigger").metadata["overrides"] == expected
    assert json.loads((output / "checkpoint-8" / "manifest.json").read_text())["overrides"] == expected


def test_a_run_that_fails_before_its_first_step_leaves_the_directory_as_new(
    erase: Erase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise InputError("of no use")

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 1, refuse)
        assert erase(output) == 2
    assert not output.exists()
    with monkeypatch.context() as patch:
        at_step(patch, 3, refuse)
        assert erase(output) == 2
    assert [path.name for path in output.iterdir()] == ["log.jsonl"]
    capsys.readouterr()
    assert erase(output) == 2
    assert "a run ended there without a checkpoint: --resume starts it anew" in capsys.readouterr().err
    assert erase(output, "--resume") == 0
    assert [line["step"] for line in lines(output)] == list(range(1, 10))
