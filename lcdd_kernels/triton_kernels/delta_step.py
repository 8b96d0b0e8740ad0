"""Pass A, pass B and the refresh of W_eff over all matrices of a model: a few table-driven launches.

M matrices W[out, in] with base, delta D, gradient G = dL/dW_eff, row gates r[out] and column gates c[in] found in one
flat gate vector by its `GateMap`.

    refresh    W_ij = base_ij + (r_i c_j) D_ij, every operation rounded; where r_i c_j = 0, the bits of base_ij
               (the same kernel counts where a W is not that)
    pass A     d_gate[row i] = sum_j c_j D_ij G_ij, d_gate[col j] = sum_i r_i D_ij G_ij, sq_norm = sum (r_i c_j G_ij)^2
    pass B     AdamW on D with gradient grad_scale (r_i c_j) G_ij, old gates; then the refresh, new gates and stored D

Matrices of one dtype, layout and alignment form a group: one launch per group and pass (one where nothing is packed).
The table on the device (`delta_step_tables`) is made once; a step uploads where its gradients are. Pass A writes
partial sums per tile, and one launch for all groups gathers them per gate in a fixed order: no atomics, the same bits
always.

Signatures, layouts of G (dense, block, panels) and the meaning of `rank`: `lcdd_kernels.reference.delta_step`.
Arithmetic is float32. W is float32, float16 or bfloat16; D and the moments are that, float32 or bfloat16; G is that or
float32. Kernels that write W_eff run without floating-point fusion, so that its bits agree with every other backend.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lcdd_kernels.reference.delta_step import DENSE, LAYOUTS, AdamWStep, Gradients, Matrices
from lcdd_kernels.triton_kernels import AotSignature, LaunchConfig, launch
from lcdd_kernels.triton_kernels import delta_step_kernels as kernels
from lcdd_kernels.triton_kernels.delta_step_tables import Group, Table, TileConfig
from lcdd_kernels.triton_kernels.gates import sum_partials

# A thread has four adjacent entries, whatever the dtypes: then float32 and 16-bit tensors share one layout, and nothing
# goes through shared memory inside the loops. Gathers (packed gradients, rows that do not start on 16 bytes) need more
# registers.
REFRESH = TileConfig(block_m=4, rows=32, enable_fp_fusion=False)
PASS_A = TileConfig(block_m=8, block_n=128, rows=128)
PASS_A_GATHER = TileConfig(block_m=8, block_n=128, rows=128, max_registers=168)
PASS_B = TileConfig(block_m=2, rows=32, enable_fp_fusion=False, max_registers=80)
PASS_B_GATHER = TileConfig(block_m=2, rows=32, num_warps=8, enable_fp_fusion=False, max_registers=80)


def pass_a_config(layout: int, aligned: bool) -> TileConfig:
    """Pass A's configuration; both have the same tiles, because the partial sums' places depend on them."""
    return PASS_A if layout == DENSE and aligned else PASS_A_GATHER


def pass_b_config(layout: int, aligned: bool) -> TileConfig:
    """Pass B's configuration."""
    return PASS_B if layout == DENSE and aligned else PASS_B_GATHER


@dataclass(frozen=True, kw_only=True)
class GatherConfig(LaunchConfig):
    """Gates per program, and partial sums read at a time for each of them."""

    block_gates: int = 128
    block_tiles: int = 16


GATHER = GatherConfig()

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Beside the weight's own dtype pass B serves these, so that what can be compiled is what `aot_signatures` lists.
_DELTA_ALSO = _MOMENT_ALSO = (torch.float32, torch.bfloat16)
_GRAD_ALSO = (torch.float32,)


def _dtype(
    name: str, dtype: torch.dtype | None, weight: torch.dtype | None = None, also: Sequence[torch.dtype] = ()
) -> Any:
    """Triton's name of a matrix's dtype: its weight's, one of `also`, or (with neither) any that is served."""
    allowed = {weight, *also} - {None} or set(_DTYPES)
    if dtype not in allowed or dtype not in _DTYPES:
        raise ValueError(f"{name}: expected {' or '.join(sorted(map(str, allowed)))} (triton backend), got {dtype}")
    return _DTYPES[dtype]


def _table(matrices: Matrices, device: torch.device) -> Table:
    """Made at the first call, and kept with the matrices."""
    if device not in matrices.tables:
        matrices.tables[device] = Table(matrices, device, (PASS_A, PASS_B), GATHER.block_gates)
    return matrices.tables[device]


def _launch_group(
    kernel: Any, table: Table, order: Tensor, group: Group, cut: int, config: TileConfig, arguments: Mapping[str, Any]
) -> None:
    """One launch over all tiles of a group's matrices, in the cut of pass A (0) or B (1)."""
    launch(
        kernel,
        (group.tiles[cut],),
        config,
        table_ptr=table.entries,
        order_ptr=order[group.first :],
        count=group.count,
        **arguments,
        ALIGNED=group.kind.aligned,
        **config.constexprs(),
    )


