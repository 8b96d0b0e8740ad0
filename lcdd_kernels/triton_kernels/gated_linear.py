"""W_eff straight from gate logits, and its gradients in one read of G and delta, in Triton.

    W_eff_ij  = base_ij + (r_i c_j) delta_ij                      r = gate(row logits), c = gate(column logits)
    d_delta_ij = (r_i c_j) G_ij,   d_r_i = sum_j c_j delta_ij G_ij,   d_c_j = sum_i r_i delta_ij G_ij

A program has ROWS x BLOCK_COLS of a matrix and goes down it BLOCK_ROWS at a time. It draws its ROWS row gates and
BLOCK_COLS column gates itself, once (Philox, no gate vector in memory), and picks rows out of them as it goes. Gate
gradients are reduced in two stages of fixed order: sums over the program's rows and columns into [P, out] and [P, in]
partials, then `gate_sums_kernel` over P (and, in GQA, over the query heads that share a gate). No atomics.
Products are rounded one by one (no fusion), so W_eff has the bits of every other backend for the same gates.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdd_kernels.reference.delta_step import GateMap
from lcdd_kernels.reference.gates import GateSpec
from lcdd_kernels.triton_kernels import AotSignature, LaunchConfig, launch, triton_dtype
from lcdd_kernels.triton_kernels.gate_sums import sum_gate_partials
from lcdd_kernels.triton_kernels.gates import KINDS, gate_value, signed64


@dataclass(frozen=True, kw_only=True)
class TileConfig(LaunchConfig):
    """A program's `rows` x `block_cols`, `block_rows` at a time; `aligned`: every row starts at a multiple of 16
    elements, so loads are vectors."""

    rows: int = 64
    block_rows: int
    block_cols: int = 256
    aligned: bool
    enable_fp_fusion: bool = False


WEIGHT_CONFIGS = {aligned: TileConfig(block_rows=8, aligned=aligned) for aligned in (True, False)}
GRAD_CONFIGS = {aligned: TileConfig(block_rows=4, aligned=aligned) for aligned in (True, False)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Runtime arguments that both tile kernels share. Logits are slices of a model's vector, so of any alignment.
_SCALAR_TYPES = {
    "n_rows": "i32",
    "n_cols": "i32",
    "seed": "i64",
    "step": "i64",
    "row_offset": "i64",
    "col_offset": "i64",
    "head_dim": "i32",
    "repeat": "i32",
}
_SCALARS = ["row_logits_ptr", "col_logits_ptr", *_SCALAR_TYPES]


@triton.jit
def _tile_gates(
    row_logits_ptr,
    col_logits_ptr,
    first_row,
    first_col,
    n_rows,
    n_cols,
    seed,
    step,
    row_offset,
    col_offset,
    head_dim,
    repeat,
    KIND: tl.constexpr,
    TRAINING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Gates of the rows and columns of a tile; outside the matrix they are arbitrary."""
    rows = first_row + tl.arange(0, ROWS)
    theta = tl.load(row_logits_ptr + rows, mask=rows < n_rows, other=0.0).to(tl.float32)
    r = gate_value(theta, row_offset + rows, seed, step, KIND, TRAINING)
    cols = first_col + tl.arange(0, BLOCK_COLS)
    # GQA: `repeat` groups of head_dim columns share head_dim gates. With repeat 1 this is cols.
    shared = (cols // (repeat * head_dim)) * head_dim + cols % head_dim
    theta = tl.load(col_logits_ptr + shared, mask=cols < n_cols, other=0.0).to(tl.float32)
    c = gate_value(theta, col_offset + shared, seed, step, KIND, TRAINING)
    return r, c


@triton.jit(do_not_specialize=_SCALARS)
def gated_linear_weight_kernel(
    base_ptr,
    delta_ptr,
    row_logits_ptr,
    col_logits_ptr,
    weight_ptr,
    n_rows: tl.int32,
    n_cols: tl.int32,
    seed: tl.int64,
    step: tl.int64,
    row_offset: tl.int64,
    col_offset: tl.int64,
    head_dim: tl.int32,
    repeat: tl.int32,
    KIND: tl.constexpr,
    TRAINING: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    if ALIGNED:
        n_cols = (n_cols // 16) * 16  # tells the compiler what the launcher checked
    first_row = tl.program_id(0) * ROWS
    first_col = tl.program_id(1) * BLOCK_COLS
    r_all, c = _tile_gates(
        row_logits_ptr,
        col_logits_ptr,
        first_row,
        first_col,
        n_rows,
        n_cols,
        tl.cast(seed, tl.int64),
        tl.cast(step, tl.int64),
        tl.cast(row_offset, tl.int64),
        tl.cast(col_offset, tl.int64),
        head_dim,
        repeat,
        KIND,
        TRAINING,
        ROWS,
        BLOCK_COLS,
    )
    cols = first_col + tl.arange(0, BLOCK_COLS)
    for start in range(0, ROWS, BLOCK_ROWS):
        local = start + tl.arange(0, BLOCK_ROWS)
        rows = first_row + local
        r = tl.gather(r_all, local, 0)
        inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        offset = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
        base = tl.load(base_ptr + offset, mask=inside)
        delta = tl.load(delta_ptr + offset, mask=inside).to(tl.float32)
        product = r[:, None] * c[None, :]
        moved = base.to(tl.float32) + product * delta
        kept = base.to(weight_ptr.dtype.element_ty)
        weight = tl.where(product == 0.0, kept, moved.to(weight_ptr.dtype.element_ty))
        tl.store(weight_ptr + offset, weight, mask=inside)


@triton.jit(do_not_specialize=_SCALARS)
def gated_linear_grad_kernel(
    grad_ptr,
    delta_ptr,
    row_logits_ptr,
    col_logits_ptr,
    d_delta_ptr,
    row_partial_ptr,
    col_partial_ptr,
    n_rows: tl.int32,
    n_cols: tl.int32,
    seed: tl.int64,
    step: tl.int64,
    row_offset: tl.int64,
    col_offset: tl.int64,
    head_dim: tl.int32,
    repeat: tl.int32,
    KIND: tl.constexpr,
    TRAINING: tl.constexpr,
    NEED_DELTA: tl.constexpr,
    NEED_GATES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    if ALIGNED:
        n_cols = (n_cols // 16) * 16
    first_row = tl.program_id(0) * ROWS
    first_col = tl.program_id(1) * BLOCK_COLS
    r_all, c = _tile_gates(
        row_logits_ptr,
        col_logits_ptr,
        first_row,
        first_col,
        n_rows,
        n_cols,
        tl.cast(seed, tl.int64),
        tl.cast(step, tl.int64),
        tl.cast(row_offset, tl.int64),
        tl.cast(col_offset, tl.int64),
        head_dim,
        repeat,
        KIND,
        TRAINING,
        ROWS,
        BLOCK_COLS,
    )
    cols = first_col + tl.arange(0, BLOCK_COLS)
    col_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, ROWS, BLOCK_ROWS):
        local = start + tl.arange(0, BLOCK_ROWS)
        rows = first_row + local
        r = tl.gather(r_all, local, 0)
        inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        offset = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if NEED_GATES:
            delta = tl.load(delta_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            moved = delta * grad
            col_sum += r[:, None] * moved
            row_sum = tl.sum(moved * c[None, :], 1)
            tl.store(row_partial_ptr + tl.program_id(1).to(tl.int64) * n_rows + rows, row_sum, mask=rows < n_rows)
        if NEED_DELTA:
            product = r[:, None] * c[None, :]
            d_delta = tl.where(product == 0.0, 0.0, product * grad)
            tl.store(d_delta_ptr + offset, d_delta.to(d_delta_ptr.dtype.element_ty), mask=inside)
    if NEED_GATES:
        partial = tl.program_id(0).to(tl.int64) * n_cols + cols
        tl.store(col_partial_ptr + partial, tl.sum(col_sum, 0), mask=cols < n_cols)


def _aligned(n_cols: int, *tensors: Tensor) -> bool:
    return n_cols % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)


def _scalars(spec: GateSpec, where: GateMap, rows: int, cols: int) -> dict[str, int]:
    """The runtime arguments that both tile kernels share."""
    return {
        "n_rows": rows,
        "n_cols": cols,
        "seed": signed64(spec.seed),
        "step": signed64(spec.step),
        "row_offset": where.row_start,
        "col_offset": where.col_start,
        "head_dim": where.head_dim,
        "repeat": where.repeat,
        "KIND": KINDS.index(spec.kind),
        "TRAINING": spec.training,
    }


def _tile(config: TileConfig) -> dict[str, int | bool]:
    return {
        "ALIGNED": config.aligned,
        "ROWS": config.rows,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLS": config.block_cols,
    }


def gated_weight_triton(
    weight_base: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    spec: GateSpec,
    where: GateMap,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`reference.gated_linear.gated_weight_ref`."""
    weight_base, delta = weight_base.contiguous(), delta.contiguous()
    rows, cols = weight_base.shape
    weight = torch.empty(rows, cols, dtype=dtype or weight_base.dtype, device=weight_base.device)
    config = WEIGHT_CONFIGS[_aligned(cols, weight_base, delta, weight)]
    launch(
        gated_linear_weight_kernel,
        (triton.cdiv(rows, config.rows), triton.cdiv(cols, config.block_cols)),
        config,
        base_ptr=weight_base,
        delta_ptr=delta,
        row_logits_ptr=row_logits.contiguous(),
        col_logits_ptr=col_logits.contiguous(),
        weight_ptr=weight,
        **_scalars(spec, where, rows, cols),
        **_tile(config),
    )
    return weight


def gated_weight_grad_triton(
    grad_weight: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    spec: GateSpec,
    where: GateMap,
    *,
    need_delta: bool,
    need_gates: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`reference.gated_linear.gated_weight_grad_ref`."""
    grad_weight, delta = grad_weight.contiguous(), delta.contiguous()
    rows, cols = grad_weight.shape
    same = grad_weight.dtype == delta.dtype
    d_delta = grad_weight if same or not need_delta else torch.empty_like(delta)
    config = GRAD_CONFIGS[_aligned(cols, grad_weight, delta, d_delta)]
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(cols, config.block_cols))
    row_partials = delta.new_empty((grid[1] if need_gates else 0, rows), dtype=torch.float32)
    col_partials = delta.new_empty((grid[0] if need_gates else 0, cols), dtype=torch.float32)
    launch(
        gated_linear_grad_kernel,
        grid,
        config,
        grad_ptr=grad_weight,
        delta_ptr=delta,
        row_logits_ptr=row_logits.contiguous(),
        col_logits_ptr=col_logits.contiguous(),
        d_delta_ptr=d_delta,
        row_partial_ptr=row_partials,
        col_partial_ptr=col_partials,
        NEED_DELTA=need_delta,
        NEED_GATES=need_gates,
        **_scalars(spec, where, rows, cols),
        **_tile(config),
    )
    if not need_gates:
        return d_delta, None, None
    d_row = sum_gate_partials(row_partials, rows, head_dim=rows, repeat=1)
    d_col = sum_gate_partials(col_partials, cols // where.repeat, head_dim=where.head_dim, repeat=where.repeat)
    return d_delta if need_delta else None, d_row, d_col


def aot_signatures() -> Iterator[AotSignature]:
    """Every configuration that the launchers can choose; the core is both kinds of gates in training, aligned."""
    flags = (True, False)
    for kind, training, aligned in itertools.product(range(len(KINDS)), flags, flags):
        gates = {"KIND": kind, "TRAINING": training}
        where = f"{KINDS[kind]} {'training' if training else 'eval'}{' aligned' if aligned else ''}"
        for base, delta, weight in itertools.product(DTYPES, DTYPES, DTYPES):
            b, d, w = map(triton_dtype, (base, delta, weight))
            config = WEIGHT_CONFIGS[aligned]
            yield AotSignature(
                kernel=gated_linear_weight_kernel,
                label=f"base {b} delta {d} weight {w} {where}",
                config=config,
                signature={
                    "base_ptr": f"*{b}",
                    "delta_ptr": f"*{d}",
                    "row_logits_ptr": "*fp32",
                    "col_logits_ptr": "*fp32",
                    "weight_ptr": f"*{w}",
                    **_SCALAR_TYPES,
                },
                constexprs={**gates, **_tile(config)},
                divisible_by_16=("base_ptr", "delta_ptr", "weight_ptr") if aligned else (),
                loop_barriers=2,
                core=training and aligned and base == weight and delta in (base, torch.float32),
            )
        for grad, delta, (need_delta, need_gates) in itertools.product(
            DTYPES, DTYPES, ((True, True), (True, False), (False, True))
        ):
            g, d = map(triton_dtype, (grad, delta))
            out = d if need_delta else g
            needs = " ".join(n for n, need in (("d_delta", need_delta), ("d_gates", need_gates)) if need)
            config = GRAD_CONFIGS[aligned]
            yield AotSignature(
                kernel=gated_linear_grad_kernel,
                label=f"G {g} delta {d} {needs} {where}",
                config=config,
                signature={
                    "grad_ptr": f"*{g}",
                    "delta_ptr": f"*{d}",
                    "row_logits_ptr": "*fp32",
                    "col_logits_ptr": "*fp32",
                    "d_delta_ptr": f"*{out}",
                    "row_partial_ptr": "*fp32",
                    "col_partial_ptr": "*fp32",
                    **_SCALAR_TYPES,
                },
                constexprs={**gates, "NEED_DELTA": need_delta, "NEED_GATES": need_gates, **_tile(config)},
                divisible_by_16=("grad_ptr", "delta_ptr", "d_delta_ptr", "row_partial_ptr", "col_partial_ptr")
                if aligned
                else (),
                loop_barriers=6,
                core=training and aligned and need_delta and need_gates and delta in (grad, torch.float32),
            )
