"""Averaging gradients over ranks: what is open goes over the wire, and nothing else.

All ranks draw the same gates, so what of a gradient is not zero stands in the same places on each of them: the open
block of a matrix, or two panels (`lcdd.optimizer.packed`). At 80% closed gates a block is 4% of its matrix.

    `OpenAverage`         ranks that hold the whole model each, in DDP's place: an all-reduce in buckets that go out
                          while the backward is still running, after micro-batches were added up locally
    `OpenReduceScatter`   ranks that hold a shard each (FSDP2): the rows of the block go to the shards that own them;
                          gradients themselves stay dense, as FSDP2 makes them

Both equal dense averaging to the rounding of sums in another order; gradients of closed entries come out as zero.

Shapes: a matrix [rows, columns]; W ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcdd.errors import InputError
from lcdd.models import Site, shards
from lcdd.optimizer.block_grad import BlockGrad, OpenPart

BUCKET_BYTES = 25 << 20
"""Of gradients that travel together; torch's DDP has the same default."""

PartOf = Callable[[Site], OpenPart | None]
"""What is open of a site in the coming step; None: all of it."""


class OpenAverage:
    """Averages gradients over ranks that hold the whole model each.

        with average.last():            around a step's last micro-batch
            loss.backward()

    Args:
        sites: of all masked parameters.
        part_of: asked anew in every step, with the same answer on all ranks.
        others: trained parameters that no gate masks; they travel whole.
    """

    def __init__(self, sites: Sequence[Site], part_of: PartOf, *, others: Sequence[Tensor] = ()) -> None:
        self._part_of = part_of
        self._sites: dict[Tensor, list[Site]] = {parameter: [] for parameter in others}
        for site in sites:
            self._sites.setdefault(site.parameter, []).append(site)
        self._buckets: list[_Bucket] | None = None
        self._bucket_of: dict[Tensor, _Bucket] = {}
        self._seen: set[Tensor] = set()
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._sites]

    def close(self) -> None:
        """Leave nothing of ours in the parameters."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def last(self) -> Iterator[None]:
        """Around the last backward of a step: on leaving, every gradient is the mean over the ranks.

        Raises:
            InputError: there was no backward inside, or more than one.
        """
        self._buckets = self._make_buckets()
        self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        try:
            yield
            if all(bucket.missing == len(bucket.parameters) for bucket in self._buckets):
                raise InputError("average: expected a backward() inside, which leaves gradients, got none")
            for bucket in self._buckets:
                bucket.send()
            for bucket in self._buckets:
                bucket.receive()
        finally:
            self._buckets, self._bucket_of, self._seen = None, {}, set()

    def _make_buckets(self) -> list["_Bucket"]:
        """In the order in which a backward brings gradients about, more or less; the same on all ranks."""
        buckets: list[_Bucket] = []
        for parameter, sites in reversed(self._sites.items()):
            parts = [(site, self._part_of(site)) for site in sites]
            size = _stored(parameter, parts) * parameter.element_size()
            last = buckets[-1] if buckets else None
            if last is None or last.dtype != parameter.dtype or (last.bytes and last.bytes + size > BUCKET_BYTES):
                buckets.append(last := _Bucket(parameter.dtype))
            last.add(parameter, parts, size)
        return buckets

    def _arrived(self, parameter: Tensor) -> None:
        """A gradient is there: send its bucket if it is full, and those behind it that waited. Buckets go out in one
        order, since ranks take part in collectives in the order of their calls."""
        if self._buckets is None:
            return
        if parameter in self._seen:
            raise InputError("average: expected one backward() inside, got a second one; those before it go outside")
        self._seen.add(parameter)
        self._bucket_of[parameter].missing -= 1
        for bucket in self._buckets:
            if bucket.missing:
                return
            bucket.send()


def _stored(parameter: Tensor, parts: Sequence[tuple[Site, OpenPart | None]]) -> int:
    """Entries of a parameter's gradient that travel."""
    if not parts:
        return parameter.numel()
    shapes = [(site.matrix.shape, part) for site, part in parts]
    return sum(math.prod(shape) if part is None else part.numel(shape) for shape, part in shapes)


