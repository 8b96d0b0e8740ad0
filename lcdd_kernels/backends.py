"""Which implementation of an op serves: an explicit choice, else the device's default, self-tested at first use.

Without `use_backend`: float64 -> reference; CUDA -> triton; CPU -> native, else reference. What there is to choose
from is in `registry`.
"""

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcdd_kernels import testing
from lcdd_kernels.registry import BACKENDS, OPS, BackendUnavailable, forget, implementation, load, op_named

__all__ = ["BACKENDS", "BackendUnavailable", "Row", "available", "choose", "report", "reset", "use_backend"]

# What serves a device by default, best first; the reference serves where none of them can.
_DEFAULT = {"cuda": ("triton",), "cpu": ("native",)}


@dataclass(frozen=True)
class Row:
    """A line of `report()`: `reason` is None where the backend is available on that device."""

    op: str
    backend: str
    device: str
    chosen: bool
    reason: str | None


_verdicts: dict[tuple[str, str, str], str | None] = {}  # (op, backend, device) -> None (passed) or why it is disabled
_automatic: dict[tuple[str, str], Callable[..., Any]] = {}  # (op, device) -> what serves it by default
# Stack of use_backend. Process-wide, because autograd runs CUDA backwards in threads of its own.
_requested: list[str] = []
_lock = threading.RLock()


def _mismatch(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this kind of backend cannot take tensors of this device and dtype, or None."""
    if backend == "reference":
        return None
    if dtype == torch.float64:
        return "float64 is computed by the reference only"
    if backend == "native" and device.type != "cpu":
        return f"it computes on the CPU, the tensors are on {device}"
    if backend == "cuda" and device.type != "cuda":
        return f"it computes on CUDA, the tensors are on {device}"
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"the tensors are on {device}; Triton needs CUDA, or its interpreter (TRITON_INTERPRET=1 before the import)"
        )
    return None


def _obstacle(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve `op` here, or None. Runs the self-test at the first use of (op, backend, device)."""
    reason = _mismatch(backend, device, dtype)
    if reason is not None:
        return reason
    found = load(op, backend)
    if isinstance(found, str):
        return found
    if backend == "reference":
        return None
    key = (op, backend, str(device))
    with _lock:
        if key not in _verdicts:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{op}: its first use on {device} is inside a CUDA graph capture, where it cannot be compiled and "
                    "tested; call it once before the capture"
                )
            _verdicts[key] = _self_test(op, backend, device)
            if _verdicts[key] is not None:
                warnings.warn(
                    f"lcdd_kernels: {op} on backend {backend!r} is disabled on {device}: {_verdicts[key]}; "
                    "the reference implementation serves instead",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return _verdicts[key]


def _self_test(op: str, backend: str, device: torch.device) -> str | None:
    failures: tuple[type[BaseException], ...] = (ArithmeticError, AssertionError, AttributeError, ImportError)
    # SubprocessError: Triton calls a C compiler, which may be missing Python's headers
    failures += (LookupError, OSError, RuntimeError, TypeError, ValueError, subprocess.SubprocessError)
    if "triton.errors" in sys.modules:  # compilation errors and "out of resources" have a base class of their own
        failures += (sys.modules["triton.errors"].TritonError,)
    try:
        # the first use may come from inside no_grad, inference_mode or autocast; the test differentiates
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            testing.known_answer(op, backend, device)
    except failures as error:
        return f"its known-answer self-test failed ({type(error).__name__}: {str(error)[:500]})"
    return None


def choose(op: str, *tensors: Tensor) -> Callable[..., Any]:
    """The implementation for an op on these tensors (they share a device): the requested one, or the device's default.

    Raises `BackendUnavailable` when `use_backend` asked for one that cannot serve.
    """
    device = tensors[0].device
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else tensors[0].dtype
    if _requested:
        backend = _requested[-1]
        reason = _obstacle(op, backend, device, dtype)
        if reason is not None:
            raise BackendUnavailable(f"backend {backend!r} was requested and cannot serve {op!r}: {reason}")
        return implementation(op, backend)
    if dtype == torch.float64:
        return implementation(op, "reference")
    key = (op, str(device))
    chosen = _automatic.get(key)
    if chosen is None:
        backend = _pick(op, device, dtype)
        chosen = _automatic[key] = implementation(op, backend)
    return chosen


def _pick(op: str, device: torch.device, dtype: torch.dtype) -> str:
    for backend in _DEFAULT.get(device.type, ()):
        if backend not in OPS[op].backends:
            continue
        reason = _obstacle(op, backend, device, dtype)
        if reason is None:
            return backend
        # A CPU without the native library is an ordinary installation (`lcdd kernels` shows it); a GPU without its
        # kernels is not.
        if device.type == "cuda" and (op, backend, str(device)) not in _verdicts:
            warnings.warn(
                f"lcdd_kernels: no {backend!r} kernel for {op} on {device} ({reason}); the reference serves instead",
                RuntimeWarning,
                stacklevel=3,
            )
    return "reference"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op called inside is served by backend `name`, or raises `BackendUnavailable` with the reason.
    Process-wide, nestable.
    """
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {BACKENDS}, got {name!r}")
    with _lock:
        _requested.append(name)
    try:
        yield
    finally:
        with _lock:
            _requested.pop()


def available(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """For every backend: None where it can serve `op` on that device and dtype, else why it cannot. May run the
    self-test.
    """
    op_named(op)
    device = _with_index(torch.device(device))
    return {backend: _obstacle(op, backend, device, dtype) for backend in BACKENDS}


def report(device: torch.device | str | None = None) -> list[Row]:
    """Rows for `lcdd kernels`: every op and backend on `device` (default: the CPU, and the GPU where there is one)."""
    devices = [torch.device(device)] if device is not None else [torch.device("cpu")]
    if device is None and torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    rows = []
    for op in OPS.values():
        for where in map(_with_index, devices):
            serving = _pick(op.name, where, torch.float32)
            for backend, reason in available(op.name, where).items():
                rows.append(Row(op.name, backend, str(where), backend == serving, reason))
    return rows


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def reset(op: str | None = None) -> None:
    """Forgets what was loaded, tested and chosen, for one op or for all: after installing a library, or in a test."""
    with _lock:
        forget(op)
        tables: tuple[dict[Any, Any], ...] = (_verdicts, _automatic)
        for table in tables:
            for key in [k for k in table if op is None or k[0] == op]:
                del table[key]
