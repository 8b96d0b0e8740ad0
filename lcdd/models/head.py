"""What a model makes of its last hidden states: logits = scale · (h Wᵀ + b), soft-capped in some, and losses of them.

Gemma 2 caps its logits, Granite divides and Cohere multiplies them, some scale the hidden state before the head: losses
that multiply by the head themselves have to do the same. Where a config says so differs from family to family, so it is
measured: the head's output is replaced by known numbers on its way, and what the model makes of them is looked at.

Shapes: T tokens, D model width, V vocabulary.
"""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcdd.errors import InputError
from lcdd.models import shards
from lcdd.models.sites import backbone, head_weight, own_attention, probe_ids
from lcdd_kernels import linear_cross_entropy, linear_kl

_SHAPES: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[float, float | None]]" = weakref.WeakKeyDictionary()
"""(scale, softcap) of models that were measured."""
REACH, NEAR = 60.0, 1e-3
"""Known logits go that far from 0, twice Gemma's cap; one is so near that no cap bends it."""
CLOSE = 1e-5
"""Relative: what float32 leaves of a measured number. One so close to a number in the config, or its inverse, is it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Head:
    """A model's head: weight [V, D] (whole, or rows over the ranks), frozen bias [V] or None, what the product is
    multiplied by, where it is capped."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def cross_entropy(self, hidden: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        """`linear_cross_entropy` of final hidden states [T, D] against labels [T]."""
        weight, shape = self._as(hidden)
        return linear_cross_entropy(hidden, weight, labels, **shape, **settings)

    def kl(self, hidden: Tensor, *, ref_hidden: Tensor, ref_head: "Head", **settings: Any) -> Tensor:
        """`linear_kl` from the logits of `ref_head` on `ref_hidden` to this head's on `hidden`, both [T, D].

        Raises:
            InputError: the heads shape their logits differently.
        """
        if (self.scale, self.softcap) != (ref_head.scale, ref_head.softcap):
            raise InputError(
                f"ref_head: expected logits of scale {self.scale:g} and cap {self.softcap}, got {ref_head.scale:g} and "
                f"{ref_head.softcap}"
            )
        weight, shape = self._as(hidden)
        ref_weight, ref_shape = ref_head._as(ref_hidden)
        reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_shape["bias"]}
        return linear_kl(hidden, weight, **reference, **shape, **settings)

    def logits(self, hidden: Tensor) -> Tensor:
        """All of them: [..., D] -> [..., V]."""
        weight, shape = self._as(hidden)
        logits = nn.functional.linear(hidden, weight, shape["bias"]) * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def detached(self) -> "Head":
        """The same, without gradients."""
        return replace(self, weight=self.weight.detach())

    def gathered(self) -> "Head":
        """The same with all of a weight that is rows over the ranks, for several losses; then a collective."""
        return replace(self, weight=shards.full(self.weight))

    def cloned(self) -> "Head":
        """The same with tensors of its own, which later writes into the model do not reach, and without gradients."""
        bias = None if self.bias is None else self.bias.clone()
        return replace(self, weight=self.weight.detach().clone(), bias=bias)

    def _as(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """All of the weight, and the losses' other keywords, in the dtype of hidden states; a collective if sharded."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return shards.full(self.weight).to(hidden.dtype), {"bias": bias, "scale": self.scale, "softcap": self.softcap}


def head_of(model: PreTrainedModel) -> Head:
    """The model's head; its scale and cap are measured at first, by a forward of a few tokens.

    Raises:
        InputError: the model makes something else of its last hidden states.
    """
    if model not in _SHAPES:
        _SHAPES[model] = _measured(model)
    scale, softcap = _SHAPES[model]
    bias = getattr(model.get_output_embeddings(), "bias", None)
    bias = None if bias is None else bias.detach()
    return Head(weight=head_weight(model), bias=bias, scale=scale, softcap=softcap)


# ---------------------------------------------------------------- the measurement


@torch.no_grad()
def _measured(model: PreTrainedModel) -> tuple[float, float | None]:
    """(scale, softcap) of a model."""
    seen: dict[str, Tensor] = {}

    def keep_hidden(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["hidden"] = output[0] if isinstance(output, tuple) else output.last_hidden_state

    def replace_product(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["read"] = args[0]
        steps = REACH * torch.linspace(-1, 1, output.shape[-1], device=output.device)
        steps[0] = NEAR
        seen["known"] = steps.expand(output.shape).contiguous()
        return seen["known"]

    handles = [
        backbone(model).register_forward_hook(keep_hidden),
        model.get_output_embeddings().register_forward_hook(replace_product),
    ]
    try:
        with own_attention(model):
            logits = model(input_ids=probe_ids(model, 2), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if "known" not in seen:
        raise InputError("model: expected a head that is called, got one that is only read")
    numbers = list(_numbers(model.config.to_dict()))
    before = _ratio(seen["hidden"], seen["read"], tolerance=8 * torch.finfo(seen["read"].dtype).eps)
    if before is None:
        raise InputError("model: expected a head that reads the decoder's last hidden state, got one that does not")
    close = max(CLOSE, torch.finfo(logits.dtype).eps)  # where the model casts its logits
    scale, softcap = _fitted(seen["known"].flatten().double(), logits.flatten().double(), close)
    scales = _snapped(before, numbers, close) * _snapped(scale, numbers, close)
    return scales, softcap and _snapped(softcap, numbers, close)


def _ratio(x: Tensor, y: Tensor, *, tolerance: float) -> float | None:
    """s where y = s·x, within `tolerance` of the largest; None where there is no such s."""
    if x.shape != y.shape:
        return None
    x, y = x.double(), y.double()
    ratio = float((x * y).sum() / x.square().sum())
    close = float((y - ratio * x).abs().max()) <= tolerance * float(y.abs().max())
    return (1.0 if torch.equal(x, y) else ratio) if close else None


def _fitted(x: Tensor, y: Tensor, close: float) -> tuple[float, float | None]:
    """(s, c) where y = c·tanh(s·x / c), or s·x with no c.

    Raises:
        InputError: it is neither.
    """
    if (ratio := _ratio(x, y, tolerance=close)) is not None:
        return ratio, None
    near, far = 0, int(x.argmax())
    slope = float(y[near] / x[near])
    low, high = abs(float(y[far])), 1e9
    for _ in range(200):  # c·tanh(s·x / c) grows with c
        cap = (low * high) ** 0.5
        low, high = (cap, high) if cap * torch.tanh(slope * x[far] / cap) * slope < y[far] * slope else (low, cap)
    if not float((cap * torch.tanh(slope * x / cap) - y).abs().max()) <= 10 * close * float(y.abs().max()):
        raise InputError(
            f"model: expected logits that are the head's product, scaled or soft-capped, got others: {float(x[far]):g} "
            f"becomes {float(y[far]):g}, {float(x[near]):g} becomes {float(y[near]):g}"
        )
    return slope, cap


def _numbers(settings: Mapping[str, Any]) -> Iterator[float]:
    """Every number in a config, sections included."""
    for value in settings.values():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value:
            yield float(value)


def _snapped(value: float, numbers: list[float], close: float) -> float:
    """The number in the config, or the inverse of one, that a measured value stands for; else the value."""
    if value == 1.0:
        return value
    known = [candidate for number in numbers for candidate in (number, 1 / number)]
    nearest = min(known, key=lambda candidate: abs(candidate - value), default=value)
    return nearest if abs(nearest - value) <= close * abs(value) else value
