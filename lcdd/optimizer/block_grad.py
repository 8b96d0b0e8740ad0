"""A weight gradient that stores the open part of itself and is zero elsewhere, as a tensor that generic code can use.

`PackedGradLinear` leaves one in `weight.grad`. Norms, clipping, scaling, unscaling, accumulation, clearing and copies
act on what is stored; any other operation is given the dense tensor, and one that writes or takes a view makes the
gradient dense for good, so that nothing is an error and nothing is lost.

Shapes: the weight's [out, in]; R open rows, C open columns.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["BlockGrad", "OpenPart"]

_aten = torch.ops.aten


@dataclass(eq=False, kw_only=True, slots=True)  # not frozen: a step makes as many as there are matrices
class OpenPart:
    """Which entries of a matrix are stored, for good; two gradients with the same object add part by part.

    layout: "block", the entries in open rows and open columns, as [R, C]; or "panels", those in open rows or open
        columns, as [R, in] and [out, C].
    rows, cols: distinct int32 or int64 [R], [C], in the order of the parts.
    """

    layout: str
    rows: Tensor
    cols: Tensor

    def dense(self, parts: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        """The whole matrix [out, in], zero where nothing is stored."""
        whole = parts[0].new_zeros(shape)
        self.scatter_(whole, parts)
        return whole

    def shapes(self, shape: Sequence[int]) -> list[torch.Size]:
        """Of the parts of a matrix of this shape."""
        rows, cols = len(self.rows), len(self.cols)
        if self.layout == "block":
            return [torch.Size((rows, cols))]
        return [torch.Size((rows, shape[1])), torch.Size((shape[0], cols))]

    def numel(self, shape: Sequence[int]) -> int:
        """Entries that are stored of a matrix of this shape."""
        return sum(part.numel() for part in self.shapes(shape))

    def rectangles(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """(rows, columns) of each part, int64; None: all of them."""
        rows, cols = self.rows.long(), self.cols.long()
        return [(rows, cols)] if self.layout == "block" else [(rows, None), (None, cols)]

    def gather(self, whole: Tensor) -> tuple[Tensor, ...]:
        """The parts of a dense matrix [out, in]."""
        rows, cols = self.rows.long(), self.cols.long()
        if self.layout == "block":
            return (whole[rows[:, None], cols],)
        return whole[rows], whole[:, cols]

    def scatter_(self, whole: Tensor, parts: Sequence[Tensor]) -> None:
        """Write the parts into a dense matrix [out, in]; the rest of it stays."""
        rows, cols = self.rows.long(), self.cols.long()
        if self.layout == "block":
            whole[rows[:, None], cols] = parts[0]
        else:
            whole[:, cols] = parts[1]
            whole[rows] = parts[0]

    def distinct(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The parts with every stored entry in one of them: where panels cross, the second one is zero."""
        return parts if self.layout == "block" else (parts[0], parts[1].index_fill(0, self.rows.long(), 0))


class _Store:
    """What a gradient and its aliases share: parts of an `OpenPart`, nothing at all (zero), or the dense tensor."""

    __slots__ = ("dense", "part", "parts")

    def __init__(self, part: OpenPart | None, parts: tuple[Tensor, ...], dense: Tensor | None = None) -> None:
        self.part, self.parts, self.dense = part, parts, dense


