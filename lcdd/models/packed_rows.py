"""One forward over texts of any length behind beginnings that they share: no padding, nothing computed twice.

The tokens stand in one row of the model's input, the shared beginnings first:

    [ beginning of start 0 | ... | beginning of start N-1 | row 0 | row 1 | ... | row R-1 ]

Norms, projections and MLPs see tokens and take them as they come; only attention has to know which belong together. It
is handed to the model through transformers' `AttentionInterface`: a row attends to its start's beginning and, causally,
to itself. A model that was loaded with flash attention keeps its own, which takes such rows as they are
(`cu_seq_lens_q` and the like), but no beginning that several share.

In a causal model a beginning's states do not depend on what follows, and every row's gradient for it adds up where it
was computed once: loss and gradients are those of one text at a time.

Shapes: N starts, P tokens of a beginning, R rows (R/N of each start, in order), n tokens of all rows together, S of a
group's longest; H query heads of width d.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcdd.models.loading import PreTrainedModel
from lcdd.models.sites import attention_by, backbone, head_weight, input_embeddings

__all__ = ["PackedRows", "can_share_prefix", "common_prefix", "packed_attention_in", "why_not_packed"]


NOT_BUILT = ("softcap", "s_aux", "position_bias", "attention_bias")
"""What attentions of some architectures add to the scores, by transformers' names, and packed attention does not."""
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.08}
"""Packed texts' final states may differ from the same texts' alone by this share of the largest one; a token that sees
another text or stands at another position is farther off."""
BUILT_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers whose attention this is, by transformers' names; others hide keys, or are no attention at all."""


class PackedRows:
    """Where the tokens of N beginnings of P tokens and of rows with `lengths` tokens lie in a forward.

    Attributes:
        first: for each row, the position of its first token in the forward's output.
    """

    def __init__(self, lengths: Sequence[int], *, starts: int = 1, shared: int = 0, device: torch.device) -> None:
        self.starts, self.shared, self.lengths = starts, shared, list(lengths)
        sizes = torch.tensor(self.lengths)
        begins = sizes.cumsum(0) - sizes
        within = torch.cat([torch.arange(length) for length in self.lengths])
        self.first: list[int] = (starts * shared + begins).tolist()
        self._positions = torch.cat([torch.arange(shared).repeat(starts), shared + within])[None].to(device)
        self._groups = _groups(self.lengths, starts=starts, device=device)
        order = torch.cat([group.tokens for group in self._groups])
        self._order = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def forward(self, model: PreTrainedModel, embeds: Tensor) -> Tensor:
        """Final hidden states [N·P + n, D] of embeddings [N·P + n, D]. Layers' hooks see [1, N·P + n, D]."""
        if _own_flash(model) and not self.shared:
            return self._run(model, embeds, **self._flash_arguments())
        _refuse_recomputation(model)
        with attention_by(model, packed_attention):
            return self._run(model, embeds, packed_rows=self)

    def _run(self, model: PreTrainedModel, embeds: Tensor, **more: Any) -> Tensor:
        output = backbone(model)(inputs_embeds=embeds[None], position_ids=self._positions, use_cache=False, **more)
        return output.last_hidden_state[0]

    def _flash_arguments(self) -> dict[str, Any]:
        """transformers' `FlashAttentionKwargs` of these rows."""
        ends = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=self._order.device)
        longest = max(self.lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """[1, H, N·P + n, d], [1, H_kv, N·P + n, d] twice -> [1, N·P + n, H, d]."""
        heads, count = query.shape[1], self.starts * self.shared
        # together: one gather for what would be three
        tokens = torch.cat([query, key, value], dim=1)[0].transpose(0, 1)
        begin = tokens[:count].unflatten(0, (self.starts, self.shared)).transpose(1, 2)
        q_begin, kv_begin = begin[:, :heads], begin[:, heads:]
        outputs = []
        for group in self._groups:
            rows = group.gather(tokens[count:])
            kv = torch.cat([kv_begin[group.start], rows[:, heads:]], dim=2) if count else rows[:, heads:]
            outputs.append(group.scatter(self._scores(rows[:, :heads], kv, skip=self.shared, **how)))
        out = torch.cat(outputs).index_select(0, self._order)
        if count:
            out = torch.cat([self._scores(q_begin, kv_begin, skip=0, **how).transpose(1, 2).flatten(0, 1), out])
        return out[None]

    def _scores(
        self, query: Tensor, kv: Tensor, *, skip: int, scaling: float | None, window: int | None, dropout: float
    ) -> Tensor:
        """[R, H, S, d] whose first position is `skip`, [R, 2·H_kv, skip + S, d] -> [R, H, S, d]."""
        groups = query.shape[1] * 2 // kv.shape[1]
        key, value = kv.repeat_interleave(groups, dim=1).chunk(2, dim=1)  # masked attention has no kernel for GQA
        size = query.shape[2]
        mask = None if skip == 0 and (window is None or size <= window) else self._mask(size, skip, window)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout
        )

    def _mask(self, queries: int, skip: int, window: int | None) -> Tensor:
        """[queries, skip + queries], what the query at position skip + i sees: True at keys up to it, `window` at most.

        Made once for all layers.
        """
        if (queries, skip, window) not in self._masks:
            keys = torch.arange(skip + queries, device=self._order.device)
            back = keys[skip:, None] - keys
            seen = back >= 0
            self._masks[queries, skip, window] = seen if window is None else seen & (back < window)
        return self._masks[queries, skip, window]


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows that attend in one call, padded to their longest.

    tokens: where their tokens stand among all rows', int64 [n_g]. slots: where each stands among [R_g · S], None where
    there is no padding. start: which start each row belongs to, int64 [R_g].
    """

    tokens: Tensor
    slots: Tensor | None
    start: Tensor
    longest: int

    def gather(self, x: Tensor) -> Tensor:
        """[n, H, d] -> [R_g, H, S, d], zeros behind shorter rows."""
        rows = x.index_select(0, self.tokens)
        if self.slots is not None:
            empty = x.new_zeros(len(self.start) * self.longest, *x.shape[1:])
            rows = empty.index_copy_(0, self.slots, rows)
        return rows.unflatten(0, (len(self.start), self.longest)).transpose(1, 2)

    def scatter(self, rows: Tensor) -> Tensor:
        """[R_g, H, S, d] -> [n_g, H, d], in the order of `tokens`."""
        flat = rows.transpose(1, 2).flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)


def _pads(device: torch.device) -> bool:
    """On a GPU attention waits for launches, on a CPU padding costs what tokens cost."""
    return torch.device(device).type != "cpu"


def _groups(lengths: Sequence[int], *, starts: int, device: torch.device) -> list[_Group]:
    """Rows of one length together; all rows together where padding is cheaper than launches."""
    found: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        found.setdefault(0 if _pads(device) else length, []).append(row)
    begins = [0, *itertools.accumulate(lengths)]
    groups = []
    for rows in found.values():
        longest = max(lengths[row] for row in rows)
        tokens = torch.cat([torch.arange(begins[row], begins[row] + lengths[row]) for row in rows])
        slots = torch.cat([torch.arange(lengths[row]) + place * longest for place, row in enumerate(rows)])
        padded = len(slots) < len(rows) * longest
        start = torch.tensor([row // (len(lengths) // starts) for row in rows])
        groups.append(
            _Group(tokens.to(device), slots.to(device) if padded else None, start.to(device), longest=longest)
        )
    return groups


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_rows: PackedRows,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention: [1, heads, N·P + n, d] -> ([1, N·P + n, H, d], None)."""
    if wanted := [name for name in NOT_BUILT if more.get(name) is not None]:
        raise NotImplementedError(f"packed attention has no {wanted[0]}")
    how = {"scaling": scaling, "window": sliding_window, "dropout": dropout}
    return packed_rows.attend(query, key, value, **how), None


