"""Where every gate of a model lives, and which of them each masked matrix reads (method, section 1). Pure geometry.

Gates come in groups, a few a layer, in one flat vector θ:

    attn_read attn_q attn_k attn_v attn_write ffn_read ffn_hidden ffn_write

of which one has several parts where a layer has several such things ("ffn_hidden.3" are expert 3's channels).
A matrix is gated by one run of gates along its rows and one along its columns. Most runs are a group as it is. Where
rows of a fused or interleaved weight take gates of several groups in turn, or the same gates twice, the run is an
*alias*: a copy of those gates, in that order, behind the end of the gate vector. Kernels are given this longer vector
of *slots*, so that for them every matrix has one contiguous run a side; a model of ordinary blocks has no aliases, and
its slots are its gates.
"""

import builtins
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lcdd.errors import InputError
from lcdd_kernels import GateMap

GROUPS = ("attn_read", "attn_q", "attn_k", "attn_v", "attn_write", "ffn_read", "ffn_hidden", "ffn_write")


def base_group(name: str) -> str:
    """The one of `GROUPS` that a group belongs to: "ffn_hidden.3" -> "ffn_hidden"."""
    return name.partition(".")[0]


@dataclass(frozen=True)
class Weave:
    """The gates along one side of a matrix: `count` times over, the next `unit` gates of every piece (group, unit).

        ordinary projection                    Weave(1, (("attn_q", Q),))
        fused gate and up                      Weave(1, (("ffn_hidden", F), ("ffn_hidden", F)))
        fused q, k, v, interleaved by head     Weave(H, (("attn_q", d), ("attn_k", d), ("attn_v", d)))
        o under grouped-query attention        Weave(H_kv, (("attn_v", d),) * (H / H_kv))

    A piece whose group has come already in the same turn repeats its gates.
    """

    count: int
    pieces: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, group: str, size: int) -> "Weave":
        """A whole group in its own order."""
        return cls(1, ((group, size),))

    @cached_property
    def size(self) -> int:
        """Rows (or columns) that it gates."""
        return self.count * sum(unit for _, unit in self.pieces)

    def sizes(self) -> dict[str, int]:
        """Gates that it takes of each group."""
        return {group: self.count * unit for group, unit in self.pieces}

    def positions(self, starts: Mapping[str, int]) -> Tensor:
        """Place in θ of every gate along this side, int64 [size]; `starts`: where the groups begin."""
        turns = torch.arange(self.count, device="cpu")[:, None]
        runs = [starts[group] + turns * unit + torch.arange(unit, device="cpu") for group, unit in self.pieces]
        return torch.cat(runs, dim=1).flatten()


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A masked matrix: a two-dimensional view of a parameter, and the gates of its rows and columns.

    name: unique in the model; parameter: of the model, which the matrix is, or of which it is slice `part` along the
    first dimension. kind: q k v qkv g o gate up gate_up down. shape: as stored (a transposed weight's rows are its
    inputs).
    """

    name: str
    kind: str
    layer: int
    parameter: str
    part: int | None = None
    shape: tuple[int, int]
    rows: Weave
    cols: Weave

    def __post_init__(self) -> None:
        found = (self.rows.size, self.cols.size)
        if found != tuple(self.shape):
            raise InputError(f"{self.name}: expected gates for its shape {tuple(self.shape)}, got {found}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        sides = {side: [weave.count, [list(p) for p in weave.pieces]] for side, weave in self.sides()}
        plain = {key: getattr(self, key) for key in ("name", "kind", "layer", "parameter", "part")}
        return {**plain, "shape": list(self.shape), **sides}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Matrix":
        """What `to_dict` made."""
        sides = {
            side: Weave(int(count), tuple((str(group), int(unit)) for group, unit in pieces))
            for side, (count, pieces) in ((side, values[side]) for side in ("rows", "cols"))
        }
        rows, cols = values["shape"]
        return cls(**{**values, "shape": (int(rows), int(cols)), **sides})

    def sides(self) -> tuple[tuple[str, Weave], tuple[str, Weave]]:
        return ("rows", self.rows), ("cols", self.cols)


@dataclass(frozen=True)
class Run:
    """A side of a matrix in the slots: number of the run in `slot_offsets`, first slot, how many.

    A side of columns with `repeat` above 1 has every `head_dim` of them that often in a row, as GateMap says.
    """

    number: int
    start: int
    size: int
    head_dim: int
    repeat: int = 1

    @property
    def slots(self) -> slice:
        """Where it is."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class GateLayout:
    """Groups of every layer, in θ's order, and the matrices that read them.

    layers: for each layer its (group, size) pairs. matrices: in the order in which optimizers hold them.
    """

    layers: tuple[tuple[tuple[str, int], ...], ...]
    matrices: tuple[Matrix, ...]

    @classmethod
    def for_matrices(cls, matrices: Sequence[Matrix]) -> "GateLayout":
        """The layout of the groups that `matrices` name.

        Raises:
            InputError: a group has two sizes.
        """
        found: list[dict[str, int]] = [{} for _ in range(1 + max((m.layer for m in matrices), default=-1))]
        for matrix in matrices:
            for side, weave in matrix.sides():
                for group, size in weave.sizes().items():
                    known = found[matrix.layer].setdefault(group, size)
                    if known != size:
                        raise InputError(f"{matrix.name}: expected {known} {side} gated by {group}, got {size}")
        ordered = (sorted(groups.items(), key=lambda item: GROUPS.index(base_group(item[0]))) for groups in found)
        return cls(tuple(tuple(groups) for groups in ordered), tuple(matrices))

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters that the matrices are, or are slices of."""
        return frozenset(matrix.parameter for matrix in self.matrices)

    def difference(self, other: "GateLayout") -> str:
        """In words, the first thing in which another layout differs."""
        theirs = {matrix.name: matrix for matrix in other.matrices}
        for matrix in self.matrices:
            found = theirs.get(matrix.name)
            if found != matrix:
                got = "none" if found is None else f"one of shape {found.shape}"
                return f"with {matrix.name} of shape {matrix.shape} and its gates, got {got}"
        return f"with {len(self.matrices)} masked matrices, got {len(other.matrices)}"

    # ------------------------------------------------------------------ gates

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def groups(self) -> list[tuple[int, str, int]]:
        """(layer, group, size) of every group, in θ's order."""
        return [(layer, name, size) for layer, groups in enumerate(self.layers) for name, size in groups]

    @cached_property
    def n_gates(self) -> int:
        return sum(size for _, _, size in self.groups)

    @cached_property
    def offsets(self) -> Tensor:
        """Boundaries of `groups` in θ, int64 [groups + 1], on the CPU."""
        sizes = torch.tensor([size for _, _, size in self.groups], dtype=torch.int64, device="cpu")
        return torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), sizes.cumsum(0)])

    @cached_property
    def totals(self) -> dict[str, int]:
        """Gates of each of `GROUPS`, over all layers and parts."""
        totals = dict.fromkeys(GROUPS, 0)
        for _, name, size in self.groups:
            totals[base_group(name)] += size
        return totals

    def slice(self, layer: int, group: str) -> slice:
        """The gates of `group`, with all its parts, of `layer`; an empty slice where the layer has none."""
        if not 0 <= layer < self.n_layers:
            raise InputError(f"layer: expected 0 to {self.n_layers - 1}, got {layer}")
        if group not in GROUPS:
            raise InputError(f"group: expected one of {GROUPS}, got {group!r}")
        return self._slices.get((layer, group), slice(0, 0))

    def by_group(self, values: Tensor) -> dict[str, Tensor]:
        """Sum `values` [n_gates], any device, over layers and channels: one scalar tensor for each of `GROUPS`."""
        sums = {group: values.new_zeros(()) for group in GROUPS}
        for (_, group), part in self._slices.items():
            sums[group] = sums[group] + values[part].sum()
        return sums

    # ------------------------------------------------------------------ slots

    @property
    def n_slots(self) -> int:
        """Gates, and copies of gates for the matrices whose runs are aliases."""
        return self.n_gates + self.aliases.numel()

    @cached_property
    def aliases(self) -> Tensor:
        """Place in θ of the gate that each slot behind the gates copies, int64 [n_slots - n_gates]."""
        return torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *self._aliases.values()])

    @cached_property
    def slot_offsets(self) -> Tensor:
        """Boundaries of all runs of slots, int64, on the CPU: `offsets`, then one run for each alias."""
        sizes = torch.tensor([len(positions) for positions in self._aliases.values()], dtype=torch.int64, device="cpu")
        return torch.cat([self.offsets, self.n_gates + sizes.cumsum(0)])

    def expand(self, gate: Tensor) -> Tensor:
        """gate [n_gates] -> slots [n_slots]; the same tensor where there are no aliases."""
        if not self._aliases:
            return gate
        return torch.cat([gate, gate[self._on(gate.device).copied]])

    def fold(self, d_slots: Tensor) -> Tensor:
        """Gradient by slots [n_slots] -> by gates [n_gates]: copies' parts are added, in a fixed order."""
        if not self._aliases:
            return d_slots
        d_gate = d_slots[: self.n_gates].clone()
        for gates, slots in self._on(d_slots.device).rounds:
            d_gate[gates] += d_slots[slots]  # no gate twice in a round: deterministic
        return d_gate

    # ------------------------------------------------------------------ matrices

    def gate_map(self, matrix: Matrix) -> GateMap:
        """How a matrix finds its row and column gates in the slots."""
        rows, cols = self.runs(matrix)
        return GateMap(row_start=rows.start, col_start=cols.start, head_dim=cols.head_dim, repeat=cols.repeat)

    def runs(self, matrix: Matrix) -> tuple[Run, Run]:
        """The runs of a matrix's rows and of its columns."""
        return self._run(matrix.layer, matrix.rows, columns=False), self._run(matrix.layer, matrix.cols, columns=True)

    def is_direct(self, matrix: Matrix) -> bool:
        """Whether a matrix needs no alias and is a parameter of its own, as in an ordinary block."""
        return matrix.part is None and all(run.start < self.n_gates for run in self.runs(matrix))

    def row_and_col_gates(self, gate: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
        """Gates of a matrix's rows [rows] and columns [cols], out of gate [n_gates]."""
        starts = self._starts(matrix.layer)
        return tuple(gate[weave.positions(starts).to(gate.device)] for _, weave in matrix.sides())  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        layers = [dict(groups) for groups in self.layers]
        return {"groups": list(GROUPS), "layers": layers, "matrices": [matrix.to_dict() for matrix in self.matrices]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GateLayout":
        """What `to_dict` made.

        Raises:
            InputError: groups and matrices do not fit together.
        """
        layout = cls.for_matrices([Matrix.from_dict(matrix) for matrix in values["matrices"]])
        if [dict(groups) for groups in layout.layers] != values["layers"]:
            raise InputError("layout: expected layers of the groups that the matrices name, got others")
        return layout

    # ------------------------------------------------------------------ parts

    @cached_property
    def _slices(self) -> "dict[tuple[int, str], builtins.slice]":
        """Gates of each of `GROUPS` in each layer that has it; parts lie side by side."""
        found: dict[tuple[int, str], builtins.slice] = {}
        bounds = self.offsets.tolist()
        for (layer, name, _), start, stop in zip(self.groups, bounds, bounds[1:], strict=False):
            key = (layer, base_group(name))
            found[key] = slice(found[key].start if key in found else start, stop)
        return found

    @cached_property
    def _places(self) -> list[dict[str, tuple[int, int]]]:
        """For each layer, group -> (its number in `groups`, its first gate)."""
        places: list[dict[str, tuple[int, int]]] = [{} for _ in self.layers]
        for number, ((layer, name, _), start) in enumerate(zip(self.groups, self.offsets.tolist(), strict=False)):
            places[layer][name] = number, start
        return places

    def _starts(self, layer: int) -> dict[str, int]:
        return {name: start for name, (_, start) in self._places[layer].items()}

    @staticmethod
    def _direct(weave: Weave, *, columns: bool) -> bool:
        """One group in its own order, or (kernels know that of columns) each of its heads several times in a row."""
        return len(weave.pieces) == 1 or (columns and len(set(weave.pieces)) == 1)

    @cached_property
    def _aliases(self) -> dict[tuple[int, Weave], Tensor]:
        """Positions in θ of the runs that are no group, each once for its layer."""
        found: dict[tuple[int, Weave], Tensor] = {}
        for matrix in self.matrices:
            for side, weave in matrix.sides():
                if not self._direct(weave, columns=side == "cols") and (matrix.layer, weave) not in found:
                    found[matrix.layer, weave] = weave.positions(self._starts(matrix.layer))
        return found

    @cached_property
    def _alias_numbers(self) -> dict[tuple[int, Weave], int]:
        return {key: len(self.groups) + place for place, key in enumerate(self._aliases)}

    def _run(self, layer: int, weave: Weave, *, columns: bool) -> Run:
        if not self._direct(weave, columns=columns):
            number = self._alias_numbers[layer, weave]
            return Run(number, int(self.slot_offsets[number]), weave.size, head_dim=weave.size)
        group, unit = weave.pieces[0]
        number, start = self._places[layer][group]
        repeat = len(weave.pieces)
        size = weave.size // repeat
        return Run(number, start, size, head_dim=unit if repeat > 1 else size, repeat=repeat)

    @cached_property
    def _by_device(self) -> dict[torch.device, "_Aliased"]:
        return {}

    def _on(self, device: torch.device) -> "_Aliased":
        """The alias indices on a device, copied there once."""
        if device not in self._by_device:
            self._by_device[device] = _Aliased.of(self.aliases, self.n_gates, device)
        return self._by_device[device]


@dataclass(frozen=True, eq=False)
class _Aliased:
    """copied: the gate of each alias slot. rounds: (gates, slots) pairs, no gate twice in one, all slots together."""

    copied: Tensor
    rounds: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, aliases: Tensor, n_gates: int, device: torch.device) -> "_Aliased":
        rounds = [(aliases[slots].to(device), (n_gates + slots).to(device)) for slots in _rounds(aliases)]
        return cls(aliases.to(device), rounds)


def _rounds(aliases: Tensor) -> Iterator[Tensor]:
    """Places in `aliases` of the first copy of every gate, then of the second, and so on."""
    order = aliases.argsort(stable=True)
    sorted_gates = aliases[order]
    place = torch.arange(len(aliases), device="cpu")
    first = torch.searchsorted(sorted_gates, sorted_gates)  # where a gate's own stretch begins
    for copy in range(int((place - first).max()) + 1 if len(aliases) else 0):
        yield order[place - first == copy].sort().values
