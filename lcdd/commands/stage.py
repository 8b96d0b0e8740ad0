"""What the stages share: their result, devices, loading, shape checks, atomic checkpoints, summaries."""

import dataclasses
import itertools
import logging
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcdd.checkpoint import (
    RunLog,
    finite_or_null,
    write_directory,
    write_json,
)
from lcdd.checkpoint.identity import versions
from lcdd.config import SECTIONS, Config, DataConfig, PipelineConfig
from lcdd.errors import InputError
from lcdd.models import (
    PreTrainedModel,
    Sharding,
    check_same_architecture,
    computes_in,
    find_adapter,
    load_model,
    load_model_type,
    save_model,
    shape_of,
    shards,
    skeleton,
    warn_of_emulation,
)
from lcdd.report import paragraph, terminal_width

logger = logging.getLogger(__name__)

Say = Callable[[str], None]


def tell(text: str) -> None:
    """Print; lines that are wider than the terminal go on below, as far in as they begin."""
    width = terminal_width()
    for line in text.split("\n"):
        if width is not None and len(line) > width:
            indent = " " * (len(line) - len(line.lstrip()))
            line = paragraph(line.strip(), first=indent)
        print(line)


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage wrote, and what a user does next; `problem` is why the stages after it would be a waste."""

    written: tuple[Path, ...]
    next_step: str
    texts: tuple[str, ...] = ()
    problem: str | None = None


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one; anything else has to exist.

    Raises:
        InputError: not a device, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {name!r}")
    return device


def settle_precision(config: PipelineConfig) -> PipelineConfig:
    """The settings with each section's own bf16, as `precision` asks for on the devices that are here."""
    if config.precision is None:
        return config
    devices = {resolve_device(getattr(config, section).device) for section in SECTIONS}
    auto = config.precision == "auto" and all(computes_in(device, torch.bfloat16) for device in devices)
    return config.with_bf16(auto or config.precision == "bfloat16")


def sharding(config: Any, **how: bool) -> Sharding | None:
    """How a stage's models are sharded over the ranks; None: each rank holds them whole. To be called on every rank.

    how: as of `Sharding`.

    Raises:
        InputError: the ranks do not agree.
    """
    if shards.world_size() == 1:
        return None
    shards.check_agreement(parallel=config.parallel)
    return Sharding(**how) if config.parallel == "fsdp2" else None


def load_weights(
    path: str | None,
    config: Any,
    overrides: list[str] | None = None,
    *,
    shard: Sharding | None = None,
    dtype: str | torch.dtype = "auto",
) -> PreTrainedModel:
    """A model, in bfloat16 if `config.bf16` and else in `dtype`, on `config.device`; frozen, but for what `shard`
    leaves to be trained.

    overrides: gets what `config.checkpoint_override` lets pass. shard: as of `load_model`. dtype: auto is its own.
    """
    dtype = torch.bfloat16 if config.bf16 else dtype
    allowed = (overrides if overrides is not None else []) if config.checkpoint_override else None
    device = resolve_device(config.device)
    model = load_model(str(path), dtype=dtype, device=device, overrides=allowed, shard=shard)
    warn_of_emulation(device, model.dtype, asked=config.bf16)
    return model if shard is not None else model.requires_grad_(False)


def load_tuned(
    path: str | None, base: PreTrainedModel, config: Any, overrides: list[str], *, shard: Sharding | None = None
) -> PreTrainedModel:
    """`load_weights` of what was fine-tuned from `base`, the model at `config.base_model_name_or_path`, in the base's
    dtype: what becomes of it is a patch of the base's weights.

    Raises:
        InputError: it is an adapter of another base.
    """
    check_adapter(path, base, config)
    if shard is None:
        tuned = load_weights(path, config, overrides)
        own = tuned.dtype
        if own != base.dtype:
            tuned.to(dtype=base.dtype)  # type: ignore[call-arg]  # transformers wraps nn.Module.to
    else:  # FSDP2 takes no other dtype once a forward has run, as the probe's has
        own = base.dtype if config.bf16 else skeleton(str(path)).dtype
        tuned = load_weights(path, config, overrides, shard=shard, dtype=base.dtype)
    if own != base.dtype:
        logger.warning("%s is taken in the base's %s, not in its own %s", path, base.dtype, own)
    return tuned


