"""A run that is killed and resumed ends with the files of one that never was, bit for bit."""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import killed_after
from safetensors.torch import load_file

from fixtures.checkpoints import SENTENCES, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.carrier import Carrier
from lcdd.checkpoint import read_log
from lcdd.cli import main
from lcdd.commands import run as pipeline
from lcdd.config import DataConfig, LCDDConfig, SFTConfig
from lcdd.errors import TrainingStopped
from lcdd.trainer import loop as trainer
from lcdd_kernels import PackCrossover

STEPS, EVERY = 12, 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tokenizer = make_tokenizer()
    save_checkpoint(folder / "base", tokenizer=tokenizer)
    save_checkpoint(folder / "sft", seed=1, tokenizer=tokenizer)
    write_jsonl(folder / "data.jsonl", list(SENTENCES[:24]))
    return folder


def settings(made: Path, output: Path, stage: str, **changes: Any) -> Any:
    common: dict[str, Any] = {
        "output_dir": str(output), "max_steps": STEPS, "save_steps": EVERY, "learning_rate": 1e-3,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "device": "cpu", **changes,
    }  # fmt: skip
    if stage == "sft":
        return SFTConfig(base_model_name_or_path=str(made / "base"), **common)
    quick = {"warmup_steps": 3, "gate_lr": 0.4, "dual_lambda_init": 0.02}
    paths = {"sft_model_name_or_path": str(made / "sft"), "base_model_name_or_path": str(made / "base")}
    return LCDDConfig(**{**quick, **paths, **common})


def run(made: Path, config: Any) -> None:
    stage = pipeline.sft if isinstance(config, SFTConfig) else pipeline.train
    stage(config, DataConfig(dataset_name=str(made / "data.jsonl")), say=lambda _: None)


def run_until_killed(made: Path, config: Any, calls: int) -> None:
    """The run dies in the micro-batch after number `calls`."""
    with killed_after(calls, trainer, "loss_sum"):
        run(made, config)


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return {f"{path.name}:{name}": value for path in sorted(output.glob("*/*.safetensors"))
            for name, value in load_file(path).items()}  # fmt: skip


def assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("carrier", "model"):
        assert (ours / name).exists() == (theirs / name).exists()
        if (theirs / name).exists():
            for file in sorted((theirs / name).iterdir()):
                assert (ours / name / file.name).read_bytes() == file.read_bytes(), file.name
    last = sorted(path.name for path in theirs.glob("checkpoint-*"))
    assert sorted(path.name for path in ours.glob("checkpoint-*")) == last
    a, b = (tensors(path) for path in (ours, theirs))
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in b)
    curves = [
        [{k: line[k] for k in line if k not in ("seconds", "tokens_per_second", "peak_memory_bytes")}
         for line in read_log(path / "log.jsonl")] for path in (ours, theirs)
    ]  # fmt: skip
    assert curves[0] == curves[1]
    results = [json.loads((path / "summary.json").read_text())["result"] for path in (ours, theirs)]
    assert all(results[0][key] == results[1][key] for key in results[1] if key != "seconds")
    assert not list(ours.glob(".*"))


