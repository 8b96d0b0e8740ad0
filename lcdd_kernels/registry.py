"""What ops there are and where their implementations live; nothing is imported before it is used.

    reference  lcdd_kernels.reference.delta_step:weight_eff_ref
    triton     lcdd_kernels.triton_kernels.delta_step:weight_eff_triton
    native     lcdd_kernels.native:weight_eff_native
    cuda       lcdd_kernels.cuda:weight_eff_cuda

All implementations of an op have the reference's parameters, keyword-only ones included. An implementation that
cannot be had raises `BackendUnavailable` (or `ImportError`) when its module is imported or when its `require(op)`
(optional, in the same module) is called.

Adding an op: a line in `OPS`, its reference, its `Case` in `cases/X.py`, its `ops/X.py`.
"""

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BACKENDS = ("reference", "triton", "native", "cuda")
_MODULES = {
    "reference": "lcdd_kernels.reference.{stem}",
    "triton": "lcdd_kernels.triton_kernels.{stem}",
    "native": "lcdd_kernels.native",
    "cuda": "lcdd_kernels.cuda",
}
_SUFFIX = {"reference": "ref", "triton": "triton", "native": "native", "cuda": "cuda"}


class BackendUnavailable(RuntimeError, ValueError):
    """An explicitly requested backend cannot serve this op, device or dtype; the message says why."""


@dataclass(frozen=True)
class Op:
    """An op's name, its stem (the module name in every folder) and the backends that implement it."""

    name: str
    stem: str
    backends: tuple[str, ...]


_GPU = ("reference", "triton")
_BOTH = (*_GPU, "native")
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("gate_values", "gates", _BOTH),
        Op("gate_logits_grad", "gates", _BOTH),
        Op("open_indices", "gates", _BOTH),
        Op("weight_eff_", "delta_step", BACKENDS),
        Op("weight_differs", "delta_step", _BOTH),
        Op("delta_grad_stats", "delta_step", BACKENDS),
        Op("delta_adamw_", "delta_step", BACKENDS),
        Op("block_gates", "gated_linear", _GPU),
        Op("gated_weights", "gated_linear", _GPU),
        Op("gated_weight_grad", "gated_linear", _GPU),
        Op("swiglu", "swiglu", _GPU),
        Op("swiglu_grad_", "swiglu", _GPU),
        Op("pack_columns", "packed_grad", (*_GPU, "cuda")),
        Op("unpack_columns", "packed_grad", _GPU),
        Op("channel_match", "channel_match", _GPU),
        Op("channel_match_backward", "channel_match", _GPU),
        Op("cross_entropy_chunk_", "linear_loss", _GPU),
        Op("kl_chunk_", "linear_loss", _GPU),
    )
}

_loaded: dict[tuple[str, str], Callable[..., Any] | str] = {}  # (op, backend) -> implementation, or why there is none
_lock = threading.RLock()


def op_named(name: str) -> Op:
    """The op; `ValueError` where there is none of that name."""
    if name not in OPS:
        raise ValueError(f"op: expected one of {sorted(OPS)}, got {name!r}")
    return OPS[name]


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The implementation itself, imported at first call and not self-tested. Raises `BackendUnavailable` with the
    reason.
    """
    found = load(op, backend)
    if isinstance(found, str):
        raise BackendUnavailable(f"backend {backend!r} cannot serve {op!r}: {found}")
    return found


def load(op: str, backend: str) -> Callable[..., Any] | str:
    """The implementation, or the reason why there is none."""
    key = (op, backend)
    with _lock:
        if key not in _loaded:
            _loaded[key] = _find(op_named(op), backend)
        return _loaded[key]


def _find(op: Op, backend: str) -> Callable[..., Any] | str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend not in op.backends:
        return "it has no such implementation"
    try:
        module = importlib.import_module(_MODULES[backend].format(stem=op.stem))
        if hasattr(module, "require"):
            module.require(op.name)
        return getattr(module, f"{op.name.rstrip('_')}_{_SUFFIX[backend]}")  # the in-place mark is dropped
    except (ImportError, OSError, AttributeError, BackendUnavailable) as error:
        return f"{type(error).__name__}: {error}"


def forget(op: str | None = None) -> None:
    """What was loaded is looked for again, for one op or for all: after installing a library, or in a test."""
    with _lock:
        for key in [k for k in _loaded if op is None or k[0] == op]:
            del _loaded[key]
