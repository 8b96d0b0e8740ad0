"""Several patches of one base in one model: their sum, and how far they meet.

W = W_base + Σ_k (r_k ⊗ c_k) ∘ Δ_k. The sum is taken in float64 and in an order that the patches' own bytes decide, so
that a set of patches has one result, bit for bit, in whatever order it is named. B - A is `compose([B, A.scaled(-1)])`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lcdd.carrier.carrier import Carrier
from lcdd.carrier.patching import open_block
from lcdd.errors import InputError
from lcdd.models import GateLayout, Matrix

DEAR = 10.0
"""Price of a gate that another carrier has open: it stays where it is worth ten times what any other gate is."""


def compose(patches: Sequence[Carrier]) -> Carrier:
    """One patch that adds to the base what all of `patches` add; its gates are 0 or 1, open where any of theirs is.

    Δ is float32 at least: each entry is the float64 sum, rounded once. What the patches have on record of tokenizer and
    chat template goes along.

    Raises:
        InputError: no patches, patches of different bases or asked in different ways, or one that changes more than
            masked matrices.
    """
    if not patches:
        raise InputError("patches: expected at least one, got none")
    first = patches[0]
    for patch in patches:
        if patch.base_fingerprint != first.base_fingerprint or patch.layout != first.layout:
            raise InputError(
                f"patches: expected patches of one base, got fingerprints {first.base_fingerprint[:16]}… and "
                f"{patch.base_fingerprint[:16]}…"
            )
        if patch.unmasked:
            raise InputError(f"patches: expected masked matrices alone, got {sorted(patch.unmasked)[:3]} as well")
    asked = _asked(patches)
    ordered = sorted(patches, key=_digest)
    is_open = torch.stack([patch.gate != 0 for patch in ordered]).any(0)
    kinds = [torch.promote_types(delta.dtype, torch.float32) for patch in ordered for delta in patch.deltas.values()]
    dtype = reduce(torch.promote_types, kinds)
    gate = is_open.to(dtype)
    deltas = {}
    for matrix in first.layout.matrices:
        rows, cols = open_block(gate, first.layout, matrix)
        total = torch.zeros(len(rows), len(cols), dtype=torch.float64, device="cpu")
        for patch in ordered:
            own_rows, own_cols, block = _block(patch, matrix)
            total[torch.searchsorted(rows, own_rows)[:, None], torch.searchsorted(cols, own_cols)] += block
        deltas[matrix.name] = total.to(dtype)
    return replace(
        first, gate_kind="heaviside_ste", gate_logits=gate * 2 - 1, gate=gate, deltas=deltas, initial_logits=None,
        tokenizer=asked,
    )  # fmt: skip


def prices_of(patches: Sequence[Carrier], layout: GateLayout) -> Tensor:
    """Prices of gates, float32 [n_gates], for a carrier that is to keep clear of `patches`: `DEAR` where one is open.

    Raises:
        InputError: a patch of another layout.
    """
    prices = torch.ones(layout.n_gates, device="cpu")
    for patch in patches:
        if patch.layout != layout:
            raise InputError(f"patches: expected a carrier {layout.difference(patch.layout)}")
        prices[patch.gate != 0] = DEAR
    return prices


def overlap(first: Carrier, second: Carrier) -> dict[str, float]:
    """How far two patches meet.

    Returns:
        `gates`: Jaccard index of their open gates; `entries`: that of the entries of all masked matrices; `cosine`:
        of what they add to the weights.
    """
    both = (first.gate != 0) & (second.gate != 0)
    either = (first.gate != 0) | (second.gate != 0)
    shared = together = inner = 0.0
    for matrix in first.layout.matrices:
        rows, cols = (_common(a, b) for a, b in zip(_block(first, matrix)[:2], _block(second, matrix)[:2], strict=True))
        blocks = [_part(patch, matrix, rows, cols) for patch in (first, second)]
        shared += blocks[0].numel()
        together += first.deltas[matrix.name].numel() + second.deltas[matrix.name].numel() - blocks[0].numel()
        inner += float((blocks[0] * blocks[1]).sum())
    norms = first.delta_norm() * second.delta_norm()
    return {
        "gates": float(both.sum()) / max(1.0, float(either.sum())),
        "entries": shared / max(1.0, together),
        "cosine": inner / norms if norms else 0.0,
    }


def _asked(patches: Sequence[Carrier]) -> dict[str, Any]:
    """The records of tokenizer and template, which have to agree as far as they go."""
    found: dict[str, Any] = {}
    for patch in patches:
        for key, value in sorted(patch.tokenizer.items()):
            if found.setdefault(key, value) != value:
                raise InputError(f"patches: expected carriers trained with one {key}, got {found[key]!r} and {value!r}")
    return found


def _block(patch: Carrier, matrix: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Open rows, open columns, and (r ⊗ c) ∘ Δ on them in float64."""
    rows, cols = open_block(patch.gate, patch.layout, matrix)
    row_gate, col_gate = patch.layout.row_and_col_gates(patch.gate.double(), matrix)
    return rows, cols, row_gate[rows][:, None] * col_gate[cols] * patch.deltas[matrix.name].double()


def _part(patch: Carrier, matrix: Matrix, rows: Tensor, cols: Tensor) -> Tensor:
    own_rows, own_cols, block = _block(patch, matrix)
    return block[torch.searchsorted(own_rows, rows)[:, None], torch.searchsorted(own_cols, cols)]


def _common(first: Tensor, second: Tensor) -> Tensor:
    return first[torch.isin(first, second)]


def _digest(patch: Carrier) -> str:
    found = hashlib.sha256(patch.gate.double().numpy().tobytes())
    for matrix in patch.layout.matrices:
        found.update(patch.deltas[matrix.name].double().contiguous().numpy().tobytes())
    return found.hexdigest()
