"""Host side of `delta_step`: the model's matrices as a table on the device, which of them a launch takes, and the
geometry of pass A's partial sums.

The table is made once: pointers and geometry, a row per matrix. What changes from step to step, the gradients and how
they are packed, is a second, small one, the *order*: a row per matrix again, but sorted into groups that one launch
serves, so that a program finds its matrix in it.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lcdd_kernels.reference.delta_step import BLOCK, DENSE, GateMap, Gradients, Matrices
from lcdd_kernels.triton_kernels import LaunchConfig
from lcdd_kernels.triton_kernels import delta_step_kernels as fields
from lcdd_kernels.triton_kernels.tables import TableCache


@dataclass(frozen=True, kw_only=True)
class TileConfig(LaunchConfig):
    """A program handles `rows` x `block_n` entries in steps of `block_m` rows. One configuration per kernel on every
    GPU."""

    block_m: int
    block_n: int = 256
    rows: int

    def tiles(self, shape: Sequence[int]) -> int:
        return triton.cdiv(shape[0], self.rows) * triton.cdiv(shape[1], self.block_n)

    def constexprs(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n}


class Kind(NamedTuple):
    """What a kernel is compiled for. Dtypes are None where there are no such tensors."""

    weight: torch.dtype | None
    delta: torch.dtype
    moment: torch.dtype | None
    grad: torch.dtype | None
    layout: int
    aligned: bool


@dataclass(frozen=True)
class Group:
    """The matrices of one launch: rows `first` to `first + count` of the order. tiles: of all of them, in pass A's cut
    and in pass B's.
    """

    first: int
    count: int
    kind: Kind
    tiles: tuple[int, int]


@dataclass(frozen=True)
class Partials:
    """Where pass A's partial sums lie (offsets in float32 elements), and the tables that gather them."""

    places: list[tuple[int, int, int]]  # per matrix: row sums, column sums, squared norms
    total: int
    total_sq: int
    blocks: list[tuple[int, ...]]
    uses: list[tuple[int, ...]]


