"""Argument checks of the public functions: each raises `ValueError` naming the argument, what was expected and what
came.

They run in `functional/`, before any op is called, so that nothing is written on bad input. They read shapes,
dtypes and pointers only; `check_no_nan` is the one that reads values, and it does so on the CPU alone (on a GPU it
would make the host wait).
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_INT = 2**63  # schema integers are signed


def fail(name: str, expected: str, got: object) -> ValueError:
    """The one wording of every complaint; callers `raise fail(...)`."""
    return ValueError(f"{name}: expected {expected}, got {got}")


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise fail(name, "a tensor", type(value).__name__)
    return value


def check_shape(name: str, value: Tensor, shape: Sequence[int | None]) -> None:
    """Shape check; `None` stands for any size."""
    check_tensor(name, value)
    ok = value.dim() == len(shape) and all(s is None or s == v for s, v in zip(shape, value.shape, strict=True))
    if not ok:
        want = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
        raise fail(name, f"shape {want}", f"shape {list(value.shape)}")


def check_dtype(name: str, value: Tensor, allowed: Collection[torch.dtype]) -> None:
    check_tensor(name, value)
    if value.dtype not in allowed:
        raise fail(name, "dtype " + " or ".join(str(d).removeprefix("torch.") for d in allowed), value.dtype)


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    check_tensor(name, value)
    if value.device != device:
        raise fail(name, f"a tensor on {device}", f"one on {value.device}")


def check_contiguous(name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise fail(name, "a contiguous tensor", f"strides {tuple(value.stride())} for shape {list(value.shape)}")


def check_length(name: str, value: Sequence[object], length: int) -> None:
    if len(value) != length:
        raise fail(name, f"{length} entries", f"{len(value)}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        raise fail(name, "one of " + ", ".join(repr(c) for c in choices), repr(value))


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """`low <= value` and, where given, `value < high`."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise fail(name, "an int", type(value).__name__)
    if value < low or (high is not None and value >= high):
        raise fail(name, f"an int in [{low}, {'inf' if high is None else high})", value)


def check_real(name: str, value: object, low: float, high: float, *, high_open: bool = False) -> None:
    """A finite Python number in `[low, high]`, or in `[low, high)` with `high_open`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fail(name, "a number", type(value).__name__)
    if not (low <= value <= high) or (high_open and value == high) or value in (float("inf"), float("-inf")):
        raise fail(name, f"a number in [{low}, {high}{')' if high_open else ']'}", value)


def check_no_nan(name: str, value: Tensor) -> None:
    """Rejects NaN on the CPU. Elsewhere it would be a device-to-host wait in every step, and is left to the caller."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and bool(torch.isnan(value).any()):
        raise fail(name, "no NaN", f"{int(torch.isnan(value).sum())} NaN of {value.numel()}")


def check_gate(name: str, gate: Tensor, n: int | None = None) -> None:
    check_shape(name, gate, (n,))
    check_dtype(name, gate, (torch.float32, torch.float64))
    check_contiguous(name, gate)
    check_no_nan(name, gate)


@dataclass(frozen=True)
class Memory:
    """Ranges of memory that belong to one tensor each, ascending."""

    starts: list[int]
    ends: list[int]
    names: list[str]


def _range(value: Tensor) -> tuple[int, int]:
    """The addresses of a contiguous tensor, the end exclusive."""
    start = value.data_ptr()
    return start, start + value.numel() * value.element_size()


def memory_of(written: Sequence[tuple[str, Tensor]]) -> Memory:
    """The memory of contiguous tensors that are written: a weight that is its base would overwrite it, a matrix listed
    twice would be stepped twice. Raises where two overlap.
    """
    found = sorted((*_range(value), name) for name, value in written if value.numel())
    for (_, end, first), (start, _, second) in pairwise(found):
        if start < end:
            raise fail(second, "memory of its own (it is written)", f"the memory of {first}")
    return Memory([start for start, _, _ in found], [end for _, end, _ in found], [name for _, _, name in found])


def check_memory(names: Sequence[str], values: Sequence[Tensor], pointers: Sequence[int], written: Memory) -> None:
    """Contiguous tensors that are read share no byte with one that is written; pointers: their addresses."""
    ends = [start + value.nbytes for start, value in zip(pointers, values, strict=True)]
    before = [bisect_left(written.starts, end) for end in ends]  # those that begin before this one ends
    limits = [0, *written.ends]
    for name, place, start, end in zip(names, before, pointers, ends, strict=True):
        if limits[place] > start and start < end:
            raise fail(name, "memory of its own", f"the memory of {written.names[place - 1]}, which is written")
