"""The forward route's kernels in Triton: the gates of a block, W_eff of its matrices, and their gradients in one read.

    gate       = gate(logits), vector after vector                r, c: those of a matrix's rows and columns
    W_eff_ij   = base_ij + (r_i c_j) delta_ij
    d_delta_ij = (r_i c_j) G_ij,   d_r_i = sum_j c_j delta_ij G_ij,   d_c_j = sum_i r_i delta_ij G_ij

Gates are drawn once, by one launch for all vectors of a block. One launch more forms the W_eff of all its matrices: the
optimizer route's refresh (`delta_step_kernels.weight_eff_fwd_kernel`), driven by a table, so that both routes have the
same bits. In the gradient's loop every thread sums for itself, as in pass A; gate gradients are reduced in two stages
of fixed order: sums over the rows and columns of a program into [P, out] and [P, in] partials, then `gate_sums_kernel`
over P (and, in GQA, the query heads that share a gate). No atomics.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdd_kernels.reference.delta_step import GateMap
from lcdd_kernels.reference.gates import GateSpec
from lcdd_kernels.triton_kernels import AotSignature, LaunchConfig, launch, triton_dtype
from lcdd_kernels.triton_kernels import delta_step_kernels as fields
from lcdd_kernels.triton_kernels.delta_step import REFRESH
from lcdd_kernels.triton_kernels.delta_step_kernels import per_lane, weight_eff_fwd_kernel
from lcdd_kernels.triton_kernels.gate_sums import sum_gate_partials
from lcdd_kernels.triton_kernels.gates import CONFIG as GATES
from lcdd_kernels.triton_kernels.gates import KINDS, gate_value, signed64
from lcdd_kernels.triton_kernels.tables import TableCache


@dataclass(frozen=True, kw_only=True)
class GradConfig(LaunchConfig):
    """A program's `rows` x `block_cols`, `block_rows` at a time; `aligned`: every row starts at a multiple of 16
    elements, so loads are vectors."""

    rows: int = 64
    block_rows: int = 8
    block_cols: int = 128
    aligned: bool
    enable_fp_fusion: bool = False


GRAD_CONFIGS = {aligned: GradConfig(aligned=aligned) for aligned in (True, False)}
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
VECTORS = 4  # of logits that a block has, at most
_SIZES = [f"n_{i}" for i in range(VECTORS)]
_OFFSETS = [f"offset_{i}" for i in range(VECTORS)]
_GRAD_SCALARS = ["n_rows", "n_cols", "row_start", "col_start", "head_dim", "repeat"]
_tables = TableCache(size=256)  # one for every block of a model


@triton.jit(do_not_specialize=["logits_0", "logits_1", "logits_2", "logits_3", *_SIZES, *_OFFSETS, "seed", "step"])
def block_gates_kernel(
    logits_0,
    logits_1,
    logits_2,
    logits_3,
    gate_ptr,
    n_0: tl.int32,
    n_1: tl.int32,
    n_2: tl.int32,
    n_3: tl.int32,
    offset_0: tl.int64,
    offset_1: tl.int64,
    offset_2: tl.int64,
    offset_3: tl.int64,
    seed: tl.int64,
    step: tl.int64,
    KIND: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs (block of gates, vector); gates of vector v lie behind those of the vectors before it."""
    v = tl.program_id(1)
    later = tl.where(v == 2, logits_2.to(tl.int64), logits_3.to(tl.int64))
    at = tl.where(v == 0, logits_0.to(tl.int64), tl.where(v == 1, logits_1.to(tl.int64), later))
    n = tl.where(v == 0, n_0, tl.where(v == 1, n_1, tl.where(v == 2, n_2, n_3)))
    place = tl.where(v == 2, tl.cast(offset_2, tl.int64), tl.cast(offset_3, tl.int64))
    place = tl.where(v == 0, tl.cast(offset_0, tl.int64), tl.where(v == 1, tl.cast(offset_1, tl.int64), place))
    first = tl.where(v > 0, n_0, 0) + tl.where(v > 1, n_1, 0) + tl.where(v > 2, n_2, 0)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    theta = tl.load(at.to(tl.pointer_type(tl.float32)) + index, mask=index < n, other=0.0)
    z = gate_value(theta, place + index, tl.cast(seed, tl.int64), tl.cast(step, tl.int64), KIND, TRAINING)
    tl.store(gate_ptr + first + index, z, mask=index < n)


