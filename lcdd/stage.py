"""What the stages share: their result, devices, loading, shape checks, atomic checkpoints, summaries."""

import dataclasses
import hashlib
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lcdd import shards
from lcdd.checkpoint import (
    MANIFEST,
    model_fingerprint,
    require_new_directory,
    template_fingerprint,
    tokenizer_fingerprint,
    write_directory,
    write_json,
)
from lcdd.config import DataConfig
from lcdd.models import PreTrainedModel, load_model, load_model_type, load_shape, save_model
from lcdd.runlog import finite_or_null
from lcdd.training_state import lasting_settings

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage wrote, and what a user does next."""

    written: tuple[Path, ...]
    next_step: str
    texts: tuple[str, ...] = ()


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("lcdd", "torch", "transformers", "triton", "safetensors", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one; anything else has to exist.

    Raises:
        ValueError: not a device, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {name!r}")
    return device


RESULTS = {"model": MANIFEST, "carrier": "carrier.json", "trigger": MANIFEST}
"""What training stages write at their end, and the file that seals each."""


def run_directory(config: Any) -> Path:
    """Where a training stage writes: a new directory or, under `config.resume`, that of an unfinished run.

    Raises:
        ValueError: the directory has something in it that is not to be resumed, or a run that is finished.
    """
    path = Path(str(config.output_dir))
    if config.resume and path.is_dir() and any(path.iterdir()):
        if (path / "summary.json").exists():
            raise ValueError(f"resume: expected an unfinished run in {str(path)!r}, got one with its summary.json")
        traces = ("log.jsonl", "checkpoint-*", ".checkpoint-*", *(f"{name}/{seal}" for name, seal in RESULTS.items()))
        partial = (f".{name}.partial-*" for name in RESULTS)
        if not any(next(path.glob(trace), None) for trace in (*traces, *partial)):
            raise ValueError(
                f"resume: expected a run's directory, got {str(path)!r}, which has neither log nor checkpoint"
            )
        # results of a run that ended before its summary are written again; what has no seal of ours is not ours
        for name, seal in RESULTS.items():
            if (path / name).exists() and not (path / name / seal).is_file():
                raise ValueError(f"resume: expected nothing of another program in {str(path)!r}, got {name!r}")
            if shards.all_agree(True) and shards.rank() == 0:
                shutil.rmtree(path / name, ignore_errors=True)
        return path
    try:
        return require_new_directory(path)
    except ValueError as error:
        if any(path.glob("checkpoint-*")):
            raise ValueError(f"{error}; it has checkpoints: --resume goes on from the newest") from None
        if (path / "log.jsonl").exists() and not (path / "summary.json").exists():
            raise ValueError(f"{error}; a run ended there without a checkpoint: --resume starts it anew") from None
        raise


def run_identity(
    stage: str, config: Any, tokenizer: Any, items: Sequence[Any], models: Mapping[str, torch.nn.Module]
) -> dict[str, Any]:
    """What a run has to share with the one that it goes on from: settings, models, tokenizer, template, data."""
    data = hashlib.sha256()
    for item in items:
        data.update(f"{item.input_ids}{item.labels}".encode())
    return {
        "stage": stage,
        "config": lasting_settings(config),
        "micro_batches_a_step": config.gradient_accumulation_steps * shards.world_size(),
        **{name: model_fingerprint(model) for name, model in models.items()},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": template_fingerprint(tokenizer),
        "data": data.hexdigest(),
    }


def load_weights(path: str | None, config: Any) -> PreTrainedModel:
    """A frozen model, in bfloat16 if `config.bf16` and else in its own dtype, on `config.device`."""
    dtype: str | torch.dtype = torch.bfloat16 if config.bf16 else "auto"
    return load_model(str(path), dtype=dtype, device=resolve_device(config.device)).requires_grad_(False)


def check_shapes(base: str | None, other: str | None, names: tuple[str, str]) -> None:
    """Raise ValueError unless the configs of two checkpoints give the same architecture and sizes; reads no weights."""
    ours, theirs = load_shape(str(base)), load_shape(str(other))
    kinds = load_model_type(str(base)), load_model_type(str(other))
    if kinds[0] != kinds[1]:
        raise ValueError(f"{names[1]}: expected architecture {kinds[0]!r} as {names[0]} has, got {kinds[1]!r}")
    for item in dataclasses.fields(ours):
        expected, found = getattr(ours, item.name), getattr(theirs, item.name)
        if expected != found:
            raise ValueError(f"{names[1]}: expected {item.name} {expected} as {names[0]} has, got {found}")


def save_checkpoint(model: PreTrainedModel, tokenizer: Any, path: Path) -> Path:
    """Save an ordinary checkpoint that appears complete or not at all."""
    with write_directory(path) as folder:
        save_model(model, tokenizer, folder)
    return path


def write_summary(path: Path, stage: str, config: Any, data: DataConfig | None, **more: Any) -> Path:
    """summary.json of a stage: settings, versions, and what else it found."""
    content = {"stage": stage, "config": config.to_dict(), "versions": versions(), **more}
    if data is not None:
        content["data"] = data.to_dict()
    write_json(path / "summary.json", finite_or_null(content))
    return path / "summary.json"
