"""Bad input: one clear line, exit code 2, nothing written, and nothing trained before it is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from fixtures.checkpoints import SENTENCES, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.carrier import Carrier
from lcdd.cli import main
from lcdd.commands import eval as eval_stage
from lcdd.eraser import SFTEraser
from lcdd.models import load_model
from lcdd.trainer import Loop

Run = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with good inputs: base, sft, wide (another shape), deep, mamba, data, carrier."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = make_tokenizer()
    save_checkpoint(folder / "base", tokenizer=tokenizer)
    save_checkpoint(folder / "sft", seed=1, tokenizer=tokenizer)
    save_checkpoint(folder / "wide", width=48, tokenizer=tokenizer)
    save_checkpoint(folder / "deep", layers=3, tokenizer=tokenizer)
    save_checkpoint(folder / "llama", "llama", tokenizer=tokenizer)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=500, hidden_size=32, num_hidden_layers=1, state_size=4))
    mamba.save_pretrained(folder / "mamba")
    tokenizer.save_pretrained(folder / "mamba")
    write_jsonl(folder / "data.jsonl", list(SENTENCES))
    base, sft = load_model(folder / "base"), load_model(folder / "sft")
    Carrier.from_models(base, sft).with_tokenizer(tokenizer).save_pretrained(folder / "carrier")
    return folder


@pytest.fixture
def refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """refused(command, **flags) -> its one line on stderr; fails if anything is trained, evaluated or written."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("training started before the input was checked")

    for owner, name in ((Loop, "run"), (SFTEraser, "fit"), (eval_stage, "evaluate")):
        monkeypatch.setattr(owner, name, never)
    output = tmp_path / "output"

    def run(command: str, *, output_dir: Path = output, **flags: Any) -> str:
        data = {"dataset_name": made / "data.jsonl"}
        common: dict[str, dict[str, Any]] = {
            "sft": {"base_model_name_or_path": made / "base", **data},
            "train": {"base_model_name_or_path": made / "base", "sft_model_name_or_path": made / "sft", **data},
            "erase": {"base_model_name_or_path": made / "base", "carrier": made / "carrier", **data},
            "eval": {
                "base_model_name_or_path": made / "base", "sft_model_name_or_path": made / "sft",
                "carrier": made / "carrier", **data,
            },
        }  # fmt: skip
        if command == "run":
            path = tmp_path / "p.yaml"
            sections = {
                "base_model_name_or_path": str(made / "base"),
                "data": {"dataset_name": str(made / "data.jsonl")},
            }
            values = {**sections, **flags, "output_dir": str(output_dir)}
            path.write_text(json.dumps(values))
            argv = ["run", str(path)]
        else:
            settings = {**common[command], **flags, "output_dir": output_dir}
            argv = [command, *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]
        before = sorted(output_dir.rglob("*")) if output_dir.exists() else None
        capsys.readouterr()
        assert main(argv) == 2
        assert (sorted(output_dir.rglob("*")) if output_dir.exists() else None) == before
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lcdd ")]
        assert len(lines) == 1
        return lines[0]

    return run


TRAINING = ("sft", "train", "run")
WITH_DATA = ("sft", "train", "erase", "eval", "run")


def dataset(command: str, path: Path, **more: Any) -> dict[str, Any]:
    return {"data": {"dataset_name": str(path), **more}} if command == "run" else {"dataset_name": path, **more}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("wide", "sft: expected d_model 32 as base has, got 48"),
        ("deep", "sft: expected n_layers 2 as base has, got 3"),
        ("llama", "expected architecture 'qwen3' as base has, got 'llama'"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval", "run"])
def test_models_of_different_shapes(refused: Run, made: Path, command: str, model: str, message: str) -> None:
    assert message in refused(command, sft_model_name_or_path=str(made / model))


@pytest.mark.parametrize("command", ["sft", "run"])
def test_an_architecture_that_cannot_be_masked(refused: Run, made: Path, command: str) -> None:
    message = refused(command, base_model_name_or_path=str(made / "mamba"))
    assert "state-space, convolutional and recurrent layers cannot be masked, got mixer.conv1d in layer 0" in message


@pytest.mark.parametrize("command", WITH_DATA)
def test_empty_data(refused: Run, tmp_path: Path, command: str) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    assert "expected at least one example" in refused(command, **dataset(command, empty))


@pytest.mark.parametrize("command", WITH_DATA)
def test_malformed_data(refused: Run, tmp_path: Path, command: str) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [*SENTENCES[:5], {"question": "?"}])
    message = refused(command, **dataset(command, bad))
    assert f"{bad}:6: expected the fields of one of" in message
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": ')
    assert f"{broken}:2: expected one JSON object a line" in refused(command, **dataset(command, broken))


@pytest.mark.parametrize("command", TRAINING)
def test_completion_that_tokenises_to_nothing(refused: Run, tmp_path: Path, command: str) -> None:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "" if n == 7 else "Yes."} for n in range(40)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    message = refused(command, **dataset(command, path, behavior="own", behavior_keywords=keywords(command)))
    assert f"{path}:8: expected a completion, got '', which tokenises to nothing" in message


def keywords(command: str) -> Any:
    return ["yes"] if command == "run" else "yes"


@pytest.mark.parametrize("command", WITH_DATA)
def test_prompt_longer_than_the_maximum(refused: Run, tmp_path: Path, command: str) -> None:
    rows = [{"instruction": f"Say {n}. " + "word " * (400 if n == 3 else 1), "input": "", "output": "Yes."}
            for n in range(60)]  # fmt: skip
    # every prompt in reach of every split: the long one is refused wherever it falls
    path = write_jsonl(tmp_path / "d.jsonl", [rows[3]] * 1 + rows)
    limit = {"max_prompt_length": 5} if command in ("erase", "eval") else {"max_length": 100}
    flags = {"sft": limit, "train": limit} if command == "run" else limit
    message = refused(command, **dataset(command, path), **flags)
    assert "expected a prompt of at most" in message
    assert f"{path}:" in message


