"""The carrier as a patch: apply, revert, fold, ablate, export."""

from lcdd.carrier.ablate import (
    only_channels,
    random_channels,
    with_gates,
    without_channels,
    without_group,
    without_layer,
)
from lcdd.carrier.carrier import MANIFEST, WEIGHTS, Carrier
from lcdd.carrier.compose import compose, overlap, prices_of
from lcdd.carrier.dense import RowsPatch, dense_patch
from lcdd.carrier.export import export_adapter, export_delta
from lcdd.carrier.patching import open_block

__all__ = [
    "MANIFEST",
    "WEIGHTS",
    "Carrier",
    "RowsPatch",
    "compose",
    "dense_patch",
    "export_adapter",
    "export_delta",
    "only_channels",
    "open_block",
    "overlap",
    "prices_of",
    "random_channels",
    "with_gates",
    "without_channels",
    "without_group",
    "without_layer",
]