@triton.jit(do_not_specialize=["gate_ptr", *_GRAD_SCALARS])
def gated_linear_grad_kernel(
    grad_ptr,
    delta_ptr,
    gate_ptr,
    d_delta_ptr,
    row_partial_ptr,
    col_partial_ptr,
    n_rows: tl.int32,
    n_cols: tl.int32,
    row_start: tl.int32,
    col_start: tl.int32,
    head_dim: tl.int32,
    repeat: tl.int32,
    NEED_DELTA: tl.constexpr,
    NEED_GATES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    if ALIGNED:
        n_cols = (n_cols // 16) * 16  # tells the compiler what the launcher checked
    first_row = tl.program_id(0) * ROWS
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    # GQA: `repeat` groups of head_dim columns share head_dim gates. With repeat 1 this is cols.
    shared = (cols // (repeat * head_dim)) * head_dim + cols % head_dim
    c = tl.load(gate_ptr + col_start + shared, mask=cols < n_cols, other=0.0)
    STEPS: tl.constexpr = ROWS // BLOCK_ROWS
    col_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    row_sums = tl.zeros((BLOCK_ROWS, 32, STEPS), tl.float32)
    for step in range(min(STEPS, tl.cdiv(n_rows - first_row, BLOCK_ROWS))):
        rows = first_row + step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        r = tl.load(gate_ptr + row_start + rows, mask=rows < n_rows, other=0.0)
        inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        offset = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
        if grad_ptr.dtype.element_ty.primitive_bitwidth != delta_ptr.dtype.element_ty.primitive_bitwidth:
            offset = tl.max_contiguous(offset, (1, 4))  # vectors alike: or their layouts meet in shared memory
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if NEED_GATES:
            delta = tl.load(delta_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            moved = delta * grad
            col_sum += r[:, None] * moved
            row_sum = per_lane(moved * c[None, :])
            row_sums = tl.where(tl.arange(0, STEPS)[None, None, :] == step, row_sum[:, :, None], row_sums)
        if NEED_DELTA:
            product = r[:, None] * c[None, :]
            d_delta = tl.where(product == 0.0, 0.0, product * grad)
            tl.store(d_delta_ptr + offset, d_delta.to(d_delta_ptr.dtype.element_ty), mask=inside)
    if NEED_GATES:
        partial = tl.program_id(0).to(tl.int64) * n_cols + cols
        tl.store(col_partial_ptr + partial, tl.sum(col_sum, 0), mask=cols < n_cols)
        row = first_row + tl.arange(0, STEPS)[None, :] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        row_partial = tl.program_id(1).to(tl.int64) * n_rows + row
        tl.store(row_partial_ptr + row_partial, tl.sum(row_sums, axis=1), mask=row < n_rows)


def block_gates_triton(logits: Sequence[Tensor], offsets: Sequence[int], spec: GateSpec) -> Tensor:
    """`reference.gated_linear.block_gates_ref`; at most VECTORS vectors, float32."""
    if not 0 < len(logits) <= VECTORS or any(part.dtype != torch.float32 for part in logits):
        raise ValueError(f"logits: expected 1 to {VECTORS} float32 vectors (triton backend), got {len(logits)}")
    vectors, sizes = [part.contiguous() for part in logits], [part.numel() for part in logits]
    gate = torch.empty(sum(sizes), dtype=torch.float32, device=logits[0].device)
    missing = VECTORS - len(logits)
    vectors, sizes, places = vectors + vectors[:1] * missing, sizes + [0] * missing, [*offsets, *[0] * missing]
    launch(
        block_gates_kernel,
        (triton.cdiv(max(sizes), GATES.block), len(logits)),
        GATES,
        **{f"logits_{i}": vector for i, vector in enumerate(vectors)},
        gate_ptr=gate,
        **dict(zip(_SIZES, sizes, strict=True)),
        **dict(zip(_OFFSETS, places, strict=True)),
        seed=signed64(spec.seed),
        step=signed64(spec.step),
        KIND=KINDS.index(spec.kind),
        TRAINING=spec.training,
        BLOCK=GATES.block,
    )
    return gate


def gated_weights_triton(
    bases: Sequence[Tensor],
    deltas: Sequence[Tensor],
    gate: Tensor,
    maps: Sequence[GateMap],
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`reference.gated_linear.gated_weights_ref`: one launch, where the bases share a dtype and the deltas, too."""
    bases, deltas = [base.contiguous() for base in bases], [delta.contiguous() for delta in deltas]
    weights = [torch.empty_like(base, dtype=dtype or base.dtype) for base in bases]
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for m, (base, delta) in enumerate(zip(bases, deltas, strict=True)):
        groups.setdefault((base.dtype, delta.dtype), []).append(m)
    for (base_dtype, delta_dtype), members in groups.items():
        matrices = [(weights[m], bases[m], deltas[m], maps[m]) for m in members]
        table, tiles = _table(matrices, gate.device)
        launch(
            weight_eff_fwd_kernel,
            (tiles,),
            REFRESH,
            table_ptr=table,
            order_ptr=table[len(members) * fields.FIELDS.value :],
            count=len(members),
            gate_ptr=gate,
            differ_ptr=None,
            WEIGHT=DTYPES[weights[members[0]].dtype],
            BASE=DTYPES[base_dtype],
            DELTA=DTYPES[delta_dtype],
            ALIGNED=all(_aligned(w.shape[1], w, base, delta) for w, base, delta, _ in matrices),
            **REFRESH.constexprs(),
        )
    return weights


def _table(matrices: Sequence[tuple[Tensor, Tensor, Tensor, GateMap]], device: torch.device) -> tuple[Tensor, int]:
    """Of (weight, base, delta, map): entries and order one after the other on the device, and their tiles."""
    entries: list[int] = []
    order: list[int] = []
    tiles = 0
    for m, (weight, base, delta, where) in enumerate(matrices):
        geometry = (*weight.shape, where.row_start, where.col_start, where.head_dim, where.repeat)
        entries += [weight.data_ptr(), base.data_ptr(), delta.data_ptr(), 0, 0, *geometry, 0, 0, 0]
        order += [m, 0, tiles, 0, 0, 0]
        tiles += REFRESH.tiles(weight.shape)
    rows = (*entries, *order)
    return _tables.get(rows, lambda: torch.tensor(rows, dtype=torch.int64, device="cpu"), device), tiles


def _aligned(n_cols: int, *tensors: Tensor) -> bool:
    return n_cols % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)


def gated_weight_grad_triton(
    grad_weight: Tensor,
    delta: Tensor,
    gate: Tensor,
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
        gate_ptr=gate,
        d_delta_ptr=d_delta,
        row_partial_ptr=row_partials,
        col_partial_ptr=col_partials,
        n_rows=rows,
        n_cols=cols,
        row_start=where.row_start,
        col_start=where.col_start,
        head_dim=where.head_dim,
        repeat=where.repeat,
        NEED_DELTA=need_delta,
        NEED_GATES=need_gates,
        **_tile(config),
    )
    if not need_gates:
        return d_delta, None, None
    d_row = sum_gate_partials(row_partials, rows, head_dim=rows, repeat=1)
    d_col = sum_gate_partials(col_partials, cols // where.repeat, head_dim=where.head_dim, repeat=where.repeat)
    return d_delta if need_delta else None, d_row, d_col


def _tile(config: GradConfig) -> dict[str, int | bool]:
    return {
        "ALIGNED": config.aligned,
        "ROWS": config.rows,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLS": config.block_cols,
    }


def aot_signatures() -> Iterator[AotSignature]:
    """Every configuration that the launchers can choose, but for W_eff in the base's dtype, which `delta_step` lists.

    The core: both kinds of gates, and what is trained: 16-bit or float32 matrices, and float32 ones under autocast.
    """
    flags = (True, False)
    for kind, training in itertools.product(range(len(KINDS)), flags):
        vectors = {f"logits_{i}": "*fp32" for i in range(VECTORS)}
        scalars = {**dict.fromkeys(_SIZES, "i32"), **dict.fromkeys([*_OFFSETS, "seed", "step"], "i64")}
        yield AotSignature(
            kernel=block_gates_kernel,
            label=f"{KINDS[kind]} {'training' if training else 'eval'}",
            config=GATES,
            signature={**vectors, "gate_ptr": "*fp32", **scalars},
            constexprs={"KIND": kind, "TRAINING": training, "BLOCK": GATES.block},
            divisible_by_16=("gate_ptr",),
        )
    pointers = {"table_ptr": "*i64", "order_ptr": "*i64", "gate_ptr": "*fp32"}
    for weight, base, delta, aligned in itertools.product(DTYPES, DTYPES, DTYPES, flags):
        if weight == base:
            continue
        w, b, d = map(triton_dtype, (weight, base, delta))
        dtypes = {"WEIGHT": DTYPES[weight], "BASE": DTYPES[base], "DELTA": DTYPES[delta]}
        yield AotSignature(
            kernel=weight_eff_fwd_kernel,
            label=f"W {w} base {b} D {d}{' aligned' if aligned else ''}",
            config=REFRESH,
            signature={**pointers, "count": "i32"},
            constexprs={**dtypes, "ALIGNED": aligned, "differ_ptr": None, **REFRESH.constexprs()},
            divisible_by_16=tuple(pointers),
            core=aligned and base == delta == torch.float32,
        )
    for grad, delta, needs, aligned in itertools.product(
        DTYPES, DTYPES, ((True, True), (True, False), (False, True)), flags
    ):
        g, d = map(triton_dtype, (grad, delta))
        need_delta, need_gates = needs
        named = " ".join(n for n, need in (("d_delta", need_delta), ("d_gates", need_gates)) if need)
        config = GRAD_CONFIGS[aligned]
        matrices = {"grad_ptr": f"*{g}", "delta_ptr": f"*{d}", "d_delta_ptr": f"*{d if need_delta else g}"}
        partials = {"row_partial_ptr": "*fp32", "col_partial_ptr": "*fp32"}
        yield AotSignature(
            kernel=gated_linear_grad_kernel,
            label=f"G {g} delta {d} {named}{' aligned' if aligned else ''}",
            config=config,
            signature={**matrices, **partials, "gate_ptr": "*fp32", **dict.fromkeys(_GRAD_SCALARS, "i32")},
            constexprs={"NEED_DELTA": need_delta, "NEED_GATES": need_gates, **_tile(config)},
            divisible_by_16=(*matrices, *partials) if aligned else (),
            core=need_delta and need_gates and delta in (grad, torch.float32),
        )
