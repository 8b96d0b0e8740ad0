"""Gates of a whole model in a few launches: values, expected L0, their gradient, and the open-index lists.

N gates of the model, G groups (8 per layer). theta = gate logits, z = gate, sigma = logistic function.

    noise            u = ((x >> 9) + 1/2) 2^-23, x the first word of Philox4x32-10 with key = (seed lo, seed hi),
                     counter = (i lo, i hi, step lo, step hi), i = offset + position of the gate
    hard_concrete    s = sigma((ln u - ln(1-u) + theta) / BETA) in training, sigma(theta) in evaluation,
                     z = clamp(s (ZETA-GAMMA) + GAMMA, 0, 1)
    heaviside_ste    z = 1[theta > 0], backward as if z = sigma(theta)
    E[L0]            sum sigma(theta - BETA ln(-GAMMA/ZETA))  |  sum sigma(theta)
    d theta          dz * dz/dtheta + l0_weight * dE[L0]/dtheta;  the noise is drawn again, nothing is stored

`philox_uniform`, `gate_value` and `gate_slope` are device functions for the other modules too, so that the forward
route draws the same gates.
Contract: method.md section 2; arithmetic in float32, no atomics, sums in two stages of fixed order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lcdd_kernels.reference.gates import BETA, GAMMA, KINDS, L0_SHIFT, ZETA, GateSpec
from lcdd_kernels.triton_kernels import AotSignature, LaunchConfig, launch
from lcdd_kernels.triton_kernels.accurate import accurate_log, accurate_sigmoid
from lcdd_kernels.triton_kernels.tables import TableCache

# Globals that kernels read must be constexpr.
_HARD_CONCRETE: tl.constexpr = tl.constexpr(KINDS.index("hard_concrete"))
_INV_BETA: tl.constexpr = tl.constexpr(1.0 / BETA)
_GAMMA: tl.constexpr = tl.constexpr(GAMMA)
_STRETCH: tl.constexpr = tl.constexpr(ZETA - GAMMA)
_L0_SHIFT: tl.constexpr = tl.constexpr(L0_SHIFT)


@dataclass(frozen=True, kw_only=True)
class GatesConfig(LaunchConfig):
    """Gates per program. Every launch of this module uses it, whatever the model or the GPU. No fusion: a gate that the
    forward clamps is clamped by the backward's kernel too."""

    block: int = 1024
    enable_fp_fusion: bool = False


CONFIG = GatesConfig()
SUM_CONFIG = GatesConfig(block=4096, num_warps=8)
_offsets = TableCache()


# ---------------------------------------------------------------- device functions
@triton.jit
def philox_uniform(index, seed, step):
    """u in (0, 1), float32, on the grid (k + 1/2) 2^-23; index: int64 block of positions in the model's gate vector."""
    zero = index * 0
    c0 = (index & 0xFFFFFFFF).to(tl.uint32)
    c1 = (index >> 32).to(tl.uint32)
    c2 = zero.to(tl.uint32) + (step & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero.to(tl.uint32) + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, c0, c1, c2, c3)
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _stretched(theta, index, seed, step, KIND: tl.constexpr, TRAINING: tl.constexpr):
    """s before stretching (hard_concrete) or sigma(theta) (heaviside_ste)."""
    if KIND == _HARD_CONCRETE and TRAINING:
        u = philox_uniform(index, seed, step)
        s = accurate_sigmoid((accurate_log(u) - accurate_log(1.0 - u) + theta) * _INV_BETA)
    else:
        s = accurate_sigmoid(theta)
    return s


@triton.jit
def gate_value(theta, index, seed, step, KIND: tl.constexpr, TRAINING: tl.constexpr):
    """z for logits theta (float32) at positions `index` (int64); seed, step: int64 scalars; KIND: index in KINDS."""
    if KIND == _HARD_CONCRETE:
        z = _stretched(theta, index, seed, step, KIND, TRAINING) * _STRETCH + _GAMMA
        # Not min(max()): a NaN logit stays a NaN gate, as in the reference.
        z = tl.where(z < 0.0, 0.0, tl.where(z > 1.0, 1.0, z))
    else:
        z = tl.where(theta > 0.0, 1.0, 0.0)
    return z


@triton.jit
def gate_slope(theta, index, seed, step, KIND: tl.constexpr, TRAINING: tl.constexpr):
    """dz/dtheta; exactly zero where a hard-concrete gate is clamped."""
    s = _stretched(theta, index, seed, step, KIND, TRAINING)
    slope = s * (1.0 - s)
    if KIND == _HARD_CONCRETE:
        # Clamped where `gate_value` is: the same expression.
        z = s * _STRETCH + _GAMMA
        if TRAINING:
            slope = slope * _INV_BETA
        slope = tl.where((z <= 0.0) | (z >= 1.0), 0.0, slope * _STRETCH)
    return slope


