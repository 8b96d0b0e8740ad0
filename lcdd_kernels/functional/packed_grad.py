"""Packed weight gradients: the open rows and columns of G = dYᵀX and nothing else (method, section 1).

Shapes: T tokens, K in_features, O out_features, R open rows, C open columns, P = C rounded up to `packed_multiple`.
The library does the products; `pack_columns` gathers their operands.

Which matrices get one: its predicted cost over that of the dense gradient, against a crossover. Work is counted in
multiply-adds a token:

    dense     O·K
    "block"   R·C           + gather · (R + C)      hard-concrete
    "panels"  R·K + O·C     + gather · (R + C)      Heaviside

`gather` is what moving one element of X or dY into a panel costs, in multiply-adds of the dense product. A matrix is
packed where the predicted ratio is below `crossover`, which is under 1 because smaller products run a little less
efficiently. Both depend on the device, the dtype and the libraries; `DEFAULT_CROSSOVER` is the one place for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcdd_kernels import checks
from lcdd_kernels.backends import choose
from lcdd_kernels.checks import FLOATS, check_choice, check_int, fail
from lcdd_kernels.ops import packed_grad as ops

__all__ = [
    "DEFAULT_CROSSOVER",
    "PACKED_LAYOUT",
    "PackCrossover",
    "check_index_list",
    "default_crossover",
    "expand_columns",
    "pack_columns",
    "pack_cost",
    "pack_layout",
    "packed_multiple",
    "packed_weight_grad",
]

_INDEX_DTYPES = (torch.int32, torch.int64)


def check_index_list(name: str, index: Tensor | None, size: int, device: torch.device) -> None:
    """An int32 or int64 vector with values in [0, size). Values are read on the CPU only: on a GPU the host would wait,
    and the kernels answer an index out of range with NaN."""
    index = checks.check_tensor(name, index)
    checks.check_shape(name, index, (None,))
    checks.check_dtype(name, index, _INDEX_DTYPES)
    checks.check_device(name, index, device)
    if index.numel() and index.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = torch.aminmax(index)
        if low < 0 or high >= size:
            raise fail(name, f"indices in [0, {size})", f"indices in [{int(low)}, {int(high)}]")


def expand_columns(open_gates: Tensor, *, head_dim: int, repeat: int) -> Tensor:
    """Open gates of a group -> open columns of the matrix they gate, int64, in packed order (copy-major).

    open_gates: int[n] local positions. With grouped-query attention (`repeat` query heads per KV head) gate g =
    kv·head_dim + d serves columns (kv·repeat + copy)·head_dim + d: all open columns of copy 0 come first, then those of
    copy 1, and so on. With repeat = 1 the columns are the gates.
    """
    checks.check_shape("open_gates", open_gates, (None,))
    checks.check_dtype("open_gates", open_gates, _INDEX_DTYPES)
    checks.check_int("head_dim", head_dim, 1)
    checks.check_int("repeat", repeat, 1)
    gates = open_gates.long()
    if repeat == 1:
        return gates
    first = gates // head_dim * (repeat * head_dim) + gates % head_dim
    copies = torch.arange(repeat, device=gates.device) * head_dim
    return (copies[:, None] + first[None, :]).reshape(-1)


def pack_columns(x: Tensor, cols: Tensor, *, multiple: int = 1, check: bool = True) -> Tensor:
    """x[T, K], cols int[C] -> x[:, cols], contiguous [T, P], zero-padded to a `multiple` of columns. Differentiable in
    x.

    x: float32, float16, bfloat16 or float64, any strides. cols: int32 or int64, distinct (an open list).
    check: False where the caller has checked all of this before, once for many calls.
    """
    if check:
        checks.check_shape("x", x, (None, None))
        checks.check_dtype("x", x, FLOATS)
        check_index_list("cols", cols, x.shape[1], x.device)
        checks.check_int("multiple", multiple, 1)
    return _gather(x, cols, multiple, trusted=not check)


def packed_weight_grad(
    x: Tensor,
    dy: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    layout: str,
    out: Tensor | Sequence[Tensor] | None = None,
    x_open: Tensor | None = None,
    check: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """The open part of dYᵀX, for x[T, K], dy[T, O], rows int[R], cols int[C] of a linear weight [O, K].

    layout "block":  -> G[R, C]
    layout "panels": -> (G[R, :] as [R, K], G[:, C] as [O, C])
    out: accumulate into it and return it (micro-batches): same shapes, contiguous, any float dtype. A product whose
         dtype is not out's is rounded to x's dtype before it is added, as autograd does before it adds to
         `weight.grad`.
    x_open: `pack_columns(x, cols, multiple=packed_multiple(x.device))` from an earlier call, where several matrices
         read one input (q, k, v; gate, up).
    check: False where the caller has checked all of this before, once for many calls.
    Nothing open gives an empty result. Columns of a GQA o_proj: `expand_columns`.
    """
    if check:
        _check_operands(x, dy, rows, cols, layout, x_open)
    shapes = _result_shapes(x, dy, rows, cols, layout)
    targets = _targets(out, len(shapes))
    if check:
        _check_targets(targets, shapes, x)
    multiple = packed_multiple(x.device)
    dy_open = _gather(dy, rows, multiple, trusted=not check)
    if x_open is None:
        x_open = _gather(x, cols, multiple, trusted=not check)
    pairs = [(dy_open, x_open)] if layout == "block" else [(dy_open, x), (dy, x_open)]
    results = [_product(a, b, shape, target) for (a, b), shape, target in zip(pairs, shapes, targets, strict=True)]
    return results[0] if layout == "block" else (results[0], results[1])


def _gather(x: Tensor, cols: Tensor, multiple: int, *, trusted: bool) -> Tensor:
    """The op; in a backward of ours, which nobody traces or differentiates, without its wrapper: that takes the host
    longer than all the rest, for every matrix and micro-batch."""
    if trusted and not torch.is_grad_enabled():
        found: Tensor = choose("pack_columns", x)(x, cols, multiple)
        return found
    return ops.pack_columns(x, cols, multiple)


_SMALL_PRODUCT = 2**27
"""Multiply-adds. For 16-bit operands of a new shape oneDNN writes code first, for milliseconds, and while gates close
(and texts differ in length) every shape is new; a product below this is done sooner in float32."""


def _product(a: Tensor, b: Tensor, shape: tuple[int, int], out: Tensor | None) -> Tensor:
    """aᵀb in a's dtype without the padding of the operands, contiguous, or added to `out`."""
    small = a.device.type == "cpu" and a.dtype.itemsize == 2 and a.numel() * b.shape[1] < _SMALL_PRODUCT
    whole = (a.shape[1], b.shape[1]) == shape
    if out is not None and whole and out.dtype == a.dtype and not small:
        return torch.addmm(out, a.t(), b, out=out)
    product = torch.mm(a.float().t(), b.float()).to(a.dtype) if small else torch.mm(a.t(), b)
    product = product[: shape[0], : shape[1]]
    return product.contiguous() if out is None else out.add_(product)


