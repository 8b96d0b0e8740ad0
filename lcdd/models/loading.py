"""Loading and saving models and tokenizers; safetensors only, no remote code."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from lcdd.errors import InputError
from lcdd.models import shards
from lcdd.models.adapters import SETTINGS, Adapter, can_merge_rows, find_adapter, merge
from lcdd.models.blocks import Sharding, block_reader, can_read_blocks
from lcdd.models.probe import check_generates, probe
from lcdd.models.sites import check_config, structure_of
from lcdd.models.vocabulary import agree_on_end, check_ids

logger = logging.getLogger(__name__)

CONSTANTS = ("masked_bias", "causal_mask", "inv_freq", "position_ids")
"""Last parts of the names of buffers that old checkpoints hold beside their weights, and that are made anew today."""
OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""How files of weights end that are not read."""


@contextmanager
def _of(path: str | Path) -> Iterator[None]:
    """An InputError about a model's parts, as one that names the checkpoint too: a stage loads several."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{error}; of the model in {str(path)!r}") from error


@contextmanager
def _reading(expected: str, path: str | Path) -> Iterator[None]:
    """What transformers raises over the files of a checkpoint, as one InputError that names the file or setting.

    Any exception: a setting of config.json that it does not expect comes back as a KeyError, an AttributeError, a
    failed assertion, from a division by zero, from an import. Being out of memory is none of the checkpoint's.
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        if "DefaultCPUAllocator" in message:
            raise
        about = _broken_file(path) or "".join(f"{name} = {value!r}: " for name, value in _suspects(path, message))
        kind = type(error).__name__
        raise InputError(f"model: expected {expected}, got {str(path)!r}: {about}{kind}: {message}") from error


def _broken_file(path: str | Path) -> str:
    """The first of a directory's JSON files that is no JSON object, and what is wrong with it; empty if none is."""
    for file in sorted(Path(path).glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"{file.name} is no JSON ({error}): "
        if not isinstance(content, dict):
            return f"{file.name} is no JSON object: "
    return ""


def _suspects(path: str | Path, message: str) -> list[tuple[str, Any]]:
    """Settings in a local config.json whose name or value an error's message has, however it spells them
    (flash_attention_2: FlashAttention2)."""

    def squeezed(value: Any) -> str:
        return re.sub(r"[^a-z0-9]", "", str(value).lower())

    text = squeezed(message)

    def mentioned(value: Any) -> bool:
        if isinstance(value, Mapping):
            return any(map(mentioned, value.values()))
        return isinstance(value, str) and len(value) > 2 and squeezed(value) in text

    settings = _written_settings(path).items()
    return [(name, value) for name, value in settings if squeezed(name) in text or mentioned(value)][:3]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bar and its report of weights, which would break into a stage's lines."""
    shows_bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bar:
            transformers_logging.enable_progress_bar()


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    overrides: list[str] | None = None,
    shard: Sharding | None = None,
) -> PreTrainedModel:
    """Load a causal language model, and probe it (`lcdd.models.probe`); safetensors only, no remote code.

    path: a checkpoint directory or a hub name. Where it is a PEFT adapter, the model that this names as its base is
    loaded, and the adapter becomes part of its weights (`lcdd.models.adapters`).

    Of a model of pictures the language model is taken, and what is saved of it is a model of texts.

    Args:
        overrides: if given, weights that the config has no place for are left out, and that is noted here.
        shard: how the model is sharded over the ranks (`lcdd.models.blocks`), none of which holds all of it while it is
            read; to be called on every rank. Only an adapter that does more than add products to weights (DoRA, an own
            head), or whose weights are widened, is merged into a whole base, which is sharded then.

    Raises:
        InputError: `path` is not a usable checkpoint, its weights are not those of its config, its layers cannot be
            masked, it failed the probe, or ranks that are to share it have models of other shapes.
    """
    bones = skeleton(path)
    if adapter := _adapter(path):
        in_rows = shard if shard is not None and not shard.widen and can_merge_rows(adapter) else None
        base = load_model(adapter.base, dtype=dtype, device=device, overrides=overrides, shard=in_rows)
        with _reading("an adapter that can be merged", path), _quietly():
            model = merge(base, adapter, name=str(path))
        with _of(path):
            probe(model)
        shards.reshard(model)
        return model if shard is None or in_rows is not None else shard.shard(model)
    _check_generation_config(path)
    _refuse_other_formats(path)
    inside = _is_inside_another(_config(path))
    kind: Any = AutoModelForImageTextToText if inside else AutoModelForCausalLM
    in_blocks = shard is not None and can_read_blocks(type(bones))
    if shard is not None:  # or ranks would wait for each other for ever
        shards.check_agreement(model=[(name, tuple(weight.shape)) for name, weight in bones.named_parameters()])
    if shard is not None and not in_blocks:
        logger.warning("this transformers reads no parts of a checkpoint: every rank reads all of %s", path)
    with _reading("a loadable checkpoint", path), _quietly():
        if shard is not None and in_blocks:
            kind = block_reader(_outer_class(path) if inside else type(bones), shard)
        found: Any = kind.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    model, loaded = found
    _check_weights(model, loaded, path, overrides)
    if inside:
        model = _taken_out(model, path)
    placed: PreTrainedModel = model.to(device)  # type: ignore[arg-type]  # transformers wraps it without types
    with _of(path):
        if shard is not None:
            placed = shard.finish(placed) if in_blocks else shard.shard(placed)
        probe(placed)
    shards.reshard(placed)
    return placed


