"""One forward over texts of any length behind beginnings that they share: no padding, nothing computed twice.

The tokens stand in one row of the model's input, the shared beginnings first:

    [ beginning of start 0 | ... | beginning of start N-1 | row 0 | row 1 | ... | row R-1 ]

Norms, projections and MLPs see tokens and take them as they come; only attention has to know which belong together. It
is handed to the model through transformers' `AttentionInterface`: a row attends to its start's beginning and, causally,
to itself. A model that was loaded with flash attention keeps its own, which takes such rows as they are
(`cu_seq_lens_q` and the like), but no beginning that several share. A model that keeps its attention to itself, or
whose attention does what this one does not, is run over padded rows, each behind its own copy of the beginning.

In a causal model a beginning's states do not depend on what follows, and every row's gradient for it adds up where it
was computed once: loss and gradients are those of one text at a time.

Shapes: N starts, P tokens of a beginning, R rows (R/N of each start, in order), n tokens of all rows together, S of a
group's longest; H query heads of width d.
"""

import itertools
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcdd.models.sites import attention_by, backbone, decoder_layers, head_weight, input_embeddings, own_attention

__all__ = ["PackedRows", "can_share_prefix", "common_prefix", "packed_attention_in", "packs", "why_not_packed"]

logger = logging.getLogger(__name__)

