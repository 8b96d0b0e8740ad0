"""Device code of passes A and B and of the refresh; formulas in `delta_step`, which launches it.

A matrix is an entry of a table: pointers and geometry as int64, in the columns named here. A launch's grid is all tiles
of all matrices of a group, one after the other: a program finds its matrix in the order (`_find`).
"""

import triton
import triton.language as tl

from lcdd_kernels.reference.delta_step import BLOCK, DENSE, PANELS

# Columns of the matrix table. Globals that kernels read must be constexpr; the host uses their `.value`.
WEIGHT_PTR: tl.constexpr = tl.constexpr(0)
BASE_PTR: tl.constexpr = tl.constexpr(1)
DELTA_PTR: tl.constexpr = tl.constexpr(2)
AVG_PTR: tl.constexpr = tl.constexpr(3)
AVG_SQ_PTR: tl.constexpr = tl.constexpr(4)
N_ROWS: tl.constexpr = tl.constexpr(5)
N_COLS: tl.constexpr = tl.constexpr(6)
ROW_START: tl.constexpr = tl.constexpr(7)
COL_START: tl.constexpr = tl.constexpr(8)
HEAD_DIM: tl.constexpr = tl.constexpr(9)
REPEAT: tl.constexpr = tl.constexpr(10)
ROW_PARTIALS: tl.constexpr = tl.constexpr(11)  # places in the arenas of partial sums
COL_PARTIALS: tl.constexpr = tl.constexpr(12)
SQ_PARTIALS: tl.constexpr = tl.constexpr(13)
FIELDS: tl.constexpr = tl.constexpr(14)  # even: every entry starts on 16 bytes

# Columns of the order: which matrix, where its tiles begin among its group's, and its gradient.
MATRIX: tl.constexpr = tl.constexpr(0)
FIRST_TILE_A: tl.constexpr = tl.constexpr(1)
FIRST_TILE_B: tl.constexpr = tl.constexpr(2)
GRAD_PTR: tl.constexpr = tl.constexpr(3)  # dense gradient, packed block, or rows panel
GRAD_COLS_PTR: tl.constexpr = tl.constexpr(4)  # columns panel
OPEN_PER_COPY: tl.constexpr = tl.constexpr(5)  # packed columns / REPEAT
ORDER: tl.constexpr = tl.constexpr(6)

_DENSE: tl.constexpr = tl.constexpr(DENSE)
_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_PANELS: tl.constexpr = tl.constexpr(PANELS)

# A gather has no neighbours, from which Triton 3.6 concludes that lanes may run down its columns: scattered loads, and
# every tile through shared memory. It is promised two along the row, which only decides the order: a load stays one
# element wide, since neither the gradient's alignment nor a mask by column allows more (`test_aot` looks at it).
_GATHERED: tl.constexpr = tl.constexpr(2)


# ---------------------------------------------------------------- device functions
@triton.jit
def _find(order_ptr, count, FIRST_TILE: tl.constexpr):
    """This program's row of the order, and its tile within that matrix: the last one that begins at or before it."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(order_ptr + middle * ORDER + FIRST_TILE) <= tl.program_id(0)
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    place = order_ptr + low * ORDER
    return place, tl.program_id(0) - tl.load(place + FIRST_TILE).to(tl.int32)


@triton.jit
def _field(entry, FIELD: tl.constexpr):
    return tl.load(entry + FIELD)


@triton.jit
def _matrix(entry, TENSOR: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to one tensor of the matrix; ALIGNED: a multiple of 16 bytes."""
    pointer = tl.load(entry + TENSOR).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _n_cols(entry, ALIGNED: tl.constexpr):
    n_cols = tl.load(entry + N_COLS).to(tl.int32)
    if ALIGNED:
        n_cols = tl.multiple_of(n_cols, 16)
    return n_cols