class _Bucket:
    """Gradients that travel together.

    missing: those that the backward has not brought about yet.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.bytes, self.missing = dtype, 0, 0
        self.parameters: dict[Tensor, Sequence[tuple[Site, OpenPart | None]]] = {}
        self._flat: Tensor | None = None
        self._work: Any = None

    def add(self, parameter: Tensor, parts: Sequence[tuple[Site, OpenPart | None]], size: int) -> None:
        self.parameters[parameter] = parts
        self.bytes += size
        self.missing += 1

    def send(self) -> None:
        """Start the all-reduce, once; a parameter that this rank's texts did not reach takes part with zeros."""
        if self._flat is not None:
            return
        tensors = [tensor for parameter, parts in self.parameters.items() for tensor in _taken(parameter, parts)]
        self._flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).div_(shards.world_size())
        if self._flat.numel():
            self._work = dist.all_reduce(self._flat, async_op=True)

    def receive(self) -> None:
        """Wait for it, and put the means in the gradients' place."""
        assert self._flat is not None
        if self._work is not None:
            self._work.wait()
        place = 0

        def take(shape: torch.Size) -> Tensor:
            nonlocal place
            first, place = place, place + shape.numel()
            assert self._flat is not None
            return self._flat[first:place].view(shape)

        for parameter, parts in self.parameters.items():
            _put_back(parameter, parts, take)