NO_MATTER = {"position_ids", "use_cache", "output_attentions", "is_causal", "cache_position"}
"""What attentions are told beside what `packed_attention` takes, and it need not know."""
NARROW = 5
"""Windows of attention are narrowed to that many tokens for a trial on a few."""
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
        self.calls = 0  # of attention

    def forward(self, model: PreTrainedModel, embeds: Tensor) -> Tensor:
        """Final hidden states [N·P + n, D] of embeddings [N·P + n, D]; what layers' hooks see is for `tokens`."""
        return self._packed(model, embeds) if packs(model) else self._padded(model, embeds)

    def tokens(self, output: Tensor) -> Tensor:
        """What a layer gives in this forward -> its tokens [N·P + n, D]."""
        return output[0] if len(output) == 1 else output.flatten(0, 1).index_select(0, self._padding[1])

    def _packed(self, model: PreTrainedModel, embeds: Tensor) -> Tensor:
        """[1, N·P + n, D] in every layer."""
        if _own_flash(model) and not self.shared:
            return self._run(model, embeds, **self._flash_arguments())
        _refuse_recomputation(model)
        with attention_by(model, packed_attention):
            return self._run(model, embeds, packed_rows=self)

    def _padded(self, model: PreTrainedModel, embeds: Tensor) -> Tensor:
        """[R, P + S, D] in every layer: zeros behind each row, which under causal attention no token sees."""
        rows = torch.cat([embeds, embeds.new_zeros(1, embeds.shape[1])]).index_select(0, self._padding[0])
        output = backbone(model)(inputs_embeds=rows.unflatten(0, (len(self.lengths), -1)), use_cache=False)
        return self.tokens(output.last_hidden_state)

    @cached_property
    def _padding(self) -> tuple[Tensor, Tensor]:
        """Of rows padded to the longest, each behind its beginning: the packed token in every place [R·(P + S)] (one
        behind the last: padding), and the place of every packed token [N·P + n]."""
        rows, shared, width = len(self.lengths), self.shared, self.shared + max(self.lengths)
        begins, each = self.starts * shared, rows // self.starts
        row = torch.arange(rows).repeat_interleave(torch.tensor(self.lengths))
        place = row * width + torch.cat([shared + torch.arange(length) for length in self.lengths])
        source = torch.full((rows, width), begins + len(row))
        source[:, :shared] = (torch.arange(rows) // each)[:, None] * shared + torch.arange(shared)
        source.view(-1)[place] = begins + torch.arange(len(row))
        begin = (torch.arange(self.starts) * each * width)[:, None] + torch.arange(shared)
        device = self._order.device
        return source.flatten().to(device), torch.cat([begin.flatten(), place]).to(device)

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
        self.calls += 1
        heads, width, count = query.shape[1], value.shape[3], self.starts * self.shared
        if width != query.shape[3]:  # values of another width: their scores with zeros are the same
            size = max(width, query.shape[3])
            how["scaling"] = query.shape[3] ** -0.5 if how["scaling"] is None else how["scaling"]
            query, key, value = (F.pad(x, (0, size - x.shape[3])) for x in (query, key, value))
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
        return out[None, ..., :width]

    def _scores(
        self,
        query: Tensor,
        kv: Tensor,
        *,
        skip: int,
        scaling: float | None,
        window: int | None,
        dropout: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """[R, H, S, d] whose first position is `skip`, [R, 2·H_kv, skip + S, d] -> [R, H, S, d]."""
        groups = query.shape[1] * 2 // kv.shape[1]
        key, value = kv.repeat_interleave(groups, dim=1).chunk(2, dim=1)  # masked attention has no kernel for GQA
        size = query.shape[2]
        if softcap is not None or sinks is not None:
            scale, seen = query.shape[3] ** -0.5 if scaling is None else scaling, self._mask(size, skip, window)
            return _written_out(query * scale, key, value, seen, softcap=softcap, sinks=sinks, dropout=dropout)
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


def _similar(device: torch.device) -> int:
    """Tokens by which rows of a group may differ: on a GPU attention waits for launches, so any number; on a CPU
    padding costs what tokens cost, and a call as much as some."""
    return 16 if torch.device(device).type == "cpu" else 2**31


def _groups(lengths: Sequence[int], *, starts: int, device: torch.device) -> list[_Group]:
    """Rows of similar length together; all rows together where padding is cheaper than launches."""
    found: dict[int, list[int]] = {}
    similar = _similar(device)
    for row, length in enumerate(lengths):
        found.setdefault(-(-length // similar), []).append(row)
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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention: [1, heads, N·P + n, d] -> ([1, N·P + n, H, d], None).

    softcap: scores are capped so. s_aux [H]: a logit in every head's softmax that belongs to no key.

    Raises:
        NotImplementedError: the model hands over something that is not known here.
    """
    if unknown := [name for name, given in more.items() if given is not None and name not in NO_MATTER]:
        raise NotImplementedError(f"packed attention has no {unknown[0]}")
    how = {"scaling": scaling, "window": sliding_window, "dropout": dropout, "softcap": softcap, "sinks": s_aux}
    return packed_rows.attend(query, key, value, **how), None


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, softcap: float | None, sinks: Tensor | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    """Attention of scaled queries whose scores are capped, or with sinks [H]; the softmax at least in float32."""
    scores = query @ key.transpose(2, 3)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(len(query), -1, query.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    shares = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(shares, dropout, training=dropout > 0) @ value


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

_PACKS: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()
"""Models that were tried, and whether they run packed."""


def packs(model: PreTrainedModel) -> bool:
    """Whether this model runs without padding (`why_not_packed`); tried once, and said aloud where it does not."""
    if model not in _PACKS:
        reason = why_not_packed(model)
        if reason is not None:
            logger.warning("%s runs padded, since %s", type(model).__name__, reason)
        _PACKS[model] = reason is None
    return _PACKS[model]


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

    Windows are narrowed for it, so that short texts show them. Costs a few forwards of a dozen tokens. Leaves the model
    as it was.
    """
    inner = backbone(model)
    kinds: set[str] = set(getattr(inner.config, "layer_types", None) or ())
    if not kinds <= BUILT_LAYERS:
        return f"it has layers of kind {sorted(kinds - BUILT_LAYERS)[0]}"
    was_training = inner.training
    inner.eval()
    try:
        with torch.autocast(head_weight(model).device.type, enabled=False), narrow_windows(model), own_attention(model):
            alone, packed = _states_alone_and_packed(model)
    except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
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
    states = rows._packed(model, table(torch.tensor(ids, device=device)))
    if not _own_flash(model) and rows.calls < len(decoder_layers(model)):
        raise NotImplementedError("its attention is its own")
    together = [torch.cat([states[:shared], row]) for row in states[shared:].split(rows.lengths)]
    return torch.cat([output.last_hidden_state[0] for output in alone]), torch.cat(together)


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Inside, windows and chunks of attention are `NARROW` tokens."""
    changed: list[tuple[Any, str, int]] = []
    for holder in (backbone(model).config, *model.modules()):
        for name in ("sliding_window", "attention_chunk_size"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > NARROW:
                changed.append((holder, name, value))
                setattr(holder, name, NARROW)
    try:
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)
