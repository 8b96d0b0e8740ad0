"""A model's structure as far as costs depend on it: its layers' masked weights, widths, norms, feed-forwards, windows.

`Architecture.of` reads it off the modules, on the meta device as well, so that `lcdd.models.costs` holds for any
decoder that has sites.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lcdd.models.layout import Matrix
from lcdd.models.sites import decoder_layers, layout_of, matched_blocks, shape_of

FLOAT32 = 4  # bytes; RMSNorm and softmax statistics are kept in float32 whatever the weights' dtype
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")
"""Names of the setting that says how many experts a token goes through."""
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Type of a layer -> the setting that says how far it looks back."""


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A masked parameter of a layer: `experts` matrices [rows, cols] (1 where it is no stack of experts), of which a
    token goes through `chosen`. linear: it is the weight of an nn.Linear, whose gradient can be packed."""

    kind: str
    rows: int
    cols: int
    experts: int = 1
    chosen: int = 1
    linear: bool = True

    @property
    def parameters(self) -> int:
        return self.experts * self.rows * self.cols

    @property
    def active(self) -> int:
        """Parameters that a token goes through."""
        return self.chosen * self.rows * self.cols


@dataclass(frozen=True, kw_only=True)
class Norm:
    """values: of a token that it normalises; rows: into how many rows they fall. native: PyTorch's own LayerNorm."""

    values: int
    rows: int = 1
    native: bool = False

    def saved(self, item: int) -> int:
        """Bytes of a token kept for the backward: its input (in float32 unless native) and 1/rms, or mean and 1/std."""
        return self.values * (item if self.native else FLOAT32) + self.rows * FLOAT32 * (2 if self.native else 1)


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """width: of its hidden channels; gated: by a product of two projections. experts: how many like it a token goes
    through; 0: it is no expert, and every token goes through it."""

    width: int
    gated: bool
    experts: int = 0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer, as far as its costs depend on it.

    parameters: all of it. queries, keys, values: widths of all heads together. norms: of the residual stream;
    head_norms: inside the attention. window: the farthest that attention looks back; None: to the beginning.
    norm_first: nothing reads its input before a norm does.
    """

    masked: tuple[Masked, ...]
    parameters: int
    width: int
    queries: int
    keys: int
    values: int
    heads: int
    feed_forwards: tuple[FeedForward, ...]
    norms: tuple[Norm, ...]
    head_norms: tuple[Norm, ...]
    window: int | None
    norm_first: bool

    @property
    def masked_parameters(self) -> int:
        return sum(weight.parameters for weight in self.masked)

    @property
    def active_parameters(self) -> int:
        """Masked parameters that a token goes through."""
        return sum(weight.active for weight in self.masked)

    @property
    def fused_attention(self) -> bool:
        """Whether queries, keys and values come out of one projection, and are kept in one piece."""
        return any(weight.kind == "qkv" for weight in self.masked)

    def keys_seen(self, sequence: int) -> float:
        """Keys that a query attends to, on average over a causal sequence."""
        window = min(self.window or sequence, sequence)
        return window - window**2 / (2 * sequence)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model's structure. parameters: all, each once where tied. rotary: position tables that the layers share."""

    layers: tuple[Layer, ...]
    parameters: int
    n_gates: int
    width: int
    vocab_size: int
    head_dim: int
    rotary: bool
    last_norm: Norm

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Architecture":
        """Of any model that has sites, on whatever device.

        A mixture of experts whose config does not say how many a token goes through is taken to use all of them.

        Raises:
            InputError: its layers cannot be masked, or its config does not state its sizes.
        """
        shape, layout = shape_of(model.config), layout_of(model)
        settings: Any = model.config.get_text_config(decoder=True)
        blocks = zip(decoder_layers(model), matched_blocks(model)[1], layout.layers, strict=True)
        layers = tuple(
            _Reader(module, block.matrices, dict(sizes), number, settings).layer(shape.n_heads)
            for number, (module, block, sizes) in enumerate(blocks)
        )
        native = any(norm.native for norm in layers[-1].norms)
        return cls(
            layers=layers,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            n_gates=layout.n_gates,
            width=layers[0].width,
            vocab_size=shape.vocab_size,
            head_dim=shape.head_dim,
            rotary=any("Rotary" in type(module).__name__ for module in model.modules()),
            last_norm=Norm(values=layers[-1].width, native=native),
        )

    @cached_property
    def kinds(self) -> "Counter[Layer]":
        """Distinct layers, and how many there are of each."""
        return Counter(self.layers)

    @cached_property
    def weights(self) -> "Counter[Masked]":
        """Distinct masked parameters, and how many there are of each."""
        found: Counter[Masked] = Counter()
        for layer, count in self.kinds.items():
            found.update({weight: count * layer.masked.count(weight) for weight in set(layer.masked)})
        return found

    @property
    def masked_parameters(self) -> int:
        return sum(count * layer.masked_parameters for layer, count in self.kinds.items())

    @property
    def active_parameters(self) -> int:
        """Masked parameters that a token goes through."""
        return sum(count * layer.active_parameters for layer, count in self.kinds.items())

    @property
    def largest_layer(self) -> int:
        """Masked parameters of the largest layer."""
        return max(layer.masked_parameters for layer in self.kinds)

    @property
    def largest_weight(self) -> int:
        """Elements of the largest masked parameter."""
        return max(weight.parameters for layer in self.kinds for weight in layer.masked)


