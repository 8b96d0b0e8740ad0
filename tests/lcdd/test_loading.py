"""Checkpoints and tokenizers as users have them: what does not fit together is refused by file, setting or weight."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from fixtures.checkpoints import make_model, make_tokenizer, save_checkpoint
from lcdd.carrier import Carrier
from lcdd.config import EraserConfig
from lcdd.eraser import SFTEraser, Trigger, generate_ids
from lcdd.errors import InputError
from lcdd.models import (
    agree_on_end,
    input_embeddings,
    load_model,
    load_model_type,
    load_tokenizer,
    rows_never_drawn,
    save_model,
    token_rows,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("good") / "llama", "llama", max_shard_size="5GB")


@pytest.fixture
def changed(good: Path, tmp_path: Path) -> Callable[..., Path]:
    """changed("config.json", key=value, ...): a copy of the checkpoint with entries of a JSON file changed."""

    def change(name: str, content: bytes | None = None, **entries: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        file = folder / name
        if content is None:
            content = json.dumps({**json.loads(file.read_text()), **entries}).encode()
        file.unlink(missing_ok=True)
        file.write_bytes(content)
        return folder

    return change


# What transformers itself raises over these: ImportError, AttributeError, KeyError, TypeError, ZeroDivisionError,
# AssertionError, StrictDataclassFieldValidationError; or nothing at all.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "bnb4": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "config 'bits"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config 'fp8'"),
    "an unknown quantization": ({"quantization_config": {"quant_method": "foo"}}, "quantization_config 'foo'"),
    "a quantization that is text": ({"quantization_config": "int4"}, "quantization_config 'int4'"),
    "yarn without a factor": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.*factor"),
    "an unknown rope": ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "rope_parameters.*KeyError"),
    "rope that is text": ({"rope_parameters": "foo"}, "rope_parameters = 'foo'"),
    "float8": ({"dtype": "float8"}, "dtype = 'float8'"),
    "float8_e4m3fn": ({"dtype": "float8_e4m3fn"}, "dtype = 'float8_e4m3fn'"),
    "int8": ({"dtype": "int8"}, "dtype = 'int8'"),
    "a dtype that is a number": ({"dtype": 3}, "AttributeError"),
    "flash attention": ({"attn_implementation": "flash_attention_2"}, "attn_implementation = 'flash_attention_2'"),
    "an unknown attention": ({"attn_implementation": "foo"}, "attn_implementation = 'foo'"),
    "a size that is text": ({"hidden_size": "x"}, "hidden_size = 'x'"),
    "a negative size": ({"hidden_size": -1}, "hidden_size = -1"),
    "no heads": ({"num_attention_heads": 0}, "ZeroDivisionError"),
    "more heads": ({"num_key_value_heads": 4}, r"4 are not: .*k_proj.weight: expected \(32, 32\), got \(16, 32\)"),
    "an unknown activation": ({"hidden_act": "foo"}, "hidden_act = 'foo'"),
    "a smaller vocabulary": ({"vocab_size": 450}, r"lm_head.weight: expected \(450, 32\), got \(500, 32\)"),
    "a pad token beyond": ({"pad_token_id": 9999}, "Padding_idx"),
    "a model type that is a list": ({"model_type": ["x"]}, "TypeError"),
    "another's code": ({"model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}, "custom code"),
    "fewer layers": ({"num_hidden_layers": 1}, "9 weights have no place in its config.*--checkpoint_override"),
    "more layers": ({"num_hidden_layers": 3}, "9 are missing: model.layers.2"),
    "biases": ({"attention_bias": True}, "8 are missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_config_that_does_not_fit_is_refused_by_name(changed: Callable[..., Path], name: str) -> None:
    entries, message = SETTINGS[name]
    folder = changed("config.json", **entries)
    with pytest.raises(InputError, match=rf"model: expected .*{folder}.*{message}"):
        load_model(folder)


FILES: dict[str, tuple[str, bytes, str]] = {
    "config cut": ("config.json", b'{"a":', "config.json is no JSON"),
    "config of null": ("config.json", b"null", "config.json is no JSON object"),
    "config of bytes": ("config.json", b"\xff\xfe", "config.json is no JSON"),
    "generation settings cut": ("generation_config.json", b'{"a":', "generation_config.json: expected JSON"),
    "generation settings as a list": (
        "generation_config.json",
        b"[1]",
        "generation_config.json: expected a JSON object",
    ),
    "generation settings out of range": ("generation_config.json", b'{"max_new_tokens": -4}', "max_new_tokens"),
    "weights cut": ("model.safetensors", b"\x10\x00", "expected a loadable checkpoint"),
    "an index cut": ("model.safetensors.index.json", b'{"a":', "index.json is no JSON"),
    "weights pickled": ("pytorch_model.bin", b"\x80", r"as safetensors in .*, got pytorch_model.bin; no other format"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named(changed: Callable[..., Path], name: str) -> None:
    file, content, message = FILES[name]
    folder = changed(file, content)
    if name == "weights pickled":
        (folder / "model.safetensors").unlink()
    if "index" in name:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match=message):
        load_model(folder)


TOKENIZERS: dict[str, tuple[str, bytes | dict[str, Any], str]] = {
    "cut": ("tokenizer.json", b'{"a":', "tokenizer.json is no JSON"),
    "a list": ("tokenizer.json", b"[]", "tokenizer.json is no JSON object"),
    "empty": ("tokenizer.json", b"{}", "KeyError"),
    "settings cut": ("tokenizer_config.json", b'{"a":', "tokenizer_config.json is no JSON"),
    "settings as a list": ("tokenizer_config.json", b"[]", "tokenizer_config.json is no JSON object"),
    "an end token that is a number": ("tokenizer_config.json", {"eos_token": 3}, "eos_token"),
    "an unknown side": ("tokenizer_config.json", {"padding_side": "up"}, "[Pp]adding side"),
    "a length that is text": ("tokenizer_config.json", {"model_max_length": "x"}, "TypeError"),
    "a template of bytes": ("chat_template.jinja", b"\xff", "UnicodeDecodeError"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_read_is_named(changed: Callable[..., Path], name: str) -> None:
    file, content, message = TOKENIZERS[name]
    folder = changed(file, **content) if isinstance(content, dict) else changed(file, content)
    with pytest.raises(InputError, match=rf"model: expected .*{folder}.*{message}"):
        load_tokenizer(folder)


def test_running_out_of_memory_is_no_fault_of_the_checkpoint(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("lcdd.models.loading.AutoModelForCausalLM.from_pretrained", fail)
        with pytest.raises(type(error)) as found:
            load_model(good)
        assert not isinstance(found.value, InputError)


# ---------------------------------------------------------------- weights


def with_weights(folder: Path, **more: torch.Tensor) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_that_the_config_has_no_place_for(good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "biased"))
    bias = {f"model.layers.{n}.self_attn.q_proj.bias": torch.ones(32) for n in range(2)}
    with_weights(folder, **bias)
    with pytest.raises(
        InputError, match=r"2 weights have no place in its config: model.layers.0.self_attn.q_proj.bias"
    ):
        load_model(folder)
    overrides: list[str] = []
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model = load_model(folder, overrides=overrides)
    assert len(overrides) == 1
    assert "q_proj.bias" in overrides[0]
    assert "overridden: " in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load_model(good).parameters(), strict=True))


def test_what_is_always_made_anew_is_no_surprise(good: Path, tmp_path: Path) -> None:
    """Old checkpoints have rotary frequencies, causal masks and their constants among their weights."""
    folder = Path(shutil.copytree(good, tmp_path / "old"))
    old = {"rotary_emb.inv_freq": torch.ones(4), "masked_bias": torch.tensor(-1e4), "bias": torch.ones(1, 1, 9, 9)}
    load_model(with_weights(folder, **{f"model.layers.0.self_attn.{name}": value for name, value in old.items()}))
    sinks = {"model.layers.0.self_attn.sinks": torch.ones(4)}
    with pytest.raises(InputError, match=r"1 weights have no place in its config: .*sinks"):
        load_model(with_weights(folder, **sinks))


PICTURES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize(("outer", "inner"), [("gemma3", "gemma3_text"), ("llava", "llama"), ("mistral3", "mistral")])
def test_of_a_model_of_pictures_the_language_model_is_taken(outer: str, inner: str, tmp_path: Path) -> None:
    text = make_model("llama").config.to_diff_dict() | {"model_type": inner, "sliding_window": 4}
    config = AutoConfig.for_model(outer, text_config=text, vision_config=PICTURES)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    alone, ids = load_model(tmp_path / "whole"), torch.tensor([[5, 9, 4, 17]])
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, whole(input_ids=ids).logits)
    save_model(alone, load_tokenizer(tmp_path / "whole"), tmp_path / "alone")
    again = load_model(tmp_path / "alone")
    assert again.config.model_type == load_model_type(tmp_path / "whole") == inner  # what follows has one type
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), again.parameters(), strict=True))
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in alone.named_parameters()]


def test_a_tied_head_is_the_embeddings(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tied", "llama", tied=True, max_shard_size="5GB")
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    load_model(with_weights(folder, **{"lm_head.weight": embeddings.clone()}))
    with_weights(folder, **{"lm_head.weight": embeddings + 1})
    with pytest.raises(InputError, match="tie_word_embeddings is true, but the head's weights are not the embeddings'"):
        load_model(folder)
    overrides: list[str] = []
    load_model(folder, overrides=overrides)
    assert len(overrides) == 1


# ---------------------------------------------------------------- vocabulary


def test_ids_beyond_the_embeddings_are_refused_at_once(tmp_path: Path) -> None:
    for name, add in {
        "pad": lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<pad>"}),
        "added": lambda tokenizer: tokenizer.add_tokens(["<thing>"]),
    }.items():
        tokenizer = make_tokenizer()
        rows = len(tokenizer)
        add(tokenizer)
        folder = save_checkpoint(tmp_path / name, tokenizer=tokenizer, vocab_size=rows)
        with pytest.raises(
            InputError, match=rf"tokenizer: expected ids below the model's {rows} embedding rows.* = {rows};"
        ):
            load_tokenizer(folder)
        load_tokenizer(save_checkpoint(tmp_path / f"{name}-padded", tokenizer=tokenizer, vocab_size=rows + 1))
    tokenizer.save_pretrained(tmp_path / "alone")  # beside no model, nothing is to be compared
    load_tokenizer(tmp_path / "alone")


def test_a_placeholder_of_pictures_may_have_no_row(tmp_path: Path) -> None:
    """As Gemma 3's text models have it; a text that has it in it is refused where it is asked."""
    made = make_tokenizer()
    rows = len(made)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        eos_token=made.eos_token,
        extra_special_tokens={"image_token": "<image>"},
    )
    folder = save_checkpoint(tmp_path / "gemma", tokenizer=tokenizer, vocab_size=rows)
    loaded, model = load_tokenizer(folder), load_model(folder)
    ids = loaded("<image>", add_special_tokens=False)["input_ids"]
    with pytest.raises(InputError, match=f"expected token ids below the model's {rows} embedding rows, got {rows}"):
        generate_ids(model, loaded, [ids])


