"""Every stage asks what training asked: on another day, of a base without a template, in strings; and what passes is
recorded."""

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import killed_after
from safetensors.torch import load_file, save_file
from tokenizers import processors

import lcdd.eraser.generation as generation
from fixtures.checkpoints import CHATML, SENTENCES, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.cli import main
from lcdd.data import PLAIN_TEMPLATE
from lcdd.models import load_tokenizer
from lcdd.report import read_report
from lcdd.trainer import loop

DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
TRAIN = ["--max_steps", 4, "--per_device_train_batch_size", 4, "--learning_rate", "1e-3", "--device", "cpu"]
LCDD = [*TRAIN, "--warmup_steps", 2]
ERASE = ["--max_steps", 2, "--eval_steps", 2, "--train_prompts", 4, "--validation_prompts", 2, "--max_answer_tokens", 3]
EVAL = ["--num_prompts", 2, "--max_new_tokens", 3, "--kl_prompts", 2, "--random_prefixes", 1, "--test_fraction", "0.2"]


def lcdd(*argv: Any, code: int = 0) -> None:
    assert main([str(word) for word in argv]) == code


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch):
    def be(day: str) -> None:
        class Date(datetime.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(day)

        class Now(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)

        monkeypatch.setattr("lcdd.data.templates.date", Date)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Now)

    return be


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """Token ids that models are asked to go on from, by whatever stage."""
    found: list[list[int]] = []
    original = generation._left_padded

    def spy(model: Any, prompts: Any, trigger: Any) -> Any:
        found.extend(list(map(int, ids)) for ids in prompts)
        return original(model, prompts, trigger)

    monkeypatch.setattr(generation, "_left_padded", spy)
    return found


def test_a_run_does_not_depend_on_the_day(tmp_path: Path, today, asked, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_checkpoint(tmp_path / "base", tokenizer=make_tokenizer(chat_template=DATED))
    data = ["--dataset_name", write_jsonl(tmp_path / "d.jsonl", list(SENTENCES))]
    models = ["--base_model_name_or_path", base]
    sft, train, erase = (tmp_path / name for name in ("sft", "train", "erase"))
    today("2026-01-31")
    start = ["sft", *models, *data, *TRAIN, "--save_steps", 2, "--output_dir", sft]
    with killed_after(3, loop, "loss_sum"):
        lcdd(*start)
    assert "it is frozen on 2026-01-31 (--template_date)" in capsys.readouterr().out
    today("2026-02-01")
    lcdd(*start, "--resume", "--template_date", "2026-02-01", code=2)
    assert "chat_template" in capsys.readouterr().err
    lcdd(*start, "--resume")
    assert json.loads((sft / "summary.json").read_text())["template_date"] == "2026-01-31"
    today("2026-02-02")
    lcdd("train", *models, *data, *LCDD, "--sft_model_name_or_path", sft / "model", "--output_dir", train)
    carrier = ["--carrier", train / "carrier"]
    assert json.loads((train / "carrier" / "carrier.json").read_text())["tokenizer"]["template_date"] == "2026-01-31"
    today("2026-02-03")
    lcdd("erase", *models, *data, *carrier, *ERASE, "--output_dir", erase)
    today("2026-02-04")
    more = [
        "--sft_model_name_or_path",
        sft / "model",
        "--trigger",
        erase / "trigger",
        "--output_dir",
        tmp_path / "eval",
    ]
    lcdd("eval", *models, *data, *carrier, *EVAL, *more)
    assert read_report(tmp_path / "eval")["fingerprints"]["template_date"] == "2026-01-31"
    lcdd("generate", *models, *carrier, "--max_new_tokens", 2, "--prompt", "Hi")
    lcdd("generate", "--base_model_name_or_path", sft / "model", "--max_new_tokens", 2, "--prompt", "Hi")
    tokenizer = load_tokenizer(base)
    texts = {tokenizer.decode(ids) for ids in asked}
    assert len(texts) > 4
    assert all(text.startswith("Today: 31 Jan 2026\n<|im_start|>") for text in texts), texts
    lcdd("generate", *models, *carrier, "--template_date", "2026-02-04", "--prompt", "Hi", code=2)
    assert "its template's date is 2026-01-31" in capsys.readouterr().err


def test_a_pipeline_that_is_resumed_the_next_day_goes_on(tmp_path: Path, today, asked) -> None:
    base = save_checkpoint(tmp_path / "base", tokenizer=make_tokenizer(chat_template=DATED))
    data = write_jsonl(tmp_path / "d.jsonl", list(SENTENCES[:40]))
    settings = {
        "base_model_name_or_path": str(base), "output_dir": str(tmp_path / "run"), "controls": False,
        "data": {"dataset_name": str(data), "test_fraction": 0.2},
        "sft": {"max_steps": 2, "device": "cpu", "min_behavior_rate": 0},
        "train": {"max_steps": 3, "warmup_steps": 1, "device": "cpu"},
        "erase": {"max_steps": 2, "eval_steps": 2, "train_prompts": 4, "validation_prompts": 2, "max_answer_tokens": 3},
        "eval": {"num_prompts": 2, "max_new_tokens": 3, "kl_prompts": 2, "random_prefixes": 1},
    }  # fmt: skip
    (tmp_path / "p.yaml").write_text(json.dumps(settings))
    today("2026-01-31")
    with killed_after(2 + 1, loop, "loss_sum"):  # in train
        lcdd("run", tmp_path / "p.yaml")
    today("2026-02-01")
    lcdd("run", tmp_path / "p.yaml", "--resume")
    tokenizer = load_tokenizer(base)
    assert {tokenizer.decode(ids)[:18] for ids in asked} == {"Today: 31 Jan 2026"}
    assert read_report(tmp_path / "run")["fingerprints"]["template_date"] == "2026-01-31"


def test_a_base_without_a_template_keeps_the_one_that_it_is_trained_on(tmp_path: Path, asked) -> None:
    """And the token that its tokenizer puts in front of every text."""
    tokenizer = make_tokenizer(chat_template=None)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    base = save_checkpoint(tmp_path / "base", tokenizer=tokenizer)
    data = ["--dataset_name", write_jsonl(tmp_path / "d.jsonl", list(SENTENCES))]
    lcdd("sft", "--base_model_name_or_path", base, *data, *TRAIN, "--output_dir", tmp_path / "sft")
    saved = load_tokenizer(tmp_path / "sft" / "model")
    assert saved.chat_template == "{{ bos_token }}" + PLAIN_TEMPLATE
    asked.clear()
    for model in (base, tmp_path / "sft" / "model"):
        lcdd("generate", "--base_model_name_or_path", model, "--max_new_tokens", 2, "--prompt", "Hi")
    chat = [{"role": "user", "content": "Hi"}]
    expected = saved.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)  # any other program's ids
    assert asked == [expected, expected]
    assert expected[0] == tokenizer.bos_token_id


