"""The CPU library (`csrc/`, a C ABI) behind ctypes: `X_native` with the parameters of `X_ref`.

One call for a whole model; fp32 arithmetic, storage fp32, bf16 or fp16. The instruction set is chosen at run time
(AVX-512, AVX2 or plain C++); all three, and every thread count, give the same bits. Importing this module loads
nothing: `require` does, at first use, and raises `BackendUnavailable` where the library was not built, is of another
version, or does not load.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lcdd_kernels.checks import fail
from lcdd_kernels.reference.delta_step import BLOCK, DENSE, LAYOUTS, AdamWStep, Gradients, Matrices
from lcdd_kernels.reference.gates import KINDS, GateSpec
from lcdd_kernels.registry import BackendUnavailable

ABI_VERSION = 1
LIBRARY = Path(__file__).with_name("liblcdd_native.so")
LEVELS = ("scalar", "avx2", "avx512")  # position = code in lcdd_native.h

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STATUS = {1: "out of memory", 3: "this CPU cannot run that instruction set"}
_PACKED_MISMATCH = 2

_int, _i64, _u64, _float, _ptr = ctypes.c_int, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float, ctypes.c_void_p


class Matrix(ctypes.Structure):
    """`lcdd_matrix` of lcdd_native.h."""

    _fields_ = (
        *((name, _ptr) for name in ("weight", "base", "delta", "exp_avg", "exp_avg_sq", "grad", "grad_cols")),
        *((name, _i64) for name in ("rows", "cols", "row_start", "col_start", "head_dim", "repeat")),
        *((name, _i64) for name in ("open_rows", "open_cols", "weight_dtype", "delta_dtype")),
        *((name, _i64) for name in ("exp_avg_dtype", "exp_avg_sq_dtype", "grad_dtype", "layout")),
    )


class AdamW(ctypes.Structure):
    """`lcdd_adamw` of lcdd_native.h."""

    _fields_ = tuple(
        (name, _float)
        for name in (
            "grad_scale", "decay", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size", "inverse_bias2_sqrt",
            "eps",
        )
    )  # fmt: skip


def adamw_numbers(adam: AdamWStep) -> AdamW:
    """The factors that pass B multiplies by."""
    return AdamW(
        adam.grad_scale, adam.decay, 1 - adam.beta1, adam.beta2, 1 - adam.beta2, adam.step_size, 1 / adam.root_bias2,
        adam.eps,
    )  # fmt: skip


def pointer(name: str, value: Tensor, numel: int, device: str, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> int:
    """The tensor's address, after the checks without which the library would read or write out of bounds."""
    if value.device.type != device or value.dtype not in dtypes or not value.is_contiguous() or value.numel() != numel:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise fail(
            name,
            f"a contiguous {expected} tensor of {numel} elements on {device}",
            f"{value.dtype} of shape {list(value.shape)}, strides {value.stride()}, on {value.device}",
        )
    return value.data_ptr()


def matrix_table(matrices: Matrices, device: str) -> ctypes.Array[Matrix]:
    """The pointer table of the C functions, made once for a list of matrices: only the gradients change."""
    if device not in matrices.tables:
        matrices.tables[device] = _new_table(matrices, device)
    return matrices.tables[device]