@contextmanager
def packed_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` attends as `PackedRows` say.

    `PackedRows.forward` does this itself; around forward and backward it is needed where the backward recomputes
    activations.
    """
    if _own_flash(model):
        yield
        return
    with attention_by(model, packed_attention):
        yield


def _own_flash(model: PreTrainedModel) -> bool:
    return str(backbone(model).config._attn_implementation).startswith("flash_attention")  # type: ignore[union-attr]


def _refuse_recomputation(model: PreTrainedModel) -> None:
    """Raise where the backward would recompute layers with another attention than the forward's."""
    inner = backbone(model)
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in inner.modules())
    outside = inner.config._attn_implementation != f"lcdd_{packed_attention.__name__}"  # type: ignore[union-attr]
    if recomputes and outside and torch.is_grad_enabled() and inner.training:
        raise RuntimeError(
            "PackedRows: with activation checkpointing, forward and backward have to run inside packed_attention_in"
        )


# ---------------------------------------------------------------- what a model can do


def common_prefix(rows: Sequence[Sequence[int]], *, at_most: int) -> int:
    """How many tokens all rows begin with (a chat template's, a system prompt), `at_most` of them."""
    first = min(rows, key=len)
    longest = min(len(first), at_most)
    for place in range(longest):
        if any(row[place] != first[place] for row in rows):
            return place
    return longest


def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether texts may share one computation of their beginning: not where dropout would be drawn once for all."""
    if _own_flash(model):
        return False
    inner = backbone(model)
    dropout = float(getattr(inner.config, "attention_dropout", 0.0) or 0.0)
    return dropout == 0 and not any(isinstance(m, nn.Dropout) and m.p > 0 for m in inner.modules())


@torch.no_grad()
def why_not_packed(model: PreTrainedModel) -> str | None:
    """Why this model cannot run `PackedRows` exactly, None if it can: tried on three short texts, alone and packed.

    Costs a few forwards of a dozen tokens. Leaves the model as it was.
    """
    inner = backbone(model)
    kinds: set[str] = set(getattr(inner.config, "layer_types", None) or ())
    if not kinds <= BUILT_LAYERS:
        return f"it has layers of kind {sorted(kinds - BUILT_LAYERS)[0]}"
    was_training = inner.training
    inner.eval()
    try:
        with torch.autocast(head_weight(model).device.type, enabled=False):
            alone, packed = _states_alone_and_packed(model)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return f"it does not take them: {error}"
    finally:
        inner.train(was_training)
    difference = float((packed - alone).float().abs().max() / alone.float().abs().max())
    if difference > ROUNDING[alone.dtype]:
        return f"packed texts differ from the same texts alone by {difference:.2g} of the largest state"
    return None


def _states_alone_and_packed(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Final hidden states [21, D] of three texts with three tokens in common, one by one and together."""
    inner, shared, table = backbone(model), 3 if can_share_prefix(model) else 0, input_embeddings(model)
    device = table.weight.device
    texts = [
        [(place if place < 3 else (7 * number + 5) * place) % table.num_embeddings for place in range(length)]
        for number, length in enumerate((9, 5, 7))
    ]
    ids = [*texts[0][:shared], *itertools.chain(*(text[shared:] for text in texts))]
    alone = [inner(input_ids=torch.tensor([text], device=device), use_cache=False) for text in texts]
    rows = PackedRows([len(text) - shared for text in texts], shared=shared, device=device)
    states = rows.forward(model, table(torch.tensor(ids, device=device)))
    together = [torch.cat([states[:shared], row]) for row in states[shared:].split(rows.lengths)]
    return torch.cat([output.last_hidden_state[0] for output in alone]), torch.cat(together)
