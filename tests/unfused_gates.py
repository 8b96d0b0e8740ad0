"""The forward route left to autograd, sample inputs, and the comparison that both test modules of the route use."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcdd_kernels import GateMap, GateSpec
from lcdd_kernels.reference.gates import gate_noise_ref


def unfused_gate(logits: Tensor, spec: GateSpec, *, offset: int) -> Tensor:
    """Gates by their definition, for autograd (method, section 2)."""
    if spec.kind == "heaviside_ste":
        soft = torch.sigmoid(logits)
        return (logits > 0).to(soft.dtype) + soft - soft.detach()
    if not spec.training:
        return (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1)
    u = gate_noise_ref(logits.numel(), spec, offset=offset, dtype=logits.dtype, device=logits.device)
    return (torch.sigmoid((torch.logit(u) + logits) * 1.5) * 1.2 - 0.1).clamp(0, 1)


def unfused_linear(
    x: Tensor,
    weight_base: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    spec: GateSpec,
    *,
    where: GateMap = GateMap(0, 0),  # noqa: B008
    bias: Tensor | None = None,
) -> Tensor:
    """x W_eff^T with every step left to autograd, in the dtype of delta."""
    r = unfused_gate(row_logits, spec, offset=where.row_start)
    c = unfused_gate(col_logits, spec, offset=where.col_start)
    columns = torch.arange(delta.shape[1], device=delta.device)
    c = c[(columns // (where.repeat * where.head_dim)) * where.head_dim + columns % where.head_dim]
    weight = weight_base + (torch.outer(r, c) * delta).to(weight_base.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def sample(
    tokens: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    gates: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    bias: bool = False,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float, of: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=g)).to(of).to(device)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "x": normal(tokens, cols, scale=1.0),
        "weight_base": normal(rows, cols, scale=1 / math.sqrt(cols)),
        "delta": normal(rows, cols, scale=0.3 / math.sqrt(cols)),
        "row_logits": normal(rows, scale=2.0, of=wide),
        "col_logits": normal(gates or cols, scale=2.0, of=wide),
    }
    return inputs | ({"bias": normal(rows, scale=0.1)} if bias else {})


def run(function: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor, **settings: Any) -> dict[str, Tensor]:
    """y and the gradient of every input but the base."""
    leaves = {name: value.detach().clone().requires_grad_(name != "weight_base") for name, value in inputs.items()}
    y = function(**leaves, **settings)
    y.backward(dy.to(y.dtype).to(y.device))
    assert leaves["weight_base"].grad is None
    return {"y": y.detach(), **{f"d_{n}": leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}}


def assert_as_close_as(got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Every error at most twice the same-dtype expression's, plus a few roundings of the largest entry."""
    assert got.keys() == truth.keys()
    for name, exact in truth.items():
        value = got[name]
        assert value.dtype == plain[name].dtype
        exact = exact.cpu().double()
        error = (value.cpu().double() - exact).abs()
        other = (plain[name].cpu().double() - exact).abs()
        floor = 2 * torch.finfo(value.dtype).eps * float(exact.abs().max())
        assert float(error.nan_to_num(math.inf).max()) <= 2 * float(other.max()) + floor, name


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().double() for name, value in inputs.items()}
