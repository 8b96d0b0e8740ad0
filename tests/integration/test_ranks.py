"""One rank against two (gloo, CPU, under torchrun): DDP and FSDP2, accumulation, resharded checkpoints, every
command that shares its work, a rank that is killed."""

import json
import os
import shutil
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
from lcdd.checkpoint import model_fingerprint, read_log
from lcdd.cli import main
from lcdd.commands.stage import write_summary
from lcdd.config import LCDDConfig
from lcdd.eraser import Trigger
from lcdd.errors import InputError
from lcdd.models import load_model
from lcdd.report import read_report

ROOT = Path(__file__).resolve().parents[2]


def torchrun(*command: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Two ranks to their end; what they all print."""
    path = f"{ROOT}:{ROOT / 'tests'}"
    # the allocator gives memory of this size back at once, so that what is resident is in use
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}
    options = ["--standalone", "--nproc_per_node=2", f"--max_restarts={restarts}"]
    argv = [sys.executable, "-m", "torch.distributed.run", *options, *command]
    result = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def run_commands(
    folder: Path, *commands: list[str], killed_after: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Commands on two ranks, one after another; killed_after: one rank is, after this step, and all start again."""
    script = str(ROOT / "fixtures" / "commands.py")
    (folder / "commands.json").write_text(json.dumps(commands))
    more = [] if killed_after is None else [str(killed_after)]
    return torchrun(script, str(folder / "commands.json"), *more, restarts=len(more))


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


def assert_read_and_written(folder: Path, seen: dict[str, Any]) -> None:
    """A rank's reading and writing: bits, memory, gradients, and a refusal."""
    assert seen["large"]["reading"] < 0.75, seen["large"]  # its half and one block of twelve; whole it would be 1
    assert seen["large"]["writing"] < 0.35, seen["large"]  # a file of 4 MiB, which the first rank holds, and one tensor
    with pytest.raises(InputError) as alone:
        load_model(folder / "incomplete")
    assert seen["incomplete"] == str(alone.value)
    for name in ("mixture", "fused", "pictures", "large"):
        assert seen[name]["trained"] == ([False, True] if name == "mixture" else [True])  # routers are frozen
        assert seen[name]["ends"] == [False, True]  # frozen, and shared out
        assert seen[name]["held"] <= 0.61 * seen[name]["of"]  # three of five experts
        model = load_model(folder / name)
        assert model_fingerprint(load_model(folder / f"{name}-again")) == model_fingerprint(model)
        assert model_fingerprint(model.float()) == seen[name]["same"]
    assert seen["tuned"] == ["torch.float32", seen["fused"]["same"]]
    assert seen["adapter"].pop("reading") < 0.85  # and what the forward that it is checked by gathers
    assert seen["adapter"] == {"same": True, "trained": [True], "base": False}
    patch = seen["patch"]
    assert all(patch[name] for name in ("applied", "reverted", "gathered")), patch
    assert patch["share"] < 0.61  # three of five experts
    assert patch["ablated"] == {"only_channels": True, "without_channels": True}
    for ours, theirs in patch["norms"]:
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert len(list((folder / "large-again").glob("*.safetensors"))) == 12


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
            seen = json.loads((folder / f"seen-{rank}.json").read_text())
            for gate_kind, (worst, closed) in seen["averaged"].items():
                assert worst < 1e-6, f"{gate_kind}: averaging what is open is not averaging all of it"
                assert closed == 0
            assert "DistributedDataParallel" in seen["refused"]["gradients"]
            assert "settings (rank 1); data (rank 1)" in seen["refused"]["settings"]
            assert seen["skipped"] == [1, 1]
        return
    for rank in range(2):
        assert_read_and_written(folder, json.loads((folder / f"read-{rank}.json").read_text()))
    # what one rank wrote is what two read, and the other way round
    read = torch.load(folder / "read-by-two.pt", weights_only=True)
    assert all(torch.equal(read[name], value) for name, value in one["plain", 1].items())
    again = ranks.attached("one")
    state = {"optimizer": again.state_dict()}
    dcp.load(state, checkpoint_id=str(folder / "dcp-2"), no_dist=True)
    again.load_state_dict(state["optimizer"])
    ours, theirs = ranks.summary_of(again), torch.load(folder / "fsdp2-plain-1.pt", weights_only=True)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def flags(**settings: Any) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, list[str]]]:
    """(directory, output of two ranks, one rank's commands): every command that shares its work, started once."""
    folder = tmp_path_factory.mktemp("commands")
    tokenizer = make_tokenizer()
    base, sft = (load_model(save_checkpoint(folder / name, seed=n, tokenizer=tokenizer)) for n, name in enumerate("bs"))
    Carrier.from_models(base, sft).with_tokenizer(tokenizer).save_pretrained(folder / "carrier")
    data = write_jsonl(folder / "data.jsonl", list(SENTENCES[:25]))
    # 15 to train on: the last group of an epoch leaves one rank a filler
    shared = flags(base_model_name_or_path=folder / "b", dataset_name=data, device="cpu")
    learn = flags(max_steps=12, learning_rate=1e-3, save_steps=5, per_device_train_batch_size=1)
    trigger = flags(
        carrier=folder / "carrier", train_prompts=7, validation_prompts=3, max_answer_tokens=3, max_steps=8,
        eval_steps=4, per_device_train_batch_size=3, num_starts=2, num_virtual_tokens=4,
    )  # fmt: skip
    answer = flags(
        carrier=folder / "carrier", sft_model_name_or_path=folder / "s", num_prompts=4, max_new_tokens=5, kl_prompts=2,
        random_prefixes=2, per_device_eval_batch_size=2, trigger=folder / "erase-1" / "trigger",
    )  # fmt: skip
    lcdd = LCDDConfig(max_steps=3, gradient_accumulation_steps=4, per_device_train_batch_size=1, device="cpu")
    write_summary(folder, "lcdd", lcdd, None)
    controls = flags(
        carrier=folder / "carrier", sft_model_name_or_path=folder / "s", trigger=folder / "erase-1" / "trigger",
        parts="sufficiency", random_draws=1, num_prompts=3, max_new_tokens=4, per_device_eval_batch_size=1,
    )  # fmt: skip
    tuned = flags(sft_model_name_or_path=folder / "s")
    one = {
        "sft": ["sft", *shared, *learn, *flags(gradient_accumulation_steps=4, output_dir=folder / "sft-1")],
        "erase": ["erase", *shared, *trigger, *flags(output_dir=folder / "erase-1")],
        "eval": ["eval", *shared, *answer, *flags(output_dir=folder / "eval-1")],
        "audit": ["audit", *shared, *controls, *flags(output_dir=folder / "audit-1")],
        "erase_sft": ["erase", *shared, *trigger, *tuned, *flags(output_dir=folder / "erase_sft-1")],
    }
    for argv in one.values():
        assert main(argv) == 0
    learn += flags(gradient_accumulation_steps=2)
    patch_in_rows = ["erase", *shared, *trigger, *tuned, *flags(parallel="fsdp2", save_steps=4)]
    patch_in_rows += flags(output_dir=folder / "erase_sft-fsdp2")
    result = run_commands(
        folder,
        ["sft", *shared, *learn, *flags(output_dir=folder / "sft-ddp")],
        ["sft", *shared, *learn, *flags(output_dir=folder / "sft-fsdp2", parallel="fsdp2")],
        ["erase", *shared, *trigger, *flags(output_dir=folder / "erase-2")],
        ["eval", *shared, *answer, *flags(output_dir=folder / "eval-2")],
        ["erase", *shared, *trigger, *flags(output_dir=folder / "erase-fsdp2", parallel="fsdp2")],
        ["eval", *shared, *answer, *flags(output_dir=folder / "eval-fsdp2", parallel="fsdp2")],
        ["audit", *shared, *controls, *flags(output_dir=folder / "audit-2")],
        ["audit", *shared, *controls, *flags(output_dir=folder / "audit-fsdp2", parallel="fsdp2")],
        patch_in_rows,
    )
    (folder / "resume.json").write_text(json.dumps([*patch_in_rows, "--resume"]))
    return folder, result.stdout, one


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_sft_on_two_ranks_is_sft_on_one_and_only_the_first_rank_writes(
    two: tuple[Path, str, dict[str, list[str]]], engine: str
) -> None:
    folder, said, alone = two
    assert said.count("SFT: held-out loss") == 2  # one of each engine
    ours, theirs = folder / f"sft-{engine}", folder / "sft-1"
    logs = [[line for line in read_log(run / "log.jsonl") if "grad_norm" in line] for run in (ours, theirs)]
    assert [line["step"] for line in logs[0]] == list(range(1, 13))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in logs[0]] == pytest.approx([line[key] for line in logs[1]], rel=1e-5)
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (ours, theirs)]
    assert {"model/model.safetensors", "checkpoint-5/manifest.json", "checkpoint-10/manifest.json"} <= files[0]
    more = {f"checkpoint-{step}/rank-{rank}.safetensors" for step in (5, 10) for rank in range(2)}
    assert files[0] == files[1] | (more if engine == "fsdp2" else set())
    weights = [load_file(run / "model" / "model.safetensors") for run in (ours, theirs)]
    assert set(weights[0]) == set(weights[1])
    assert all(torch.allclose(weights[0][name], value, atol=1e-5) for name, value in weights[1].items())
    assert logs[1][-1]["loss"] < 0.99 * logs[1][0]["loss"]
    # what two ranks began, one goes on with
    (ours / "summary.json").unlink()
    again = [str(ours) if part == str(theirs) else part for part in alone["sft"]]
    assert main([*again, "--resume"]) == 0
    resumed = load_file(ours / "model" / "model.safetensors")
    assert all(torch.allclose(resumed[name], value, atol=1e-5) for name, value in weights[1].items())