def _result_shapes(x: Tensor, dy: Tensor, rows: Tensor, cols: Tensor, layout: str) -> list[tuple[int, int]]:
    if layout == "block":
        return [(rows.shape[0], cols.shape[0])]
    return [(rows.shape[0], x.shape[1]), (dy.shape[1], cols.shape[0])]


def _check_operands(x: Tensor, dy: Tensor, rows: Tensor, cols: Tensor, layout: str, x_open: Tensor | None) -> None:
    checks.check_choice("layout", layout, ("block", "panels"))
    checks.check_shape("x", x, (None, None))
    checks.check_dtype("x", x, FLOATS)
    checks.check_shape("dy", dy, (x.shape[0], None))
    checks.check_dtype("dy", dy, (x.dtype,))
    checks.check_device("dy", dy, x.device)
    check_index_list("rows", rows, dy.shape[1], x.device)
    check_index_list("cols", cols, x.shape[1], x.device)
    if x_open is not None:
        multiple = packed_multiple(x.device)
        checks.check_shape("x_open", x_open, (x.shape[0], -(-cols.shape[0] // multiple) * multiple))
        checks.check_dtype("x_open", x_open, (x.dtype,))
        checks.check_device("x_open", x_open, x.device)


def _targets(out: Tensor | Sequence[Tensor] | None, count: int) -> list[Tensor] | list[None]:
    if out is None:
        return [None] * count
    targets = [out] if isinstance(out, Tensor) else list(out)
    checks.check_length("out", targets, count)
    return targets


def _check_targets(targets: list[Tensor] | list[None], shapes: list[tuple[int, int]], x: Tensor) -> None:
    for target, shape in zip(targets, shapes, strict=True):
        if target is not None:
            checks.check_shape("out", target, shape)
            checks.check_dtype("out", target, FLOATS)
            checks.check_device("out", target, x.device)
            checks.check_contiguous("out", target)


PACKED_LAYOUT = {"hard_concrete": "block", "heaviside_ste": "panels"}


@dataclass(frozen=True, kw_only=True)
class PackCrossover:
    """gather: multiply-adds one gathered element costs. crossover: pack where the predicted cost ratio is below it.

    min_elements: smaller matrices stay dense whatever is open: there the fixed cost of more calls outweighs the
        product.
    source: where the figures come from, a measurement (on what) or a prediction.
    """

    gather: float
    crossover: float
    min_elements: int
    source: str


# Predicted for CUDA: a gathered bf16 element moves about 6 elements of memory traffic at 20% density, i.e. 3e-12 s at 4
# TB/s, against 3e14 multiply-adds a second. `make gpu` measures them.
DEFAULT_CROSSOVER: dict[tuple[str, torch.dtype], PackCrossover] = {
    ("cpu", torch.float32): PackCrossover(
        gather=16.0, crossover=0.77, min_elements=2**16, source="measured: AMD EPYC (AVX-512), 1 thread"
    ),
    ("cpu", torch.bfloat16): PackCrossover(
        gather=60.0, crossover=0.87, min_elements=2**18, source="measured: AMD EPYC (AVX-512), 1 thread"
    ),
    ("cuda", torch.float32): PackCrossover(
        gather=150.0, crossover=0.8, min_elements=2**20, source="predicted for an H200, not measured"
    ),
    ("cuda", torch.bfloat16): PackCrossover(
        gather=900.0, crossover=0.8, min_elements=2**22, source="predicted for an H200, not measured"
    ),
}


def default_crossover(device: torch.device | str, dtype: torch.dtype) -> PackCrossover:
    """The figures for a device type and dtype: those of float32 for wider dtypes, of bfloat16 for 16-bit ones."""
    kind = torch.device(device).type
    table_dtype = torch.bfloat16 if dtype.itemsize == 2 else torch.float32
    return DEFAULT_CROSSOVER[("cpu" if kind == "cpu" else "cuda", table_dtype)]


def pack_cost(layout: str, *, out_features: int, in_features: int, n_rows: int, n_cols: int, gather: float) -> float:
    """Predicted cost of a packed weight gradient over the dense one; 0 where nothing is open."""
    products = n_rows * n_cols if layout == "block" else n_rows * in_features + out_features * n_cols
    if products == 0:
        return 0.0
    return (products + gather * (n_rows + n_cols)) / (out_features * in_features)


def pack_layout(
    *,
    gate_kind: str,
    out_features: int,
    in_features: int,
    n_rows: int,
    n_cols: int,
    crossover: PackCrossover,
    check: bool = True,
) -> str:
    """ "dense", or the gate kind's packed layout ("block" for hard_concrete, "panels" for heaviside_ste) where that is
    cheaper.

    n_rows, n_cols: open rows and columns of the matrix (GQA columns counted once for each query head). Nothing open:
    packed (and empty), unless the matrix is small. check: as of `packed_weight_grad`.
    """
    if check:
        check_choice("gate_kind", gate_kind, tuple(PACKED_LAYOUT))
        check_int("n_rows", n_rows, 0, out_features + 1)
        check_int("n_cols", n_cols, 0, in_features + 1)
    if out_features * in_features < crossover.min_elements:
        return "dense"
    layout = PACKED_LAYOUT[gate_kind]
    cost = pack_cost(
        layout,
        out_features=out_features,
        in_features=in_features,
        n_rows=n_rows,
        n_cols=n_cols,
        gather=crossover.gather,
    )
    return layout if cost < crossover.crossover else "dense"


def packed_multiple(device: torch.device) -> int:
    """Panels' row length is a multiple of this: 8 elements (16 bytes in bf16) is what tensor-core GEMMs need to run at
    speed."""
    return 8 if device.type == "cuda" else 1
