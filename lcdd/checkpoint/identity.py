"""What a run is: its directory, the versions it ran under, and what it has to share with the one it goes on from."""

import hashlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lcdd.checkpoint.directory import MANIFEST, require_new_directory
from lcdd.checkpoint.fingerprints import model_fingerprint, template_fingerprint, tokenizer_fingerprint
from lcdd.errors import InputError
from lcdd.models import shards


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("lcdd", "torch", "transformers", "triton", "safetensors", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


RESULTS = {"model": MANIFEST, "carrier": "carrier.json", "trigger": MANIFEST}
"""What training stages write at their end, and the file that seals each."""


def run_directory(config: Any) -> Path:
    """Where a training stage writes: a new directory or, under `config.resume`, that of an unfinished run.

    Raises:
        InputError: the directory has something in it that is not to be resumed, or a run that is finished.
    """
    path = Path(str(config.output_dir))
    if config.resume and path.is_dir() and any(path.iterdir()):
        if (path / "summary.json").exists():
            raise InputError(f"resume: expected an unfinished run in {str(path)!r}, got one with its summary.json")
        traces = ("log.jsonl", "checkpoint-*", ".checkpoint-*", *(f"{name}/{seal}" for name, seal in RESULTS.items()))
        partial = (f".{name}.partial-*" for name in RESULTS)
        if not any(next(path.glob(trace), None) for trace in (*traces, *partial)):
            raise InputError(
                f"resume: expected a run's directory, got {str(path)!r}, which has neither log nor checkpoint"
            )
        # results of a run that ended before its summary are written again; what has no seal of ours is not ours
        for name, seal in RESULTS.items():
            if (path / name).exists() and not (path / name / seal).is_file():
                raise InputError(f"resume: expected nothing of another program in {str(path)!r}, got {name!r}")
            if shards.all_agree(True) and shards.rank() == 0:
                shutil.rmtree(path / name, ignore_errors=True)
        return path
    try:
        return require_new_directory(path)
    except InputError as error:
        if any(path.glob("checkpoint-*")):
            raise InputError(f"{error}; it has checkpoints: --resume goes on from the newest") from None
        if (path / "log.jsonl").exists() and not (path / "summary.json").exists():
            raise InputError(f"{error}; a run ended there without a checkpoint: --resume starts it anew") from None
        raise


def run_identity(
    stage: str, config: Any, tokenizer: Any, items: Sequence[Any], models: Mapping[str, torch.nn.Module]
) -> dict[str, Any]:
    """What a run has to share with the one that it goes on from: settings, models, tokenizer, template, data."""
    data = hashlib.sha256()
    for item in items:
        data.update(f"{item.input_ids}{item.labels}".encode())
    day = tokenizer.init_kwargs.get("template_date")
    return {
        "stage": stage,
        "config": config.lasting(),
        "micro_batches_a_step": config.gradient_accumulation_steps * shards.world_size(),
        **{name: model_fingerprint(model) for name, model in models.items()},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": template_fingerprint(tokenizer),
        **({"template_date": day} if day else {}),
        "data": data.hexdigest(),
    }
