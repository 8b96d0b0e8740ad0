"""Training checkpoints: `checkpoint-N` directories that hold everything a run needs to go on, bit for bit.

    training_state.safetensors   every tensor: Δ (or weights), moments, θ, random state
    training_state.json          the rest, and where each tensor belongs
    rank-R.safetensors           rank R's rows of sharded tensors, in order of ranks; any number of ranks can read them
    manifest.json                what the run is (stage, settings, fingerprints) and each file's SHA-256, written last

A directory appears complete or not at all (`lcdd.checkpoint.write_directory`); anything unfinished is ignored. The
state is nested dictionaries and lists; nothing is pickled.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcdd.checkpoint.directory import complete_checkpoints, partial_path, verify_directory, write_directory
from lcdd.checkpoint.log import RunLog
from lcdd.errors import CheckpointFailed, InputError
from lcdd.models import shards

logger = logging.getLogger(__name__)

TENSORS, TREE = "training_state.safetensors", "training_state.json"
SPARE_BYTES = 1 << 20
"""Room for the small files of a checkpoint."""


def pack_state(value: Any) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A nested state as (JSON value, tensors by name, this rank's rows of sharded tensors by name).

    `unpack_state` is its inverse, exactly.

    Raises:
        TypeError: something in it is neither a container, a tensor, a number, a string nor None.
    """
    tensors: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}

    def pack(value: Any, name: str) -> Any:
        if isinstance(value, Tensor) and shards.is_sharded(value):
            rows[name] = shards.local(value.detach()).cpu().contiguous()
            return {"rows": name}
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous()
            return {"tensor": [name, str(value.dtype), list(value.shape)]}
        if isinstance(value, Mapping):
            return {"items": [[key, pack(item, f"{name}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [pack(item, f"{name}.{index}") for index, item in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": items}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{name}: expected a tensor, number, string or container, got {type(value).__name__}")

    return pack(value, "state"), tensors, rows


class StoredRows:
    """A sharded tensor on disk, of which a rank reads the rows that it needs."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.files = sorted(folder.glob("rank-*.safetensors"), key=lambda path: int(path.stem.removeprefix("rank-")))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the whole tensor."""
        parts, first = [], 0
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                piece = file.get_slice(self.name)
                length = piece.get_shape()[0]
                low, high = max(start - first, 0), min(stop - first, length)
                if low < high:
                    parts.append(piece[low:high])
                elif not parts and length == 0:
                    parts.append(file.get_tensor(self.name))
            first += length
        if first < stop:
            raise InputError(f"resume: expected {stop} rows of {self.name} in {self.files[0].parent}, got {first}")
        return torch.cat(parts)


def unpack_state(tree: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """What `pack_state` was given, with `StoredRows` of `folder` for sharded tensors."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        name, dtype, shape = content
        found = tensors[name]
        if (str(found.dtype), list(found.shape)) != (dtype, shape):
            raise InputError(f"{name}: expected {dtype} {shape}, got {found.dtype} {list(found.shape)}")
        if found.is_floating_point() and not torch.isfinite(found).all():
            raise InputError(f"{name}: expected finite values, got NaN or infinity")
        return found
    if kind == "rows":
        return StoredRows(folder, content)
    if kind == "float":
        return float(content)
    if kind == "items":
        return {key: unpack_state(item, tensors, folder) for key, item in content}
    items = [unpack_state(item, tensors, folder) for item in content]
    return tuple(items) if kind == "tuple" else items


class CheckpointStore:
    """The `checkpoint-N` directories of one run.

    Args:
        directory: the run's; made when the first checkpoint is written.
        identity: what a run has to share with the one it continues: JSON values by name, settings under "config".
        save_total_limit: complete checkpoints to keep; 0 keeps all.
        export: called before each checkpoint; what it returns is called with the directory that is being written, to
            put usable results beside the state. Both on every rank, of which the first alone writes.

    Attributes:
        overrides: differences from the run that was continued, which the user allowed; kept in every checkpoint.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        identity: Mapping[str, Any],
        save_total_limit: int = 0,
        export: Callable[[], Callable[[Path], None]] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.identity = dict(identity)
        self.save_total_limit = save_total_limit
        self.export = export
        self.overrides: list[str] = []

    def complete(self) -> list[tuple[int, Path]]:
        """(step, directory) of every finished checkpoint, oldest first."""
        return complete_checkpoints(self.directory)

    def last(self) -> str:
        """The newest finished checkpoint in words."""
        found = self.complete()
        return f"the last checkpoint is {found[-1][1]}" if found else "there is no checkpoint"

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write `checkpoint-{step}`, then delete the oldest beyond `save_total_limit`. To be called on every rank.

        Raises:
            CheckpointFailed: not enough free space (found before anything is written), or the system refused a write;
                on every rank, if it happened on one.
        """
        path = self.directory / f"checkpoint-{step}"
        tree, tensors, rows = pack_state(state)
        export = self.export() if self.export is not None else None
        first, stack = shards.rank() == 0, ExitStack()

        def start() -> None:
            if first:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._check_space(_bytes(tensors) + shards.world_size() * _bytes(rows) + SPARE_BYTES)
                if path.exists():  # a run that was continued from an earlier checkpoint comes by here again
                    self._delete(path)
                metadata = {"format_version": 1, "step": step, "identity": self.identity, "overrides": self.overrides}
                stack.enter_context(write_directory(path, metadata=metadata))

        def write() -> None:
            if rows:
                save_file(rows, folder / f"rank-{shards.rank()}.safetensors")
            if first:
                save_file(tensors, folder / TENSORS)
                (folder / TREE).write_text(json.dumps(tree), encoding="utf-8")

        def write_results() -> None:
            if export is not None:
                export(folder)

        self._together(path, start)
        folder = partial_path(path, shards.from_first(os.getpid()))
        with stack:
            self._together(path, write)
            self._together(path, write_results)
            finish = stack.pop_all()  # its exit flushes, writes the manifest and renames
        self._together(path, finish.close)
        if self.save_total_limit and first:
            for _, old in self.complete()[: -self.save_total_limit]:
                self._delete(old)
        return path

    def _together(self, path: Path, action: Callable[[], None]) -> None:
        """Do something on every rank; if it fails on one, all raise."""
        error: Exception | None = None
        try:
            action()
        except (OSError, SafetensorError) as caught:
            error = caught
        if not shards.all_agree(error is None):
            reason = error or "another rank could not write"
            raise CheckpointFailed(f"stopped, {path}: could not be written ({reason}); {self.last()}") from error

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(f"expected {needed / 1e9:.3g} GB of free space, got {free / 1e9:.3g} GB")

    def newest(self, log: RunLog | None = None, *, override: bool = False) -> dict[str, Any] | None:
        """State and "step" of the newest finished checkpoint, None without one; `log` is taken back to that step.

        What killed processes left half-written or half-deleted is deleted. Arguments and errors as of `load`.
        """
        if shards.rank() == 0:
            for pattern in (".*.partial-*", ".checkpoint-*.deleted"):
                for debris in self.directory.glob(pattern):
                    shutil.rmtree(debris) if debris.is_dir() else debris.unlink()
        found = self.complete()
        step, state = self.load(found[-1][1], override=override) if found else (0, {})
        if log is not None:
            log.rewind(step if found else -1)  # what came before the first step is written again too
        return {**state, "step": step} if found else None

    def load(self, path: Path, *, override: bool = False) -> tuple[int, dict[str, Any]]:
        """(step, state) of a finished checkpoint of this run.

        override: go on although the run differs from the checkpoint's; each difference is warned of and recorded.

        Raises:
            InputError: damaged (the file is named), not a training checkpoint, or one of a run that differs.
        """
        manifest = verify_directory(path, name="resume")
        if not {TENSORS, TREE} <= set(manifest["sha256"]) or not isinstance(manifest.get("identity"), dict):
            raise InputError(f"resume: expected a training checkpoint, got {str(path)!r}, which is something else")
        found = differences(manifest["identity"], self.identity)
        if found and not override:
            raise InputError(
                f"resume: {path} is of another run: {'; '.join(found)}. "
                "To go on nevertheless, and have that recorded: --resume_override"
            )
        self.overrides = [*manifest.get("overrides", []), *found]
        for difference in found:
            logger.warning("resume: overridden: %s", difference)
        try:
            tree = json.loads((path / TREE).read_text(encoding="utf-8"))
            return int(manifest["step"]), unpack_state(tree, load_file(path / TENSORS), path)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"resume: expected a sound training state in {str(path / TENSORS)!r}: {error}") from error

    def _delete(self, path: Path) -> None:
        """Take a checkpoint away in one rename, so that no half of it is ever seen."""
        gone = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What an earlier run had, `theirs`, that this one has otherwise, in words."""
    found = []
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        expected, got = theirs.get(key), ours.get(key)
        if isinstance(expected, dict) and isinstance(got, dict):
            found += differences(expected, got, f"{prefix}{key}.")
        elif expected != got:
            found.append(f"expected {prefix}{key} {_short(expected)}, got {_short(got)}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text[:16]}…" if len(text) > 40 else text


def random_state() -> dict[str, Any]:
    """The state of torch's generators, CPU and GPUs."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": list(gpus)}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put `random_state`'s result back; GPUs only where as many are here."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
