"""One optimizer step over every matrix of a model: passes A and B, and the refresh of W_eff alone (method section 1).

`DeltaStepPlan` checks the matrices once and keeps what backends build of them; `weight_eff_`, `delta_grad_stats` and
`delta_adamw_` are a plan that is used once. They are steps of an optimizer: no autograd formula, no custom op
(its wrapper costs more than the launches), and the writes are told to autograd, so that a backward through a weight
that was stepped since its forward is an error.

Shapes: N gates of the model, M matrices, each `[out, in]`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcdd_kernels import checks
from lcdd_kernels.backends import choose
from lcdd_kernels.checks import MAX_INT, check_gate, fail
from lcdd_kernels.reference.delta_step import BLOCK, DENSE, LAYOUTS, PANELS, AdamWStep, GateMap, Gradients, Matrices

__all__ = ["AdamWStep", "DeltaStepPlan", "GateMap", "delta_adamw_", "delta_grad_stats", "weight_eff_"]

_MATRIX_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CODES = {layout: code for code, layout in enumerate(LAYOUTS)}
_WRITTEN = ("weights", "deltas", "exp_avgs", "exp_avg_sqs")

Grad = Tensor | tuple[Tensor, Tensor]


class DeltaStepPlan:
    """Passes A and B and the refresh over the M matrices of a model, for as long as these tensors are its.

    Made once (when an optimizer is attached); a call then looks at the gates and the gradients alone. The tensors may
    move (`.data` replaced): that is noticed, and they are checked again. A step that makes several calls has its
    gradients checked once, by `take`.

    weights, bases: W_eff and the base's weights, one dtype (float32, float16, bfloat16; float64 with float64 gates);
    deltas, exp_avgs, exp_avg_sqs: Δ and AdamW's moments, each of any of these dtypes. All [out, in], contiguous, on one
    device. gate_maps: where each matrix finds its gates in a flat vector of `n_gates`. What no call needs may be left
    out: `grad_stats` reads deltas, `refresh` and `differing` weights, bases and deltas, `step` everything.

    Raises ValueError naming the list, the matrix and what was expected; also where one that is written shares memory
    with another one.
    """

    def __init__(
        self,
        gate_maps: Sequence[GateMap],
        *,
        n_gates: int,
        deltas: Sequence[Tensor],
        weights: Sequence[Tensor] = (),
        bases: Sequence[Tensor] = (),
        exp_avgs: Sequence[Tensor] = (),
        exp_avg_sqs: Sequence[Tensor] = (),
    ) -> None:
        self._maps, self._n_gates = tuple(gate_maps), n_gates
        lists = {"weights": weights, "deltas": deltas, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "bases": bases}
        self._lists = {name: list(tensors) for name, tensors in lists.items() if name == "deltas" or len(tensors)}
        self._tensors = list(itertools.chain.from_iterable(self._lists.values()))
        first = next(iter(self._lists.values()))
        self._device = checks.check_tensor("deltas[0]", first[0]).device if first else torch.device("cpu")
        self._check()

    # ------------------------------------------------------------------ calls

    @torch.no_grad()
    def refresh(self, gate: Tensor) -> None:
        """weights[m] := bases[m] + (r ⊗ c) ∘ deltas[m], in place, from gate[N].

        Bit-identical on every backend; where a gate is closed the base's bits are copied.
        """
        self._check_there("weights", "bases")
        matrices = self._current()
        self._check_gate("gate", gate)
        choose("weight_eff_", gate)(matrices, gate)
        torch.autograd.graph.increment_version(matrices.weights)

    @torch.no_grad()
    def differing(self, m: int, gate: Tensor) -> Tensor:
        """How many entries of weights[m] are not what `refresh` would write from gate[N]: int64 [] on the device."""
        self._check_there("weights", "bases")
        checks.check_int("m", m, 0, len(self._maps))
        places = range(m, len(self._tensors), len(self._maps))  # of this matrix in every list
        if any(self._tensors[place].data_ptr() != self._pointers[place] for place in places):
            self._check()
        self._check_gate("gate", gate)
        return choose("weight_differs", gate)(self._matrices, m, gate)

    def take(
        self, grads: Sequence[Grad], gate: Tensor, *, layouts: Sequence[str] | None = None, rank: Tensor | None = None
    ) -> Gradients:
        """Gradients, checked, for the calls of one step, in which no tensor moves; arguments as of `grad_stats`."""
        self._current()
        found = self._gradients(grads, layouts, rank, gate.dtype)
        if "exp_avgs" in self._lists:
            self._check_memory_of(found)
        return found

    @torch.no_grad()
    def grad_stats(
        self,
        grads: Sequence[Grad] | Gradients,
        gate: Tensor,
        *,
        layouts: Sequence[str] | None = None,
        rank: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pass A: (d_gate[N], sq_norm[]) in the gate's dtype, from G = ∂L/∂W_eff; deterministic.

        d_gate[n] = sum over every row and column that uses gate n of its gradient; sq_norm = Σ ‖(r ⊗ c) ∘ G‖², for
        clipping. layouts[m]: "dense" (default; grads[m] is [out, in]), "block" (open rows × open columns; closed gates
        get zero), or "panels" (grads[m] is a pair: open rows × all columns, all rows × open columns). Packed ones need
        `rank` of `open_indices`. grads may be what `take` returned, without the others.
        """
        self._check_gate("gate", gate)
        found = grads if isinstance(grads, Gradients) else self.take(grads, gate, layouts=layouts, rank=rank)
        return choose("delta_grad_stats", gate)(self._matrices, found, gate)

    @torch.no_grad()
    def step(
        self,
        grads: Sequence[Grad] | Gradients,
        gate_old: Tensor,
        gate_new: Tensor,
        adam: AdamWStep,
        *,
        layouts: Sequence[str] | None = None,
        rank: Tensor | None = None,
    ) -> None:
        """Pass B, in place: AdamW on deltas with the gradient grad_scale·(r_old ⊗ c_old) ∘ G, then weights from the new
        gates and the stored deltas.

        The update uses the moments before they are rounded for storage. grads, layouts: as in `grad_stats`, with
        `rank` of the *old* gates; an entry that a packed gradient lacks has gradient zero, and its momenta still move
        delta. A grad_scale on the device may be NaN: then nothing is written.
        """
        self._check_there("weights", "bases", "exp_avgs", "exp_avg_sqs")
        self._check_gate("gate_old", gate_old)
        self._check_gate("gate_new", gate_new)
        checks.check_dtype("gate_new", gate_new, (gate_old.dtype,))
        _check_adam(adam, gate_old)
        found = grads if isinstance(grads, Gradients) else self.take(grads, gate_old, layouts=layouts, rank=rank)
        choose("delta_adamw_", gate_old)(self._matrices, found, gate_old, gate_new, adam)
        for name in _WRITTEN:
            torch.autograd.graph.increment_version(self._lists[name])

    # ------------------------------------------------------------------ checks, once

    def _check(self) -> None:
        checks.check_int("n_gates", self._n_gates, 0)
        for name, tensors in self._lists.items():
            checks.check_length(name, tensors, len(self._maps))
        self._float64: str | None = None  # the first matrix that is, which float32 gates do not go with
        shapes_of = next(iter(self._lists))
        for name, tensors in self._lists.items():
            for m, (value, like) in enumerate(zip(tensors, self._lists[shapes_of], strict=True)):
                where = f"{name}[{m}]"
                allowed = (like.dtype,) if name == "bases" and shapes_of == "weights" else checks.FLOATS
                _check_matrix(where, value, (None, None) if name == shapes_of else like.shape, allowed, self._device)
                if value.dtype == torch.float64 and self._float64 is None:
                    self._float64 = where
        self._shapes = [delta.shape for delta in self._lists["deltas"]]
        for m, (where_gates, shape) in enumerate(zip(self._maps, self._shapes, strict=True)):
            check_gate_map(f"gate_maps[{m}]", where_gates, shape, self._n_gates)
        self._check_memory()
        self._pointers = self._addresses()
        self._matrices = Matrices(maps=self._maps, n_gates=self._n_gates, **self._lists)
        starts = [[g.row_start, g.col_start] for g in self._maps]
        sizes = [[s[0], s[1] // g.repeat] for s, g in zip(self._shapes, self._maps, strict=True)]
        first = torch.tensor(starts, dtype=torch.int64, device="cpu").view(-1, 2)
        self._sides = torch.stack([first, first + torch.tensor(sizes, dtype=torch.int64, device="cpu").view(-1, 2)])

    def _check_memory(self) -> None:
        written = _WRITTEN if "exp_avgs" in self._lists else ("weights",)
        named = {n: [(f"{n}[{m}]", t) for m, t in enumerate(tensors)] for n, tensors in self._lists.items()}
        self._written = checks.memory_of([pair for name in written for pair in named.get(name, [])])
        for name in self._lists.keys() - set(written):
            names, tensors = zip(*named[name], strict=True) if named[name] else ((), ())
            checks.check_memory(names, tensors, [tensor.data_ptr() for tensor in tensors], self._written)
        self._grad_names = [f"grads[{m}]" for m in range(len(self._maps))]

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))

    def _check_there(self, *needed: str) -> None:
        for name in needed:
            if name not in self._lists and self._maps:
                raise fail(name, f"{len(self._maps)} entries", 0)

    def _current(self) -> Matrices:
        """The matrices, checked again where a tensor has moved."""
        if self._addresses() != self._pointers:
            self._check()
        return self._matrices

    # ------------------------------------------------------------------ checks of every call

    def _check_gate(self, name: str, gate: Tensor) -> None:
        check_gate(name, gate, self._n_gates)
        if self._float64 is not None and gate.dtype == torch.float32:
            raise fail(self._float64, "dtype float32 or float16 or bfloat16 (beside float32 gates)", "float64")
        if self._maps:
            checks.check_device(name, gate, self._device)

    def _gradients(
        self, grads: Sequence[Grad], layouts: Sequence[str] | None, rank: Tensor | None, gate_dtype: torch.dtype
    ) -> Gradients:
        """Gradients as the backends take them: one tensor per matrix, the column panels apart, layout codes."""
        checks.check_length("grads", grads, len(self._maps))
        codes = self._codes(layouts)
        packed = any(codes)
        dtypes = _MATRIX_DTYPES if gate_dtype == torch.float32 else checks.FLOATS
        counts = self._open_counts(rank) if packed else None
        known = self._shapes if not packed else [
            self._shapes[m] if code == DENSE else counts[m] if code == BLOCK and counts is not None else None
            for m, code in enumerate(codes)
        ]  # fmt: skip
        if PANELS in codes or not _all_plain(grads, known, dtypes, self._device):
            for m, (grad, code) in enumerate(zip(grads, codes, strict=True)):
                self._check_grad(m, grad, code, None if counts is None else counts[m], dtypes)
        if PANELS not in codes:
            tensors: Any = grads
            return Gradients(
                tensors=tensors, col_panels=[None] * len(grads), layouts=codes, rank=rank if packed else None
            )
        pairs = [grad if code == PANELS else (grad, None) for grad, code in zip(grads, codes, strict=True)]
        tensors, panels = zip(*pairs, strict=True)
        return Gradients(tensors=tensors, col_panels=panels, layouts=codes, rank=rank)

    def _codes(self, layouts: Sequence[str] | None) -> list[int]:
        if layouts is None:
            return [DENSE] * len(self._maps)
        checks.check_length("layouts", layouts, len(self._maps))
        codes = [_CODES.get(layout, -1) for layout in layouts]
        if -1 in codes:
            m = codes.index(-1)
            checks.check_choice(f"layouts[{m}]", layouts[m], LAYOUTS)
        return codes

    def _open_counts(self, rank: Tensor | None) -> list[tuple[int, int]] | None:
        """Open rows and columns of every matrix as `rank` has them; on a GPU None, as the host would have to wait."""
        if rank is None:
            raise fail("rank", "the rank of open_indices (a gradient is packed)", None)
        checks.check_shape("rank", rank, (self._n_gates,))
        checks.check_dtype("rank", rank, (torch.int32,))
        checks.check_device("rank", rank, self._device)
        checks.check_contiguous("rank", rank)
        if rank.device.type != "cpu":
            return None
        before = torch.zeros(rank.numel() + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(rank >= 0, 0, out=before[1:])
        starts, ends = before[self._sides]
        rows_and_cols = (ends - starts).tolist()
        return [(rows, cols * g.repeat) for (rows, cols), g in zip(rows_and_cols, self._maps, strict=True)]

    def _check_grad(
        self, m: int, grad: Grad, code: int, counts: tuple[int, int] | None, dtypes: Sequence[torch.dtype]
    ) -> None:
        n_out, n_in = self._shapes[m]
        n_rows, n_cols = counts or (None, None)
        if code == PANELS:
            if not isinstance(grad, tuple | list) or len(grad) != 2:
                raise fail(f"grads[{m}]", "a pair (rows panel, columns panel)", type(grad).__name__)
            _check_matrix(f"grads[{m}][0]", grad[0], (n_rows, n_in), dtypes, self._device)
            _check_matrix(f"grads[{m}][1]", grad[1], (n_out, n_cols), (grad[0].dtype,), self._device)
        elif isinstance(grad, tuple | list):
            raise fail(f"grads[{m}]", f"a tensor (layout {LAYOUTS[code]!r})", type(grad).__name__)
        else:
            _check_matrix(
                f"grads[{m}]", grad, (n_out, n_in) if code == DENSE else (n_rows, n_cols), dtypes, self._device
            )

    def _check_memory_of(self, grads: Gradients) -> None:
        checks.check_memory(self._grad_names, grads.tensors, grads.pointers, self._written)
        if PANELS in grads.layouts:
            found = zip(self._grad_names, grads.col_panels, grads.panel_pointers, strict=True)
            names, panels, pointers = zip(*((f"{n}[1]", t, at) for n, t, at in found if t is not None), strict=True)
            checks.check_memory(names, panels, pointers, self._written)


def _all_plain(
    grads: Sequence[object],
    shapes: Sequence[Sequence[int] | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> bool:
    """Whether gradients of one tensor each are as they should be (None: of whatever shape), looked at all together;
    what is wrong with one that is not is `_check_grad`'s to say."""
    if not all(isinstance(grad, Tensor) for grad in grads):
        return False
    found = [grad.shape for grad in grads]  # type: ignore[attr-defined]
    return (
        all(got == shape if shape is not None else len(got) == 2 for got, shape in zip(found, shapes, strict=True))
        and {grad.dtype for grad in grads}.issubset(dtypes)  # type: ignore[attr-defined]
        and all(grad.device == device for grad in grads)  # type: ignore[attr-defined]
        and all(map(Tensor.is_contiguous, grads))  # type: ignore[arg-type]
    )


def _check_matrix(
    name: str, value: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    checks.check_shape(name, value, shape)
    checks.check_dtype(name, value, dtypes)
    checks.check_device(name, value, device)
    checks.check_contiguous(name, value)


def check_gate_map(name: str, where: GateMap, shape: Sequence[int], n_gates: int) -> None:
    if not isinstance(where, GateMap):
        raise fail(name, "a GateMap", type(where).__name__)
    n_out, n_in = shape
    checks.check_int(f"{name}.row_start", where.row_start, 0, n_gates - n_out + 1)
    checks.check_int(f"{name}.head_dim", where.head_dim, 1)
    checks.check_int(f"{name}.repeat", where.repeat, 1)
    if where.repeat > 1 and n_in % (where.repeat * where.head_dim):
        raise fail(name, f"repeat*head_dim dividing {n_in} columns", f"{where.repeat}*{where.head_dim}")
    checks.check_int(f"{name}.col_start", where.col_start, 0, n_gates - n_in // where.repeat + 1)


def _check_adam(adam: AdamWStep, gate: Tensor) -> None:
    largest = torch.finfo(torch.float32).max
    for name in ("lr", "eps", "weight_decay"):
        checks.check_real(name, getattr(adam, name), 0.0, largest)
    if isinstance(adam.grad_scale, Tensor):
        _check_matrix("grad_scale", adam.grad_scale, (), (gate.dtype,), gate.device)
    else:
        checks.check_real("grad_scale", adam.grad_scale, 0.0, largest)
    for name in ("beta1", "beta2"):
        checks.check_real(name, getattr(adam, name), 0.0, 1.0, high_open=True)
    checks.check_int("step", adam.step, 1, MAX_INT)


# ---------------------------------------------------------------------- a plan that is used once


def weight_eff_(
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    deltas: Sequence[Tensor],
    gate: Tensor,
    gate_maps: Sequence[GateMap],
) -> None:
    """`DeltaStepPlan.refresh`, once."""
    n_gates = checks.check_tensor("gate", gate).numel()
    DeltaStepPlan(gate_maps, n_gates=n_gates, weights=weights, bases=bases, deltas=deltas).refresh(gate)


def delta_grad_stats(
    grads: Sequence[Grad],
    deltas: Sequence[Tensor],
    gate: Tensor,
    gate_maps: Sequence[GateMap],
    *,
    layouts: Sequence[str] | None = None,
    rank: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`DeltaStepPlan.grad_stats`, once."""
    n_gates = checks.check_tensor("gate", gate).numel()
    return DeltaStepPlan(gate_maps, n_gates=n_gates, deltas=deltas).grad_stats(grads, gate, layouts=layouts, rank=rank)


def delta_adamw_(
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    deltas: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Grad],
    gate_old: Tensor,
    gate_new: Tensor,
    gate_maps: Sequence[GateMap],
    adam: AdamWStep,
    *,
    layouts: Sequence[str] | None = None,
    rank: Tensor | None = None,
) -> None:
    """`DeltaStepPlan.step`, once."""
    lists = {"weights": weights, "bases": bases, "deltas": deltas, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    plan = DeltaStepPlan(gate_maps, n_gates=checks.check_tensor("gate_old", gate_old).numel(), **lists)
    plan.step(grads, gate_old, gate_new, adam, layouts=layouts, rank=rank)