def _refresh_dtypes(group: Group) -> dict[str, Any]:
    weight = _dtype("weights", group.kind.weight)
    return {"WEIGHT": weight, "BASE": weight, "DELTA": _dtype("deltas", group.kind.delta)}


def weight_eff_triton(matrices: Matrices, gate: Tensor) -> None:
    """weights[m] := bases[m] + (r x c) o deltas[m], in place: one launch per dtype and alignment."""
    table = _table(matrices, gate.device)
    order, groups = table.order(None)
    for group, chosen in [(group, _refresh_dtypes(group)) for group in groups]:  # refused before anything is written
        arguments = {"gate_ptr": gate, "differ_ptr": None, **chosen}
        _launch_group(kernels.weight_eff_fwd_kernel, table, order, group, 1, REFRESH, arguments)


def weight_differs_triton(matrices: Matrices, m: int, gate: Tensor) -> Tensor:
    """How many entries of weights[m] the refresh would change, int64 []; neither writes nor keeps a matrix."""
    table = _table(matrices, gate.device)
    order, group = table.alone(m)
    differs = torch.empty(group.tiles[1], dtype=torch.int32, device=gate.device)
    arguments = {"gate_ptr": gate, "differ_ptr": differs, **_refresh_dtypes(group)}
    _launch_group(kernels.weight_eff_fwd_kernel, table, order, group, 1, REFRESH, arguments)
    return differs.sum()


