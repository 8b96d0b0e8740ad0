"""Linear layers whose backward computes only the part of the weight gradient that LCDD reads.

Once most gates are closed, almost none of G = ∂L/∂W_eff matters: with hard-concrete gates the open rows × open columns,
with Heaviside gates the open rows and the open columns (method, section 1). `PackedGradLinear` is an `nn.Linear`
with the same parameters, forward and input gradient; where it is told which rows and columns are open, its weight
gradient is a `BlockGrad`, which stores those and is zero elsewhere.

    PackedGradLinear.swap(linear)                     the instance's class changes; names, tensors and state_dict do not
    linear.set_plan("block", open_rows, open_cols)    once an optimizer step, for the forwards until the next call
    linear.weight.grad                                as of any linear
    linear.restore()                                  an ordinary nn.Linear again

`PackPlan` does this for a whole model: it swaps the linears, and after every draw of the gates tells each one its
open rows and columns, or leaves it dense where packing would cost more than it saves. A dense gradient is made zero
where a packed one stores nothing, so that norms, and what generic code does by them, do not depend on the layout.

Shapes: T tokens (all leading dimensions), R open rows, C open columns.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import GateLayout, Run, Site
from lcdd.optimizer.block_grad import BlockGrad, OpenPart
from lcdd.optimizer.gates import Gates
from lcdd.optimizer.swapped import Swapped
from lcdd_kernels import (
    PackCrossover,
    default_crossover,
    expand_columns,
    pack_columns,
    pack_layout,
    packed_multiple,
    packed_weight_grad,
)
from lcdd_kernels.functional.packed_grad import PACKED_LAYOUT, check_index_list

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
    """y = x Wᵀ + b. Backward: dx and db as always; dW is a `BlockGrad` of `part`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, part: OpenPart, dtype: torch.dtype) -> Tensor:
        # x is saved as it came: q, k and v then hold one tensor, where autocast's own copies would be three.
        ctx.save_for_backward(x, weight)
        ctx.part, ctx.dtype = part, dtype
        if dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # raises where the graph was freed or the weight stepped since the forward
        dy, shape = dy.reshape(-1, weight.shape[0]), x.shape
        dx = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight.to(ctx.dtype)).to(x.dtype).reshape(shape)
        if ctx.needs_input_grad[1]:
            x = x.reshape(-1, weight.shape[1])
            if torch.is_grad_enabled():  # create_graph: what shall be differentiated once more is an ordinary tensor
                d_weight = (dy.t() @ x.to(ctx.dtype)).to(weight.dtype)
            else:
                d_weight = _open_grad(x, dy, ctx.part, ctx.dtype, like=weight)
        if ctx.needs_input_grad[2]:
            d_bias = dy.sum(dim=0)
        return dx, d_weight, d_bias, None, None


def _open_grad(x: Tensor, dy: Tensor, part: OpenPart, dtype: torch.dtype, *, like: Tensor) -> BlockGrad:
    """The stored part of dYᵀX for x[T, in] in the dtype it came in and dy[T, out] in the compute dtype."""
    x_open = _panels.get(x, part.cols, dtype)
    found = packed_weight_grad(x.to(dtype), dy, part.rows, part.cols, layout=part.layout, x_open=x_open, check=False)
    parts = (found,) if isinstance(found, Tensor) else found
    return BlockGrad.of(part, tuple(p.to(like.dtype) for p in parts), like.shape)  # as weight.grad would have