@triton.jit
def _l0_logit(theta, KIND: tl.constexpr):
    """The logit of the probability that the gate is open."""
    if KIND == _HARD_CONCRETE:
        theta = theta - _L0_SHIFT
    return theta


# ---------------------------------------------------------------- kernels
@triton.jit(do_not_specialize=["n_gates", "seed", "step", "offset"])
def gate_values_fwd_kernel(
    logits_ptr,
    gate_ptr,
    l0_partial_ptr,
    n_gates: tl.int32,
    seed: tl.int64,
    step: tl.int64,
    offset: tl.int64,
    KIND: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK gates: gate[i], and this block's share of the expected L0."""
    pid = tl.program_id(0)
    index = pid * BLOCK + tl.arange(0, BLOCK)
    inside = index < n_gates
    theta = tl.load(logits_ptr + index, mask=inside, other=0.0)
    z = gate_value(theta, offset + index.to(tl.int64), tl.cast(seed, tl.int64), tl.cast(step, tl.int64), KIND, TRAINING)
    tl.store(gate_ptr + index, z, mask=inside)
    likely_open = accurate_sigmoid(_l0_logit(theta, KIND))
    tl.store(l0_partial_ptr + pid, tl.sum(tl.where(inside, likely_open, 0.0), axis=0))


@triton.jit(do_not_specialize=["count"])
def sum_partials_kernel(partial_ptr, out_ptr, count: tl.int32, BLOCK: tl.constexpr):
    """out[pid] = sum of partial[pid*BLOCK : (pid+1)*BLOCK]; the second stage of every scalar reduction, order fixed."""
    pid = tl.program_id(0)
    offset = pid * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + pid, tl.sum(tl.load(partial_ptr + offset, mask=offset < count, other=0.0), axis=0))