def _taken(parameter: Tensor, parts: Sequence[tuple[Site, OpenPart | None]]) -> list[Tensor]:
    """What travels of a parameter's gradient."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    grad = parameter.grad
    if not parts:
        return [grad]
    found: list[Tensor] = []
    for site, part in parts:
        if part is not None and isinstance(grad, BlockGrad) and grad.part is part:
            found += grad.parts
            continue
        whole = site.view(grad.dense() if isinstance(grad, BlockGrad) else grad)
        found += [whole] if part is None else part.gather(whole)
    return found


def _put_back(
    parameter: Tensor, parts: Sequence[tuple[Site, OpenPart | None]], take: Callable[[torch.Size], Tensor]
) -> None:
    """The reverse of `_taken`, in the same order."""
    grad = parameter.grad
    assert grad is not None
    if not parts:
        grad.copy_(take(grad.shape))
    for site, part in parts:
        if part is not None and isinstance(grad, BlockGrad) and grad.part is part:
            for stored in grad.parts:
                stored.copy_(take(stored.shape))
            continue
        if isinstance(grad, BlockGrad):  # somebody made it dense, or stored other entries
            grad = parameter.grad = grad.dense()
        whole = site.view(grad)
        if part is None:
            whole.copy_(take(whole.shape))
        else:
            part.scatter_(whole, [take(shape) for shape in part.shapes(whole.shape)])


# ---------------------------------------------------------------- shards


@dataclass(frozen=True, kw_only=True)
class _Slab:
    """Rows × columns of one parameter that travel, in the buffers of a reduce-scatter.

    offset, shape: of this parameter's chunk [rows of a rank, columns] in a rank's part of FSDP2's buffer.
    rows, columns: of the whole parameter, int64; None: all.
    place: in a rank's part of the buffer that travels. height: rows that each rank has room for there.
    """

    offset: int
    shape: tuple[int, int]
    rows: Tensor | None
    columns: Tensor | None
    place: int
    height: int

    @property
    def width(self) -> int:
        return self.shape[1] if self.columns is None else len(self.columns)


class OpenReduceScatter:
    """FSDP2's reduce-scatter of a layer's gradients, of what is open alone: `FSDPModule.set_custom_reduce_scatter`.

    FSDP2 hands over [W, every parameter's chunk of rows one after another]. Of each chunk the open rows × open columns
    travel, in as much room as the rank with the most open rows needs; the shards get zeros elsewhere.

    Args:
        parameters: those of the layer that are trained, in FSDP2's order.
        sites: the masked ones among them.
        part_of: as of `OpenAverage`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sites: Sequence[Site], part_of: PartOf) -> None:
        self._parameters, self._part_of = parameters, part_of
        self._sites = {site.parameter: site for site in sites if site.matrix.part is None}

    @classmethod
    def install(cls, layers: Sequence[nn.Module], sites: Sequence[Site], part_of: PartOf) -> bool:
        """Give every layer that is an FSDP2 module its own; False where none is one by itself (another wrapping)."""
        found = False
        for layer in layers:
            state = getattr(layer, "_get_fsdp_state", None)
            group = state()._fsdp_param_group if state is not None else None
            if group is None:
                continue
            trained = [p.sharded_param for p in group.fsdp_params if p.sharded_param.requires_grad]
            layer.set_custom_reduce_scatter(cls(trained, sites, part_of))  # type: ignore[operator]
            found = True
        return found

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As torch's default does."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """input [W·n], output [n].

        Raises:
            RuntimeError: a parameter of the layer has no gradient, so that nobody knows whose n are.
        """
        ranks, me = dist.get_world_size(group), dist.get_rank(group)
        chunk, slabs, size = self._slabs(ranks)
        if chunk != output_tensor.numel():
            raise RuntimeError(
                f"reduce-scatter: expected a gradient of each of {len(self._parameters)} parameters of a layer "
                f"({chunk} entries a rank), got {output_tensor.numel()}: a parameter took no part in the loss"
            )
        packed = input_tensor.new_zeros(ranks, size)
        for slab in slabs:
            self._copy(slab, input_tensor.view(ranks, chunk), packed, 0, into_packed=True)
        mine = packed.new_empty(size)
        if size:
            dist.reduce_scatter_tensor(mine, packed.view(-1), op=op, group=group)
        output_tensor.zero_()
        for slab in slabs:
            self._copy(slab, output_tensor.view(1, chunk), mine.view(1, size), me, into_packed=False)

    def _slabs(self, ranks: int) -> tuple[int, list[_Slab], int]:
        """(entries of a rank's part in FSDP2's buffer, what travels, entries of a rank's part of that)."""
        offset = place = 0
        slabs: list[_Slab] = []
        for parameter in self._parameters:
            shape = (-(-len(parameter) // ranks), math.prod(parameter.shape[1:]))
            site = self._sites.get(parameter)
            part = self._part_of(site) if site is not None else None
            for rows, cols in [(None, None)] if part is None else part.rectangles():
                height = shape[0] if rows is None else self._most_rows(rows, shape[0], ranks)
                slab = _Slab(offset=offset, shape=shape, rows=rows, columns=cols, place=place, height=height)
                slabs.append(slab)
                place += slab.height * slab.width
            offset += shape[0] * shape[1]
        return offset, slabs, place

    @staticmethod
    def _most_rows(rows: Tensor, chunk: int, ranks: int) -> int:
        return int(torch.bincount(rows // chunk, minlength=ranks).max()) if len(rows) else 0

    @staticmethod
    def _copy(slab: _Slab, whole: Tensor, packed: Tensor, first: int, *, into_packed: bool) -> None:
        """Between FSDP2's buffer [w, n] and what travels [w, m], for the w ranks from `first` on."""
        ranks, (height, width) = len(whole), slab.shape
        chunks = whole[:, slab.offset : slab.offset + height * width].view(ranks, height, width)
        there = packed[:, slab.place : slab.place + slab.height * slab.width].view(ranks, slab.height, slab.width)
        if slab.rows is None:
            if into_packed:
                there.copy_(chunks if slab.columns is None else chunks[:, :, slab.columns])
            elif slab.columns is None:
                chunks.copy_(there)
            else:
                chunks[:, :, slab.columns] = there
            return
        rank, row = slab.rows // height, slab.rows % height
        kept = (rank >= first) & (rank < first + ranks)
        # places among the rows of one rank: rows ascend
        begins = torch.searchsorted(rank, torch.arange(first + ranks, device=rank.device))
        within = torch.arange(len(rank), device=rank.device) - begins[rank.clamp_max(first + ranks - 1)]
        rank, row, within = rank[kept] - first, row[kept], within[kept]
        columns = slice(None) if slab.columns is None else slab.columns
        where = (rank[:, None], row[:, None], columns) if slab.columns is not None else (rank, row)
        if into_packed:
            there[rank, within] = chunks[where]
        else:
            chunks[where] = there[rank, within]