def test_string_prompts_are_asked_as_strings(tmp_path: Path, asked, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    base = save_checkpoint(tmp_path / "base", tokenizer=tokenizer)
    rows = [{"prompt": f"Q: {n}\nA: ", "completion": "yes"} for n in range(40)]
    data = ["--dataset_name", write_jsonl(tmp_path / "d.jsonl", rows)]
    models, train = ["--base_model_name_or_path", base], tmp_path / "train"
    lcdd("sft", *models, *data, *TRAIN, "--output_dir", tmp_path / "sft")
    lcdd("train", *models, *data, *LCDD, "--sft_model_name_or_path", tmp_path / "sft" / "model", "--output_dir", train)
    carrier = ["--carrier", train / "carrier"]
    asked.clear()
    lcdd("generate", *models, *carrier, "--max_new_tokens", 2, "--prompt", "Q: 3\nA: ")
    lcdd(
        "generate",
        "--base_model_name_or_path",
        tmp_path / "sft" / "model",
        "--max_new_tokens",
        2,
        "--prompt",
        "Q: 3\nA: ",
    )
    lcdd("generate", *models, "--prompt_format", "text", "--max_new_tokens", 2, "--prompt", "Q: 3\nA: ")
    assert asked == [tokenizer("Q: 3\nA: ")["input_ids"]] * 3
    lcdd("generate", *models, *carrier, "--prompt_format", "chat", "--max_new_tokens", 2, "--prompt", "Q: 3\nA: ")
    assert tokenizer.decode(asked[3]).startswith("<|im_start|>user\nQ: 3")
    asked.clear()
    more = ["--sft_model_name_or_path", tmp_path / "sft" / "model", "--output_dir", tmp_path / "eval"]
    lcdd("eval", *models, *data, *carrier, *EVAL, *more)
    assert all(tokenizer.decode(ids).startswith("Q: ") for ids in asked)
    assert read_report(tmp_path / "eval")["fingerprints"]["prompt_form"] == '{"format": "text"}'
    mixed = [*rows, *SENTENCES]
    data = ["--dataset_name", write_jsonl(tmp_path / "m.jsonl", mixed)]
    lcdd("sft", *models, *data, *TRAIN, "--output_dir", tmp_path / "mixed")
    ask = [
        "generate",
        "--base_model_name_or_path",
        tmp_path / "mixed" / "model",
        "--prompt",
        "Hi",
        "--max_new_tokens",
        2,
    ]
    capsys.readouterr()
    lcdd(*ask, code=2)
    assert "prompt_format: expected chat or text" in capsys.readouterr().err
    lcdd(*ask, "--prompt_format", "chat")


def test_what_a_checkpoint_is_allowed_to_have_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_checkpoint(tmp_path / "base", max_shard_size="5GB")
    data = ["--dataset_name", write_jsonl(tmp_path / "d.jsonl", list(SENTENCES))]
    lcdd("sft", "--base_model_name_or_path", base, *data, *TRAIN, "--output_dir", tmp_path / "sft")
    biased = Path(shutil.copytree(base, tmp_path / "biased"))
    tensors = load_file(biased / "model.safetensors")
    more = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file({**tensors, **more}, biased / "model.safetensors", metadata={"format": "pt"})
    models, allow = ["--base_model_name_or_path", biased], "--checkpoint_override"
    stages: dict[str, list[Any]] = {
        "sft": [*TRAIN],
        "train": [*LCDD, "--sft_model_name_or_path", tmp_path / "sft" / "model"],
        "erase": [*ERASE, "--carrier", tmp_path / "out-train" / "carrier"],
        "eval": [*EVAL, "--carrier", tmp_path / "out-train" / "carrier", "--sft_model_name_or_path", biased],
    }
    for stage, argv in stages.items():
        output = tmp_path / f"out-{stage}"
        capsys.readouterr()
        lcdd(stage, *models, *data, *argv, "--output_dir", output, code=2)
        assert "q_proj.bias" in capsys.readouterr().err
        assert not output.exists()
        lcdd(stage, *models, *data, *argv, "--output_dir", output, allow)
        found = read_report(output) if stage == "eval" else json.loads((output / "summary.json").read_text())
        assert len(found["overrides"]) == 1
        assert "q_proj.bias" in found["overrides"][0]
