"""Host side of `delta_step`: the table of matrices, their groups, and the geometry of pass A's partial sums."""

import functools
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lcdd_kernels.reference.delta_step import BLOCK, DENSE, PANELS
from lcdd_kernels.triton_kernels import LaunchConfig, upload
from lcdd_kernels.triton_kernels import delta_step_kernels as fields


@dataclass(frozen=True, kw_only=True)
class TileConfig(LaunchConfig):
    """A program handles `rows` x `block_n` entries in steps of `block_m` rows. One configuration per kernel on every
    GPU: a warp reads 256 consecutive columns of a row (16 bytes a thread in bf16), and registers do not spill."""

    block_m: int
    block_n: int = 256
    rows: int

    def tiles(self, shape: Sequence[int]) -> tuple[int, int]:
        return triton.cdiv(shape[0], self.rows), triton.cdiv(shape[1], self.block_n)

    def constexprs(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n}


@dataclass(frozen=True)
class Group:
    """Matrices that share a launch: their rows of the table, the common shape, and the kernel's constexprs."""

    first: int
    count: int
    shape: tuple[int, int]
    constexprs: Mapping[str, Any]

    def grid(self, config: TileConfig) -> tuple[int, int]:
        tiles_m, tiles_n = config.tiles(self.shape)
        return tiles_m * tiles_n, self.count


@dataclass(frozen=True)
class Partials:
    """Where pass A's partial sums lie (offsets in float32 elements), and the tables that gather them."""

    places: tuple[tuple[int, int, int], ...]  # per matrix: row sums, column sums, squared norms
    total: int
    total_sq: int
    blocks: Tensor
    uses: Tensor


@functools.lru_cache(maxsize=8)
def _device_table(values: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 table on the device; kept while the pointers stay what they were (weights always, gradients often)."""
    return upload(torch.tensor(values, dtype=torch.int64), device)


def plan(
    gate_maps: Tensor,
    device: torch.device,
    tensors: Mapping[Any, Sequence[Tensor]],
    constexprs: Sequence[Mapping[str, Any]],
    *,
    layouts: Sequence[int] | None = None,
    col_panels: Sequence[Tensor] = (),
    places: Sequence[tuple[int, int, int]] | None = None,
) -> tuple[Tensor, list[Group]]:
    """The table on the device, and the groups in order of first appearance.

    tensors: column of the table -> one contiguous tensor per matrix.
    constexprs: what each matrix's kernel is compiled for.
    places: `Partials.places`. Raises ValueError for a tensor that is not contiguous.
    """
    panels = iter(col_panels)
    groups: dict[tuple[Any, ...], list[tuple[int, ...]]] = defaultdict(list)
    for m, (row_start, col_start, head_dim, repeat) in enumerate(gate_maps.tolist()):
        layout = DENSE if layouts is None else layouts[m]
        shape = tuple(tensors[fields.DELTA_PTR][m].shape)
        entry = [0] * fields.FIELDS.value
        aligned = shape[1] % 16 == 0
        for column, of_matrix in tensors.items():
            entry[column.value] = _pointer(of_matrix[m])
            # A packed block is gathered element by element: its alignment does not matter.
            if not (column is fields.GRAD_PTR and layout == BLOCK):
                aligned = aligned and entry[column.value] % 16 == 0
        n_packed = tensors[fields.GRAD_PTR][m].shape[1] if layout == BLOCK else 0
        if layout == PANELS:
            panel = next(panels)
            n_packed = panel.shape[1]
            entry[fields.GRAD_COLS_PTR.value] = _pointer(panel)
        geometry = (*shape, row_start, col_start, head_dim, repeat, n_packed // repeat)
        entry[fields.N_ROWS.value : fields.OPEN_PER_COPY.value + 1] = geometry
        if places is not None:
            entry[fields.ROW_PARTIALS.value : fields.SQ_PARTIALS.value + 1] = places[m]
        groups[(shape, *constexprs[m].items(), ("ALIGNED", aligned))].append(tuple(entry))
    rows = tuple(itertools.chain.from_iterable(groups.values()))
    found, first = [], 0
    for (shape, *chosen), entries in groups.items():
        found.append(Group(first, len(entries), shape, dict(chosen)))
        first += len(entries)
    return (_device_table(rows, device) if rows else torch.empty(0)), found


def _pointer(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError(
            f"matrices: expected contiguous tensors, got strides {tensor.stride()} for {list(tensor.shape)}"
        )
    return tensor.data_ptr()


@functools.lru_cache(maxsize=8)
def partial_sums(
    shapes: tuple[tuple[int, int], ...],
    maps: tuple[tuple[int, ...], ...],
    n_gates: int,
    device: torch.device,
    config: TileConfig,
    block_gates: int,
) -> Partials:
    """Layout of the partial sums, and who uses which gate: pure geometry, so computed once per model.

    The gate vector is cut wherever a matrix side begins or ends, so that all gates between two cuts have the same uses.
    """
    places: list[tuple[int, int, int]] = []
    total = total_sq = 0
    sides: list[tuple[int, int, tuple[int, ...]]] = []  # first gate, end gate, a row of `uses`
    for (n_rows, n_cols), (row_start, col_start, head_dim, repeat) in zip(shapes, maps, strict=True):
        tiles_m, tiles_n = config.tiles((n_rows, n_cols))
        of_rows, of_cols = total, total + tiles_n * n_rows
        sides.append((row_start, row_start + n_rows, (of_rows, tiles_n, n_rows, row_start, 1, 1)))
        sides.append((col_start, col_start + n_cols // repeat, (of_cols, tiles_m, n_cols, col_start, head_dim, repeat)))
        places.append((of_rows, of_cols, total_sq))
        total = of_cols + tiles_m * n_cols
        total_sq += tiles_m * tiles_n
    cuts = sorted({0, n_gates, *itertools.chain.from_iterable(side[:2] for side in sides)})
    blocks: list[tuple[int, int, int, int]] = []
    uses: list[tuple[int, ...]] = []
    for begin, end in itertools.pairwise(cuts):
        first_use = len(uses)
        uses += [use for side_begin, side_end, use in sides if side_begin <= begin and end <= side_end]
        for start in range(begin, end, block_gates):
            blocks.append((start, min(start + block_gates, end), first_use, len(uses)))
    return Partials(
        places=tuple(places),
        total=total,
        total_sq=total_sq,
        blocks=upload(torch.tensor(blocks, dtype=torch.int64).view(-1, 4), device),
        uses=upload(torch.tensor(uses, dtype=torch.int64).view(-1, 6), device),
    )
