"""A checkpoint in blocks, as one process sees it; what ranks do together is in tests/integration/test_ranks.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fixtures.checkpoints import make_model
from lcdd.checkpoint import model_fingerprint
from lcdd.errors import InputError
from lcdd.models import Sharding, load_model, save_weights
from lcdd.models.blocks import in_blocks


def test_a_block_is_what_shares_the_first_number_of_its_names() -> None:
    names = ["lm_head.weight", "h.1.attn.weight", "h.0.experts.7.weight", "h.0.experts.10.weight", "h.1.norm.weight"]
    assert in_blocks(names) == [names[:1], names[2:4], [names[1], names[4]]]


def test_files_hold_whole_blocks_and_tied_weights_once(tmp_path: Path) -> None:
    model = make_model("llama", layers=3, tied=True)
    for name in ("few", "one"):
        (tmp_path / name).mkdir()
        at_most = 1 if name == "few" else 10**9
        save_weights(model, model.state_dict(), tmp_path / name, dtype=torch.float32, at_most=at_most)
        assert model_fingerprint(load_model(tmp_path / name)) == model_fingerprint(model)
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    index = json.loads((tmp_path / "few" / "model.safetensors.index.json").read_text())
    files: dict[str, list[str]] = {}
    for name, file in index["weight_map"].items():
        files.setdefault(file, []).append(name)
    assert sorted(files) == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    for file, names in files.items():
        assert len(in_blocks(names)) == 1
        with safe_open(tmp_path / "few" / file, framework="pt") as opened:
            assert set(opened.keys()) == set(names)
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert "lm_head.weight" not in index["weight_map"]


def test_trained_weights_of_several_dtypes_are_refused_by_name() -> None:
    model = make_model("llama").bfloat16()
    for layer in model.model.layers:
        layer.input_layernorm.float()
    sharding = Sharding(trained=True, train_unmasked=True)
    sharding.mark(model)
    with pytest.raises(InputError, match=r"layer 0 under fsdp2, got torch\.bfloat16 and torch\.float32; take ddp"):
        sharding.finish(model)