CASES = {
    "sft": ("sft", {}),
    "sft_unmasked_bound": ("sft", {"train_unmasked": True, "max_delta_norm": 0.5, "lr_scheduler_type": "linear"}),
    "sft_lora_bound": (
        "sft",
        {
            "use_peft": True,
            "lora_r": 4,
            "lora_dropout": 0.2,
            "max_delta_norm": 0.05,
            "lora_target_modules": ("q_proj", "down_proj"),
        },
    ),
    "hard_concrete": ("lcdd", {}),
    "heaviside_packed": ("lcdd", {"gate_kind": "heaviside_ste", "gate_init_mean": 0.2, "gate_init_std": 0.5}),
    "hard_concrete_packed": ("lcdd", {"gate_init_mean": -0.5, "gate_init_std": 1.0, "train_unmasked": True}),
    "forward": ("lcdd", {"gating": "forward", "gate_optimizer": "sgd", "gate_momentum": 0.9}),
    "mask_only_kl": ("lcdd", {"train_delta": False, "loss": "kl"}),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    stage, changes = CASES[case]
    if "packed" in case:
        everything_packs = PackCrossover(gather=0.0, crossover=1.1, min_elements=0, source="test")
        monkeypatch.setattr("lcdd.optimizer.packed.default_crossover", lambda *_: everything_packs)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(made, settings(made, whole, stage, **changes))
    for calls in (9, 6):  # in the middle of a step after checkpoint-3, then of one after checkpoint-6
        run_until_killed(made, settings(made, cut, stage, resume=cut.exists(), **changes), calls)
    assert {path.name for path in cut.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    (cut / ".checkpoint-9.partial-1").mkdir()  # what a killed process leaves
    (cut / "checkpoint-11").mkdir()  # and what looks like a checkpoint
    run(made, settings(made, cut, stage, resume=True, **changes))
    (cut / "checkpoint-11").rmdir()
    assert_same_run(cut, whole)


def flags(config: Any, made: Path) -> list[str]:
    found = ["sft" if isinstance(config, SFTConfig) else "train", "--dataset_name", str(made / "data.jsonl")]
    for key, value in config.to_dict().items():
        if value != type(config)().to_dict()[key]:
            found += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return found


def test_other_settings_models_or_data_are_refused_unless_overridden(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    config = settings(made, output, "lcdd")
    run_until_killed(made, config, 9)
    assert main(flags(config, made)) == 2
    assert "it has checkpoints: --resume goes on from the newest" in capsys.readouterr().err
    config = replace(config, resume=True)
    before = sorted(path.name for path in output.iterdir())
    assert main(flags(replace(config, gate_lr=0.1, max_steps=14), made)) == 2
    error = capsys.readouterr().err
    assert "expected config.gate_lr 0.4, got 0.1" in error
    assert "expected config.max_steps 12, got 14" in error
    assert "--resume_override" in error
    swapped = replace(config, sft_model_name_or_path=config.base_model_name_or_path)
    assert main(flags(swapped, made)) == 2
    assert "expected sft '" in capsys.readouterr().err
    other = write_jsonl(tmp_path / "other.jsonl", list(SENTENCES[2:26]))
    assert main([*flags(config, made), "--dataset_name", str(other)]) == 2
    assert "expected data '" in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == before
    allowed = replace(config, gate_lr=0.1, resume_override=True)
    assert main(flags(allowed, made)) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["overrides"] == ["expected config.gate_lr 0.4, got 0.1"]
    manifest = json.loads((output / "checkpoint-9" / "manifest.json").read_text())
    assert manifest["overrides"] == summary["overrides"]
    assert Carrier.from_pretrained(output / "checkpoint-9" / "carrier").n_open > 0
    capsys.readouterr()
    assert main(flags(config, made)) == 2
    assert "expected an unfinished run" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run_until_killed(made, settings(made, output, "lcdd"), 9)
    path = output / "checkpoint-3" / "training_state.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])
    with pytest.raises(ValueError, match=r"training_state\.safetensors' is damaged"):
        run(made, settings(made, output, "lcdd", resume=True))


def test_resume_with_nothing_to_resume_starts(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / ".checkpoint-3.partial-1").mkdir()
    run(made, settings(made, output, "sft", resume=True, max_steps=2))
    assert (output / "model" / "manifest.json").exists()
    assert not list(output.glob(".*"))


@pytest.mark.parametrize("stage", ["sft", "lcdd"])
def test_resume_takes_nothing_away_that_is_not_its_own(made: Path, tmp_path: Path, stage: str) -> None:
    output = tmp_path / "project"
    mine = output / "model" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"resume: expected a run's directory, got '.*project'"):
        run(made, settings(made, output, stage, resume=True))
    (output / "log.jsonl").touch()
    with pytest.raises(ValueError, match=r"resume: expected nothing of another program .*, got 'model'"):
        run(made, settings(made, output, stage, resume=True))
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("when", ["step", "save", "last step"])
def test_sigterm_writes_a_checkpoint_and_resumes_bit_for_bit(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(made, settings(made, whole, "lcdd"))
    target, name, call = {
        "step": (trainer, "loss_sum", 8),
        "save": (trainer.CheckpointStore, "save", 2),
        "last step": (trainer.RunLog, "write", STEPS),
    }[when]
    original, count = getattr(target, name), []

    def interrupted(*args: Any) -> Any:
        count.append(1)
        if len(count) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(target, name, interrupted)
    config = settings(made, cut, "lcdd")
    assert main(flags(config, made)) == 143
    assert "lcdd train: terminated after step" in capsys.readouterr().err
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run(made, replace(config, resume=True))
    for path in cut.glob("checkpoint-*"):  # the one that the signal made is not in the other run
        if not (whole / path.name).exists():
            for file in sorted(path.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            path.rmdir()
    if len(list(cut.glob("checkpoint-*"))) == 2:
        assert_same_run(cut, whole)
    assert (cut / "carrier" / "carrier.safetensors").read_bytes() == (
        whole / "carrier" / "carrier.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("how", ["space", "file size", "read-only"])
def test_a_save_that_fails_stops_and_keeps_the_last_checkpoint(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    import resource
    import shutil

    output = tmp_path / "run"
    original, count = trainer.CheckpointStore.save, []

    def failing(self: Any, step: int, state: Any) -> Path:
        count.append(1)
        if len(count) < 2:
            return original(self, step, state)
        with monkeypatch.context() as patch:
            if how == "space":
                usage = shutil.disk_usage(tmp_path)._replace(free=10)
                patch.setattr(shutil, "disk_usage", lambda _: usage)
            elif how == "read-only":

                def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
                    raise OSError(30, "Read-only file system", str(self))

                patch.setattr(Path, "mkdir", refuse)
            if how != "file size":
                return original(self, step, state)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            return original(self, step, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)

    monkeypatch.setattr(trainer.CheckpointStore, "save", failing)
    with pytest.raises(TrainingStopped, match=r"checkpoint-6: could not be written .*the last checkpoint is .*-3"):
        run(made, settings(made, output, "lcdd"))
    assert [path.name for path in output.iterdir() if "checkpoint" in path.name] == ["checkpoint-3"]
    monkeypatch.undo()
    run(made, settings(made, output, "lcdd", resume=True))
    assert (output / "carrier" / "carrier.json").exists()


def test_signals_outside_the_main_thread_are_left_alone() -> None:
    from lcdd.checkpoint import termination

    seen = []

    def body() -> None:
        with termination(listen=True) as request:
            seen.append((request.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(0, signal.SIG_DFL)]
