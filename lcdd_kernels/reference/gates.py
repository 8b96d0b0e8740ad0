"""Gates of a whole model, in plain PyTorch (method section 2): the implementation signatures that every backend shares.

Shapes: N gates of the model, G groups (8 a layer). Logits and gates are float32, or float64 in the float64 reference.

Noise (hard_concrete in training), the same bits on every backend: Philox4x32-10 with
    key     = (seed & 0xffffffff, seed >> 32)
    counter = (n & 0xffffffff, n >> 32, step & 0xffffffff, step >> 32)      n = offset + position of the gate
    x       = first output word (uint32)
    u       = (float(x >> 9) + 0.5) * 2**-23
Of x, 23 bits are kept: then u has 24 significant bits, so u *and* 1 - u are exact in float32 and strictly inside (0,
1). (With 24 bits, x >> 8, float32 rounds the largest value to u = 1.)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("heaviside_ste", "hard_concrete")  # position = code
BETA = 2.0 / 3.0
GAMMA = -0.1
ZETA = 1.1
L0_SHIFT = BETA * math.log(-GAMMA / ZETA)  # P(z > 0) = sigmoid(theta - L0_SHIFT); negative, about -1.5986

_MASK = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """How gates are drawn from their logits (method, section 2).

    kind: "heaviside_ste" (0 or 1; straight-through gradient) or "hard_concrete" (in [0, 1]; with noise in training,
    deterministic otherwise). seed, step: of the noise, any int in [0, 2**63).
    """

    kind: str
    seed: int = 0
    step: int = 0
    training: bool = True


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a uint32 product held in int64. The 64-bit product wraps, its bits do not change."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox_ref(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) over int64 tensors that hold uint32 words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mulhilo(_PHILOX_M[0], c0)
        hi1, lo1 = _mulhilo(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK, (k1 + _PHILOX_W[1]) & _MASK
    return c0, c1, c2, c3


def gate_noise_ref(
    n: int, spec: GateSpec, *, offset: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """u[n] in (0, 1): the noise of gates offset .. offset + n - 1. Exact in float32, so the same numbers in every
    dtype.
    """
    i = torch.arange(offset, offset + n, dtype=torch.int64, device=device)
    word2, word3 = torch.full_like(i, spec.step & _MASK), torch.full_like(i, spec.step >> 32)
    x, *_ = philox_ref((i & _MASK, i >> 32, word2, word3), (spec.seed & _MASK, spec.seed >> 32))
    return ((x >> 9).to(dtype) + 0.5) * 2.0**-23


def _concrete(logits: Tensor, spec: GateSpec, offset: int) -> tuple[Tensor, float]:
    """s of the hard concrete, and the derivative of s's argument with respect to theta."""
    if not spec.training:
        return torch.sigmoid(logits), 1.0
    u = gate_noise_ref(logits.numel(), spec, offset=offset, dtype=logits.dtype, device=logits.device)
    return torch.sigmoid((u.log() - (1 - u).log() + logits) / BETA), 1.0 / BETA


def gate_values_ref(logits: Tensor, spec: GateSpec, *, offset: int = 0) -> tuple[Tensor, Tensor]:
    """logits[N] -> (gate[N], expected_l0[]), both in the dtype of logits.

    heaviside_ste: gate = 1[theta > 0], L0 = sum sigmoid(theta).
    hard_concrete: gate = clamp(s*(ZETA-GAMMA)+GAMMA, 0, 1), s = sigmoid((ln u - ln(1-u) + theta)/BETA) in training and
    sigmoid(theta) otherwise; L0 = sum sigmoid(theta - BETA*ln(-GAMMA/ZETA)).
    `offset` is added to the noise counter: a slice of the logits draws what it would draw within the whole vector.
    The sum is deterministic.
    """
    if spec.kind == "heaviside_ste":
        return (logits > 0).to(logits.dtype), torch.sigmoid(logits).sum()
    s, _ = _concrete(logits, spec, offset)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1), torch.sigmoid(logits - L0_SHIFT).sum()


def gate_logits_grad_ref(
    logits: Tensor, d_gate: Tensor, spec: GateSpec, *, l0_weight: float, offset: int = 0
) -> Tensor:
    """d_logits[N] = d_gate * dz/dtheta + l0_weight * dE[L0]/dtheta, in the dtype of logits; the noise is recomputed.

    heaviside_ste: dz/dtheta := sigmoid'(theta), straight through. hard_concrete: exactly zero where the gate is
    clamped.
    """
    if spec.kind == "heaviside_ste":
        slope = torch.sigmoid(logits) * torch.sigmoid(-logits)
        return d_gate * slope + l0_weight * slope
    s, inner = _concrete(logits, spec, offset)
    z = s * (ZETA - GAMMA) + GAMMA
    slope = torch.where((z > 0) & (z < 1), s * (1 - s) * (inner * (ZETA - GAMMA)), 0.0)
    shifted = logits - L0_SHIFT
    # sigmoid(-x) rather than 1 - sigmoid(x): no cancellation for wide open gates.
    return d_gate * slope + l0_weight * (torch.sigmoid(shifted) * torch.sigmoid(-shifted))


def open_indices_ref(gate: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gate[N], offsets[G+1] (int64, CPU, from 0 to N, ascending) -> (indices[N], counts[G], rank[N]), all int32 on
    gate's device.

    indices[offsets[g] : offsets[g] + counts[g]] are the local positions of group g's open gates (gate != 0),
    ascending; the rest of the group's slice is -1. rank[n] is the place of gate n in its group's list, -1 where it is
    closed.
    """
    n = gate.numel()
    bounds = offsets.to(gate.device)
    starts, sizes = bounds[:-1], bounds[1:] - bounds[:-1]
    is_open = gate != 0
    before = torch.zeros(n + 1, dtype=torch.int64, device=gate.device)  # open gates in gate[:n]
    torch.cumsum(is_open, 0, out=before[1:])
    start_of = torch.repeat_interleave(starts, sizes, output_size=n)
    place = before[:-1] - before[start_of]
    rank = torch.where(is_open, place, -1).to(torch.int32)
    counts = (before[bounds[1:]] - before[starts]).to(torch.int32)
    position = torch.arange(n, device=gate.device)
    # Closed gates are all sent to one extra slot, so that no boolean mask (a wait for its count) is needed.
    indices = torch.full((n + 1,), -1, dtype=torch.int32, device=gate.device)
    indices[torch.where(is_open, start_of + place, n)] = (position - start_of).to(torch.int32)
    return indices[:n].clone(), counts, rank
