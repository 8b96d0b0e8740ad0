"""Linear layers whose backward computes only the part of the weight gradient that LCDD reads.

Once most gates are closed, almost none of G = ∂L/∂W_eff matters: with hard-concrete gates the open rows × open columns,
with Heaviside gates the open rows and the open columns (method, section 1). `PackedGradLinear` is an `nn.Linear`
with the same parameters, forward and input gradient; where it is told which rows and columns are open, its weight
gradient goes, packed, to `module.packed_grad` and `weight.grad` stays None.

    PackedGradLinear.swap(linear)                     the instance's class changes; names, tensors and state_dict do not
    linear.set_plan("block", open_rows, open_cols)    once an optimizer step, for the backwards until the next call
    linear.packed_grad                                [R, C], or ([R, in], [out, C]) for "panels"; at first None
    linear.restore()                                  an ordinary nn.Linear again

`PackPlan` does this for a whole model: it swaps the projections, and after every draw of the gates tells each one its
open rows and columns, or leaves it dense where packing would cost more than it saves.

Shapes: T tokens (all leading dimensions), R open rows, C open columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from lcdd.config import LCDDConfig
from lcdd.models import ROW_AND_COL_GROUPS, GateLayout, Projection
from lcdd.optimizer.gates import Gates
from lcdd_kernels import (
    PackCrossover,
    default_crossover,
    expand_columns,
    pack_columns,
    pack_layout,
    packed_multiple,
    packed_weight_grad,
)
from lcdd_kernels.functional.packed_grad import check_index_list

__all__ = ["LAYOUTS", "PackPlan", "PackedGradLinear"]

LAYOUTS = ("dense", "block", "panels")


class _PanelCache:
    """The last packed input panel of each device: q, k, v (and gate, up) read one input, one after the other.

    One panel a device is kept, because a model's panels together would cost as much memory as its activations. An entry
    is matched by the input's memory, layout and version, and it dies with that memory: an address that is used again
    for something else does not match.
    """

    def __init__(self) -> None:
        self._last: dict[torch.device, tuple[tuple[Any, ...], StorageWeakRef, Tensor]] = {}

    def get(self, x: Tensor, cols: Tensor, dtype: torch.dtype) -> Tensor:
        """x[T, K], cols int[C] -> pack_columns(x, cols) in `dtype`."""
        key = (*_identity(x), *_identity(cols), dtype)
        last = self._last.get(x.device)
        if last is not None and last[0] == key and not last[1].expired():
            return last[2]
        panel = pack_columns(x, cols, multiple=packed_multiple(x.device), check=False).to(dtype)
        self._last[x.device] = (key, StorageWeakRef(x.untyped_storage()), panel)
        return panel

    def drop(self) -> None:
        self._last.clear()


def _identity(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x._version


_panels = _PanelCache()


class _PackedLinear(torch.autograd.Function):
    """y = x Wᵀ + b. Backward: dx and db as always; the weight gradient is added, packed, to `module.packed_grad`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: "PackedGradLinear", dtype: torch.dtype
    ) -> Tensor:
        # x is saved as it came: q, k and v then hold one tensor, where autocast's own copies would be three.
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.dtype, ctx.plan = module, dtype, module._plan
        ctx.weight_node = torch.autograd.graph.get_gradient_edge(weight).node
        if dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # raises where the graph was freed or the weight stepped since the forward
        if ctx.plan is not ctx.module._plan:
            raise RuntimeError(
                "PackedGradLinear: the open rows and columns changed (set_plan) between this forward and its backward"
            )
        dy = dy.reshape(-1, weight.shape[0])
        dx = d_bias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight.to(ctx.dtype)).to(x.dtype).reshape(x.shape)
        if ctx.needs_input_grad[2]:
            d_bias = dy.sum(dim=0)
        if _wants_weight_grad(ctx.weight_node):
            ctx.module._add_packed(x.reshape(-1, weight.shape[1]), dy, ctx.dtype)
        return dx, None, d_bias, None, None