class PackedGradLinear(Swapped, nn.Linear):
    """An `nn.Linear` that can leave the closed part of its weight gradient uncomputed; see the module's docstring.

    Compiled by torch.compile its gradient is dense.

    Attributes:
        part: the open rows and columns; None where the gradient is dense.
    """

    _original, _ours = nn.Linear, ("part",)
    part: OpenPart | None

    @staticmethod
    def swap(linear: nn.Linear) -> "PackedGradLinear":
        """Turns this instance into a PackedGradLinear with layout "dense"; its parameters, hooks and names stay as they
        are."""
        _check_plain("linear", linear)
        linear.__class__ = PackedGradLinear
        assert isinstance(linear, PackedGradLinear)
        linear.part = None
        return linear

    def restore(self) -> nn.Linear:
        """The reverse of `swap`: an ordinary nn.Linear. Returns the same instance."""
        del self.part
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    @property
    def layout(self) -> str:
        """The form of the gradient: "block", "panels" or "dense"."""
        return "dense" if self.part is None else self.part.layout

    def set_plan(self, layout: str, rows: Tensor | None = None, cols: Tensor | None = None) -> None:
        """What the weight gradient of the next forwards is.

        layout "dense": all of it. "block": a BlockGrad of G[rows, cols]. "panels": one of (G[rows, :], G[:, cols]).
        rows, cols: distinct int32 or int64 on the weight's device, in the order that the stored parts shall have (GQA's
        o_proj: `lcdd_kernels.expand_columns`). They may be empty. Projections that share an input share its packed
        panel where they are given the same `cols` tensor (or the same slice of one).
        """
        if layout not in LAYOUTS:
            raise InputError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
        if layout == "dense" and not (rows is None and cols is None):
            raise InputError('rows, cols: expected None with layout "dense", got tensors')
        if layout == "dense":
            self.part = None
            return
        check_index_list("rows", rows, self.out_features, self.weight.device)
        check_index_list("cols", cols, self.in_features, self.weight.device)
        assert rows is not None
        assert cols is not None
        self.part = OpenPart(layout=layout, rows=rows, cols=cols)
        _panels.drop()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self.part is None:
            return F.linear(x, self.weight, self.bias)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return F.linear(x, self.weight, self.bias)
        kind, dtype = x.device.type, self.weight.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(kind)
        elif x.dtype != dtype:
            raise InputError(f"x: expected dtype {dtype} (the weight's), got {x.dtype}")
        return _PackedLinear.apply(x, self.weight, self.bias, self.part, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, layout={self.layout}"


def _check_plain(name: str, linear: nn.Linear) -> None:
    if type(linear) is not nn.Linear:
        raise InputError(f"{name}: expected an nn.Linear (not a subclass), got {type(linear).__name__}")


class _Packable(NamedTuple):
    """A linear that may be packed, and the runs of gates of its rows and columns."""

    site: Site
    linear: PackedGradLinear
    rows: Run
    cols: Run


def packed_kind(config: LCDDConfig) -> str:
    """The kind of gates whose gradients' open part is all that a run reads."""
    # paced closing asks for no gradient of a closed gate, of whatever kind
    return "hard_concrete" if config.paced else config.gate_kind


class OpenParts:
    """What is open of each site's gradient under the gates in force, packed or not."""

    def __init__(self, layout: GateLayout, *, gate_kind: str) -> None:
        self.layout, self.gate_kind = layout, gate_kind
        self._kind = gate_kind
        self._gates: Gates | None = None
        self._found: dict[str, OpenPart | None] = {}

    def update(self, gates: Gates, *, fixed: bool = False) -> None:
        """Take in new gates; of `fixed` ones no gate's gradient is asked for."""
        self._gates, self._kind = gates, "hard_concrete" if fixed else self.gate_kind
        self._found.clear()

    def of(self, site: Site) -> OpenPart | None:
        """Its open part, that of its linear's packed gradient where it has one; None where all of it is no more."""
        if isinstance(site.linear, PackedGradLinear) and site.linear.part is not None:
            return site.linear.part
        if site.name not in self._found:
            assert self._gates is not None
            row_run, col_run = self.layout.runs(site.matrix)
            rows, cols = self._gates.open_in(row_run), _columns(self._gates.open_in(col_run), col_run)
            part = OpenPart(layout=PACKED_LAYOUT[self._kind], rows=rows, cols=cols)
            self._found[site.name] = part if part.numel(site.matrix.shape) < math.prod(site.matrix.shape) else None
        return self._found[site.name]


class PackPlan:
    """Which sites of a model have packed weight gradients, and the open rows and columns of each; see the module.

    sites: those that are an `nn.Linear` are swapped in place (`PackedGradLinear.swap`), `restore()` swaps them back;
        slices, transposed weights and subclasses of nn.Linear keep their dense gradients.
    crossover: None takes the defaults for the weights' device and dtype.
    pack: off leaves every gradient dense, zero where a packed one would store nothing.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        layout: GateLayout,
        *,
        gate_kind: str,
        crossover: PackCrossover | None = None,
        pack: bool = True,
    ) -> None:
        self.layout, self.gate_kind, self.pack = layout, gate_kind, pack
        weight = sites[0].parameter
        self.crossover = crossover or default_crossover(weight.device, weight.dtype)
        self.linears = [
            _Packable(site, PackedGradLinear.swap(site.linear), *layout.runs(site.matrix))
            for site in sites
            if site.linear is not None and type(site.linear) is nn.Linear
        ]
        self._geometry = [(site.matrix.shape, rows, cols) for site, _, rows, cols in self.linears]
        self._sizes: list[int] = layout.slot_offsets.diff().tolist()
        self.parts = OpenParts(layout, gate_kind=gate_kind)
        self._gates: Gates | None = None
        self._kind = gate_kind
        self._closed: dict[int, Tensor] = {}
        by_parameter: dict[nn.Parameter, list[Site]] = {}
        for site in sites:
            by_parameter.setdefault(site.parameter, []).append(site)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._zero_closed, views))
            for parameter, views in by_parameter.items()
        ]

    @classmethod
    def for_sites(cls, sites: Sequence[Site], layout: GateLayout, config: LCDDConfig) -> "PackPlan":
        """The plan of an optimizer with this config."""
        return cls(sites, layout, gate_kind=packed_kind(config), pack=config.pack == "auto")

    def update(self, gates: Gates, *, fixed: bool = False) -> None:
        """Give every linear the open rows and columns of `gates`; of `fixed` ones no gate's gradient is asked for.

        Reads the counts of open gates from the host's copy and makes slices: no device-to-host wait. The host has a
        few milliseconds for all linears, so nothing is checked here that the layout has settled.
        """
        self._gates = gates
        self._kind = "hard_concrete" if fixed else self.gate_kind  # of which the open block is all there is
        self._closed.clear()
        _panels.drop()
        self.parts.update(gates, fixed=fixed)
        layouts = self._choose(gates.counts) if self.pack else ["dense"] * len(self.linears)
        packed = [to_pack for to_pack, layout in zip(self.linears, layouts, strict=True) if layout != "dense"]
        parts = _OpenParts(gates, self._sizes, [to_pack.cols for to_pack in packed])
        for (_, linear, rows, cols), layout in zip(self.linears, layouts, strict=True):
            part = None if layout == "dense" else OpenPart(layout=layout, rows=parts.rows(rows), cols=parts.cols(cols))
            linear.__dict__["part"] = part  # nn.Module's own way of setting it takes longer than all the rest

    def _choose(self, counts: Sequence[int]) -> list[str]:
        """The layout of every linear."""
        return [
            pack_layout(
                gate_kind=self._kind, out_features=shape[0], in_features=shape[1], n_rows=counts[rows.number],
                n_cols=counts[cols.number] * cols.repeat, crossover=self.crossover, check=False,
            )
            for shape, rows, cols in self._geometry
        ]  # fmt: skip

    def layouts(self) -> list[str]:
        """The layout in force of every linear, in order."""
        return [packable.linear.layout for packable in self.linears]

    def restore(self) -> None:
        """Ordinary linear layers again."""
        for hook in self._hooks:
            hook.remove()
        for packable in self.linears:
            packable.linear.restore()

    @torch.no_grad()
    def _zero_closed(self, sites: Sequence[Site], parameter: Tensor) -> None:
        """After a backward: make a parameter's dense gradient zero where a packed one stores nothing."""
        whole = parameter.grad
        if whole is None or isinstance(whole, BlockGrad):
            return
        for site in sites:
            grad, (row_run, col_run) = site.view(whole), self.layout.runs(site.matrix)
            rows, cols = self._closed_in(row_run), _columns(self._closed_in(col_run), col_run)
            if PACKED_LAYOUT[self._kind] == "panels":
                if rows.numel() and cols.numel():
                    grad[rows[:, None], cols] = 0
                continue
            for dim, closed in ((0, rows), (1, cols)):
                if closed.numel():
                    grad.index_fill_(dim, closed, 0)

    def _closed_in(self, run: Run) -> Tensor:
        """`Gates.closed_in` of the last update, made once for all sites of a run."""
        assert self._gates is not None
        if run.number not in self._closed:
            self._closed[run.number] = self._gates.closed_in(run)
        return self._closed[run.number]


class _OpenParts:
    """Open rows and columns of a draw, each run's made once: what reads one input shares its packed panel."""

    def __init__(self, gates: Gates, sizes: Sequence[int], cols: Sequence[Run]) -> None:
        """sizes: of all runs of slots. cols: the runs whose columns will be asked for."""
        lengths = [length for size, count in zip(sizes, gates.counts, strict=True) for length in (count, size - count)]
        self._runs = gates.indices.split(lengths)[::2]
        self._repeated: dict[Run, Tensor] = {}
        repeated = dict.fromkeys(run for run in cols if run.repeat > 1)
        for shape in {(run.head_dim, run.repeat) for run in repeated}:
            self._expand([run for run in repeated if (run.head_dim, run.repeat) == shape])

    def _expand(self, runs: Sequence[Run]) -> None:
        """The columns of runs that repeat alike, together: a few launches for a whole model."""
        head_dim, repeat = runs[0].head_dim, runs[0].repeat
        opened = [self._runs[run.number] for run in runs]
        copies = expand_columns(torch.cat(opened), head_dim=head_dim, repeat=repeat).view(repeat, -1)
        pieces = [copy.split([len(gates) for gates in opened]) for copy in copies.unbind()]
        ordered = torch.cat([piece for of_run in zip(*pieces, strict=True) for piece in of_run])
        found = ordered.split([repeat * len(gates) for gates in opened])
        self._repeated.update(zip(runs, found, strict=True))

    def rows(self, run: Run) -> Tensor:
        return self._runs[run.number]

    def cols(self, run: Run) -> Tensor:
        """As `_columns`."""
        return self.rows(run) if run.repeat == 1 else self._repeated[run]


def _columns(gates: Tensor, run: Run) -> Tensor:
    """The columns that these gates of a run serve."""
    return expand_columns(gates, head_dim=run.head_dim, repeat=run.repeat) if run.repeat > 1 else gates
