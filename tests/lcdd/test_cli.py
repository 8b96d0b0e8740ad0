"""The command line: exit codes, one-line errors, and what a command says at its end."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lcdd import cli
from lcdd.commands import run as pipeline
from lcdd.commands import sft as sft_command
from lcdd.commands.stage import StageResult, beside, command_line
from lcdd.config import DataConfig, EraserConfig, LCDDConfig, SFTConfig, from_flags
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
        (["sft", "--model_name", "m"], "did you mean --base_model_name_or_path?"),
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


def test_the_next_command_can_be_pasted_whole(monkeypatch, tmp_path: Path, capsys) -> None:
    data = DataConfig(dataset_name="my data.jsonl", behavior="own", behavior_keywords=("yes", "of course"))
    command = command_line(
        "erase", data, base_model_name_or_path="b", carrier=tmp_path / "c", output_dir="o", seed=None
    )
    words = shlex.split(command)
    assert words[:2] == ["lcdd", "erase"]
    arguments = cli.build_parser().parse_args(words[1:])
    configs = from_flags(arguments, EraserConfig, DataConfig)
    assert configs[1] == data
    assert configs[0] == EraserConfig(base_model_name_or_path="b", carrier=str(tmp_path / "c"), output_dir="o")
    for columns in (40, 60, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sft_command, "sft", lambda *_: StageResult(written=(), next_step=command))
        assert cli.main(["sft", *REQUIRED]) == 0
        shown = capsys.readouterr().out
        longest = max(len(word) for word in command.split(" --")) + 8
        assert max(map(len, shown.splitlines())) <= max(columns, longest)
        pasted = subprocess.run(
            ["sh", "-c", f"printf '%s\\n' {shown.removeprefix('next: ')}"], capture_output=True, text=True
        )
        assert pasted.stdout.splitlines() == words


def test_the_next_command_works_in_a_fresh_shell(monkeypatch, tmp_path: Path, capsys) -> None:
    """`make demo` installs into .venv, which is on nobody's PATH; and the shell may be anywhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("carrier", "yes"):
        (tmp_path / name).mkdir()
    (tmp_path / "d.jsonl").touch()
    data = DataConfig(dataset_name="d.jsonl", behavior="own", behavior_keywords=("yes",))  # a word, not that directory
    paths = {"base_model_name_or_path": "Qwen/Qwen3-0.6B", "carrier": "carrier", "trigger": Path("new")}
    assert shlex.split(command_line("erase", data, **paths))[2:] == [
        "--base_model_name_or_path", "Qwen/Qwen3-0.6B", "--carrier", str(tmp_path / "carrier"), "--trigger",
        str(tmp_path / "new"), "--dataset_name", str(tmp_path / "d.jsonl"), "--behavior", "own", "--behavior_keywords",
        "yes",
    ]  # fmt: skip
    monkeypatch.setattr(sft_command, "sft", lambda *_: StageResult(written=(), next_step="lcdd chat"))
    monkeypatch.setattr("sys.argv", [".venv/bin/lcdd", "sft"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["sft", *REQUIRED]) == 0
    assert capsys.readouterr().out == f"next: {tmp_path}/.venv/bin/lcdd chat\n"


def test_the_next_directory_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    assert beside(tmp_path / "sft", "train") == tmp_path / "train"
    assert beside(tmp_path / "sft", "sft") == tmp_path / "sft-2"
    (tmp_path / "train").mkdir()
    assert beside(tmp_path / "sft", "train") == tmp_path / "train-2"


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_first_line_comes_within_a_second_and_bad_settings_before_it(command: str, tmp_path: Path) -> None:
    """Before PyTorch is imported; the process ends at a path that is not there."""
    (tmp_path / "p.yaml").write_text("base_model_name_or_path: nowhere\noutput_dir: o\ndata: {dataset_name: d.jsonl}\n")
    flags = ["--base_model_name_or_path", "nowhere", "--sft_model_name_or_path", "s", "--output_dir", "o"]
    argv = ["run", "p.yaml"] if command == "run" else ["train", *flags, "--dataset_name", "d.jsonl"]
    run = [sys.executable, "-c", "import sys; from lcdd.cli import main; sys.exit(main(sys.argv[1:]))"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    start = time.perf_counter()
    with subprocess.Popen([*run, *argv], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        first, seconds = process.stderr.readline(), time.perf_counter() - start
        process.kill()
    assert first == "Loading PyTorch ...\n"
    assert seconds < 5, "torch is not imported before it; on an idle machine this is a fifth of a second"
    bad = subprocess.run([*run, *argv[:-1], "no.yaml"] if command == "run" else [*run, *argv, "--seed", "-1"],
                         cwd=tmp_path, capture_output=True, text=True, env=environment)  # fmt: skip
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "Loading" not in bad.stderr


def test_torchrun_is_for_training(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sft_command, "sft", lambda *_: StageResult(written=(), next_step=""))
    assert cli.main(["sft", *REQUIRED]) == 0
    assert cli.main(["report", "--output_dir", "o"]) == 2
    assert capsys.readouterr().err.startswith("lcdd report, rank 0: expected one process")


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