@triton.jit
def _col_gate_index(entry, cols):
    """Position of each column's gate in the model's gate vector (int64)."""
    head_dim = _field(entry, HEAD_DIM).to(tl.int32)
    repeat = _field(entry, REPEAT).to(tl.int32)
    local = (cols // (repeat * head_dim)) * head_dim + cols % head_dim
    return _field(entry, COL_START) + local


@triton.jit
def _packed_col(place, entry, cols, rank):
    """Position of an open column in the packed order: copy-major for GQA."""
    head_dim = _field(entry, HEAD_DIM).to(tl.int32)
    repeat = _field(entry, REPEAT).to(tl.int32)
    copy = (cols // head_dim) % repeat
    return copy.to(tl.int64) * _field(place, OPEN_PER_COPY) + rank


@triton.jit
def _weight_eff(base, delta, gates, WEIGHT: tl.constexpr):
    """base + gates*delta in dtype WEIGHT, every operation rounded; base's own bits where `gates` (r*c) is zero."""
    total = base.to(tl.float32) + gates * delta.to(tl.float32)
    return tl.where(gates == 0.0, base.to(WEIGHT), total.to(WEIGHT))


# ---------------------------------------------------------------- kernels
@triton.jit(do_not_specialize=["count"])
def weight_eff_fwd_kernel(
    table_ptr,
    order_ptr,
    count: tl.int32,
    gate_ptr,
    differ_ptr,
    WEIGHT: tl.constexpr,
    BASE: tl.constexpr,
    DELTA: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Refresh of W_eff; or, where there is a differ_ptr, how many entries of a tile are not what it would write."""
    place, tile = _find(order_ptr, count, FIRST_TILE_B)
    entry = table_ptr + _field(place, MATRIX) * FIELDS
    n_rows = _field(entry, N_ROWS).to(tl.int32)
    n_cols = _n_cols(entry, ALIGNED)
    tiles_n = tl.cdiv(n_cols, BLOCK_N)
    first_row = (tile // tiles_n) * ROWS
    cols = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_in = cols < n_cols
    col_gate = tl.load(gate_ptr + _col_gate_index(entry, cols), mask=col_in, other=0.0)
    weight_ptr = _matrix(entry, WEIGHT_PTR, WEIGHT, ALIGNED)
    base_ptr = _matrix(entry, BASE_PTR, BASE, ALIGNED)
    delta_ptr = _matrix(entry, DELTA_PTR, DELTA, ALIGNED)
    row_gate_ptr = gate_ptr + _field(entry, ROW_START)
    if differ_ptr is not None:
        differs = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(first_row, min(first_row + ROWS, n_rows), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_in = rows < n_rows
        row64 = rows.to(tl.int64)[:, None]
        inside = row_in[:, None] & col_in[None, :]
        row_gate = tl.load(row_gate_ptr + rows, mask=row_in, other=0.0)
        at = row64 * n_cols + cols[None, :]
        if (
            WEIGHT.primitive_bitwidth != BASE.primitive_bitwidth
            or WEIGHT.primitive_bitwidth != DELTA.primitive_bitwidth
        ):
            at = tl.max_contiguous(at, (1, 4))  # vectors alike: or their layouts meet in shared memory
        base = tl.load(base_ptr + at, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        weight = _weight_eff(base, delta, row_gate[:, None] * col_gate[None, :], WEIGHT)
        if differ_ptr is None:
            tl.store(weight_ptr + at, weight, mask=inside)
        else:
            found = tl.load(weight_ptr + at, mask=inside, other=0.0)
            differs += (inside & (found != weight)).to(tl.int32)
    if differ_ptr is not None:
        tl.store(differ_ptr + tile, tl.sum(tl.sum(differs, axis=1), axis=0))


@triton.jit
def per_lane(values):
    """Sums of neighbours, which one thread holds: [BLOCK_M, BLOCK_N] -> [BLOCK_M, 32]."""
    sums = tl.reshape(values, [values.shape[0], 32, values.shape[1] // 32])
    return tl.sum(sums, axis=2)


@triton.jit(do_not_specialize=["count"])
def delta_grad_stats_kernel(
    table_ptr,
    order_ptr,
    count: tl.int32,
    gate_ptr,
    rank_ptr,
    partial_ptr,
    sq_partial_ptr,
    DELTA: tl.constexpr,
    GRAD: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pass A, first stage: per tile, one partial sum for each of its rows and columns, and one of the squared norm.

    Inside the loop every thread sums for itself; the threads meet after it. A warp has whole rows (BLOCK_N is 32 lanes
    of a few columns each), and keeps the sums of every step's rows apart, in `row_sums`.
    """
    place, tile = _find(order_ptr, count, FIRST_TILE_A)
    entry = table_ptr + _field(place, MATRIX) * FIELDS
    n_rows = _field(entry, N_ROWS).to(tl.int32)
    n_cols = _n_cols(entry, ALIGNED)
    tiles_n = tl.cdiv(n_cols, BLOCK_N)
    tile_m = tile // tiles_n
    tile_n = tile % tiles_n
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_in = cols < n_cols
    col_gate_index = _col_gate_index(entry, cols)
    col_gate = tl.load(gate_ptr + col_gate_index, mask=col_in, other=0.0)
    delta_ptr = _matrix(entry, DELTA_PTR, DELTA, ALIGNED)
    # A packed gradient is gathered: its own alignment says nothing.
    grad_ptr = _matrix(place, GRAD_PTR, GRAD, ALIGNED and LAYOUT != _BLOCK)
    row_start = _field(entry, ROW_START)
    if LAYOUT != _DENSE:
        col_rank = tl.load(rank_ptr + col_gate_index, mask=col_in, other=-1)
        packed_col = _packed_col(place, entry, cols, col_rank)
        n_packed = _field(place, OPEN_PER_COPY) * _field(entry, REPEAT)
        col_open = col_rank >= 0
    if LAYOUT == _PANELS:
        grad_cols_ptr = _matrix(place, GRAD_COLS_PTR, GRAD, False)
    STEPS: tl.constexpr = ROWS // BLOCK_M
    col_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sq_sum = tl.zeros([BLOCK_M, 32], tl.float32)
    row_sums = tl.zeros([BLOCK_M, 32, STEPS], tl.float32)
    first_row = tile_m * ROWS
    for step in range(min(STEPS, tl.cdiv(n_rows - first_row, BLOCK_M))):
        rows = first_row + step * BLOCK_M + tl.arange(0, BLOCK_M)
        row_in = rows < n_rows
        row64 = rows.to(tl.int64)[:, None]
        inside = row_in[:, None] & col_in[None, :]
        row_gate = tl.load(gate_ptr + row_start + rows, mask=row_in, other=0.0)
        if LAYOUT == _DENSE:
            needed = inside
            grad = tl.load(grad_ptr + row64 * n_cols + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            for_rows = grad
        else:
            row_rank = tl.load(rank_ptr + row_start + rows, mask=row_in, other=-1)
            packed_row = row_rank.to(tl.int64)[:, None]
            row_open = (row_rank >= 0)[:, None]
            if LAYOUT == _BLOCK:
                needed = inside & row_open & col_open[None, :]
                block_at = tl.max_contiguous(packed_row * n_packed + packed_col[None, :], (1, _GATHERED))
                grad = tl.load(grad_ptr + block_at, mask=needed, other=0.0).to(tl.float32)
                for_rows = grad
            else:
                needed = inside & (row_open | col_open[None, :])
                rows_at = grad_ptr + packed_row * n_cols + cols[None, :]
                grad = tl.load(rows_at, mask=inside & row_open, other=0.0).to(tl.float32)
                cols_at = tl.max_contiguous(row64 * n_packed + packed_col[None, :], (1, _GATHERED))
                for_rows = tl.load(grad_cols_ptr + cols_at, mask=inside & col_open[None, :], other=0.0).to(tl.float32)
        delta = tl.load(delta_ptr + row64 * n_cols + cols[None, :], mask=needed, other=0.0).to(tl.float32)
        row_sum = per_lane(col_gate[None, :] * (delta * for_rows))
        this_step = tl.arange(0, STEPS)[None, None, :] == step
        row_sums = tl.where(this_step, row_sum[:, :, None], row_sums)
        col_sum += row_gate[:, None] * (delta * grad)
        d_delta = (row_gate[:, None] * col_gate[None, :]) * grad
        sq_sum += per_lane(d_delta * d_delta)
    col_partial_ptr = partial_ptr + _field(entry, COL_PARTIALS) + tile_m.to(tl.int64) * n_cols
    tl.store(col_partial_ptr + cols, tl.sum(col_sum, axis=0), mask=col_in)
    row_partial_ptr = partial_ptr + _field(entry, ROW_PARTIALS) + tile_n.to(tl.int64) * n_rows
    row = first_row + tl.arange(0, STEPS)[None, :] * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    tl.store(row_partial_ptr + row, tl.sum(row_sums, axis=1), mask=row < n_rows)
    sq = tl.sum(tl.sum(sq_sum, axis=1), axis=0)
    tl.store(sq_partial_ptr + _field(entry, SQ_PARTIALS) + tile, sq)


@triton.jit
def gate_gather_kernel(
    blocks_ptr, uses_ptr, partial_ptr, d_gate_ptr, BLOCK_GATES: tl.constexpr, BLOCK_TILES: tl.constexpr
):
    """Pass A, second stage: d_gate of BLOCK_GATES gates, over every matrix side that uses them, in a fixed order.

    blocks [n, 4]: first gate, end gate, first use, end use.
    uses [u, 6]: offset of the partial sums, how many, the distance between two of them, the gate of the side's first
    row or column, head_dim, repeat (1 for rows).
    """
    block = blocks_ptr + tl.program_id(0) * 4
    gates = tl.load(block) + tl.arange(0, BLOCK_GATES)
    inside = gates < tl.load(block + 1)
    total = tl.zeros([BLOCK_TILES, BLOCK_GATES], tl.float32)
    for use in range(tl.load(block + 2), tl.load(block + 3)):
        entry = uses_ptr + use * 6
        base = tl.load(entry)
        n_tiles = tl.load(entry + 1).to(tl.int32)
        distance = tl.load(entry + 2)
        local = gates - tl.load(entry + 3)
        head_dim = tl.load(entry + 4)
        repeat = tl.load(entry + 5)
        first = (local // head_dim) * (head_dim * repeat) + local % head_dim
        for copy in range(repeat.to(tl.int32)):
            place = base + first + copy * head_dim
            for start in range(0, n_tiles, BLOCK_TILES):
                tiles = start + tl.arange(0, BLOCK_TILES)
                pointers = partial_ptr + tiles.to(tl.int64)[:, None] * distance + place[None, :]
                some = (tiles < n_tiles)[:, None] & inside[None, :]
                total += tl.load(pointers, mask=some, other=0.0)
    tl.store(d_gate_ptr + gates, tl.sum(total, axis=0), mask=inside)


@triton.jit(
    do_not_specialize=[
        "count",
        "decay",
        "one_minus_beta1",
        "beta2",
        "one_minus_beta2",
        "step_size",
        "inverse_root_bias2",
        "eps",
    ]
)
def delta_adamw_kernel(
    table_ptr,
    order_ptr,
    count: tl.int32,
    gate_old_ptr,
    gate_new_ptr,
    rank_ptr,
    decay: tl.float32,
    one_minus_beta1: tl.float32,
    beta2: tl.float32,
    one_minus_beta2: tl.float32,
    step_size: tl.float32,
    inverse_root_bias2: tl.float32,
    eps: tl.float32,
    scale_ptr,
    WEIGHT: tl.constexpr,
    DELTA: tl.constexpr,
    MOMENT: tl.constexpr,
    GRAD: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pass B: AdamW on delta, gradient formed on the fly, and the next W_eff; nothing at all where scale is NaN."""
    scale = tl.load(scale_ptr)
    place, tile = _find(order_ptr, count, FIRST_TILE_B)
    entry = table_ptr + _field(place, MATRIX) * FIELDS
    n_rows = _field(entry, N_ROWS).to(tl.int32)
    n_cols = _n_cols(entry, ALIGNED)
    tiles_n = tl.cdiv(n_cols, BLOCK_N)
    first_row = (tile // tiles_n) * ROWS
    cols = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_in = cols < n_cols
    col_gate_index = _col_gate_index(entry, cols)
    col_old = tl.load(gate_old_ptr + col_gate_index, mask=col_in, other=0.0)
    col_new = tl.load(gate_new_ptr + col_gate_index, mask=col_in, other=0.0)
    weight_ptr = _matrix(entry, WEIGHT_PTR, WEIGHT, ALIGNED)
    base_ptr = _matrix(entry, BASE_PTR, WEIGHT, ALIGNED)
    delta_ptr = _matrix(entry, DELTA_PTR, DELTA, ALIGNED)
    avg_ptr = _matrix(entry, AVG_PTR, MOMENT, ALIGNED)
    sq_ptr = _matrix(entry, AVG_SQ_PTR, MOMENT, ALIGNED)
    grad_ptr = _matrix(place, GRAD_PTR, GRAD, ALIGNED and LAYOUT != _BLOCK)
    row_start = _field(entry, ROW_START)
    if LAYOUT != _DENSE:
        col_rank = tl.load(rank_ptr + col_gate_index, mask=col_in, other=-1)
        packed_col = _packed_col(place, entry, cols, col_rank)
        n_packed = _field(place, OPEN_PER_COPY) * _field(entry, REPEAT)
    end = tl.where(scale >= 0.0, min(first_row + ROWS, n_rows), first_row)
    for start in range(first_row, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_in = rows < n_rows
        row64 = rows.to(tl.int64)[:, None]
        inside = row_in[:, None] & col_in[None, :]
        row_old = tl.load(gate_old_ptr + row_start + rows, mask=row_in, other=0.0)
        row_new = tl.load(gate_new_ptr + row_start + rows, mask=row_in, other=0.0)
        if LAYOUT == _DENSE:
            grad = tl.load(grad_ptr + row64 * n_cols + cols[None, :], mask=inside, other=0.0)
        else:
            row_rank = tl.load(rank_ptr + row_start + rows, mask=row_in, other=-1)
            needed = inside & (row_rank >= 0)[:, None] & (col_rank >= 0)[None, :]
            packed_row = row_rank.to(tl.int64)[:, None]
            if LAYOUT == _BLOCK:
                block_at = tl.max_contiguous(packed_row * n_packed + packed_col[None, :], (1, _GATHERED))
                grad = tl.load(grad_ptr + block_at, mask=needed, other=0.0)
            else:
                grad = tl.load(grad_ptr + packed_row * n_cols + cols[None, :], mask=needed, other=0.0)
        gradient = ((row_old[:, None] * col_old[None, :]) * scale) * grad.to(tl.float32)

        delta_at = delta_ptr + row64 * n_cols + cols[None, :]
        avg_at = avg_ptr + row64 * n_cols + cols[None, :]
        sq_at = sq_ptr + row64 * n_cols + cols[None, :]
        delta = tl.load(delta_at, mask=inside, other=0.0).to(tl.float32)
        avg = tl.load(avg_at, mask=inside, other=0.0).to(tl.float32)
        sq = tl.load(sq_at, mask=inside, other=0.0).to(tl.float32)
        avg = avg + (gradient - avg) * one_minus_beta1
        sq = sq * beta2 + (one_minus_beta2 * gradient) * gradient
        denominator = tl.sqrt_rn(sq) * inverse_root_bias2 + eps
        delta = decay * delta - step_size * tl.div_rn(avg, denominator)
        stored = delta.to(DELTA)
        tl.store(avg_at, avg.to(MOMENT), mask=inside)
        tl.store(sq_at, sq.to(MOMENT), mask=inside)
        tl.store(delta_at, stored, mask=inside)

        base = tl.load(base_ptr + row64 * n_cols + cols[None, :], mask=inside, other=0.0)
        weight = _weight_eff(base, stored, row_new[:, None] * col_new[None, :], WEIGHT)
        tl.store(weight_ptr + row64 * n_cols + cols[None, :], weight, mask=inside)