def _new_table(matrices: Matrices, device: str) -> ctypes.Array[Matrix]:
    names = ("weight", "base", "delta", "exp_avg", "exp_avg_sq")
    lists = {name: getattr(matrices, f"{name}s") for name in names if len(getattr(matrices, f"{name}s"))}
    table = (Matrix * len(matrices.deltas))()
    for m, (entry, shape, where) in enumerate(zip(table, matrices.shapes, matrices.maps, strict=True)):
        n_out, n_in = entry.rows, entry.cols = shape
        entry.row_start, entry.col_start = where.row_start, where.col_start
        entry.head_dim, entry.repeat = where.head_dim, where.repeat
        last = max(where.row_start + n_out, where.col_start + -(-n_in // where.repeat))
        low = min(where.row_start, where.col_start) < 0 or min(where.head_dim, where.repeat) < 1
        if low or last > matrices.n_gates or n_in % where.repeat:
            raise fail(f"maps[{m}]", f"gates within [0, {matrices.n_gates}) for a matrix {n_out}x{n_in}", where)
        for name, tensors in lists.items():
            value = tensors[m]
            setattr(entry, name, pointer(f"{name}s[{m}]", value, n_out * n_in, device, tuple(_DTYPES)))
            if name != "base":
                setattr(entry, f"{name}_dtype", _DTYPES[value.dtype])
            elif value.dtype != matrices.weights[m].dtype:
                raise fail(f"bases[{m}]", f"the weight's {matrices.weights[m].dtype}", value.dtype)
    return table


def set_grads(table: ctypes.Array[Matrix], grads: Gradients, device: str) -> ctypes.Array[Matrix]:
    """The table with these gradients in it; they must outlive the call that takes it."""
    for m, (entry, grad, panel, layout) in enumerate(
        zip(table, grads.tensors, grads.col_panels, grads.layouts, strict=True)
    ):
        entry.layout = layout
        entry.grad_dtype = _DTYPES.get(grad.dtype, 0)
        entry.open_rows = rows = entry.rows if layout == DENSE else grad.shape[0]
        entry.open_cols = cols = grad.shape[1] if layout == BLOCK else entry.cols
        entry.grad = pointer(f"grads[{m}]", grad, rows * cols, device, tuple(_DTYPES))
        entry.grad_cols = None
        if panel is not None:
            entry.open_cols = panel.shape[1]
            size = entry.rows * entry.open_cols
            entry.grad_cols = pointer(f"col_panels[{m}]", panel, size, device, (grad.dtype,))
    return table


def rank_pointer(grads: Gradients, n_gates: int, device: str) -> int | None:
    if grads.rank is not None:
        return pointer("rank", grads.rank, n_gates, device, (torch.int32,))
    if any(layout != DENSE for layout in grads.layouts):
        raise fail("rank", f"the rank of open_indices (layouts other than {LAYOUTS[DENSE]!r})", None)
    return None


class NativeLibrary:
    """The library at one dispatch level. `threads`: as torch has it at the time of the call, unless given."""

    def __init__(self, path: Path = LIBRARY, level: str | None = None, threads: int | None = None) -> None:
        if level is not None and level not in LEVELS:
            raise fail("level", f"one of {LEVELS}", repr(level))
        self._c = _load(path)
        best = self._c.lcdd_best_level()
        self._level = best if level is None else LEVELS.index(level)
        self.level = LEVELS[self._level]
        self._threads = threads
        if self._level > best:
            raise BackendUnavailable(f"this CPU runs {LEVELS[: best + 1]}, not {level!r}")

    @property
    def threads(self) -> int:
        return torch.get_num_threads() if self._threads is None else self._threads

    def gate_values(self, logits: Tensor, spec: GateSpec, *, offset: int = 0) -> tuple[Tensor, Tensor]:
        n = logits.numel()
        gate, expected_l0 = torch.empty_like(logits), logits.new_empty(())
        self._call(
            "lcdd_gate_values", pointer("logits", logits, n, "cpu"), n, KINDS.index(spec.kind), spec.seed, spec.step,
            spec.training, offset, gate.data_ptr(), expected_l0.data_ptr(), self.threads,
        )  # fmt: skip
        return gate, expected_l0

    def gate_logits_grad(
        self, logits: Tensor, d_gate: Tensor, spec: GateSpec, *, l0_weight: float, offset: int = 0
    ) -> Tensor:
        n = logits.numel()
        d_logits = torch.empty_like(logits)
        self._call(
            "lcdd_gate_logits_grad", pointer("logits", logits, n, "cpu"), pointer("d_gate", d_gate, n, "cpu"), n,
            KINDS.index(spec.kind), spec.seed, spec.step, spec.training, offset, l0_weight, d_logits.data_ptr(),
            self.threads,
        )  # fmt: skip
        return d_logits

    def open_indices(self, gate: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, groups = gate.numel(), offsets.numel() - 1
        where = pointer("offsets", offsets, groups + 1, "cpu", (torch.int64,))
        if groups < 0 or offsets[0] != 0 or offsets[-1] != n or bool((offsets.diff() < 0).any()):
            raise fail("offsets", f"ascending int64 from 0 to {n}", offsets.tolist())
        indices, rank = torch.empty(n, dtype=torch.int32, device="cpu"), torch.empty(n, dtype=torch.int32, device="cpu")
        counts = torch.empty(groups, dtype=torch.int32, device="cpu")
        self._call(
            "lcdd_open_indices", pointer("gate", gate, n, "cpu"), where, groups, indices.data_ptr(), counts.data_ptr(),
            rank.data_ptr(),
        )  # fmt: skip
        return indices, counts, rank

    def weight_eff(self, matrices: Matrices, gate: Tensor) -> None:
        table = matrix_table(matrices, "cpu")
        where = pointer("gate", gate, matrices.n_gates, "cpu")
        self._call("lcdd_weight_eff", table, len(table), where, self._level, self.threads)

    def weight_differs(self, matrices: Matrices, m: int, gate: Tensor) -> Tensor:
        weight = matrices.weights[m]
        lists = {"bases": [matrices.bases[m]], "deltas": [matrices.deltas[m]], "weights": [torch.empty_like(weight)]}
        alone = Matrices(maps=[matrices.maps[m]], n_gates=matrices.n_gates, **lists)
        self.weight_eff(alone, gate)
        return (weight != alone.weights[0]).sum()

    def delta_grad_stats(self, matrices: Matrices, grads: Gradients, gate: Tensor) -> tuple[Tensor, Tensor]:
        n = matrices.n_gates
        table = set_grads(matrix_table(matrices, "cpu"), grads, "cpu")
        d_gate, sq_norm = torch.empty_like(gate), gate.new_empty(())
        self._call(
            "lcdd_grad_stats", table, len(table), pointer("gate", gate, n, "cpu"), rank_pointer(grads, n, "cpu"), n,
            d_gate.data_ptr(), sq_norm.data_ptr(), self._level, self.threads,
        )  # fmt: skip
        return d_gate, sq_norm

    def delta_adamw(
        self, matrices: Matrices, grads: Gradients, gate_old: Tensor, gate_new: Tensor, adam: AdamWStep
    ) -> None:
        if (known := adam.known()) is None:
            return
        n = matrices.n_gates
        table = set_grads(matrix_table(matrices, "cpu"), grads, "cpu")
        self._call(
            "lcdd_delta_adamw", table, len(table), pointer("gate_old", gate_old, n, "cpu"),
            pointer("gate_new", gate_new, n, "cpu"), rank_pointer(grads, n, "cpu"), ctypes.byref(adamw_numbers(known)),
            self._level, self.threads,
        )  # fmt: skip

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._c, function)(*arguments)
        if status == _PACKED_MISMATCH:
            raise fail("grads", "packed gradients of the open rows and columns that rank describes", "another shape")
        if status != 0:
            raise RuntimeError(f"{function}: {_STATUS.get(status, f'status {status}')}")


_SIGNATURES: dict[str, tuple[type, ...]] = {
    "lcdd_gate_values": (_ptr, _i64, _int, _u64, _u64, _int, _u64, _ptr, _ptr, _int),
    "lcdd_gate_logits_grad": (_ptr, _ptr, _i64, _int, _u64, _u64, _int, _u64, _float, _ptr, _int),
    "lcdd_open_indices": (_ptr, _ptr, _i64, _ptr, _ptr, _ptr),
    "lcdd_weight_eff": (_ptr, _i64, _ptr, _int, _int),
    "lcdd_grad_stats": (_ptr, _i64, _ptr, _ptr, _i64, _ptr, _ptr, _int, _int),
    "lcdd_delta_adamw": (_ptr, _i64, _ptr, _ptr, _ptr, _ptr, _int, _int),
    "lcdd_best_level": (),
    "lcdd_abi_version": (),
}


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise BackendUnavailable(
            f"{path.name} was not built (the install log says why; it needs CMake and a C++ compiler)"
        )
    library = ctypes.CDLL(str(path))
    version = library.lcdd_abi_version()
    if version != ABI_VERSION:
        raise BackendUnavailable(f"{path.name} has ABI {version}, this package {ABI_VERSION}: install lcdd again")
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


@functools.cache
def _shared() -> NativeLibrary:
    return NativeLibrary()


def require(op: str) -> None:
    """Loads the library. Raises `BackendUnavailable` or `OSError` with the reason where it cannot serve `op`."""
    _shared()


def __getattr__(name: str) -> object:
    """`X_native` is method X of the shared library object: same parameters as `X_ref`, written down once."""
    method = name.removesuffix("_native")
    if method == name or not hasattr(NativeLibrary, method):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_shared(), method)
