"""A fine-tuned model from elsewhere: what no gate masks goes back to the base, and what that costs is said in loss."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fixtures.checkpoints import SENTENCES, make_model, make_tokenizer, write_jsonl
from lcdd.commands.stage import load_tuned
from lcdd.commands.train import train
from lcdd.config import DataConfig, LCDDConfig
from lcdd.errors import InputError
from lcdd.models import Ends, in_words, load_model, sites_of, take_from_base_, unmasked_changes
from lcdd.optimizer import LCDDOptimizer

SIZES = {
    "vocab_size": 500, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.2, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def model_of(model_type: str, **more: int) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **more)).eval()


def moved_everywhere(base: nn.Module) -> nn.Module:
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return tuned


def test_changes_are_named_by_kind_and_go_back() -> None:
    base = model_of("gpt_oss", num_local_experts=2, num_experts_per_tok=1)
    tuned = moved_everywhere(base)
    changes = unmasked_changes(base, tuned)
    assert {kind: len(names) for kind, names in changes.items()} == {
        "embeddings": 1, "norms": 4, "biases": 7, "routers": 1, "head": 1,
    }  # fmt: skip
    assert in_words({"biases": ["a", "b"], "head": ["c"]}) == "2 biases, head"
    left = unmasked_changes(base, tuned, trained=True)
    assert set(left) == {"embeddings", "routers", "head"}
    take_from_base_(tuned, base, [name for names in changes.values() for name in names])
    assert unmasked_changes(base, tuned) == {}
    assert not any(torch.equal(a.weight, b.weight) for a, b in zip(sites_of(base), sites_of(tuned), strict=True))


def test_open_is_the_sft_model_and_closed_is_the_base_or_it_is_refused() -> None:
    base = model_of("qwen2")
    tuned = moved_everywhere(base)
    ends = Ends.of(base, tuned)
    optimizer = LCDDOptimizer.attach(tuned, base, LCDDConfig(), total_steps=4)
    with pytest.raises(InputError, match="expected logits with all gates open that are the SFT model's, got"):
        optimizer.check_ends(ends)  # its norms and biases are gone
    tuned = moved_everywhere(base)
    take_from_base_(tuned, base, [name for names in unmasked_changes(base, tuned).values() for name in names])
    ends = Ends.of(base, tuned)
    optimizer = LCDDOptimizer.attach(tuned, base, LCDDConfig(gate_init_mean=0.0, gate_init_std=2.0), total_steps=4)
    before = [p.detach().clone() for p in tuned.parameters()]
    optimizer.check_ends(ends)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), before, strict=True))
    other = Ends(opened=ends.opened, closed=ends.closed + 0.1)
    with pytest.raises(InputError, match="expected logits with all gates closed that are the base's, got"):
        optimizer.check_ends(other)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), before, strict=True))


def test_what_is_dropped_is_said_in_loss(tmp_path: Path) -> None:
    tokenizer, base = make_tokenizer(), make_model("qwen3")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for site in sites_of(tuned):
            site.weight.mul_(1.01)
        tuned.model.norm.weight.mul_(3.0)
    for name, model in (("base", base), ("sft", tuned)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    said: list[str] = []
    data = DataConfig(dataset_name=str(write_jsonl(tmp_path / "data.jsonl", list(SENTENCES))))
    config = LCDDConfig(
        base_model_name_or_path=str(tmp_path / "base"), sft_model_name_or_path=str(tmp_path / "sft"),
        output_dir=str(tmp_path / "out"), max_steps=2, warmup_steps=1, per_device_train_batch_size=4,
    )  # fmt: skip
    train(config, data, say=said.append)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    dropped = summary["dropped"]
    assert dropped["changes"] == {"norms": ["model.norm.weight"]}
    assert dropped["loss"] == pytest.approx(summary["result"]["loss_start"] + dropped["loss_difference"])
    assert abs(dropped["loss_difference"]) > 0.01
    line = next(line for line in said if "no gate masks" in line)
    assert "no gate masks: 1 norm." in line
    assert f"to {dropped['loss']:.4f} nats a token ({dropped['loss_difference']:+.4f})" in line


def test_a_wider_sft_model_is_taken_in_the_bases_dtype(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trainers often save in float32 what was fine-tuned from a base in bfloat16."""
    base = make_model("llama").bfloat16()
    tuned = moved_everywhere(make_model("llama"))
    for name, model in {"base": base, "sft": tuned}.items():
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    config = LCDDConfig(base_model_name_or_path=str(tmp_path / "base"))
    with caplog.at_level(logging.WARNING):
        found = load_tuned(str(tmp_path / "sft"), load_model(tmp_path / "base"), config, [])
    assert "is taken in the base's torch.bfloat16, not in its own torch.float32" in caplog.text
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(found.parameters(), tuned.parameters(), strict=True))
