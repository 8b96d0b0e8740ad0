"""The typed public functions: they validate (a bad argument is a `ValueError`, and nothing is written) and call one op.

One file a stem. NaN gates and logits are rejected on the CPU; on a GPU the check would make the host wait, so there a
NaN is the caller's to catch (the optimizer sees it in the squared norm, which any NaN reaches).
"""

from lcdd_kernels.functional.channel_match import channel_match, last_token_index
from lcdd_kernels.functional.delta_step import (
    AdamWStep,
    DeltaStepPlan,
    GateMap,
    delta_adamw_,
    delta_grad_stats,
    weight_eff_,
)
from lcdd_kernels.functional.gated_linear import gated_linear, gated_mlp, gated_qkv
from lcdd_kernels.functional.gates import GateSpec, gate_logits_grad, gate_values, open_indices
from lcdd_kernels.functional.linear_loss import linear_cross_entropy, linear_kl
from lcdd_kernels.functional.packed_grad import (
    PackCrossover,
    default_crossover,
    expand_columns,
    pack_columns,
    pack_layout,
    packed_multiple,
    packed_weight_grad,
)

__all__ = [
    "AdamWStep",
    "DeltaStepPlan",
    "GateMap",
    "GateSpec",
    "PackCrossover",
    "channel_match",
    "default_crossover",
    "delta_adamw_",
    "delta_grad_stats",
    "expand_columns",
    "gate_logits_grad",
    "gate_values",
    "gated_linear",
    "gated_mlp",
    "gated_qkv",
    "last_token_index",
    "linear_cross_entropy",
    "linear_kl",
    "open_indices",
    "pack_columns",
    "pack_layout",
    "packed_multiple",
    "packed_weight_grad",
    "weight_eff_",
]