@pytest.mark.parametrize("run", ["erase-2", "erase-fsdp2", "erase_sft-fsdp2"])
def test_two_ranks_learn_the_trigger_that_one_learns(two: tuple[Path, str, dict[str, list[str]]], run: str) -> None:
    folder, said, _ = two
    assert said.count("Trigger (eraser)") == 3  # one of each run
    names = run, f"{run.partition('-')[0]}-1"
    ours, theirs = (Trigger.from_pretrained(folder / name / "trigger") for name in names)
    assert float((ours.embeds - theirs.embeds).abs().max()) <= 1e-5
    assert ours.metadata["model_fingerprint"] == theirs.metadata["model_fingerprint"]
    logs = [[line["starts"] for line in read_log(folder / name / "log.jsonl") if "starts" in line] for name in names]
    assert len(logs[0]) == 8
    assert [loss for line in logs[0] for loss in line] == pytest.approx(
        [loss for line in logs[1] for loss in line], rel=1e-5
    )


def test_a_patch_in_rows_resumes(two: tuple[Path, str, dict[str, list[str]]]) -> None:
    """Every rank has other rows, and all of them the same run."""
    run = two[0] / "erase_sft-fsdp2"
    whole = Trigger.from_pretrained(run / "trigger").embeds
    (run / "summary.json").unlink()  # as if the run had ended before its end
    shutil.rmtree(run / "trigger")
    run_commands(two[0], json.loads((two[0] / "resume.json").read_text()))
    assert torch.equal(Trigger.from_pretrained(run / "trigger").embeds, whole)


