"""A gradient that stores its open part is, to whoever looks at it, the dense tensor."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lcdd.optimizer import BlockGrad, OpenPart

ROWS, COLS = torch.tensor([6, 1, 2]), torch.tensor([4, 0], dtype=torch.int32)
INF = math.inf


def made(layout: str, dtype: torch.dtype = torch.float32) -> tuple[BlockGrad, Tensor]:
    """A packed gradient [7, 5], and the dense tensor of the same entries, built without it."""
    whole = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, cols = ROWS.long(), COLS.long()
    block = layout == "block"
    parts = (whole[rows[:, None], cols],) if block else (whole[rows], whole[:, cols])
    kept = torch.zeros(7, 5, dtype=torch.bool)
    kept[rows] = not block
    kept[:, cols] = not block
    kept[rows[:, None], cols] = True
    grad = BlockGrad.of(OpenPart(layout=layout, rows=ROWS, cols=COLS), parts, whole.shape)
    return grad, torch.where(kept, whole, 0)


def same(found: Any, expected: Any) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(found.dense() if isinstance(found, BlockGrad) else found, expected)


both = pytest.mark.parametrize("layout", ["block", "panels"])

# name -> (operation, whether the gradient has to stay packed)
READS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "norm": (lambda g: g.norm(), True),
    "vector norms": (lambda g: torch.stack([torch.linalg.vector_norm(g, p) for p in (0.5, 1, 2, 3, INF)]), True),
    "odd norms": (lambda g: torch.stack([torch.linalg.vector_norm(g, p) for p in (0, -1, -INF)]), True),
    "row norms": (lambda g: torch.linalg.vector_norm(g, dim=1), True),
    "norm in float64": (lambda g: torch.linalg.vector_norm(g, dtype=torch.float64), True),
    "foreach norm": (lambda g: torch._foreach_norm([g, torch.ones(3)])[0], True),
    "total norm": (lambda g: nn.utils.get_total_norm([g, torch.ones(3)]), True),
    "times a number": (lambda g: g * 3, True),
    "times a scalar": (lambda g: g * torch.tensor(3.0), True),
    "times a float64 scalar": (lambda g: g * torch.tensor(3.0, dtype=torch.float64), True),
    "over a number": (lambda g: g / 7, True),
    "twice": (lambda g: g + g, True),
    "minus": (lambda g: g - 2 * g, True),
    "clone": (torch.clone, True),
    "detach": (lambda g: g.detach(), True),
    "data": (lambda g: g.data, True),
    "float64": (lambda g: g.double(), True),
    "bfloat16": (lambda g: g.to(torch.bfloat16), True),
    "to its device": (lambda g: g.to("cpu"), True),
    "deepcopy": (copy.deepcopy, True),
    "times a row": (lambda g: g * torch.arange(5.0), True),
    "isnan": (torch.isnan, True),
    "isfinite": (lambda g: torch.isfinite(g).all(), True),
    "sum": (torch.sum, True),
    "largest": (lambda g: g.abs().max(), True),
    "square": (lambda g: g.float().square().sum(), True),
    "equal to zero": (lambda g: g == 0, True),
    "plus one": (lambda g: 1 + g, True),
    "stack": (lambda g: torch.stack([g, g]), True),
    "cat": (lambda g: torch.cat([g, torch.ones(2, 5)]), True),
    "where": (lambda g: torch.where(g > 0, g, -g), True),
    "as_tensor": (torch.as_tensor, True),
    "zeros_like": (torch.zeros_like, True),
    "tolist": (lambda g: torch.tensor(g.tolist()), True),
    "item": (lambda g: torch.tensor(g.sum().item()), True),
    "matmul": (lambda g: g @ g.t(), False),
    "slice": (lambda g: g[1:3, ::2], False),
    "view": (lambda g: g.view(-1), False),
    "transpose": (lambda g: g.t().contiguous(), False),
    "numpy": (lambda g: torch.from_numpy(g.numpy().copy()), False),
    "asarray": (lambda g: torch.from_numpy(np.asarray(g).copy()), False),
    "dlpack": (lambda g: torch.from_dlpack(g), False),
}


@both
@pytest.mark.parametrize("read", READS)
def test_what_is_read_is_what_the_dense_tensor_gives(layout: str, read: str) -> None:
    (grad, dense), (operation, packed) = made(layout), READS[read]
    same(operation(grad), operation(dense))
    same(grad, dense)  # and it still is
    if packed:
        assert grad.part is not None


def _put(g: Any) -> None:
    g[0, 0] = 5.0


def _put_row(g: Any) -> None:
    g[3].fill_(1.0)


def _add_to(g: Any) -> None:
    g.view(-1).add_(1.0)


def _through_numpy(g: Any) -> None:
    g.numpy()[2, 2] = 3.0


WRITES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "mul_": (lambda g: g.mul_(2), True),
    "mul_ by a scalar": (lambda g: g.mul_(torch.tensor(0.5)), True),
    "div_": (lambda g: g.div_(3), True),
    "foreach mul": (lambda g: torch._foreach_mul_([g, torch.ones(2)], 2.0), True),
    "foreach mul by a scalar": (lambda g: torch._foreach_mul_([g], torch.tensor(2.0)), True),
    "foreach div": (lambda g: torch._foreach_div_([g], 2.0), True),
    "data mul_": (lambda g: g.data.mul_(3), True),
    "detach mul_": (lambda g: g.detach().mul_(3), True),
    "itself": (lambda g: g.add_(g.clone(), alpha=0.5), True),
    "clamp": (lambda g: g.clamp_(-0.1, 0.2), True),
    "clamp to positive": (lambda g: g.clamp_(min=0.1), False),
    "foreach clamp": (lambda g: torch._foreach_clamp_min_([g], -0.1), False),
    "add": (lambda g: g.add_(torch.ones(7, 5)), False),
    "addcmul": (lambda g: g.addcmul_(g, g), False),
    "fill": (lambda g: g.fill_(2.0), False),
    "copy": (lambda g: g.copy_(torch.ones(7, 5)), False),
    "nan_to_num": (lambda g: g.nan_to_num_(), False),
    "index_fill": (lambda g: g.index_fill_(0, torch.tensor([1]), 0), False),
    "entry": (_put, False),
    "row": (_put_row, False),
    "view": (_add_to, False),
    "numpy": (_through_numpy, False),
    "zero, then dense": (lambda g: (g.zero_(), g.add_(torch.ones(7, 5))), False),
    "mul_ of what was made dense": (lambda g: (g.view(-1), g.mul_(2), g.div_(3)), False),
}


@both
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_is_written(layout: str, write: str) -> None:
    (grad, dense), (operation, packed) = made(layout), WRITES[write]
    alias = grad.detach()
    operation(grad)
    operation(dense)
    same(grad, dense)
    same(alias, dense)
    assert (grad.part is not None) == packed


@both
def test_it_is_saved_and_shown_as_the_dense_tensor(layout: str) -> None:
    grad, dense = made(layout)
    buffer = io.BytesIO()
    torch.save(grad, buffer)
    buffer.seek(0)
    for found in (torch.load(buffer, weights_only=True), pickle.loads(pickle.dumps(grad))):
        assert type(found) is Tensor
        assert torch.equal(found, dense)
    assert repr(grad).startswith(f"BlockGrad({layout}, tensor([[")


@both
def test_sums_of_zero_of_other_parts_and_of_other_dtypes(layout: str) -> None:
    grad, dense = made(layout)
    assert float(grad.zero_().norm()) == 0.0
    assert not grad.dense().any()
    assert grad.double().dtype == torch.float64
    grad.add_(made(layout)[0])  # nothing is stored: the other's parts are taken over, not shared
    assert grad.part is not None
    grad.mul_(2)
    same(grad, 2 * dense)
    other, expected = made("panels" if layout == "block" else "block")
    same(grad + other, 2 * dense + expected)
    grad += other
    same(grad, 2 * dense + expected)
    assert grad.part is None
    wide, _ = made(layout, torch.float64)
    assert (made(layout)[0] + wide).dtype == torch.float64
    plain = torch.ones(7, 5)
    plain += made(layout)[0]
    same(plain, 1 + dense)


@both
@pytest.mark.parametrize("foreach", [False, True])
def test_torch_optimizers_and_clipping_take_it(layout: str, foreach: bool) -> None:
    results = []
    for index in (0, 1):
        weight, bias = nn.Parameter(torch.ones(7, 5)), nn.Parameter(torch.ones(3))
        weight.grad, bias.grad = made(layout)[index], torch.ones(3)
        norm = nn.utils.clip_grad_norm_([weight, bias], 0.5)
        nn.utils.clip_grad_value_([weight, bias], 0.1)
        optimizer = torch.optim.AdamW([weight, bias], lr=0.1, foreach=foreach)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert float(weight.grad.norm()) == 0.0
        results.append((norm, weight.detach()))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@both
@pytest.mark.parametrize("value", [1.0, math.nan, INF])
def test_gradscaler_unscales_it_and_sees_what_is_not_finite(layout: str, value: float) -> None:
    found = []
    for index in (0, 1):
        grad, inf = made(layout)[index], torch.zeros(())
        (grad.parts[-1] if index == 0 else grad)[-1, -1].mul_(value)
        torch._amp_foreach_non_finite_check_and_unscale_([torch.ones(2), grad], inf, torch.tensor(0.25))
        found.append(float(inf))
        assert value != 1.0 or (index == 1 or grad.part is not None)
    assert found[0] == (0.0 if value == 1.0 else 1.0)
    assert value != 1.0 or found[0] == found[1]


def test_nothing_open_is_zero() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for layout, parts in (
        ("block", (torch.zeros(0, 0),)),
        ("panels", (torch.zeros(0, 5), torch.zeros(7, 0))),
    ):
        grad = BlockGrad.of(OpenPart(layout=layout, rows=none, cols=none), parts, torch.Size((7, 5)))
        assert float(grad.norm()) == float(torch.linalg.vector_norm(grad, INF)) == 0.0
        assert torch.equal(grad.dense(), torch.zeros(7, 5))
        assert not torch.isnan(grad.mul_(2)).any()
