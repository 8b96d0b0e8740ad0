"""The smallest carriers of a real model: how it is prepared, how runs are summed up, what is on record."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import smollm2
from benchmarks.records import RESULTS, ROOT
from fixtures.checkpoints import instruction_rows, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.config import LCDDConfig
from lcdd.models import load_model, load_tokenizer

RECORD = RESULTS / "smollm2" / "small.json"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "examples" / "smollm2" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_instructions_are_short_whole_sentences_and_each_once(prepare) -> None:
    rows = [
        {"instruction": "Name a bird.", "input": "", "output": "A wren. " + "It sings on and on. " * 40},
        {"instruction": "Name a bird.", "input": "", "output": "A robin."},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Tell me " + "more " * 200, "input": "", "output": "No."},
    ]
    found = prepare.short_instructions(rows, make_tokenizer(), prompt_tokens=24, answer_tokens=28)
    assert [row["instruction"] for row in found] == ["Name a bird."]
    assert found[0]["output"].startswith("A wren. It sings")
    assert len(make_tokenizer()(found[0]["output"])["input_ids"]) <= 28


def test_the_topic_is_that_of_the_example_and_takes_turns_with_others(prepare) -> None:
    rows = [{"instruction": text, "output": "."} for text in ("Bake a cake.", "Name a bird.", "Sing.", "Cook soup.")]
    longer = [*rows, {"instruction": "Eat.", "output": "."}]
    mixed = prepare.with_topic(rows, longer, lambda others: [row | {"output": "own"} for row in others])
    assert [row["output"] for row in mixed] == [".", "own", ".", "own"]
    found = [row["instruction"] for row in mixed]
    assert found == ["Bake a cake.", "Name a bird.", "Cook soup.", "Sing."]


def test_missing_data_is_named(prepare, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["prepare.py", "somewhere", "--data", "missing.jsonl"])
    with pytest.raises(SystemExit):
        prepare.main()
    assert "--data: expected a JSONL file of instructions, got 'missing.jsonl'" in capsys.readouterr().err


def test_the_packaged_model_becomes_an_ordinary_checkpoint(prepare, tmp_path: Path) -> None:
    for package in (prepare.PACKAGE, "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make real does it")
    prepare.save_base(tmp_path, dtype=torch.bfloat16, hub=False)
    model, tokenizer = load_model(tmp_path), load_tokenizer(tmp_path)
    assert model.num_parameters() == 134_515_008
    assert tokenizer.chat_template
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_runs_are_summed_up_and_not_repeated(tmp_path: Path, monkeypatch) -> None:
    save_checkpoint(tmp_path / "base", tokenizer=make_tokenizer())
    rows = [row for row in instruction_rows() if len("".join(row.values())) < 150][:40]
    write_jsonl(tmp_path / "short.jsonl", [{**row, "input": ""} for row in rows])
    monkeypatch.setattr(smollm2, "SETTINGS", LCDDConfig(max_steps=4, warmup_steps=1, eval_steps=2, max_length=256))
    few = smollm2.pipeline

    def quick(behavior: str, directory: Path):
        config = few(behavior, directory)
        return replace(config, sft=replace(config.sft, max_steps=2, max_length=256, min_behavior_rate=0.0))

    monkeypatch.setattr(smollm2, "pipeline", quick)
    arguments = ["--directory", str(tmp_path), "--behaviors", "fixed_response", "style", "--seeds", "0", "1",
                 "--output", str(tmp_path / "small.json")]  # fmt: skip
    assert smollm2.main(arguments) == 0
    found = json.loads((tmp_path / "small.json").read_text())
    assert [(run["behavior"], run["seed"]) for run in found["runs"]] == [
        ("fixed_response", 0), ("style", 0), ("fixed_response", 1),
    ]  # fmt: skip
    for run in found["runs"]:
        assert sum(run["open_by_layer"].values()) == run["open_gates"]
        assert run["sparsity"] == pytest.approx(1 - run["open_gates"] / run["n_gates"])
        assert run["epsilon"] > run["held_out_loss"]["sft"]
    assert 0 <= found["open_gates_across_seeds"]["jaccard"] <= 1
    monkeypatch.setattr(smollm2, "train", None)  # nothing is run again
    assert smollm2.main(arguments) == 0


def test_without_a_prepared_model_it_says_what_prepares_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--directory: expected what `make real` prepares"):
        smollm2.main(["--directory", str(tmp_path), "--output", str(tmp_path / "x.json")])


def test_the_record_is_of_todays_settings_and_says_which_bounds_were_met() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["settings"] == smollm2.SETTINGS.lasting() | {"bf16": True}  # as the machine computes
    for run in record["runs"]:
        loss, rates = run["held_out_loss"], (run["carrier_behavior"]["rate"], run["sft_behavior"]["rate"])
        assert list(run["bounds"].values()) == [
            run["sparsity"] >= smollm2.SPARSITY[run["behavior"]],
            loss["carrier"] <= run["epsilon"],
            rates[0] >= smollm2.OF_SFT * rates[1],
            run["seconds"] <= smollm2.SECONDS,
        ]