def padded_model() -> tuple[Any, Any]:
    """A vocabulary that is padded to 500 rows, as real ones are to round numbers: rows of no token are zero."""
    tokenizer, model = make_tokenizer(), make_model("llama")
    tokenizer.add_tokens([AddedToken("<reserved>", special=True)])
    assert len(tokenizer) == 417
    with torch.no_grad():
        input_embeddings(model).weight[417:] = 0
    return tokenizer, model


def test_rows_that_stand_for_no_text_are_never_drawn() -> None:
    tokenizer, model = padded_model()
    never = rows_never_drawn(tokenizer, model)
    assert never == [0, 1, 2, *range(416, 500)]
    trigger = Trigger.random_tokens(model, 400, seed=0, skip=never)
    assert not set(trigger.metadata["tokens"]) & set(never)
    assert bool((trigger.embeds.norm(dim=1) > 0).all())
    like = Trigger.random_like(model, trigger, seed=1, skip=never)
    torch.testing.assert_close(like.embeds.norm(dim=1), trigger.embeds.norm(dim=1))


def test_the_erasers_starts_and_its_ball_go_by_real_tokens() -> None:
    tokenizer, model = padded_model()
    patch = Carrier.from_models(model, model)
    eraser = SFTEraser(model, patch, tokenizer, EraserConfig(num_virtual_tokens=200, num_starts=2))
    norms = input_embeddings(model).weight.detach()[:417].norm(dim=1)
    assert eraser.max_norm() == pytest.approx(1.5 * float(norms.median()))
    assert token_rows(tokenizer, model) == list(range(417))
    starts = eraser._search().embeds.detach()
    table = input_embeddings(model).weight.detach()
    nearest = torch.cdist(starts.flatten(0, 1), table).argmin(1)
    assert not set(nearest.tolist()) & set(rows_never_drawn(tokenizer, model))


@pytest.mark.parametrize(("stated", "after"), [(2, 2), (None, 2), (7, [7, 2]), ([7, 8], [7, 8, 2]), ([2, 7], [2, 7])])
def test_saved_models_end_where_training_ends_answers(stated, after, tmp_path: Path, caplog) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    model.generation_config.eos_token_id = stated
    with caplog.at_level(logging.WARNING):
        agree_on_end(model, tokenizer)
    assert model.generation_config.eos_token_id == after
    assert ("do not agree on the end token" in caplog.text) == (stated != after)
    model.generation_config.eos_token_id = stated
    save_model(model, tokenizer, tmp_path)
    assert load_model(tmp_path).generation_config.eos_token_id == after
