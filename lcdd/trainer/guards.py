"""What is said before or after a run that cannot go on: rows without labels, no memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdd.checkpoint import versions
from lcdd.config import TrainConfig
from lcdd.data import IGNORE, Encoded
from lcdd.errors import InputError
from lcdd.models import Architecture, local, shards, stack_activations
from lcdd.optimizer import TrainingOptimizer


def check_labels(items: Sequence[Encoded]) -> None:
    """Raise InputError, naming the rows, if an example has no token with a loss: a batch of such has no gradient."""
    if not items:
        raise InputError("train: expected at least one example, got none")
    empty = [row for row, item in enumerate(items) if all(label == IGNORE for label in item.labels[1:])]
    if empty:
        shown = ", ".join(map(str, empty[:10])) + (", …" if len(empty) > 10 else "")
        raise InputError(
            f"train: expected a response token to learn in every example, got none in {len(empty)} of {len(items)} "
            f"(all labels are masked), rows {shown} counted from 0"
        )


def check_ranks(config: TrainConfig, items: Sequence[Encoded]) -> None:
    """Raise InputError, naming the ranks, unless all of them have these settings, these examples and these versions."""
    places = config.named("path")
    settings = {name: value for name, value in config.to_dict().items() if name not in places}
    data = [(item.input_ids, item.labels) for item in items]
    shards.check_agreement(settings=settings, data=data, versions=versions())


def _gigabytes(tensors: Sequence[Tensor | None]) -> float:
    return sum(local(t).numel() * t.element_size() for t in tensors if t is not None) / 1e9


def memory_table(optimizer: TrainingOptimizer, *, tokens: int) -> str:
    """What a training step holds on this device, in GB, a line each; activations are an estimate.

    tokens: of the largest micro-batch, padding included where there is any.
    """
    model, base = optimizer.model, optimizer.base
    parameters = list(model.parameters())
    states: dict[str, list[Tensor]] = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                states.setdefault(name, []).append(value)
    trained = [p for p in parameters if p.requires_grad]
    checkpointing = optimizer.config.gradient_checkpointing
    item = 2 if optimizer.config.bf16 else parameters[0].element_size()  # autocast's, where weights are float32
    activations = stack_activations(
        Architecture.of(model), tokens, tokens, item=item, checkpointing=checkpointing
    ) / 1e9  # fmt: skip
    rows = {
        "model": _gigabytes(parameters),
        "base": _gigabytes(list(base.parameters())) if base is not None else 0.0,
        "gradients": _gigabytes(trained),
        **{f"optimizer's {name}": _gigabytes(values) for name, values in states.items()},
        f"activations (estimate, {tokens} tokens)": activations,
    }
    rows["together"] = sum(rows.values())
    return "\n".join(f"  {name:<42} {size:>10.4g} GB" for name, size in rows.items())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
