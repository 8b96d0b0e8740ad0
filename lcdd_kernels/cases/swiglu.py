"""Cases of SwiGLU: values on both sides of zero and far from it."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from lcdd_kernels.cases import Case, Inputs


def make_forward(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shape = (7, 151 * size)
    return {name: (3.0 * torch.randn(shape, generator=generator)).to(dtype).to(device) for name in ("gate", "up")}


def make_backward(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed + 1)
    d_hidden = torch.randn((7, 151 * size), generator=generator).to(dtype).to(device)
    return {"d_hidden": d_hidden, **make_forward(dtype, device, seed, size)}


def forward_expression(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def backward_expression(d_hidden: Tensor, gate: Tensor, up: Tensor) -> None:
    with torch.enable_grad():
        g, u = gate.clone().requires_grad_(), up.clone().requires_grad_()
        hidden = silu(g) * u
        d_gate, d_up = torch.autograd.grad(hidden, (g, u), d_hidden)
    for target, value in ((d_hidden, hidden.detach()), (gate, d_gate), (up, d_up)):
        target.copy_(value)


# One exp, of an argument up to 13 in size, and one division; the slope of silu doubles their relative error.
_APPROXIMATIONS = 4 + 4 + 13


CASES = {
    "swiglu": Case(
        make=make_forward,
        expression=forward_expression,
        outputs=("hidden",),
        approximations={"hidden": _APPROXIMATIONS},
    ),
    "swiglu_grad_": Case(
        make=make_backward,
        expression=backward_expression,
        outputs=("d_hidden", "gate", "up"),
        in_place=True,
        approximations={"d_hidden": _APPROXIMATIONS, "gate": 2 * _APPROXIMATIONS, "up": _APPROXIMATIONS},
    ),
}