# ---------------------------------------------------------------- reading it off the modules


@dataclass(frozen=True)
class _Reader:
    """One decoder layer, its matrices, and the sizes of its groups of gates."""

    module: nn.Module
    matrices: Sequence[Matrix]
    sizes: dict[str, int]
    number: int
    settings: Any

    def layer(self, heads: int) -> Layer:
        norms = list(self._norms())
        outside = [norm for name, norm in norms if not self._in_attention(name)]
        first = next((name for name, _ in norms if not self._in_attention(name)), "")
        return Layer(
            masked=tuple(self._masked()),
            parameters=sum(parameter.numel() for parameter in self.module.parameters()),
            width=self.sizes["attn_write"],
            queries=self.sizes["attn_q"],
            keys=self.sizes["attn_k"],
            values=self.sizes["attn_v"],
            heads=heads,
            feed_forwards=tuple(self._feed_forwards()),
            norms=tuple(outside),
            head_norms=tuple(norm for name, norm in norms if self._in_attention(name)),
            window=self._window(),
            norm_first=bool(first) and not first.startswith("post"),
        )

    def _masked(self) -> Iterator[Masked]:
        for name, slices in self._by_parameter().items():
            matrix = slices[0]
            owner = self.module.get_submodule(name.rpartition(".")[0])
            experts = {} if matrix.part is None else {"experts": len(slices), "chosen": self._chosen(len(slices))}
            rows, cols = matrix.shape
            yield Masked(kind=matrix.kind, rows=rows, cols=cols, linear=type(owner) is nn.Linear, **experts)

    def _feed_forwards(self) -> Iterator[FeedForward]:
        stacks = self._by_parameter()
        gated = {group for m in self.matrices if m.kind in ("gate", "gate_up") for group in _hidden(m)}
        for slices in stacks.values():
            matrix = slices[0]
            if matrix.kind == "down":
                group = next(iter(_hidden(matrix)))
                experts = 0 if matrix.part is None else self._chosen(len(slices))
                yield FeedForward(width=self.sizes[group], gated=group in gated, experts=experts)

    def _by_parameter(self) -> dict[str, list[Matrix]]:
        found: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            found.setdefault(matrix.parameter, []).append(matrix)
        return found

    def _chosen(self, experts: int) -> int:
        for name in CHOSEN_EXPERTS:
            value = getattr(self.settings, name, None)
            if value is not None:
                return min(value[self.number] if isinstance(value, list | tuple) else value, experts)
        return experts

    def _in_attention(self, name: str) -> bool:
        attention = next(m.name for m in self.matrices if m.kind == "o").rpartition(".")[0]
        return bool(attention) and name.startswith(f"{attention}.")

    def _norms(self) -> Iterator[tuple[str, Norm]]:
        """Path and norm of every module that says in its class's name that it is one."""
        for name, module in self.module.named_modules():
            if "Norm" not in type(module).__name__:
                continue
            values, last = self.sizes["attn_write"], name.rpartition(".")[2]
            if self._in_attention(name):
                sides = {"qk": ("attn_q", "attn_k"), "q": ("attn_q",), "k": ("attn_k",)}
                side = next((groups for start, groups in sides.items() if last.startswith(start)), ())
                values = sum(self.sizes[group] for group in side) or values
            weight = getattr(module, "weight", None)
            row = weight.shape[-1] if weight is not None else self._head_or(values, name)
            yield name, Norm(values=values, rows=max(1, values // row), native=isinstance(module, nn.LayerNorm))

    def _head_or(self, values: int, name: str) -> int:
        head = getattr(self.settings, "head_dim", None)
        return head if self._in_attention(name) and isinstance(head, int) else values

    def _window(self) -> int | None:
        kinds = getattr(self.settings, "layer_types", None)
        setting = WINDOWS.get(kinds[self.number]) if kinds else "sliding_window"
        return getattr(self.settings, setting, None) or None if setting else None


def _hidden(matrix: Matrix) -> set[str]:
    """Groups of hidden channels that a matrix reads or writes."""
    groups = {group for _, weave in matrix.sides() for group in weave.sizes()}
    return {group for group in groups if group.startswith("ffn_hidden")}