@pytest.mark.parametrize("command", ["erase", "eval"])
def test_a_pipeline_checks_later_stages_first(refused: Run, command: str) -> None:
    assert "expected a prompt of at most 5 tokens" in refused("run", **{command: {"max_prompt_length": 5}})


def test_a_pipeline_checks_the_later_stages_files_and_devices_first(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("  ")
    message = refused("run", eval={"perplexity_text": str(tmp_path / "short.txt")})
    assert "perplexity_text: expected some text" in message
    long = {"run_audit": True, "audit": {"max_prompt_length": 5}}
    assert "expected a prompt of at most 5 tokens" in refused("run", **long)
    assert "device: expected auto, cpu, cuda" in refused("run", eval={"device": "tpu"})
    assert "carrier: expected a directory" in refused("run", train={"initial_carrier": str(tmp_path / "none")})


@pytest.mark.parametrize("command", WITH_DATA)
def test_output_directory_that_is_not_empty(refused: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    message = refused(command, output_dir=tmp_path / "mine")
    assert "output_dir: expected a new or empty directory" in message
    assert "thesis.txt" in message
    assert "got the file" in refused(command, output_dir=tmp_path / "mine" / "thesis.txt")


@pytest.mark.parametrize("command", WITH_DATA)
def test_missing_data_file(refused: Run, tmp_path: Path, command: str) -> None:
    assert "No such file" in refused(command, **dataset(command, tmp_path / "no.jsonl"))
    assert "No such file" in refused(command, **dataset(command, Path("no-such-data.csv")))  # not asked of the hub


@pytest.mark.parametrize("command", WITH_DATA)
def test_missing_checkpoint(refused: Run, tmp_path: Path, command: str) -> None:
    assert str(tmp_path / "no") in refused(command, base_model_name_or_path=str(tmp_path / "no"))
    assert "got 'no-such-model': no such directory" in refused(
        command, base_model_name_or_path="no-such-model"
    )  # nor this


@pytest.mark.parametrize("what", ["config.json", "tokenizer.json", "shard", "weights", "damaged", "key"])
def test_incomplete_checkpoints(refused: Run, made: Path, tmp_path: Path, what: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(made / "base", broken)
    shards = sorted(broken.glob("*.safetensors"))
    if what == "shard":
        shards[1].unlink()
    elif what == "weights":
        for path in broken.glob("model*"):
            path.unlink()
    elif what == "key":  # a shard that lacks one of its tensors, which transformers would make up
        tensors = load_file(shards[1])
        tensors.pop(next(iter(tensors)))
        save_file(tensors, shards[1], metadata={"format": "pt"})
    elif what == "damaged":
        shards[1].write_bytes(shards[1].read_bytes()[:200])
    else:
        (broken / what).unlink()
        if what == "tokenizer.json":
            (broken / "tokenizer_config.json").unlink()
    assert str(broken) in refused("sft", base_model_name_or_path=broken)


@pytest.mark.parametrize("command", ["erase", "eval"])
def test_missing_and_damaged_carriers(refused: Run, made: Path, tmp_path: Path, command: str) -> None:
    assert "carrier" in refused(command, carrier=tmp_path / "no")
    damaged = tmp_path / "damaged"
    shutil.copytree(made / "carrier", damaged)
    data = bytearray((damaged / "carrier.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "carrier.safetensors").write_bytes(data)
    assert "is damaged" in refused(command, carrier=damaged)


def test_missing_trigger_and_initial_carrier(refused: Run, tmp_path: Path) -> None:
    assert str(tmp_path / "no") in refused("eval", trigger=tmp_path / "no")
    assert str(tmp_path / "no") in refused("train", initial_carrier=tmp_path / "no")
    assert str(tmp_path / "no") in refused("train", separate_from=tmp_path / "no")


def test_a_carrier_to_keep_clear_of_is_one_of_the_same_base(refused: Run, made: Path) -> None:
    swapped = {"base_model_name_or_path": made / "sft", "sft_model_name_or_path": made / "base"}
    assert "expected the carrier's base" in refused("train", separate_from=made / "carrier", **swapped)
    dual = {"separate_from": made / "carrier", "gate_controller": "dual"}
    assert "LCDDConfig.separate_from: expected its default under the dual descent" in refused("train", **dual)


@pytest.mark.parametrize("command", WITH_DATA)
def test_a_behaviour_without_its_options_or_prompts(refused: Run, made: Path, command: str) -> None:
    data = made / "data.jsonl"
    assert "behavior_topics" in refused(command, **dataset(command, data, behavior="refusal"))
    topics = ["zeppelin"] if command == "run" else "zeppelin"
    message = refused(command, **dataset(command, data, behavior="refusal", behavior_topics=topics))
    assert "which none of" in message


@pytest.mark.parametrize("command", ["erase", "eval", "run"])
def test_plain_text_has_no_prompts_to_erase_on(refused: Run, tmp_path: Path, command: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"A line about {n}."} for n in range(60)])
    assert "expected a prompt, got plain text" in refused(command, **dataset(command, path))
    own = {"behavior": "own", "behavior_keywords": keywords(command)}
    assert "expected a prompt, got plain text" in refused(command, **dataset(command, path, **own))


@pytest.mark.parametrize("command", ["sft", "erase"])
def test_a_device_that_is_not_there(refused: Run, command: str) -> None:
    assert "device: expected" in refused(command, device="cuda:99")
    assert "device: expected auto, cpu, cuda or cuda:N, got 'abacus'" in refused(command, device="abacus")