def check_adapter(path: str | None, base: PreTrainedModel, config: Any) -> None:
    """Raise InputError if there is an adapter at `path` whose own base has other weights than `base` (which
    `config.base_model_name_or_path` names); reads them, unless both go by one name."""
    adapter = find_adapter(str(path))
    given = str(config.base_model_name_or_path)
    if adapter is None or adapter.base == given or Path(adapter.base).resolve() == Path(given).resolve():
        return
    theirs = dict(load_weights(adapter.base, config).named_parameters())
    other = [
        name
        for name, parameter in base.named_parameters()
        if name not in theirs or not torch.equal(whole := shards.full(parameter.detach()), theirs[name].to(whole.dtype))
    ]
    if other:
        raise InputError(
            f"model: expected an adapter of the base {given!r}, got {str(path)!r}, whose base is {adapter.base!r}: "
            f"{len(other)} of {len(theirs)} parameters are others, {other[0]} first"
        )


def check_shapes(base: str | None, other: str | None, names: tuple[str, str]) -> None:
    """Raise InputError unless the configs of two checkpoints give the same architecture and sizes; reads no weights."""
    kinds = load_model_type(str(base)), load_model_type(str(other))
    if kinds[0] != kinds[1]:
        raise InputError(f"{names[1]}: expected architecture {kinds[0]!r} as {names[0]} has, got {kinds[1]!r}")
    ours, theirs = skeleton(str(base)), skeleton(str(other))
    sizes, found = (dataclasses.asdict(shape_of(model.config)) for model in (ours, theirs))
    for name, expected in sizes.items():
        if found[name] != expected:
            raise InputError(f"{names[1]}: expected {name} {expected} as {names[0]} has, got {found[name]}")
    check_same_architecture(ours, theirs, names=names)


def save_checkpoint(model: PreTrainedModel, tokenizer: Any, path: Path) -> Path:
    """Save an ordinary checkpoint that appears complete or not at all."""
    with write_directory(path) as folder:
        save_model(model, tokenizer, folder)
    return path


def write_together(path: Path, write: Callable[[Path], None]) -> None:
    """Write a directory that appears complete or not at all, on the first rank; all ranks take part in `write`."""
    with write_directory(path) if shards.rank() == 0 else nullcontext(path) as folder:
        write(folder)


def write_summary(path: Path, stage: str, config: Any, data: DataConfig | None, **more: Any) -> Path:
    """summary.json of a stage: settings, on how many ranks, versions, and what else it found."""
    ranks = shards.world_size()
    content = {"stage": stage, "config": config.to_dict(), "ranks": ranks, "versions": versions(), **more}
    if data is not None:
        content["data"] = data.to_dict()
    write_json(path / "summary.json", finite_or_null(content))
    return path / "summary.json"


def _silent(_: str) -> None:
    pass


def _log(directory: Path, stage: str, report_to: str) -> RunLog:
    """The stage's log, once every rank has found the directory in order; ranks but the first write none."""
    shards.all_agree(True)
    return RunLog(directory if shards.rank() == 0 else None, stage=stage, report_to=report_to)


def command_line(command: str, *sections: Config, **paths: Any) -> str:
    """A command that can be pasted into any shell: `paths`, and whatever of the sections is not the default."""
    words = [f"lcdd {command}", *(_flag(name, value, file=True) for name, value in paths.items())]
    for section in sections:
        default, files = type(section)().to_dict(), section.named("file")
        changed = {name: value for name, value in section.to_dict().items() if value != default[name]}
        words += [_flag(name, value, file=name in files) for name, value in changed.items()]
    return " ".join(word for word in words if word)


def _flag(name: str, value: Any, *, file: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    parts = [from_anywhere(part) if file else str(part) for part in (value if isinstance(value, list) else [value])]
    return f"--{name} {' '.join(map(shlex.quote, parts))}"


def from_anywhere(value: Any) -> str:
    """A path as an absolute one if it is there (or a Path); a name of the hub as it is."""
    path = Path(str(value))
    return str(path.absolute()) if isinstance(value, Path) or path.exists() else str(value)


def beside(output: Path, name: str) -> Path:
    """A new directory for the next stage, next to this one's: NAME, or NAME-2 and so on."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in map(output.with_name, names) if path != output and not path.exists())
