"""The CUDA C++ library (`csrc/cuda/`, C ABI) behind ctypes: `X_cuda` with the parameters of `X_ref`.

Not built by an install, and never chosen by default: not yet measured faster than the Triton kernels. To try it,
    cmake -S . -B build/native -DLCDD_CUDA=ON && cmake --build build/native
and ask for it with `use_backend("cuda")`. One launch covers every matrix of a model (`csrc/cuda/lcdd_cuda.h`).
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from lcdd_kernels.checks import fail
from lcdd_kernels.native import Matrix, adamw_numbers, matrix_table, pointer, rank_pointer, set_grads
from lcdd_kernels.reference.delta_step import AdamWStep, Gradients, Matrices, gather_partial_sums
from lcdd_kernels.registry import BackendUnavailable

_DEVICE = "cuda"
LIBRARY = Path(__file__).with_name("liblcdd_cuda.so")

_int, _i64, _ptr = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_TABLE = (_ptr, _ptr, _i64, _i64)  # matrices, places, how many, tiles
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "lcdd_cuda_weight_eff": (*_TABLE, _ptr, _ptr),
    "lcdd_cuda_grad_stats": (*_TABLE, _ptr, _ptr, _ptr, _ptr, _ptr, _ptr, _i64, _ptr),
    "lcdd_cuda_delta_adamw": (*_TABLE, _ptr, _ptr, _ptr, _ptr, _ptr),
    "lcdd_cuda_pack_columns": (_ptr, _ptr, _ptr, _i64, _i64, _i64, _i64, _int, _ptr),
}


@functools.cache
def _library() -> ctypes.CDLL:
    if not LIBRARY.exists():
        raise BackendUnavailable(
            "not enabled: not yet measured faster than Triton on a GPU (build it with cmake -DLCDD_CUDA=ON to try it)"
        )
    library = ctypes.CDLL(str(LIBRARY))
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


def _tiles() -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of a tile of pass A, and of pass B and the refresh."""
    sizes = (_i64 * 4)()
    _library().lcdd_cuda_tiles(sizes)
    return (sizes[0], sizes[1]), (sizes[2], sizes[3])


def require(op: str) -> None:
    """Loads the library. Raises `BackendUnavailable` or `OSError` with the reason where it cannot serve `op`."""
    _library()


def _call(function: str, device: torch.device, *arguments: object) -> None:
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        status = getattr(_library(), function)(*arguments, stream)
    if status != 0:
        raise RuntimeError(f"{function}: CUDA error {status}")


@functools.lru_cache(maxsize=16)
def _on_device(table: bytes, device: torch.device) -> Tensor:
    """A table's bytes on the device; the same one serves step after step, as long as no tensor moves."""
    return torch.frombuffer(bytearray(table), dtype=torch.uint8).to(device)


def _keep_for_stream(*tables: Tensor) -> None:
    """They may leave the cache before the kernel has run: their memory is not given out again until then."""
    for table in tables:
        table.record_stream(torch.cuda.current_stream(table.device))


class Plan:
    """A table of matrices on the device, with where each one's tiles and partial sums are (`lcdd_place`)."""

    def __init__(self, table: ctypes.Array[Matrix], tile: tuple[int, int], device: torch.device) -> None:
        places = [(0, 0, 0, 0)]
        for m in table:
            row_tiles, col_tiles = -(-m.rows // tile[0]), -(-m.cols // tile[1])
            sizes = (row_tiles * col_tiles, m.rows * col_tiles, m.cols * row_tiles, m.rows + m.cols)
            places.append(tuple(a + b for a, b in zip(places[-1], sizes, strict=True)))
        self.tiles, self.row_partials, self.col_partials, self.sums = places[-1]
        if self.tiles >= 2**31:
            raise fail("matrices", "fewer than 2**31 tiles", self.tiles)
        matrices = _on_device(bytes(table), device)
        offsets = _on_device(torch.tensor(places, dtype=torch.int64, device="cpu").numpy().tobytes(), device)
        _keep_for_stream(matrices, offsets)
        self.arguments = (matrices.data_ptr(), offsets.data_ptr(), len(table), self.tiles)


def weight_eff_cuda(matrices: Matrices, gate: Tensor) -> None:
    plan = Plan(matrix_table(matrices, _DEVICE), _tiles()[1], gate.device)
    where = pointer("gate", gate, matrices.n_gates, _DEVICE)
    _call("lcdd_cuda_weight_eff", gate.device, *plan.arguments, where)


def delta_grad_stats_cuda(matrices: Matrices, grads: Gradients, gate: Tensor) -> tuple[Tensor, Tensor]:
    n = matrices.n_gates
    plan = Plan(set_grads(matrix_table(matrices, _DEVICE), grads, _DEVICE), _tiles()[0], gate.device)
    row_partials, col_partials = gate.new_empty(plan.row_partials), gate.new_empty(plan.col_partials)
    squares, sums = gate.new_empty(plan.tiles), gate.new_empty(plan.sums + 1)
    sums[-1] = 0  # the slot that gather_partial_sums pads with
    _call(
        "lcdd_cuda_grad_stats", gate.device, *plan.arguments, pointer("gate", gate, n, _DEVICE),
        rank_pointer(grads, n, _DEVICE), row_partials.data_ptr(), col_partials.data_ptr(), squares.data_ptr(),
        sums.data_ptr(), plan.sums,
    )  # fmt: skip
    d_gate = gather_partial_sums(sums, matrices.maps, matrices.shapes, n)
    return d_gate, squares.sum(dtype=torch.float64).float()


def delta_adamw_cuda(matrices: Matrices, grads: Gradients, gate_old: Tensor, gate_new: Tensor, adam: AdamWStep) -> None:
    if (known := adam.known()) is None:
        return
    n = matrices.n_gates
    plan = Plan(set_grads(matrix_table(matrices, _DEVICE), grads, _DEVICE), _tiles()[1], gate_old.device)
    _call(
        "lcdd_cuda_delta_adamw", gate_old.device, *plan.arguments, pointer("gate_old", gate_old, n, _DEVICE),
        pointer("gate_new", gate_new, n, _DEVICE), rank_pointer(grads, n, _DEVICE), ctypes.byref(adamw_numbers(known)),
    )  # fmt: skip


def pack_columns_cuda(x: Tensor, cols: Tensor, multiple: int = 1) -> Tensor:
    x, cols, n_cols = x.contiguous(), cols.to(torch.int32).contiguous(), cols.numel()
    padded = -(-n_cols // multiple) * multiple
    out = x.new_empty(x.shape[0], padded)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    where = pointer("cols", cols, n_cols, _DEVICE, (torch.int32,))
    _call(
        "lcdd_cuda_pack_columns", x.device, pointer("x", x, x.numel(), _DEVICE, dtypes), where, out.data_ptr(),
        x.shape[0], x.shape[1], n_cols, padded, x.element_size(),
    )  # fmt: skip
    return out