def delta_grad_stats_triton(matrices: Matrices, grads: Gradients, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Pass A: (d_gate[N], sq_norm[]) float32, by one launch per group, one gather and one sum."""
    table = _table(matrices, gate.device)
    order, groups = table.order(grads)
    arena = torch.empty(table.partials.total, dtype=torch.float32, device=gate.device)
    squares = torch.empty(table.partials.total_sq, dtype=torch.float32, device=gate.device)
    shared = {"gate_ptr": gate, "partial_ptr": arena, "sq_partial_ptr": squares}
    for group in groups:
        chosen = {
            "DELTA": _dtype("deltas", group.kind.delta),
            "GRAD": _dtype("grads", group.kind.grad),
            "LAYOUT": group.kind.layout,
            "rank_ptr": None if group.kind.layout == DENSE else grads.rank,
        }
        config = pass_a_config(group.kind.layout, group.kind.aligned)
        _launch_group(kernels.delta_grad_stats_kernel, table, order, group, 0, config, {**shared, **chosen})
    d_gate = torch.empty(gate.numel(), dtype=torch.float32, device=gate.device)
    blocks, uses = table.gather
    launch(
        kernels.gate_gather_kernel,
        (blocks.shape[0],),
        GATHER,
        blocks_ptr=blocks,
        uses_ptr=uses,
        partial_ptr=arena,
        d_gate_ptr=d_gate,
        BLOCK_GATES=GATHER.block_gates,
        BLOCK_TILES=GATHER.block_tiles,
    )
    return d_gate, sum_partials(squares)


def _scale(adam: AdamWStep, gate: Tensor) -> Tensor:
    """The factor on the gradients, float32 [] on the device; the host waits for none, and copies none there."""
    scale = adam.grad_scale
    return scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float32, device=gate.device)


def delta_adamw_triton(
    matrices: Matrices, grads: Gradients, gate_old: Tensor, gate_new: Tensor, adam: AdamWStep
) -> None:
    """Pass B, in place on weights, deltas, exp_avgs and exp_avg_sqs: one launch per group."""
    table = _table(matrices, gate_old.device)
    order, groups = table.order(grads)
    constexprs = [
        {
            "WEIGHT": _dtype("weights", g.kind.weight),
            "DELTA": _dtype("deltas", g.kind.delta, g.kind.weight, _DELTA_ALSO),
            "MOMENT": _dtype("exp_avgs", g.kind.moment, g.kind.weight, _MOMENT_ALSO),
            "GRAD": _dtype("grads", g.kind.grad, g.kind.weight, _GRAD_ALSO),
            "LAYOUT": g.kind.layout,
            "rank_ptr": None if g.kind.layout == DENSE else grads.rank,
        }
        for g in groups
    ]
    numbers = {
        "gate_old_ptr": gate_old,
        "gate_new_ptr": gate_new,
        "decay": adam.decay,
        "one_minus_beta1": 1 - adam.beta1,
        "beta2": adam.beta2,
        "one_minus_beta2": 1 - adam.beta2,
        "step_size": adam.step_size,
        "inverse_root_bias2": 1 / adam.root_bias2,
        "eps": adam.eps,
        "scale_ptr": _scale(adam, gate_old),
    }
    for group, chosen in zip(groups, constexprs, strict=True):
        config = pass_b_config(group.kind.layout, group.kind.aligned)
        _launch_group(kernels.delta_adamw_kernel, table, order, group, 1, config, {**numbers, **chosen})


# ---------------------------------------------------------------- ahead of time
# (weight and base, delta, moments, gradient): what LCDD chooses by itself for a model in that dtype, and its options.
_CORE = (
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),
    (torch.float16, torch.float16, torch.float32, torch.float16),
    (torch.float32, torch.float32, torch.float32, torch.float32),
)


def _mixes() -> list[tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]]:
    """Every (weight, delta, moments, gradient) that pass B takes, the core ones first."""
    served = [
        (weight, delta, moment, grad)
        for weight in _DTYPES
        for delta in {weight: 0, **dict.fromkeys(_DELTA_ALSO)}
        for moment in {weight: 0, **dict.fromkeys(_MOMENT_ALSO)}
        for grad in {weight: 0, **dict.fromkeys(_GRAD_ALSO)}
    ]
    return [*_CORE, *(mix for mix in served if mix not in _CORE)]


def aot_signatures() -> Iterator[AotSignature]:
    """Every configuration that the launchers above choose: dtypes x layouts x alignment."""
    places = [(layout, aligned) for layout in range(len(LAYOUTS)) for aligned in (True, False)]
    for delta, (layout, aligned) in itertools.product(_DTYPES, places):
        where = f"{LAYOUTS[layout]} {'aligned' if aligned else 'unaligned'}"
        for grad in _DTYPES:
            yield _signature(
                kernels.delta_grad_stats_kernel,
                pass_a_config(layout, aligned),
                f"D {_DTYPES[delta]} G {_DTYPES[grad]} {where}",
                {"gate_ptr": "*fp32", "partial_ptr": "*fp32", "sq_partial_ptr": "*fp32"},
                {"DELTA": _DTYPES[delta], "GRAD": _DTYPES[grad], "LAYOUT": layout, "ALIGNED": aligned},
                any((delta, grad) == (mix[1], mix[3]) for mix in _CORE),
            )
        if layout == DENSE:
            for weight in _DTYPES:
                dtypes = {"WEIGHT": _DTYPES[weight], "BASE": _DTYPES[weight], "DELTA": _DTYPES[delta]}
                chosen = {**dtypes, "ALIGNED": aligned}
                core = any((weight, delta) == mix[:2] for mix in _CORE)
                label = f"W {_DTYPES[weight]} D {_DTYPES[delta]}"
                writing = {"gate_ptr": "*fp32"}, {**chosen, "differ_ptr": None}
                yield _signature(kernels.weight_eff_fwd_kernel, REFRESH, f"{label} {where}", *writing, core)
                counting = {"gate_ptr": "*fp32", "differ_ptr": "*i32"}, chosen
                label += " compared" + (" aligned" if aligned else "")
                yield _signature(kernels.weight_eff_fwd_kernel, REFRESH, label, *counting, core)
    floats = ("decay", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size", "inverse_root_bias2", "eps")
    pass_b = {"gate_old_ptr": "*fp32", "gate_new_ptr": "*fp32", "scale_ptr": "*fp32", **dict.fromkeys(floats, "fp32")}
    for mix, (layout, aligned) in itertools.product(_mixes(), places):
        weight, delta, moment, grad = (_DTYPES[dtype] for dtype in mix)
        yield _signature(
            kernels.delta_adamw_kernel,
            pass_b_config(layout, aligned),
            f"W {weight} D {delta} m {moment} G {grad} {LAYOUTS[layout]} {'aligned' if aligned else 'unaligned'}",
            pass_b,
            {"WEIGHT": weight, "DELTA": delta, "MOMENT": moment, "GRAD": grad, "LAYOUT": layout, "ALIGNED": aligned},
            mix in _CORE,
        )
    tables = {"blocks_ptr": "*i64", "uses_ptr": "*i64", "partial_ptr": "*fp32", "d_gate_ptr": "*fp32"}
    yield AotSignature(
        kernel=kernels.gate_gather_kernel,
        label=f"{GATHER.block_gates} gates",
        config=GATHER,
        signature=tables,
        constexprs={"BLOCK_GATES": GATHER.block_gates, "BLOCK_TILES": GATHER.block_tiles},
        divisible_by_16=tuple(tables),
    )


def _signature(
    kernel: Any,
    config: TileConfig,
    label: str,
    arguments: Mapping[str, str],
    constexprs: Mapping[str, Any],
    core: bool,
) -> AotSignature:
    """`rank_ptr` is there for packed gradients, None for dense ones, and no argument of the refresh."""
    signature = {"table_ptr": "*i64", "order_ptr": "*i64", "count": "i32", **arguments}
    constexprs = {**constexprs, **config.constexprs()}
    if "LAYOUT" in constexprs:
        if constexprs["LAYOUT"] == DENSE:
            constexprs["rank_ptr"] = None
        else:
            signature["rank_ptr"] = "*i32"
    return AotSignature(
        kernel=kernel,
        label=label,
        config=config,
        signature=signature,
        constexprs=constexprs,
        divisible_by_16=tuple(name for name, type_ in signature.items() if type_.startswith("*")),
        core=core,
    )