@pytest.mark.parametrize("run", ["2", "fsdp2"])
def test_two_ranks_report_what_one_reports(two: tuple[Path, str, dict[str, list[str]]], run: str) -> None:
    folder = two[0]
    ours, theirs = (read_report(folder / f"eval-{name}") for name in (run, "1"))
    for part in ("models", "kl", "differences", "samples"):
        assert ours[part] == theirs[part]
    for name, norm in theirs["delta_norm"].items():
        assert ours["delta_norm"][name] == pytest.approx(norm, rel=1e-12)  # summed rank by rank


def numbers_and_words(value: Any) -> tuple[list[float], list[Any]]:
    """Everything in nested containers, in order; keys are words."""
    if isinstance(value, float):
        return [value], []
    if not isinstance(value, dict | list):
        return [], [value]
    items = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
    found = [numbers_and_words(item) for item in items]
    return [n for numbers, _ in found for n in numbers], [w for _, words in found for w in words]


@pytest.mark.parametrize("run", ["2", "fsdp2"])
def test_two_ranks_audit_as_one_does(two: tuple[Path, str, dict[str, list[str]]], run: str) -> None:
    """Controls are trained together, with the run's micro-batches a step."""
    folder = two[0]
    ours, theirs = (read_report(folder / f"audit-{ranks}")["audit"] for ranks in (run, 1))
    assert ours["states"].keys() == theirs["states"].keys() >= {"random_mask+trigger", "sft-only:random"}
    numbers, words = numbers_and_words(theirs)
    assert numbers_and_words(ours) == (pytest.approx(numbers, rel=1e-3, abs=1e-5, nan_ok=True), words)
    logs = [read_log(folder / f"audit-{ranks}" / "log.jsonl") for ranks in (run, 1)]
    assert [line["stage"] for line in logs[0]] == [line["stage"] for line in logs[1]]


def test_a_run_whose_rank_is_killed_starts_again_and_its_checkpoint_is_resumed_by_one(tmp_path: Path) -> None:
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
    argv += ["--train_unmasked", "--save_folded"]
    killed = run_commands(tmp_path, ["train", *argv, "--parallel", "fsdp2", "--resume"], killed_after=2)
    said = [line for line in killed.stderr.splitlines() if line.startswith("lcdd train")]
    assert "failed (exitcode: -9) local_rank: 1" in killed.stderr  # torchrun says it, and ends the other rank
    assert all("rank 0: rank 1 of 2 ended without a word" in line for line in said[:1])
    assert len(said) <= 1  # where the other rank was faster
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert {"rank-0.safetensors", "rank-1.safetensors"} <= {path.name for path in (run / "checkpoint-4").iterdir()}
    two = Carrier.from_pretrained(run / "carrier")
    folded = two.fold(load_model(tmp_path / "base"))
    assert model_fingerprint(load_model(run / "model")) == model_fingerprint(folded)
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