def _wants_weight_grad(node: Any) -> bool:
    """False in `torch.autograd.grad(loss, inputs)` and `backward(inputs=...)` that leave this weight out."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:  # torch's answer for a leaf that is itself asked for
        raise RuntimeError(
            "PackedGradLinear: torch.autograd.grad cannot return this weight's gradient, which goes to packed_grad; "
            'use backward(), or set_plan("dense")'
        ) from error


class PackedGradLinear(nn.Linear):
    """An `nn.Linear` that can leave the closed part of its weight gradient uncomputed; see the module's docstring.

    layout: "dense" is an ordinary linear layer in every respect. packed_grad: what the backwards since the last
    `set_plan` or `zero_packed_grad` have added up, in the weight's dtype.
    """

    packed_grad: Tensor | tuple[Tensor, Tensor] | None
    _plan: tuple[str, Tensor | None, Tensor | None]

    @staticmethod
    def swap(linear: nn.Linear) -> "PackedGradLinear":
        """Turns this instance into a PackedGradLinear with layout "dense"; its parameters, hooks and names stay as they
        are."""
        if type(linear) is not nn.Linear:
            raise ValueError(f"linear: expected an nn.Linear (not a subclass), got {type(linear).__name__}")
        linear.__class__ = PackedGradLinear
        assert isinstance(linear, PackedGradLinear)
        linear.packed_grad = None
        linear._plan = ("dense", None, None)
        return linear

    def restore(self) -> nn.Linear:
        """The reverse of `swap`: an ordinary nn.Linear, without packed_grad and plan. Returns the same instance."""
        del self.packed_grad, self._plan
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    @property
    def layout(self) -> str:
        """The form of `packed_grad`: "block" or "panels"; "dense" where the gradient goes to `weight.grad`."""
        return self._plan[0]

    def set_plan(self, layout: str, rows: Tensor | None = None, cols: Tensor | None = None) -> None:
        """What the next backwards compute; discards `packed_grad`, which belongs to the rows and columns of before.

        layout "dense": weight.grad, all of it. "block": G[rows, cols]. "panels": (G[rows, :], G[:, cols]).
        rows, cols: distinct int32 or int64 on the weight's device, in the order that packed_grad shall have (GQA's
        o_proj: `lcdd_kernels.expand_columns`). They may be empty. Projections that share an input share its packed
        panel where they are given the same `cols` tensor (or the same slice of one).
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
        if layout == "dense":
            if rows is not None or cols is not None:
                raise ValueError('rows, cols: expected None with layout "dense", got tensors')
        else:
            check_index_list("rows", rows, self.out_features, self.weight.device)
            check_index_list("cols", cols, self.in_features, self.weight.device)
        self._plan = (layout, rows, cols)
        self.packed_grad = None
        _panels.drop()

    def zero_packed_grad(self) -> None:
        """As `weight.grad = None`."""
        self.packed_grad = None

    def forward(self, x: Tensor) -> Tensor:
        if self._plan[0] == "dense" or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return F.linear(x, self.weight, self.bias)
        kind, dtype = x.device.type, self.weight.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(kind)
        elif x.dtype != dtype:
            raise ValueError(f"x: expected dtype {dtype} (the weight's), got {x.dtype}")
        return _PackedLinear.apply(x, self.weight, self.bias, self, dtype)

    def _add_packed(self, x: Tensor, dy: Tensor, dtype: torch.dtype) -> None:
        """x[T, in] in the dtype it came in, dy[T, out] in the compute dtype."""
        layout, rows, cols = self._plan
        assert rows is not None
        assert cols is not None
        x_open = _panels.get(x, cols, dtype)
        grad = packed_weight_grad(
            x.to(dtype), dy, rows, cols, layout=layout, out=self.packed_grad, x_open=x_open, check=False
        )
        if self.packed_grad is None:
            kind = self.weight.dtype  # as weight.grad would have
            self.packed_grad = grad.to(kind) if isinstance(grad, Tensor) else (grad[0].to(kind), grad[1].to(kind))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, layout={self.layout}"


class PackPlan:
    """Which projections of a model have packed weight gradients, and the open rows and columns of each; see the module.

    sites: swapped in place (`PackedGradLinear.swap`); `restore()` swaps them back.
    crossover: None takes the defaults for the weights' device and dtype.
    """

    def __init__(
        self,
        sites: Sequence[Projection],
        layout: GateLayout,
        *,
        gate_kind: str,
        crossover: PackCrossover | None = None,
    ) -> None:
        self.sites, self.layout, self.gate_kind = list(sites), layout, gate_kind
        weight = self.sites[0].linear.weight
        self.crossover = crossover or default_crossover(weight.device, weight.dtype)
        self.linears = [PackedGradLinear.swap(site.linear) for site in self.sites]

    @classmethod
    def for_sites(cls, sites: Sequence[Projection], layout: GateLayout, config: LCDDConfig) -> "PackPlan":
        """The plan of an optimizer with this config."""
        return cls(sites, layout, gate_kind=config.gate_kind)

    def update(self, gates: Gates) -> None:
        """Give every projection the open rows and columns of `gates`; gradients packed for earlier gates are discarded.

        Reads the counts of open gates from the host's copy and makes slices: no device-to-host wait.
        """
        repeat = self.layout.shape.n_heads // self.layout.shape.n_kv_heads
        for site, linear in zip(self.sites, self.linears, strict=True):
            row_group, col_group = ROW_AND_COL_GROUPS[site.kind]
            rows, cols = gates.open_in(site.layer, row_group), gates.open_in(site.layer, col_group)
            copies = repeat if site.kind == "o" else 1
            layout = pack_layout(
                gate_kind=self.gate_kind,
                out_features=linear.out_features,
                in_features=linear.in_features,
                n_rows=rows.numel(),
                n_cols=cols.numel() * copies,
                crossover=self.crossover,
            )
            if layout == "dense":
                linear.set_plan("dense")
                continue
            if copies > 1:
                cols = expand_columns(cols, head_dim=self.layout.shape.head_dim, repeat=copies)
            linear.set_plan(layout, rows, cols)

    def layouts(self) -> list[str]:
        """The layout in force of every site, in order."""
        return [linear.layout for linear in self.linears]

    def restore(self) -> None:
        """Ordinary linear layers again."""
        for linear in self.linears:
            linear.restore()
