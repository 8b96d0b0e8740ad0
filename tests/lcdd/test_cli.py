"""The command line: exit codes, one-line errors, and what a command says at its end."""

from pathlib import Path

import pytest
import torch

from lcdd import cli
from lcdd.commands import run as pipeline
from lcdd.commands import sft as sft_command
from lcdd.commands.stage import StageResult
from lcdd.config import LCDDConfig, SFTConfig
from lcdd.errors import InputError, TrainingStopped, WrongFingerprint
from lcdd_kernels import BackendUnavailable

REQUIRED = ["--base_model_name_or_path", "m", "--output_dir", "o", "--dataset_name", "d.jsonl"]


def test_a_stage_gets_its_configs_and_its_result_is_told(monkeypatch, capsys) -> None:
    seen = []

    def sft(*configs):
        seen.extend(configs)
        return StageResult(written=(Path("o/model"),), next_step="lcdd train ...")

    monkeypatch.setattr(sft_command, "sft", sft)
    assert cli.main(["sft", *REQUIRED, "--learning_rate", "1e-3", "--behavior", "own"]) == 0
    assert seen[0] == SFTConfig(base_model_name_or_path="m", output_dir="o", learning_rate=1e-3)
    assert seen[1].behavior == "own"
    assert capsys.readouterr().out == "wrote o/model\nnext: lcdd train ...\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("x: expected a,\n  got b"), 2),
        (WrongFingerprint("base"), 2),
        (OSError("disk\nfull"), 2),
        (BackendUnavailable("triton"), 2),
        (TrainingStopped("lr"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_line_and_an_exit_code(monkeypatch, capsys, error: BaseException, code: int) -> None:
    def sft(*_):
        raise error

    monkeypatch.setattr(sft_command, "sft", sft)
    assert cli.main(["sft", *REQUIRED]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lcdd sft: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("bug", [KeyError("bug"), ValueError("bug"), RuntimeError("bug"), AssertionError("bug")])
def test_bugs_keep_their_traceback_and_say_where_to_report_them(monkeypatch, capsys, bug: Exception) -> None:
    def sft(*_):
        raise bug

    monkeypatch.setattr(sft_command, "sft", sft)
    with pytest.raises(type(bug), match="bug"):
        cli.main(["sft", *REQUIRED])
    assert cli.REPORT_BUGS in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sft"], "SFTConfig.base_model_name_or_path: expected a value, got nothing"),
        (["sft", *REQUIRED, "--learning_rate", "-1"], "SFTConfig.learning_rate: expected a value >= 0, got -1.0"),
        (["sft", *REQUIRED, "--config", "no.yaml"], "config: expected a readable YAML file"),
        (["run", "no.yaml"], "expected a readable YAML file, got 'no.yaml'"),
        (["erase", "--output_dir", "x"], "EraserConfig.base_model_name_or_path: expected a value"),
    ],
)
def test_bad_settings(argv: list[str], message: str, capsys) -> None:
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["quantise"],
        ["sft", "--learning"],
        ["train", *REQUIRED, "--gate_l", "1"],
        ["sft", "--max_steps", "x"],
    ],
)
def test_unknown_commands_abbreviations_and_types_are_usage_errors(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lcdd")
    assert error.count("\n") == 1
    assert "--help" in error


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["trian"], "did you mean train?"),
        (["sft", "--learning_rte", "1"], "did you mean --learning_rate?"),
        (["sft", "--learning_rte=1"], "did you mean --learning_rate?"),
        (["sft", "--model_name_or_path", "m"], "did you mean --base_model_name_or_path?"),
        (["generate", "--tigger", "t"], "did you mean --trigger?"),
    ],
)
def test_what_is_written_nearly_right_is_suggested(argv: list[str], hint: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err


def test_what_is_written_quite_otherwise_is_not(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sft", "--quantum", "m"])
    assert "did you mean" not in capsys.readouterr().err


def test_torchrun_is_for_training(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sft_command, "sft", lambda *_: StageResult(written=(), next_step=""))
    assert cli.main(["sft", *REQUIRED]) == 0
    assert cli.main(["report", "--output_dir", "o"]) == 2
    assert capsys.readouterr().err.startswith("lcdd report: expected one process")


def test_out_of_memory_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sft_command, "sft", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("20 GiB")))
    assert cli.main(["sft", *REQUIRED]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lcdd sft: out of memory")
    assert error.count("\n") == 1


def test_run_reads_sections_and_overrides_the_output(monkeypatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(pipeline, "run", lambda config: seen.append(config) or StageResult(written=(), next_step=""))
    path = tmp_path / "p.yaml"
    path.write_text("base_model_name_or_path: m\noutput_dir: a\ntrain: {gate_lr: 1e-2, loss_budget: 1}\n")
    assert cli.main(["run", str(path), "--output_dir", "b"]) == 0
    assert (seen[0].output_dir, seen[0].train) == ("b", LCDDConfig(gate_lr=1e-2, loss_budget=1))


def test_version_and_kernels(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert cli.main(["kernels"]) == 0
    out = capsys.readouterr().out
    assert "delta_adamw" in out
    assert "reference" in out