@triton.jit(do_not_specialize=["n_gates", "seed", "step", "offset", "l0_weight"])
def gate_logits_bwd_kernel(
    logits_ptr,
    d_gate_ptr,
    d_logits_ptr,
    n_gates: tl.int32,
    seed: tl.int64,
    step: tl.int64,
    offset: tl.int64,
    l0_weight: tl.float32,
    KIND: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d_logits = d_gate * dz/dtheta + l0_weight * dE[L0]/dtheta."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n_gates
    theta = tl.load(logits_ptr + index, mask=inside, other=0.0)
    d_gate = tl.load(d_gate_ptr + index, mask=inside, other=0.0)
    slope = gate_slope(
        theta, offset + index.to(tl.int64), tl.cast(seed, tl.int64), tl.cast(step, tl.int64), KIND, TRAINING
    )
    shifted = _l0_logit(theta, KIND)
    # sigmoid(-x) rather than 1 - sigmoid(x): no cancellation for wide open gates.
    l0_slope = accurate_sigmoid(shifted) * accurate_sigmoid(-shifted)
    tl.store(d_logits_ptr + index, d_gate * slope + l0_weight * l0_slope, mask=inside)


@triton.jit
def open_indices_kernel(gate_ptr, offsets_ptr, indices_ptr, counts_ptr, rank_ptr, BLOCK: tl.constexpr):
    """One program per group: open gates fill the list from the front, ascending; closed ones put -1 from the back.

    Each list position is written exactly once, so no pass is needed to clear it.
    """
    group = tl.program_id(0)
    begin = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    n_open = tl.zeros((), tl.int32)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < end
        is_open = inside & (tl.load(gate_ptr + position, mask=inside, other=0.0) != 0.0)
        flag = is_open.to(tl.int32)
        rank = n_open + tl.cumsum(flag, axis=0) - flag
        local = (position - begin).to(tl.int32)
        n_closed_before = local - rank
        slot = tl.where(is_open, begin + rank, end - 1 - n_closed_before)
        tl.store(indices_ptr + slot, tl.where(is_open, local, -1), mask=inside)
        tl.store(rank_ptr + position, tl.where(is_open, rank, -1), mask=inside)
        n_open += tl.sum(flag, axis=0)
    tl.store(counts_ptr + group, n_open)


# ---------------------------------------------------------------- launchers
def signed64(value: int) -> int:
    """The two's-complement int64 with the same 64 bits: kernels take i64, and a seed may use all 64 bits."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def sum_partials(partials: torch.Tensor) -> torch.Tensor:
    """Sum of a float32 vector in stages of fixed order: the same bits on every run. Returns a scalar float32."""
    if partials.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=partials.device)
    while True:
        blocks = triton.cdiv(partials.numel(), SUM_CONFIG.block)
        out = torch.empty(blocks, dtype=torch.float32, device=partials.device)
        launch(
            sum_partials_kernel,
            (blocks,),
            SUM_CONFIG,
            partial_ptr=partials,
            out_ptr=out,
            count=partials.numel(),
            BLOCK=SUM_CONFIG.block,
        )
        if blocks == 1:
            return out.reshape(())
        partials = out


def _settings(spec: GateSpec, n_gates: int, offset: int) -> dict[str, int | bool]:
    """The arguments that the kernels of values and of their gradient share."""
    return {
        "n_gates": n_gates,
        "seed": signed64(spec.seed),
        "step": signed64(spec.step),
        "offset": offset,
        "KIND": KINDS.index(spec.kind),
        "TRAINING": spec.training,
        "BLOCK": CONFIG.block,
    }


def gate_values_triton(logits: torch.Tensor, spec: GateSpec, *, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate[N], expected_l0[]) from logits [N]; both float32. See `lcdd_kernels.reference.gates`."""
    logits = logits.contiguous()
    n_gates = logits.numel()
    gate = torch.empty(n_gates, dtype=torch.float32, device=logits.device)
    blocks = triton.cdiv(n_gates, CONFIG.block)
    partials = torch.empty(blocks, dtype=torch.float32, device=logits.device)
    launch(
        gate_values_fwd_kernel,
        (blocks,),
        CONFIG,
        logits_ptr=logits,
        gate_ptr=gate,
        l0_partial_ptr=partials,
        **_settings(spec, n_gates, offset),
    )
    return gate, sum_partials(partials)


def gate_logits_grad_triton(
    logits: torch.Tensor, d_gate: torch.Tensor, spec: GateSpec, *, l0_weight: float, offset: int = 0
) -> torch.Tensor:
    """d_logits [N] float32 from d_gate [N] and the weight of the expected L0."""
    logits = logits.contiguous()
    d_gate = d_gate.contiguous()
    n_gates = logits.numel()
    d_logits = torch.empty(n_gates, dtype=torch.float32, device=logits.device)
    launch(
        gate_logits_bwd_kernel,
        (triton.cdiv(n_gates, CONFIG.block),),
        CONFIG,
        logits_ptr=logits,
        d_gate_ptr=d_gate,
        d_logits_ptr=d_logits,
        l0_weight=float(l0_weight),
        **_settings(spec, n_gates, offset),
    )
    return d_logits


def open_indices_triton(gate: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indices[N], counts[G], rank[N]), int32, of gate [N] in groups offsets [G+1] (int64, from 0 to N)."""
    gate = gate.contiguous()
    n_gates, n_groups = gate.numel(), offsets.numel() - 1
    indices = torch.empty(n_gates, dtype=torch.int32, device=gate.device)
    rank = torch.empty(n_gates, dtype=torch.int32, device=gate.device)
    counts = torch.empty(n_groups, dtype=torch.int32, device=gate.device)
    launch(
        open_indices_kernel,
        (n_groups,),
        CONFIG,
        gate_ptr=gate,
        offsets_ptr=_offsets.get(tuple(offsets.tolist()), lambda: offsets, gate.device),
        indices_ptr=indices,
        counts_ptr=counts,
        rank_ptr=rank,
        BLOCK=CONFIG.block,
    )
    return indices, counts, rank


# ---------------------------------------------------------------- ahead of time
def aot_signatures() -> Iterator[AotSignature]:
    """Every configuration that the launchers above choose."""
    scalars = {"n_gates": "i32", "seed": "i64", "step": "i64", "offset": "i64"}
    values = {"logits_ptr": "*fp32", "gate_ptr": "*fp32", "l0_partial_ptr": "*fp32"}
    grad = {"logits_ptr": "*fp32", "d_gate_ptr": "*fp32", "d_logits_ptr": "*fp32"}
    for kind, name in enumerate(KINDS):
        for training in (True, False):
            constexprs = {"KIND": kind, "TRAINING": training, "BLOCK": CONFIG.block}
            for kernel, signature in (
                (gate_values_fwd_kernel, values | scalars),
                (gate_logits_bwd_kernel, grad | scalars | {"l0_weight": "fp32"}),
            ):
                yield AotSignature(
                    kernel=kernel,
                    label=f"{name} {'training' if training else 'eval'}",
                    config=CONFIG,
                    signature=signature,
                    constexprs=constexprs,
                    divisible_by_16=tuple(name for name, type_ in signature.items() if type_.startswith("*")),
                )
    yield AotSignature(
        kernel=sum_partials_kernel,
        label=f"block {SUM_CONFIG.block}",
        config=SUM_CONFIG,
        signature={"partial_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32"},
        constexprs={"BLOCK": SUM_CONFIG.block},
        divisible_by_16=("partial_ptr", "out_ptr"),
    )
    outputs = {"indices_ptr": "*i32", "counts_ptr": "*i32", "rank_ptr": "*i32"}
    yield AotSignature(
        kernel=open_indices_kernel,
        label=f"block {CONFIG.block}",
        config=CONFIG,
        signature={"gate_ptr": "*fp32", "offsets_ptr": "*i64"} | outputs,
        constexprs={"BLOCK": CONFIG.block},
        divisible_by_16=("gate_ptr", "offsets_ptr", *outputs),
        loop_barriers=5,  # a running count over all threads: 4 of Triton 3.9, 5 of 3.6
    )
