"""Where every gate of a model lives: eight groups a layer in one flat vector (method, section 1).

`GateLayout` is pure geometry: it maps (layer, group) to a slice of the gate logits θ, and a projection to the
slices that gate its rows and its columns. `Gates` is what is trained: θ, and the gates drawn from it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lcdd.models.sites import PROJECTION_PATHS, ModelShape
from lcdd_kernels import GateMap

GROUPS = ("attn_read", "attn_q", "attn_k", "attn_v", "attn_write", "ffn_read", "ffn_hidden", "ffn_write")

# projection -> (group gating its rows, group gating its columns)
ROW_AND_COL_GROUPS = {
    "q": ("attn_q", "attn_read"),
    "k": ("attn_k", "attn_read"),
    "v": ("attn_v", "attn_read"),
    "o": ("attn_write", "attn_v"),
    "gate": ("ffn_hidden", "ffn_read"),
    "up": ("ffn_hidden", "ffn_read"),
    "down": ("ffn_write", "ffn_hidden"),
}


@dataclass(frozen=True)
class GateLayout:
    """Slices of the flat gate vector, layer by layer, groups in the order of `GROUPS`."""

    shape: ModelShape

    @cached_property
    def group_sizes(self) -> dict[str, int]:
        """Gates in each group of one layer."""
        s = self.shape
        keys = s.n_kv_heads * s.head_dim
        sizes = (s.d_model, s.n_heads * s.head_dim, keys, keys, s.d_model, s.d_model, s.d_ff, s.d_model)
        return dict(zip(GROUPS, sizes, strict=True))

    @cached_property
    def n_gates(self) -> int:
        return self.shape.n_layers * sum(self.group_sizes.values())

    @cached_property
    def offsets(self) -> Tensor:
        """Group boundaries, int64 [n_layers · 8 + 1], on the CPU; group g of layer l is number 8·l + g."""
        sizes = torch.tensor(list(self.group_sizes.values()) * self.shape.n_layers)
        return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])

    def group_number(self, layer: int, group: str) -> int:
        """Index of a group in `offsets`, and in the counts of open gates."""
        if not 0 <= layer < self.shape.n_layers:
            raise ValueError(f"layer: expected 0 to {self.shape.n_layers - 1}, got {layer}")
        if group not in GROUPS:
            raise ValueError(f"group: expected one of {GROUPS}, got {group!r}")
        return layer * len(GROUPS) + GROUPS.index(group)

    def slice(self, layer: int, group: str) -> slice:
        """The slice of the flat gate vector that belongs to `group` of `layer`."""
        number = self.group_number(layer, group)
        return slice(int(self.offsets[number]), int(self.offsets[number + 1]))

    def gate_map(self, kind: str, layer: int) -> GateMap:
        """How the projection `kind` of `layer` finds its row and column gates in the flat vector.

        The columns of `o` are the value channels, each KV head's slice repeated for the query heads it serves.
        """
        if kind not in PROJECTION_PATHS:
            raise ValueError(f"kind: expected one of {tuple(PROJECTION_PATHS)}, got {kind!r}")
        row_group, col_group = ROW_AND_COL_GROUPS[kind]
        columns = self.shape.weight_shape(kind)[1]
        grouped = kind == "o"
        return GateMap(
            row_start=self.slice(layer, row_group).start,
            col_start=self.slice(layer, col_group).start,
            head_dim=self.shape.head_dim if grouped else columns,
            repeat=self.shape.n_heads // self.shape.n_kv_heads if grouped else 1,
        )

    def by_group(self, values: Tensor) -> dict[str, Tensor]:
        """Sum `values` [n_gates], any device, over layers and channels: one scalar tensor a group."""
        per_layer = values.view(self.shape.n_layers, -1)
        parts = per_layer.split(list(self.group_sizes.values()), dim=1)
        return {group: part.sum() for group, part in zip(GROUPS, parts, strict=True)}
