"""A dense patch between two sharded models, of which every rank has its own rows alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from lcdd.carrier.carrier import Carrier
from lcdd.carrier.patching import rows_here
from lcdd.errors import InputError
from lcdd.models import Matrix, PreTrainedModel, check_same_architecture, shards, sites_of


@dataclass(frozen=True, eq=False, kw_only=True)
class RowsPatch(Carrier):
    """A dense patch between sharded models, or what ablation leaves of one: to be applied, and not to be saved.

    spans: of each masked matrix the rows that are on this rank. deltas: Δ on those of them that are open [rows, open
    columns], float32 (float64 beside float64 weights), on the CPU. Gates are 0 or 1. `delta_norm`, `summary` and
    `check_base` are collectives, to be called on every rank.
    """

    spans: Mapping[str, range] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def from_models(cls, base: PreTrainedModel, other: PreTrainedModel) -> "RowsPatch":
        """What turns `base` into `other`, within one rounding of each weight; a collective.

        Raises:
            InputError: the models differ in architecture, or in something that is not finite.
        """
        check_same_architecture(base, other, names=("base", "other"))
        for model in (base, other):
            shards.reshard(model)
        deltas, spans = {}, {}
        for ours, theirs in zip(sites_of(base), sites_of(other), strict=True):
            (fixed, first), (weight, _) = rows_here(ours), rows_here(theirs)
            spans[ours.name] = range(first, first + len(fixed))
            wide = torch.promote_types(fixed.dtype, torch.float32)
            deltas[ours.name] = (weight.to(wide) - fixed.to(wide)).cpu()
        patch = replace(cls._all_open(base, other, deltas), spans=spans)
        finite = all(bool(tensor.isfinite().all()) for tensor in (*deltas.values(), *patch.unmasked.values()))
        if not shards.all_agree(finite):
            raise InputError("other: expected finite values, got NaN or infinity")
        return patch

    def __post_init__(self) -> None:
        """Whole blocks are what a carrier from elsewhere is checked for."""

    def delta_norm(self) -> float:
        own = [delta.double().square().sum() for delta in self.deltas.values()]
        return math.sqrt(shards.total(float(sum(own))) + self.unmasked_norm**2)

    def save_pretrained(self, directory: str | Path) -> NoReturn:
        raise InputError(f"patch: expected a whole one to save in {str(directory)!r}, got the rows of one rank")

    def open_block(self, gate: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
        rows, cols = super().open_block(gate, matrix)
        span = self.spans[matrix.name]
        return rows[(rows >= span.start) & (rows < span.stop)], cols

    def _rows(self, name: str, here: slice) -> Tensor:
        return self.deltas[name]


def dense_patch(base: PreTrainedModel, other: PreTrainedModel) -> Carrier:
    """What turns `base` into `other`, every gate open; of sharded models each rank has its rows alone."""
    kind = RowsPatch if shards.holds_shards(base) else Carrier
    return kind.from_models(base, other)
