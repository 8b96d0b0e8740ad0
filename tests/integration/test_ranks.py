"""One rank against two (gloo, CPU, under torchrun): DDP and FSDP2, accumulation, resharded checkpoints, the trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from fixtures import ranks
from fixtures.checkpoints import SENTENCES, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.carrier import Carrier
from lcdd.checkpoint import read_log
from lcdd.cli import main

ROOT = Path(__file__).resolve().parents[2]


def torchrun(*command: str, processes: int = 2) -> str:
    """What all ranks print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
    result = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Any]]:
    """One rank's runs with the same steps: twice the accumulation; and its state as a distributed checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for groups in (2, 4):
        optimizer = ranks.fit("one", groups)
        found["plain", groups // 2] = ranks.summary_of(optimizer)
        if groups == 2:
            dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=str(folder / "dcp-1"), no_dist=True)
    found["otherwise", 2] = ranks.summary_of(ranks.fit("one", 4, **ranks.OTHERWISE))
    return folder, found


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    assert torch.equal(ours["gate"] != 0, theirs["gate"] != 0)
    worst = {name: float((ours[name] - value).abs().max()) for name, value in theirs.items()}
    assert worst["lambda"] <= 1e-6
    assert all(error <= 1e-5 for name, error in worst.items() if name.startswith(("delta", "unmasked")))
    return worst


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_does(alone: tuple[Path, dict[Any, Any]], kind: str) -> None:
    folder, one = alone
    torchrun(str(ROOT / "fixtures" / "ranks.py"), kind, str(folder))
    worst = {}
    for (name, groups), theirs in one.items():
        ours = torch.load(folder / f"{kind}-{name}-{groups}.pt", weights_only=True)
        worst[name, groups] = assert_close(ours, theirs)
        assert int((ours["gate"] != 0).sum()) > 0
    closed = float((one["plain", 1]["gate"] == 0).double().mean())
    assert 0.02 < closed < 0.98, f"a test of gates wants some of each, got {closed:.1%} closed"
    if kind == "ddp":
        for rank in range(2):
            assert "DistributedDataParallel" in json.loads((folder / f"refused-{rank}.json").read_text())
        return
    # what one rank wrote is what two read, and the other way round
    read = torch.load(folder / "read-by-two.pt", weights_only=True)
    assert all(torch.equal(read[name], value) for name, value in one["plain", 1].items())
    again = ranks.attached("one")
    state = {"optimizer": again.state_dict()}
    dcp.load(state, checkpoint_id=str(folder / "dcp-2"), no_dist=True)
    again.load_state_dict(state["optimizer"])
    ours, theirs = ranks.summary_of(again), torch.load(folder / "fsdp2-plain-1.pt", weights_only=True)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_sft_on_two_ranks_is_sft_on_one_and_only_the_first_rank_writes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base")
    write_jsonl(
        tmp_path / "data.jsonl", list(SENTENCES[:25])
    )  # 15 to train on: the last group of an epoch leaves one rank a filler
    settings = {
        "base_model_name_or_path": tmp_path / "base", "dataset_name": tmp_path / "data.jsonl", "max_steps": 12,
        "learning_rate": 1e-3, "save_steps": 5, "device": "cpu", "per_device_train_batch_size": 1,
    }  # fmt: skip
    argv = ["sft", *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]
    out = torchrun("-m", "lcdd", *argv, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "two"))
    assert out.count("SFT: held-out loss") == out.count("wrote ") / 2 == 1
    again = [*argv, "--gradient_accumulation_steps", "4", "--output_dir"]
    assert main([*again, str(tmp_path / "one")]) == 0
    two, one = (
        [line for line in read_log(tmp_path / run / "log.jsonl") if "grad_norm" in line] for run in ("two", "one")
    )
    assert [line["step"] for line in two] == list(range(1, 13))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5)
    files = [
        sorted(str(path.relative_to(tmp_path / run)) for path in (tmp_path / run).rglob("*")) for run in ("two", "one")
    ]
    assert files[0] == files[1]
    assert {"model/model.safetensors", "checkpoint-5/manifest.json", "checkpoint-10/manifest.json"} <= set(files[0])
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("two", "one")]
    assert all(torch.allclose(weights[0][name], value, atol=1e-5) for name, value in weights[1].items())
    assert one[-1]["loss"] < 0.99 * one[0]["loss"]
    # what two ranks began, one goes on with
    (tmp_path / "two" / "summary.json").unlink()
    assert main([*again, str(tmp_path / "two"), "--resume"]) == 0
    resumed = load_file(tmp_path / "two" / "model" / "model.safetensors")
    assert all(torch.allclose(resumed[name], value, atol=1e-5) for name, value in weights[1].items())


def test_the_command_line_under_torchrun_and_a_checkpoint_of_two_ranks_resumed_by_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    save_checkpoint(tmp_path / "base", tokenizer=tokenizer)
    save_checkpoint(tmp_path / "sft", seed=1, tokenizer=tokenizer)
    write_jsonl(tmp_path / "data.jsonl", list(SENTENCES[:24]))
    settings = {
        "sft_model_name_or_path": tmp_path / "sft", "base_model_name_or_path": tmp_path / "base", "max_steps": 6,
        "dataset_name": tmp_path / "data.jsonl", "output_dir": tmp_path / "run", "save_steps": 2, "device": "cpu",
        "per_device_train_batch_size": 2, "warmup_steps": 2, "gate_lr": 0.4, "dual_lambda_init": 0.02,
    }  # fmt: skip
    argv = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    argv += ["--train_unmasked"]
    torchrun("-m", "lcdd", "train", *argv, "--parallel", "fsdp2")
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert {"rank-0.safetensors", "rank-1.safetensors"} <= {path.name for path in (run / "checkpoint-4").iterdir()}
    two = Carrier.from_pretrained(run / "carrier")
    curve = [line for line in read_log(run / "log.jsonl") if "ema" in line]
    assert [line["step"] for line in curve] == [1, 2, 3, 4, 5, 6]
    (run / "summary.json").unlink()  # as if the run had ended before its end
    assert main(["train", *argv, "--resume", "--gradient_accumulation_steps", "2"]) == 0
    one = Carrier.from_pretrained(run / "carrier")
    assert torch.equal(one.gate != 0, two.gate != 0)
    assert all(torch.allclose(one.deltas[name], value, atol=1e-5) for name, value in two.deltas.items())
    assert len(two.unmasked) == 9  # four norms a layer, and the last
    assert all(torch.allclose(one.unmasked[name], value, atol=1e-6) for name, value in two.unmasked.items())
    again = [line for line in read_log(run / "log.jsonl") if "ema" in line]
    assert again[:4] == curve[:4]
    assert [line["dual_lambda"] for line in again] == pytest.approx([line["dual_lambda"] for line in curve], abs=1e-6)