def _outer_class(path: str | Path) -> type[PreTrainedModel]:
    """The class of a model of pictures."""
    with torch.device("meta"):
        return type(AutoModelForImageTextToText.from_config(_config(path)))


def _is_inside_another(config: PretrainedConfig) -> bool:
    """Whether a config is that of a model of pictures or sounds, with a language model in it."""
    return config.get_text_config(decoder=True) is not config


def _taken_out(whole: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """The language model of a model of pictures: the same modules under the names of a model of texts.

    Raises:
        InputError: transformers' class for it has another decoder.
    """
    alone: Any = skeleton_of(whole.config)
    decoder = whole.get_decoder()
    if type(decoder) is not type(alone.base_model):
        raise InputError(
            f"model: expected a language model that is {type(alone.base_model).__name__} in {str(path)!r}, got "
            f"{type(decoder).__name__}"
        )
    head = whole.get_output_embeddings()
    setattr(alone, alone.base_model_prefix, decoder)
    alone.set_output_embeddings(head)
    alone.config, alone.generation_config = decoder.config, whole.generation_config
    alone.config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight  # the outer config says it
    logger.warning("of %s, a %s, the language model alone is used and saved", path, whole.config.model_type)
    return alone.eval()


def _check_weights(model: PreTrainedModel, loaded: Mapping[str, Any], path: str | Path, overrides: Any) -> None:
    """Raise InputError unless the weights in a checkpoint are those that its config has places for."""
    if mismatched := sorted(loaded["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise InputError(
            f"model: expected weights of the sizes in the config of {str(path)!r}, {len(mismatched)} are not: {name}: "
            f"expected {tuple(expected)}, got {tuple(found)}"
        )
    if missing := sorted(loaded["missing_keys"]):  # transformers would initialise them at random
        raise InputError(
            f"model: expected all weights in {str(path)!r}, {len(missing)} are missing: {', '.join(missing[:3])}"
        )
    wrong = []
    if unexpected := sorted(key for key in loaded["unexpected_keys"] if not _is_constant(key, model)):
        wrong.append(f"{len(unexpected)} weights have no place in its config: {', '.join(unexpected[:3])}")
    head, tied = model.get_output_embeddings(), model.config.get_text_config(decoder=True).tie_word_embeddings
    if head is not None and tied and head.weight is not model.get_input_embeddings().weight:
        wrong.append("tie_word_embeddings is true, but the head's weights are not the embeddings'")
    for what in wrong:
        message = f"model: expected {str(path)!r} to hold the weights of its config and no others, but {what}"
        if overrides is None:
            raise InputError(f"{message}. To go on nevertheless, and have that recorded: --checkpoint_override")
        if message not in overrides:
            logger.warning("overridden: %s", message)
            overrides.append(message)


def _is_constant(key: str, model: PreTrainedModel) -> bool:
    """Whether a name that today's model has no place for is that of a mask or a table which old checkpoints hold."""
    path, _, name = key.rpartition(".")
    if name in CONSTANTS:
        return True
    modules = dict(model.named_modules())  # the `bias` of an attention, beside those of its layers, is a causal mask
    return name == "bias" and path in modules and not modules[path]._parameters


def _check_generation_config(path: str | Path) -> None:
    """Raise InputError for a generation_config.json that cannot be read, which transformers passes over: it says where
    answers end."""
    file = Path(path) / "generation_config.json"
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(content).__name__}")


def _refuse_other_formats(path: str | Path) -> None:
    """Raise InputError for a directory whose weights are in no safetensors but in another format, with the way out."""
    files = [file.name for file in sorted(Path(path).glob("*")) if file.suffix in (*OTHER_FORMATS, ".safetensors")]
    if not files or any(name.endswith(".safetensors") for name in files):
        return
    raise InputError(
        f"model: expected weights as safetensors in {str(path)!r}, got {files[0]}; no other format is read. What you "
        f"trust is converted in Python: transformers.AutoModelForCausalLM.from_pretrained({str(path)!r}, dtype='auto')"
        ".save_pretrained('elsewhere'), and the tokenizer's files copied beside it"
    )


def skeleton(path: str | Path) -> PreTrainedModel:
    """The model at `path` on the meta device: its parts and shapes without weights, read from its config alone.

    Raises:
        InputError: there is no config of a causal language model, or its layers cannot be masked.
    """
    config = _config(path)
    with _of(path), _reading("a causal language model's config", path), _quietly():
        return skeleton_of(config)


def skeleton_of(config: PretrainedConfig | Mapping[str, Any]) -> PreTrainedModel:
    """A config's model on the meta device; a config, or the entries of a config.json (`model_type` and sizes). Of a
    model of pictures it is the language model.

    Raises:
        InputError: it is no causal language model's, or its layers cannot be masked.
    """
    if isinstance(config, Mapping):
        config = cast(PretrainedConfig, AutoConfig.for_model(**config))
    check_config(config)
    text = config.get_text_config(decoder=True)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        inside = "" if text is config else f", whose language model {text.model_type!r} has no class of its own"
        raise InputError(
            f"model: expected a causal language model's config, got {config.model_type!r}{inside}"
        ) from error
    structure_of(model)
    check_generates(model)
    return model


def load_model_type(path: str | Path) -> str:
    """Name of the architecture of the language model at `path`, read from its config alone."""
    return str(_config(path).get_text_config(decoder=True).model_type)


def hub_commit(name: str) -> str:
    """The commit that a hub name stands for now; its weights may not have been fetched yet.

    Raises:
        InputError: the hub has no such model, or cannot be asked and it is not in the cache.
    """
    try:
        file = "config.json" if _adapter(name) is None else SETTINGS
        return Path(str(cached_file(name, file))).parent.name  # .../snapshots/COMMIT/config.json
    except OSError as error:
        raise InputError(f"model: expected a hub name, got {name!r}: {error}") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer and make sure that it can pad (with the end-of-text token where it has no own pad token); an
    adapter that has none has its base's.

    Raises:
        InputError: `path` has no tokenizer, the tokenizer has neither a pad nor an end-of-text token, or one of its
            ids has no embedding in the model beside it.
    """
    _refuse_bare_name(path)
    if (adapter := _adapter(path)) and not (adapter.folder / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter.base)
    with _reading("a tokenizer", path), _quietly():
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        ids = tokenizer("a")["input_ids"]
    if not ids:  # what transformers makes of a directory without a tokenizer
        raise InputError(f"model: expected a tokenizer in {str(path)!r}, found none")
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if template is not None and not isinstance(template, str):
            raise InputError(f"model: expected a chat template as text in {str(path)!r}, got {template!r}")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"tokenizer: expected a pad or an end-of-text token, {str(path)!r} has neither")
        tokenizer.pad_token = tokenizer.eos_token
    if adapter or not Path(path).is_dir() or (Path(path) / "config.json").is_file():
        n_rows = getattr(_config(path).get_text_config(decoder=True), "vocab_size", None)
        if n_rows is not None:
            check_ids(tokenizer, n_rows, where=repr(str(path)))
    return tokenizer


def new_model(settings: Mapping[str, Any], *, seed: int) -> PreTrainedModel:
    """A randomly initialised model from the entries of a config.json (`model_type` and sizes); float32, on the CPU.

    Raises:
        InputError: it is no decoder's.
    """
    config = AutoConfig.for_model(**settings)
    check_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: str | Path) -> None:
    """Save an ordinary checkpoint: safetensors weights under their own names, config, tokenizer."""
    if tokenizer is not None:
        agree_on_end(model, tokenizer)
        tokenizer.save_pretrained(path)
    model.save_pretrained(path, safe_serialization=True)


def hide_progress_bars() -> None:
    """Transformers' own bars over loading and saving, which would break into the lines of a command."""
    transformers_logging.disable_progress_bar()


def _refuse_bare_name(path: str | Path) -> None:
    """Raise InputError for a name that can only be meant as a directory and is none.

    Every model of our architectures has an owner on the hub, so that a name without one is not looked up there: offline
    that takes the hub client's retries, half a minute. It refuses by itself what no hub name can look like.
    """
    try:
        there = "/" in str(path) or Path(path).exists()
    except OSError:  # a name that is too long
        there = False
    if not there:
        raise InputError(
            f"model: expected a checkpoint directory or a hub name (owner/name), got {str(path)[:99]!r}: "
            "no such directory"
        )


def _adapter(path: str | Path) -> Adapter | None:
    """The adapter at `path`, if it is one, whose base is a whole model that can be reached."""
    _refuse_bare_name(path)
    adapter = find_adapter(path)
    if adapter is None:
        return None
    if "/" not in adapter.base and not Path(adapter.base).is_dir():
        raise _base_not_here(path, adapter, "no such directory")
    if find_adapter(adapter.base) is not None:
        raise InputError(f"model: expected a whole model as the base of the adapter {str(path)!r}, got another adapter")
    return adapter


def _base_not_here(path: str | Path, adapter: Adapter, reason: str) -> InputError:
    return InputError(
        f"model: expected the base of the adapter {str(path)!r} as its {SETTINGS} has it, base_model_name_or_path = "
        f"{adapter.base!r}, got {reason}; where it lies elsewhere on this machine, write that path there"
    )


def _config(path: str | Path) -> PretrainedConfig:
    if adapter := _adapter(path):
        try:
            return _config(adapter.base)
        except InputError as error:
            raise _base_not_here(path, adapter, str(error)) from error
    _refuse_bare_name(path)
    _refuse_quantised(path, _written_settings(path).get("quantization_config"))
    with _reading("a checkpoint directory or a hub name", path), _quietly():
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    _refuse_quantised(path, getattr(config, "quantization_config", None))
    return config


def _refuse_quantised(path: str | Path, settings: Any) -> None:
    if settings:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        raise InputError(
            f"model: expected weights that are not quantised, got {str(path)!r} with quantization_config {method!r}"
        )


def _written_settings(path: str | Path) -> Mapping[str, Any]:
    """The entries of a local config.json as they are written there, as far as it can be read."""
    file = Path(path)
    try:
        content = json.loads((file if file.is_file() else file / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
