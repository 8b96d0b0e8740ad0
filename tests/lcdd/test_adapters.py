"""PEFT adapters as the SFT model, and SFT by LoRA: merged they compute what PEFT does, or are refused by name."""

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fixtures.checkpoints import SENTENCES, make_model, make_tokenizer, write_jsonl
from lcdd.carrier import Carrier
from lcdd.cli import main
from lcdd.config import SFTConfig
from lcdd.errors import InputError
from lcdd.models import (
    LoRALayers,
    adapters,
    find_adapter,
    in_words,
    load_model,
    load_tokenizer,
    unmasked_changes,
)
from lcdd.models.adapters import Adapter, can_merge_rows, merge
from lcdd.optimizer import SFTOptimizer

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.tensor([[3, 14, 15, 9, 26]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "base"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, config: peft.PeftConfig, **settings: Any) -> nn.Module:
    """An adapter with noise in all that it trains, on disk; the model that PEFT makes of it. settings: written over
    those in its adapter_config.json."""
    torch.manual_seed(1)
    model = peft.get_peft_model(make_model("llama"), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base), **settings}))
    return model


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, True), ({"init_lora_weights": "gaussian"}, True), ({"init_lora_weights": "pissa"}, False),
        ({"use_dora": True}, False), ({"modules_to_save": ["lm_head"]}, False), ({"bias": "all"}, False),
        ({"peft_type": "LOHA"}, False),
    ],
)  # fmt: skip
def test_rows_alone_are_merged_where_products_are_all_there_is(settings: dict[str, Any], rows: bool) -> None:
    found = json.loads(json.dumps(lora().to_dict(), default=str)) | settings
    assert can_merge_rows(Adapter(folder=Path(), settings=found)) is rows


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("half", [0, 1])
def test_a_ranks_rows_of_any_layer_get_what_the_whole_layer_gets(half: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear, embedding, and Conv1D, whose weight lies the other way round; here a rank is half of each weight."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({"linear": nn.Linear(6, 8), "embedding": nn.Embedding(10, 6), "conv": Conv1D(12, 6)})
    config = peft.LoraConfig(target_modules=list(layers), r=2, init_lora_weights=False)
    tuner = peft.LoraModel(layers, config, "default")
    before = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}

    def rows(weight: torch.Tensor, part: int = half) -> torch.Tensor:
        return weight[part * len(weight) // 2 : (part + 1) * len(weight) // 2]

    monkeypatch.setattr(adapters.shards, "local", rows)
    monkeypatch.setattr(adapters.shards, "row_offset", lambda weight: half * (len(weight) // 2))
    with torch.no_grad():
        adapters._add_rows(tuner)
    found = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.get_base_layer().weight.data.copy_(before[name])
    whole = tuner.merge_and_unload()
    for name, weight in found.items():
        expected = getattr(whole, name).weight if hasattr(whole, name) else whole[name].weight
        assert torch.equal(rows(weight), rows(expected)), name
        assert not torch.equal(rows(weight), rows(before[name])), name
        assert torch.equal(rows(weight, 1 - half), rows(before[name], 1 - half)), name


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings)


def merged(folder: Path) -> Any:
    """As `load_model`, without the probes."""
    found = find_adapter(folder)
    assert found is not None
    return merge(make_model("llama"), found, name=str(folder))


MERGED: dict[str, tuple[peft.PeftConfig, str]] = {
    "lora": (lora(), ""),
    "dora": (lora(use_dora=True), ""),
    "rslora": (lora(use_rslora=True), ""),
    "embeddings": (lora(target_modules=["q_proj", "embed_tokens"]), "embeddings"),
    "modules_to_save": (lora(modules_to_save=["lm_head", "norm"]), "5 norms, head"),
    "tokens": (lora(trainable_token_indices=[3, 4]), "embeddings"),
    "loha": (peft.LoHaConfig(target_modules=TARGETS), ""),
    "ia3": (peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), ""),
    "oft": (peft.OFTConfig(oft_block_size=8, r=0, target_modules=TARGETS), ""),
    "shira": (peft.ShiraConfig(r=2, target_modules=TARGETS), ""),
    "norms": (peft.LNTuningConfig(target_modules=["input_layernorm"]), "2 norms"),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGED)
def test_a_merged_adapter_computes_what_peft_does(case: str, base: Path, tmp_path: Path) -> None:
    config, beside = MERGED[case]
    expected = adapter(base, tmp_path, copy.deepcopy(config))
    original = make_model("llama")
    found = merged(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)
    assert in_words(unmasked_changes(original, found)) == beside
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in original.named_parameters()]


