"""Loading and saving models and tokenizers; safetensors only, no remote code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from lcdd.errors import InputError
from lcdd.models.sites import ModelShape, shape_of


def load_model(
    path: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a causal language model; safetensors only, no remote code.

    Raises:
        InputError: `path` is not a usable checkpoint, or its architecture is not supported.
    """
    shape_of(_config(path))
    shows_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # it would break into the lines of a stage that loads several models
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model: expected a loadable checkpoint, got {str(path)!r}: {error}") from error
    finally:
        if shows_bar:
            transformers_logging.enable_progress_bar()
    model, loaded = found
    if missing := sorted(loaded["missing_keys"]):  # transformers would initialise them at random
        raise InputError(
            f"model: expected all weights in {str(path)!r}, {len(missing)} are missing: {', '.join(missing[:3])}"
        )
    return model.to(device)


def load_shape(path: str | Path) -> ModelShape:
    """Sizes of the model at `path`, read from its config alone."""
    return shape_of(_config(path))


def load_settings(path: str | Path) -> dict[str, Any]:
    """Entries of the config.json at `path`, the architecture's defaults filled in."""
    return _config(path).to_dict()


def load_model_type(path: str | Path) -> str:
    """Name of the architecture of the model at `path`, read from its config alone."""
    return str(_config(path).model_type)


def hub_commit(name: str) -> str:
    """The commit that a hub name stands for now; its weights may not have been fetched yet.

    Raises:
        InputError: the hub has no such model, or cannot be asked and it is not in the cache.
    """
    try:
        return Path(str(cached_file(name, "config.json"))).parent.name  # .../snapshots/COMMIT/config.json
    except OSError as error:
        raise InputError(f"model: expected a hub name, got {name!r}: {error}") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer and make sure that it can pad (with the end-of-text token where it has no own pad token).

    Raises:
        InputError: `path` has no tokenizer, or the tokenizer has neither a pad nor an end-of-text token.
    """
    _refuse_bare_name(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"model: expected a tokenizer in {str(path)!r}: {error}") from error
    if not tokenizer("a")["input_ids"]:  # what transformers makes of a directory without a tokenizer
        raise InputError(f"model: expected a tokenizer in {str(path)!r}, found none")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"tokenizer: expected a pad or an end-of-text token, {str(path)!r} has neither")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def new_model(settings: Mapping[str, Any], *, seed: int) -> PreTrainedModel:
    """A randomly initialised model from the entries of a config.json (`model_type` and sizes); float32, on the CPU.

    Raises:
        InputError: the architecture is not supported.
    """
    config = AutoConfig.for_model(**settings)
    shape_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: str | Path) -> None:
    """Save an ordinary checkpoint: safetensors weights under their own names, config, tokenizer."""
    model.save_pretrained(path, safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _refuse_bare_name(path: str | Path) -> None:
    """Raise InputError for a name that can only be meant as a directory and is none.

    Every model of our architectures has an owner on the hub, so that a name without one is not looked up there: offline
    that takes the hub client's retries, half a minute. It refuses by itself what no hub name can look like.
    """
    if "/" not in str(path) and not Path(path).exists():
        raise InputError(
            f"model: expected a checkpoint directory or a hub name (owner/name), got {str(path)!r}: no such directory"
        )


def _config(path: str | Path) -> PretrainedConfig:
    _refuse_bare_name(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"model: expected a checkpoint directory or a hub name, got {str(path)!r}: {error}") from error
