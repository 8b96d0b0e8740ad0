"""SwiGLU forward and backward in plain PyTorch. T tokens, F feed-forward width; s = sigmoid(g).

    h = silu(g) * u,   d_g = d_h u s (1 + g (1 - s)),   d_u = d_h silu(g)

Arithmetic is float32 (float64 for float64), rounded once.
"""

import torch
from torch import Tensor


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [T, F], rounded once."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_grad_ref(d_hidden: Tensor, gate: Tensor, up: Tensor) -> None:
    """In place, all [T, F]: d_hidden := silu(gate)*up (again), gate := d_gate, up := d_up. Three buffers, not six."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    g, u, dh = gate.to(wide), up.to(wide), d_hidden.to(wide)
    s = torch.sigmoid(g)
    silu = g * s
    # Every right-hand side before any write: in float32 and float64 g, u and dh are the buffers themselves.
    hidden, d_gate, d_up = silu * u, dh * u * (s * (1 + g * (1 - s))), dh * silu
    d_hidden.copy_(hidden)
    gate.copy_(d_gate)
    up.copy_(d_up)
