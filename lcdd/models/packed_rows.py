"""One forward over prompts of any length behind beginnings that they share: no padding, nothing computed twice.

The tokens stand in one row of the model's input, the shared beginnings first:

    [ beginning of start 0 | ... | beginning of start N-1 | row 0 | row 1 | ... | row R-1 ]

Norms, projections and MLPs see tokens and take them as they come; only attention has to know which belong together. It
is handed to the model through transformers' `AttentionInterface`: a row attends to its start's beginning and, causally,
to itself.

Shapes: N starts, P tokens of a beginning, R rows (R/N of each start, in order), n tokens of all rows together, S of the
longest; H query heads of width d.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcdd.models.loading import PreTrainedModel
from lcdd.models.sites import attention_by, backbone

__all__ = ["PackedRows"]


class PackedRows:
    """Where the tokens of N beginnings of P tokens and of rows with `lengths` tokens lie in a forward.

    Attributes:
        first: for each row, the position of its first token in the forward's output.
    """

    def __init__(self, lengths: Sequence[int], *, starts: int, shared: int, device: torch.device) -> None:
        self.starts, self.shared, self.rows, self.longest = starts, shared, len(lengths), max(lengths)
        sizes = torch.tensor(lengths)
        begins = sizes.cumsum(0) - sizes
        row = torch.arange(self.rows).repeat_interleave(sizes)
        within = torch.arange(len(row)) - begins[row]
        self.first: list[int] = (starts * shared + begins).tolist()
        self._slots = (row * self.longest + within).to(device)  # of each token in rows padded to [R·S]
        self._positions = torch.cat([torch.arange(shared).repeat(starts), shared + within])[None].to(device)
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def forward(self, model: PreTrainedModel, embeds: Tensor) -> Tensor:
        """Final hidden states [N·P + n, D] of embeddings [N·P + n, D]. Layers' hooks see [1, N·P + n, D]."""
        with attention_by(model, packed_attention):
            output = backbone(model)(
                inputs_embeds=embeds[None], position_ids=self._positions, use_cache=False, packed_rows=self
            )
        return output.last_hidden_state[0]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[1, H, N·P + n, d] -> the beginnings' [N, H, P, d] and the rows', zeros behind each: [R, H, S, d]."""
        tokens, count = x[0].transpose(0, 1), self.starts * self.shared
        padded = x.new_zeros(self.rows * self.longest, *tokens.shape[1:]).index_copy_(0, self._slots, tokens[count:])
        begin, rows = tokens[:count].unflatten(0, (self.starts, self.shared)), padded.unflatten(0, (self.rows, -1))
        return begin.transpose(1, 2), rows.transpose(1, 2)

    def join(self, begin: Tensor, rows: Tensor) -> Tensor:
        """`split` undone, as attention hands it on: [1, N·P + n, H, d]."""
        tokens = rows.transpose(1, 2).flatten(0, 1).index_select(0, self._slots)
        return torch.cat([begin.transpose(1, 2).flatten(0, 1), tokens])[None]

    def mask(self, queries: int, skip: int, window: int | None) -> Tensor:
        """[queries, skip + queries], what the query at position skip + i sees: True at keys up to it, `window` at most.

        Made once for all layers.
        """
        if (queries, skip, window) not in self._masks:
            keys = torch.arange(skip + queries, device=self._slots.device)
            back = keys[skip:, None] - keys
            seen = back >= 0
            self._masks[queries, skip, window] = seen if window is None else seen & (back < window)
        return self._masks[queries, skip, window]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_rows: PackedRows,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention: [1, heads, N·P + n, d] -> ([1, N·P + n, H, d], None)."""
    packed, heads, groups = packed_rows, query.shape[1], query.shape[1] // key.shape[1]
    begin, rows = packed.split(torch.cat([query, key, value], dim=1))  # together: one launch for what would be three
    q_begin, kv_begin = begin.split([heads, begin.shape[1] - heads], dim=1)
    q_rows, kv_rows = rows.split([heads, rows.shape[1] - heads], dim=1)
    kv_rows = torch.cat([kv_begin.repeat_interleave(packed.rows // packed.starts, dim=0), kv_rows], dim=2)

    def attend(q: Tensor, kv: Tensor, skip: int) -> Tensor:
        k, v = kv.repeat_interleave(groups, dim=1).chunk(2, dim=1)  # masked attention has no kernel for GQA
        mask = packed.mask(q.shape[2], skip, sliding_window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)

    out_begin = attend(q_begin, kv_begin, skip=0) if packed.shared else q_begin
    return packed.join(out_begin, attend(q_rows, kv_rows, skip=packed.shared)), None