class BlockGrad(torch.Tensor):
    """A matrix [out, in] of which `parts` are stored, where `part` says; part None: dense, or all zero."""

    _store: _Store
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, store: _Store, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> "BlockGrad":
        grad: BlockGrad = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        grad._store = store
        return grad

    def __init__(self, *_: Any) -> None:
        super().__init__()

    @classmethod
    def of(cls, part: OpenPart, parts: tuple[Tensor, ...], shape: torch.Size) -> "BlockGrad":
        """A gradient [out, in] of the parts that `part` describes, which are kept, not copied."""
        return cls(_Store(part, parts), shape, parts[0].dtype, parts[0].device)

    @property
    def part(self) -> OpenPart | None:
        return self._store.part

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self._store.parts

    def dense(self) -> Tensor:
        """An ordinary tensor [out, in] with the same entries; it may share memory with this one."""
        store = self._store
        if store.dense is not None:
            return store.dense
        if store.part is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return store.part.dense(store.parts, self.shape)

    def _become_dense(self) -> Tensor:
        """The dense tensor, which is from now on what this gradient and its aliases store."""
        dense = self.dense()
        self._store.part, self._store.parts, self._store.dense = None, (), dense
        return dense

    def _like(self, store: _Store, dtype: torch.dtype | None = None) -> "BlockGrad":
        return BlockGrad(store, self.shape, dtype or self.dtype, self.device)

    def _mapped(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "BlockGrad":
        """A new gradient of `function` of what is stored, with function(0) = 0; of its result's dtype."""
        store = self._store
        dense = None if store.dense is None else function(store.dense)
        parts = tuple(function(part) for part in store.parts)
        found = self._like(_Store(store.part, parts, dense))
        dtypes = {stored.dtype for stored in found._stored()} or {dtype or self.dtype}
        return found._like(found._store, dtypes.pop())

    def _stored(self) -> tuple[Tensor, ...]:
        """The tensors with all entries that may not be zero."""
        return self._store.parts if self._store.dense is None else (self._store.dense,)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        result = NotImplemented if handler is None else handler(*args, **kwargs)
        return _densely(func, args, kwargs) if result is NotImplemented else result

    # ------------------------------------------------------------------ what does not come by dispatch

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        layout = self.part.layout if self.part is not None else "dense"
        return f"BlockGrad({layout}, {self.dense()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockGrad":
        memo[id(self)] = copied = self.clone()
        return copied  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def numpy(self, **options: Any) -> Any:
        return self._become_dense().numpy(**options)

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        return self._become_dense().__array__(*arguments, **options)

    def __dlpack__(self, *arguments: Any, **options: Any) -> Any:
        return self._become_dense().__dlpack__(*arguments, **options)

    def tolist(self) -> Any:
        return self.dense().tolist()

    def data_ptr(self) -> int:
        return self._become_dense().data_ptr()

    def untyped_storage(self) -> Any:
        return self._become_dense().untyped_storage()

    def storage(self) -> Any:
        return self._become_dense().storage()


# ---------------------------------------------------------------- operations


def _densely(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` on ordinary tensors; a gradient that it writes, or returns a view of, is dense from then on."""
    wrappers: dict[int, BlockGrad] = {}

    def plain(value: Any, lasting: bool) -> Any:
        if not isinstance(value, BlockGrad):
            return value
        if not lasting:
            return value.dense()
        dense = value._become_dense()
        wrappers[id(dense)] = value
        return dense

    aliased = {argument.name: argument.alias_info is not None for argument in func._schema.arguments}
    names = [argument.name for argument in func._schema.arguments]
    plain_args = [
        tree_map(lambda item, name=name: plain(item, aliased[name]), value)
        for name, value in zip(names, args, strict=False)
    ]
    plain_kwargs = {
        name: tree_map(lambda item, name=name: plain(item, aliased[name]), value) for name, value in kwargs.items()
    }
    result = func(*plain_args, **plain_kwargs)
    return tree_map(lambda item: wrappers.get(id(item), item), result)


def _alias(grad: BlockGrad) -> BlockGrad:
    return grad._like(grad._store)


def _clone(grad: BlockGrad, *, memory_format: Any = None) -> BlockGrad:
    return grad._mapped(torch.clone)


def _to_copy(grad: BlockGrad, *, dtype: Any = None, device: Any = None, **options: Any) -> Any:
    if device not in (None, grad.device) or any(options.get(key) for key in ("layout", "pin_memory")):
        return NotImplemented
    return grad._mapped(lambda part: part.to(dtype or part.dtype, copy=True), dtype or grad.dtype)


def _scaled(function: Any) -> Callable[..., Any]:
    """`function` by one number for the whole tensor."""

    def handler(grad: Any, factor: Any) -> Any:
        if not isinstance(grad, BlockGrad) or (isinstance(factor, Tensor) and factor.ndim):
            return NotImplemented
        return grad._mapped(lambda part: function(part, factor))

    return handler


def _scaled_(function: Any) -> Callable[..., Any]:
    """As `_scaled`, in place."""

    def handler(grad: Any, factor: Any) -> Any:
        if not isinstance(grad, BlockGrad) or (isinstance(factor, Tensor) and factor.ndim):
            return NotImplemented
        for part in grad._stored():
            function(part, factor)
        return grad

    return handler


def _add_(grad: Any, other: Any, *, alpha: Any = 1) -> Any:
    """In place, where both store the same entries, or this one none yet."""
    if not (isinstance(grad, BlockGrad) and isinstance(other, BlockGrad)):
        return NotImplemented
    ours, theirs = grad._store, other._store
    if theirs.dense is not None or theirs.part is None or ours.dense is not None:
        return NotImplemented
    if ours.part is None:
        parts = tuple(part.to(grad.dtype, copy=True).mul_(alpha) for part in theirs.parts)
        ours.part, ours.parts = theirs.part, parts
    elif ours.part is theirs.part:
        for mine, part in zip(ours.parts, theirs.parts, strict=True):
            mine.add_(part, alpha=alpha)
    else:
        return NotImplemented
    return grad


def _add(grad: Any, other: Any, *, alpha: Any = 1) -> Any:
    """As `_add_`, into a new gradient."""
    both = isinstance(grad, BlockGrad) and isinstance(other, BlockGrad)
    if not both or grad.dtype != other.dtype or grad.part is None or grad.part is not other.part:
        return NotImplemented
    return _add_(_clone(grad), other, alpha=alpha)


def _zero_(grad: BlockGrad) -> BlockGrad:
    grad._store.part, grad._store.parts, grad._store.dense = None, (), None
    return grad


def _clamp_(grad: BlockGrad, min: Any = None, max: Any = None) -> Any:
    if any(isinstance(bound, Tensor) for bound in (min, max)):
        return NotImplemented
    if (min is not None and min > 0) or (max is not None and max < 0):
        return NotImplemented  # zeros move
    for part in grad._stored():
        part.clamp_(min, max)
    return grad


def _vector_norm(grad: BlockGrad, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    store = grad._store
    if store.part is None or dim is not None or keepdim or ord <= 0:
        return NotImplemented
    parts = store.part.distinct(store.parts)
    norms = [torch.linalg.vector_norm(part, ord, dtype=dtype) for part in parts if part.numel()]
    if not norms:
        return torch.zeros((), dtype=dtype or grad.dtype, device=grad.device)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), ord)


def _unscale_(grads: Iterable[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """GradScaler's: what is stored takes the place of the gradient."""
    tensors = [part for grad in grads for part in (grad._stored() if isinstance(grad, BlockGrad) else (grad,))]
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found_inf, inv_scale)


def _each(function: Any) -> Callable[..., Any]:
    """A foreach operation, as one call of `function` a tensor."""
    return lambda tensors, *args, **kwargs: [function(tensor, *args, **kwargs) for tensor in tensors]


def _each_(function: Any) -> Callable[..., None]:
    """As `_each`, in place: such an operation returns nothing."""
    found = _each(function)
    return lambda *args, **kwargs: found(*args, **kwargs) and None


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.mul.Tensor: _scaled(torch.mul),
    _aten.mul.Scalar: _scaled(torch.mul),
    _aten.div.Tensor: _scaled(torch.div),
    _aten.div.Scalar: _scaled(torch.div),
    _aten.mul_.Tensor: _scaled_(Tensor.mul_),
    _aten.mul_.Scalar: _scaled_(Tensor.mul_),
    _aten.div_.Tensor: _scaled_(Tensor.div_),
    _aten.div_.Scalar: _scaled_(Tensor.div_),
    _aten.add.Tensor: _add,
    _aten.add_.Tensor: _add_,
    _aten.zero_.default: _zero_,
    _aten.clamp_.default: _clamp_,
    _aten.linalg_vector_norm.default: _vector_norm,
    _aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale_,
    _aten._foreach_mul_.Scalar: _each_(Tensor.mul_),
    _aten._foreach_mul_.Tensor: _each_(Tensor.mul_),
    _aten._foreach_div_.Scalar: _each_(Tensor.div_),
    _aten._foreach_norm.Scalar: _each(torch.linalg.vector_norm),
    _aten._foreach_zero_.default: _each_(Tensor.zero_),
}
