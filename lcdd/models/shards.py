"""Tensors that may be sharded over ranks (FSDP2's DTensors), and what ranks tell each other. Imports torch alone.

Everything here also takes ordinary tensors and a process on its own, and then does nothing.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcdd.errors import InputError


def world_size() -> int:
    """Ranks of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def holds_shards(model: nn.Module) -> bool:
    """Whether a model is sharded, so that every rank has to take part in each of its forwards."""
    return any(map(is_sharded, model.parameters()))


def local(tensor: Any) -> Any:
    """This rank's rows of a sharded tensor (the same memory); any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of a sharded tensor: a collective, to be called on every rank; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def row_offset(tensor: Any) -> int:
    """Which row of the whole tensor this rank's first one is."""
    if not is_sharded(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1][0]


def check_sharding(name: str, tensor: Any) -> None:
    """Raise InputError unless a tensor is whole, or sharded by rows over all ranks as `fully_shard` does it.

    DeepSpeed ZeRO-3 is refused: it flattens and partitions parameters in its own engine, which also owns their
    gradients and calls the optimizer on flat shards, so `weight.grad`, which every step reads, is never there.
    """
    if hasattr(tensor, "ds_id"):
        raise InputError(
            f"{name}: expected an ordinary parameter or one sharded by FSDP2's fully_shard, got one of DeepSpeed "
            "ZeRO-3, which partitions flattened parameters and never fills weight.grad; use fully_shard"
        )
    if type(tensor).__name__ == "FlatParameter" or (tensor.numel() == 0 and not is_sharded(tensor)):
        raise InputError(f"{name}: expected FSDP2 (fully_shard), got FSDP1's flattened parameter")
    if not is_sharded(tensor):
        return
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.ndim != 1 or mesh.size() != world_size() or not placements[0].is_shard(0):
        raise InputError(
            f"{name}: expected rows sharded over all {world_size()} ranks (fully_shard on a 1-D mesh), got placements "
            f"{tuple(placements)} on a mesh of shape {tuple(mesh.shape)}"
        )
    if not tensor.requires_grad:
        raise InputError(f"{name}: expected requires_grad_(True) before fully_shard, got a frozen parameter")


def reshard(model: nn.Module) -> None:
    """Free FSDP2's gathered weights, which would not see what is written into the shards."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def copy_rows_(target: Tensor, value: Any) -> None:
    """Copy a whole tensor, or one sharded like `target`, or rows on disk (`.rows(start, stop)`), into `target`."""
    mine: Tensor = local(target)
    if hasattr(value, "rows"):
        value = value.rows(row_offset(target), row_offset(target) + len(mine))
    elif is_sharded(target) and not is_sharded(value):
        value = value[row_offset(target) : row_offset(target) + len(mine)]
    mine.copy_(local(value))


def all_sum_(values: Tensor) -> Tensor:
    """`values` summed over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def _device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def total(value: float) -> float:
    """A number summed over the ranks."""
    if world_size() == 1:
        return value
    return float(all_sum_(torch.tensor(value, dtype=torch.float64, device=_device())))


def mean(value: float) -> float:
    """A number averaged over the ranks."""
    return total(value) / world_size()


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds on every rank; also a barrier."""
    if world_size() == 1:
        return ok
    return float(all_sum_(torch.tensor(float(ok), dtype=torch.float64, device=_device()))) == world_size()


def merged(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Lists of numbers from 0 on, each filled on one rank and empty on the others: all of them, on every rank."""
    if world_size() == 1:
        return [list(row) for row in rows]
    width = torch.tensor(max(map(len, rows), default=0), device=_device())
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    table = torch.zeros(len(rows), int(width), dtype=torch.int64, device=_device())
    for place, row in enumerate(rows):
        table[place, : len(row)] = torch.tensor(row, dtype=torch.int64, device=table.device) + 1
    return [[number - 1 for number in row if number] for row in all_sum_(table).tolist()]


def of_all(value: Tensor, *, average: bool = False) -> Tensor:
    """The sum (or mean) of a tensor over the ranks, the same bits on each; its gradient is that of this rank's part."""
    if world_size() == 1:
        return value
    total = all_sum_(value.detach().clone())
    if average:
        total /= world_size()
    return total + (value - value.detach())


def texts_of_all(text: str) -> list[str]:
    """Every rank's text, in order; a collective."""
    if world_size() == 1:
        return [text]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, text)
    return found


def from_first(value: int) -> int:
    """Rank 0's value of an integer."""
    if world_size() == 1:
        return value
    box = torch.tensor(value, dtype=torch.int64, device=_device())
    dist.broadcast(box, src=0)
    return int(box)


def check_agreement(**values: Any) -> None:
    """Raise InputError, on every rank and by name, unless all ranks have the same values; named alike on all of them.

    A collective. Compared are SHA-256 of `repr`, or of the bytes of a tensor.
    """
    if world_size() == 1:
        return
    mine = torch.tensor([_digest(value) for value in values.values()], dtype=torch.int64, device=_device())
    found = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(found, mine)
    wrong = []
    for place, name in enumerate(values):
        digests = [int(of_rank[place]) for of_rank in found]
        common = max(digests, key=digests.count)  # of equally many the first rank's
        if others := [str(rank) for rank, digest in enumerate(digests) if digest != common]:
            wrong.append(f"{name} (rank {', '.join(others)})")
    if wrong:
        raise InputError(f"ranks: expected the same on all {world_size()}, got others in {'; '.join(wrong)}")


def _digest(value: Any) -> int:
    """The first 63 bits of a value's SHA-256."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    data = value if isinstance(value, bytes) else repr(value).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


def reduce_step(
    loss: float | Tensor, tokens: float, d_gate: Tensor, sq_norm: Tensor, *, sharded: bool
) -> tuple[float | Tensor, Tensor, Tensor]:
    """What one optimizer step needs of the other ranks, in one all-reduce: (loss, d_gate [N], sq_norm []).

    loss: this rank's mean over `tokens` tokens; the result is the mean over all of them. sharded: each rank has the
    sums over its own rows; else every rank has the whole gradients, which the engine (DDP) has averaged already.

    Raises:
        InputError: not sharded, and the gradients differ between the ranks: nobody has averaged them.
    """
    if world_size() == 1:
        return loss, d_gate, sq_norm
    norm = sq_norm.double()
    total = torch.as_tensor(loss, dtype=norm.dtype, device=norm.device) * tokens
    head = torch.stack([total, norm.new_tensor(tokens), norm, norm * norm])
    sums = all_sum_(torch.cat([head, d_gate.double()]) if sharded else head)
    total, weight, squares, squared = sums[:4].tolist()
    if sharded:
        return total / weight, sums[4:].to(d_gate.dtype), sums[2].to(sq_norm.dtype)
    average = squares / world_size()
    if math.isfinite(squared) and squared / world_size() - average**2 > 1e-12 * average**2 + 1e-300:
        raise InputError(
            "step: expected the same gradients on every rank, got different ones: wrap a step's last backward in "
            "optimizer.averaging(), or the model in DistributedDataParallel (or shard it with fully_shard)"
        )
    return total / weight, d_gate, sq_norm