class Table:
    """The matrices of a model on the device, made once.

    cuts: the tiles of pass A, and of pass B and the refresh. block_gates: gates that a program of the gather sums.
    Raises ValueError for a tensor that is not contiguous, or moments of two dtypes.
    """

    def __init__(
        self, matrices: Matrices, device: torch.device, cuts: tuple[TileConfig, TileConfig], block_gates: int
    ) -> None:
        self.device, self.shapes = device, matrices.shapes
        self.partials = partial_sums(self.shapes, matrices.maps, matrices.n_gates, cuts[0], block_gates)
        self._tiles = [(cuts[0].tiles(shape), cuts[1].tiles(shape)) for shape in self.shapes]
        self._repeats = [where.repeat for where in matrices.maps]
        for avg, avg_sq in zip(matrices.exp_avgs, matrices.exp_avg_sqs, strict=True):
            if avg.dtype != avg_sq.dtype:
                raise ValueError(f"exp_avg_sqs: expected the dtype of exp_avgs, {avg.dtype}, got {avg_sq.dtype}")
        made = [self._matrix(matrices, m) for m in range(len(self.shapes))]
        self._kinds, self._entries = [kind for kind, _ in made], [entry for _, entry in made]
        self._cache = TableCache()
        self._last_sorting = Sorting(None, self._kinds, self._tiles)

    def _matrix(self, matrices: Matrices, m: int) -> tuple[Kind, list[int]]:
        """A matrix's kind (without a gradient) and its row of the table."""
        lists = {
            fields.WEIGHT_PTR: matrices.weights,
            fields.BASE_PTR: matrices.bases,
            fields.DELTA_PTR: matrices.deltas,
            fields.AVG_PTR: matrices.exp_avgs,
            fields.AVG_SQ_PTR: matrices.exp_avg_sqs,
        }
        tensors = {column.value: of_all[m] for column, of_all in lists.items() if len(of_all)}
        entry = [0] * fields.FIELDS.value
        for column, tensor in tensors.items():
            entry[column] = _pointer(tensor)
        aligned = self.shapes[m][1] % 16 == 0 and all(pointer % 16 == 0 for pointer in entry)
        where = matrices.maps[m]
        geometry = (*self.shapes[m], where.row_start, where.col_start, where.head_dim, where.repeat)
        entry[fields.N_ROWS.value : fields.REPEAT.value + 1] = geometry
        entry[fields.ROW_PARTIALS.value : fields.SQ_PARTIALS.value + 1] = self.partials.places[m]

        def dtype_of(column: Any) -> torch.dtype | None:
            return tensors[column.value].dtype if column.value in tensors else None

        delta = matrices.deltas[m].dtype
        return Kind(dtype_of(fields.WEIGHT_PTR), delta, dtype_of(fields.AVG_PTR), None, DENSE, aligned), entry

    @property
    def entries(self) -> Tensor:
        """int64 [M, FIELDS] on the device."""
        return self._cache.get("entries", lambda: _int64(self._entries, fields.FIELDS.value), self.device)

    @property
    def gather(self) -> tuple[Tensor, Tensor]:
        """`Partials.blocks` and `uses` on the device."""
        blocks = self._cache.get("blocks", lambda: _int64(self.partials.blocks, 4), self.device)
        return blocks, self._cache.get("uses", lambda: _int64(self.partials.uses, 6), self.device)

    def order(self, grads: Gradients | None) -> tuple[Tensor, list[Group]]:
        """The order on the device and its groups, in order of first appearance; sent anew where a gradient moved."""
        if grads is None:
            sorting, key = self._sorting(grads), None
        elif self in grads.tables:  # passes A and B of a step are given the same
            sorting, key = grads.tables[self]
        else:
            sorting, key = self._sorting(grads), (grads.pointers, grads.panel_pointers, grads.packed_columns)
            grads.tables[self] = sorting, key
        rows = self._cache.get((sorting.key, key), lambda: self._rows(sorting, grads), self.device)
        return rows, sorting.groups

    def alone(self, m: int) -> tuple[Tensor, Group]:
        """An order of matrix m alone, and its group."""
        rows = self._cache.get(
            "alone", lambda: _int64([[n, *[0] * 5] for n in range(len(self.shapes))], 6), self.device
        )
        return rows[m:], Group(0, 1, self._kinds[m], self._tiles[m])

    def _sorting(self, grads: Gradients | None) -> "Sorting":
        """Which launch serves which matrix: made once for all gradients of these dtypes, layouts and alignment."""
        if grads is None:
            key: Any = None
        else:
            if not all(map(Tensor.is_contiguous, grads.tensors)):
                raise ValueError("grads: expected contiguous tensors")
            # a block is gathered: its own alignment does not matter
            places = zip(grads.pointers, grads.layouts, strict=True)
            unaligned = tuple([m for m, (at, layout) in enumerate(places) if at % 16 and layout != BLOCK])
            key = tuple([tensor.dtype for tensor in grads.tensors]), tuple(grads.layouts), unaligned
        if self._last_sorting.key != key:
            kinds = self._kinds if key is None else self._kinds_with(*key)
            self._last_sorting = Sorting(key, kinds, self._tiles)
        return self._last_sorting

    def _kinds_with(
        self, dtypes: Sequence[torch.dtype], layouts: Sequence[int], unaligned: Sequence[int]
    ) -> list[Kind]:
        return [
            kind._replace(grad=dtype, layout=layout, aligned=kind.aligned and m not in unaligned)
            for m, (kind, dtype, layout) in enumerate(zip(self._kinds, dtypes, layouts, strict=True))
        ]

    def _rows(self, sorting: "Sorting", grads: Gradients | None) -> Tensor:
        """The order on the CPU: `sorting`'s rows, and where the gradients are."""
        rows = sorting.rows.clone()
        if grads is None:
            return rows
        of_matrix = {fields.GRAD_PTR: grads.pointers}
        if any(grads.layouts):
            per_copy = [n // repeat for n, repeat in zip(grads.packed_columns, self._repeats, strict=True)]
            of_matrix |= {fields.GRAD_COLS_PTR: grads.panel_pointers, fields.OPEN_PER_COPY: per_copy}
        for column, values in of_matrix.items():
            rows[:, column.value] = torch.tensor(values, dtype=torch.int64, device="cpu")[sorting.members]
        return rows


class Sorting:
    """Matrices by the launch that serves them.

    key: what it was made of. groups: launches, in order of first appearance. members: the matrices, group after group,
    int64 [M]. rows: int64 [M, ORDER], without gradients, on the CPU.
    """

    def __init__(self, key: Any, kinds: Sequence[Kind], tiles: Sequence[tuple[int, int]]) -> None:
        self.key = key
        members: dict[Kind, list[int]] = defaultdict(list)
        for m, kind in enumerate(kinds):
            members[kind].append(m)
        self.groups: list[Group] = []
        rows: list[list[int]] = []
        for kind, own in members.items():
            first_a = first_b = 0
            start = len(rows)
            for m in own:
                rows.append([m, first_a, first_b, 0, 0, 0])
                first_a, first_b = first_a + tiles[m][0], first_b + tiles[m][1]
            self.groups.append(Group(start, len(own), kind, (first_a, first_b)))
        self.rows = _int64(rows, fields.ORDER.value)
        self.members = self.rows[:, fields.MATRIX.value].clone()


def _int64(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, width)


def _pointer(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError(
            f"matrices: expected contiguous tensors, got strides {tensor.stride()} for {list(tensor.shape)}"
        )
    return tensor.data_ptr()


def partial_sums(
    shapes: Sequence[tuple[int, int]], maps: Sequence[GateMap], n_gates: int, cut: TileConfig, block_gates: int
) -> Partials:
    """Layout of the partial sums, and who uses which gate: pure geometry.

    blocks: of gates, (first, end, first use, end use). uses: see `gate_gather_kernel`. The gate vector is cut wherever
    a matrix side begins or ends, so that all gates between two cuts have the same uses.
    """
    places: list[tuple[int, int, int]] = []
    total = total_sq = 0
    sides: list[tuple[int, int, tuple[int, ...]]] = []  # first gate, end gate, a row of `uses`
    for (n_rows, n_cols), g in zip(shapes, maps, strict=True):
        tiles_m, tiles_n = triton.cdiv(n_rows, cut.rows), triton.cdiv(n_cols, cut.block_n)
        of_rows, of_cols = total, total + tiles_n * n_rows
        by_row = (of_rows, tiles_n, n_rows, g.row_start, 1, 1)
        sides.append((g.row_start, g.row_start + n_rows, by_row))
        by_col = (of_cols, tiles_m, n_cols, g.col_start, g.head_dim, g.repeat)
        sides.append((g.col_start, g.col_start + n_cols // g.repeat, by_col))
        places.append((of_rows, of_cols, total_sq))
        total = of_cols + tiles_m * n_cols
        total_sq += tiles_m * tiles_n
    cuts = sorted({0, n_gates, *itertools.chain.from_iterable(side[:2] for side in sides)})
    blocks: list[tuple[int, ...]] = []
    uses: list[tuple[int, ...]] = []
    for begin, end in itertools.pairwise(cuts):
        first_use = len(uses)
        uses += [use for side_begin, side_end, use in sides if side_begin <= begin and end <= side_end]
        for start in range(begin, end, block_gates):
            blocks.append((start, min(start + block_gates, end), first_use, len(uses)))
    return Partials(places, total, total_sq, blocks, uses)
