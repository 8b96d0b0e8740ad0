"""What every op is sampled with and judged by: a `Case` in `cases/X.py` (X: the op's stem), in its module's `CASES`."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lcdd_kernels.registry import op_named

Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """How one op is sampled and judged.

    make(dtype, device, seed, size): keyword arguments of the implementation functions; size >= 1 scales the shapes.
    Values are
        drawn on the CPU, so that they are the same on every device. What is purely written must start as NaN.
    expression: same parameters and results as the implementation, in ordinary eager PyTorch of the same dtype.
    outputs: names of the results, in order; for an in-place op, of the arguments that it writes, or of their attributes
        ("matrices.weights").
    exact: outputs that must equal the reference of the same dtype bit for bit.
    depth: per output, the roundings that follow one another in its computation beyond the last one: the length of the
        chain of operations, or about log2(n) for a sum of n terms. It widens the floor, because on a few numbers the
        expression's error is luck, and another order of the same roundings has other luck.
    approximations: per output, what the chip's approximations of exp, log and division may cost, in half-ulps of
        float32 whatever the storage is: 4 each, and for exp as many as its argument is large.
    dtypes: storage dtypes that the op takes (float64 apart: every op's reference takes it).
    """

    make: Callable[[torch.dtype, torch.device, int, int], Inputs]
    expression: Callable[..., Any]
    outputs: tuple[str, ...]
    in_place: bool = False
    exact: frozenset[str] = frozenset()
    depth: Mapping[str, int] = field(default_factory=dict)
    approximations: Mapping[str, int] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


def case_of(op: str) -> Case:
    """The op's `Case`; `ValueError` where there is no such op or it has none."""
    module = importlib.import_module(f"lcdd_kernels.cases.{op_named(op).stem}")
    if op not in module.CASES:
        raise ValueError(f"op: {module.__name__}.CASES has no case for {op!r}, only {sorted(module.CASES)}")
    return module.CASES[op]
