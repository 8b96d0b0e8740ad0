"""The carrier as a patch: apply, revert, fold, ablate."""

from lcdd.carrier.ablate import (
    only_channels,
    random_channels,
    with_gates,
    without_channels,
    without_group,
    without_layer,
)
from lcdd.carrier.carrier import MANIFEST, WEIGHTS, Carrier

__all__ = [
    "MANIFEST",
    "WEIGHTS",
    "Carrier",
    "only_channels",
    "random_channels",
    "with_gates",
    "without_channels",
    "without_group",
    "without_layer",
]