REFUSED: dict[str, tuple[peft.PeftConfig, dict[str, Any], str]] = {
    "prompt": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), {},
               "become part of the weights, got .* of type PROMPT_TUNING, which is put in front of a prompt"),
    "prefix": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), {}, "of type PREFIX_TUNING"),
    "adaption": (peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1), {},
                 "of type ADAPTION_PROMPT$"),
    "alora": (lora(alora_invocation_tokens=[9, 9]), {}, "aLoRA does not support"),
    "layers": (lora(layer_replication=[[0, 2], [1, 2]]), {}, "replicates some of them"),
    "no base": (lora(), {"base_model_name_or_path": None}, "expected base_model_name_or_path in .* got None"),
    "base elsewhere": (lora(), {"base_model_name_or_path": "gone"}, "'gone', got no such directory; where it lies"),
    "another rank": (lora(), {"r": 4}, "size mismatch"),
    "more layers": (lora(), {"target_modules": [*TARGETS, "o_proj"]}, "its file lacks 4 of them: .*o_proj"),
    "fewer": (lora(), {"target_modules": ["q_proj"]}, "its base has no place for 8 of them"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(case: str, base: Path, tmp_path: Path) -> None:
    config, settings, message = REFUSED[case]
    adapter(base, tmp_path, copy.deepcopy(config), **settings)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_files_and_packages_that_are_not_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(base, tmp_path / "a", lora())
    adapter(base, tmp_path / "b", lora(), base_model_name_or_path=str(tmp_path / "a"))
    with pytest.raises(InputError, match=r"expected a whole model as the base .* got another adapter"):
        load_model(tmp_path / "b")
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    settings = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (quantised / "config.json").write_text(json.dumps(settings))
    adapter(base, tmp_path / "c", lora(), base_model_name_or_path=str(quantised))
    with pytest.raises(InputError, match=r"adapter .*/c' .* weights that are not quantised, got .*'gptq'"):
        load_model(tmp_path / "c")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"an adapter or a whole model .* got both"):
        load_model(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    weights = tmp_path / "a" / "adapter_model.safetensors"
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"peft: expected PEFT to be installed \(pip install lcdd\[peft\]\) to merge"):
        load_model(tmp_path / "a")
    monkeypatch.undo()
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"expected adapter_model.safetensors in the adapter .* no other format"):
        load_model(tmp_path / "a")


def test_a_head_of_its_own_where_the_base_has_its_embeddings_is_refused(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path, lora(modules_to_save=["lm_head"]))
    found = find_adapter(tmp_path)
    assert found is not None
    with pytest.raises(InputError, match=r"adds, drops or resizes lm_head.weight"):
        merge(make_model("llama", tied=True), found, name="one")


def test_weights_that_are_not_finite_are_refused(base: Path, tmp_path: Path) -> None:
    model = adapter(base, tmp_path, lora())
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = math.nan
    settings = (tmp_path / "adapter_config.json").read_text()
    model.save_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(InputError, match="NaN"):
        load_model(tmp_path)


def test_an_adapter_is_compressed_and_one_of_another_base_is_not(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter(base, tmp_path / "adapter", lora(modules_to_save=["norm"]))
    other = load_model(base)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 0.5
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(base).save_pretrained(tmp_path / "other")
    data = write_jsonl(tmp_path / "data.jsonl", list(SENTENCES))
    command = ["train", "--sft_model_name_or_path", str(tmp_path / "adapter"), "--dataset_name", str(data),
               "--max_steps", "2", "--warmup_steps", "1", "--output_dir", str(tmp_path / "out"),
               "--base_model_name_or_path"]  # fmt: skip
    assert main([*command, str(tmp_path / "other")]) == 2
    assert "whose base is" in (error := capsys.readouterr().err)
    assert "1 of 21 parameters are others, model.layers.1.mlp.up_proj.weight first" in error
    assert main([*command, str(base)]) == 0
    assert "no gate masks: 5 norms." in " ".join(capsys.readouterr().out.split())
    assert Carrier.from_pretrained(tmp_path / "out" / "carrier").delta_norm() > 0.1


# ---------------------------------------------------------------- SFT by LoRA


def step(model: Any, optimizer: SFTOptimizer) -> None:
    model.train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    optimizer.step(loss.item())
    model.eval()


def test_lora_in_training_is_the_merged_model_and_keeps_its_bound() -> None:
    base, model = make_model("qwen3"), make_model("qwen3")
    names = list(model.state_dict())
    config = SFTConfig(use_peft=True, lora_r=4, learning_rate=0.05, max_delta_norm=0.3, lora_target_modules=("q_proj",))
    optimizer = SFTOptimizer(model, config)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(model.model.layers)
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits)
    for _ in range(5):
        step(model, optimizer)
    logits, shipped = model(IDS).logits, optimizer.model_state()
    assert list(shipped) == names
    optimizer.merge()
    assert all(torch.equal(value, shipped[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(IDS).logits, logits)
    squared = [(a - b).double().square().sum() for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert math.sqrt(float(sum(squared))) == pytest.approx(0.3, rel=1e-4)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert changed == {f"model.layers.{n}.self_attn.q_proj.weight" for n in range(len(model.model.layers))}


def test_targets_are_masked_layers_and_settings_need_use_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    put = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "seed": 0}
    with pytest.raises(InputError, match=r"some of down_proj, gate_proj, .*, got 'lm_head'"):
        LoRALayers(model, targets=("q_proj", "lm_head"), **put)
    assert len(LoRALayers(model, targets=(), **put).layers) == 7 * len(model.model.layers)
    with pytest.raises(InputError, match=r"lora_r: expected use_peft beside it, .* got 4"):
        SFTConfig(lora_r=4)
    with pytest.raises(InputError, match="train_unmasked: expected it off with use_peft"):
        SFTConfig(use_peft=True, train_unmasked=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="for --use_peft"):
        LoRALayers(make_model("llama"), targets=(), **put)
