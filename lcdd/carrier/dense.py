"""A dense patch between two sharded models, of which every rank has its own rows alone."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from lcdd.carrier.carrier import Carrier
from lcdd.carrier.patching import rows_here
from lcdd.errors import InputError
from lcdd.models import PreTrainedModel, check_same_architecture, shards, sites_of


@dataclass(frozen=True, eq=False, kw_only=True)
class RowsPatch(Carrier):
    """A patch with every gate open, between models that are sharded: to be applied, and not to be saved.

    deltas: of each masked matrix this rank's rows [rows here, columns], float32 (float64 beside float64 weights), on
    the CPU. `delta_norm`, `summary` and `check_base` are collectives, to be called on every rank.
    """

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
        deltas = {}
        for ours, theirs in zip(sites_of(base), sites_of(other), strict=True):
            (fixed, _), (weight, _) = rows_here(ours), rows_here(theirs)
            wide = torch.promote_types(fixed.dtype, torch.float32)
            deltas[ours.name] = (weight.to(wide) - fixed.to(wide)).cpu()
        patch = cls._all_open(base, other, deltas)
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

    def _rows(self, name: str, here: slice) -> Tensor:
        return self.deltas[name]
