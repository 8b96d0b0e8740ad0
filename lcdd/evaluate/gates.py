"""What a report says about a carrier's gates, and how far those of several carriers are the same."""

import json
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from lcdd.carrier import Carrier
from lcdd.errors import InputError
from lcdd.report import auc


def describe(carrier: Carrier) -> dict[str, Any]:
    """The report's `fingerprints`, `sparsity`, `sparsity_by_layer` and `gates`."""
    known = {key: value if isinstance(value, str) else json.dumps(value) for key, value in carrier.tokenizer.items()}
    return {
        "fingerprints": {"base": carrier.base_fingerprint, **known},
        "sparsity": carrier.sparsity(),
        "sparsity_by_layer": carrier.sparsity_by_layer(),
        "gates": gate_summary(carrier),
    }


def gate_summary(carrier: Carrier) -> dict[str, Any]:
    """Number of gates, how many are open and how many of those fractional, the share of entries that is kept, and the
    AUC of initial θ against kept gates.

    An AUC of 1 says that the kept gates are exactly those that started highest: noise, not the loss, chose them.
    """
    is_open = carrier.gate != 0
    initial = carrier.initial_logits
    score = math.nan if initial is None else auc(initial.tolist(), is_open.tolist())
    return {
        "n": carrier.layout.n_gates,
        "open": carrier.n_open,
        "fractional": int(((carrier.gate > 0) & (carrier.gate < 1)).sum()),
        "auc_initial_theta": None if math.isnan(score) else score,
        "entry_density": carrier.entry_density(),
    }


def jaccard(first: Carrier, second: Carrier) -> float:
    """Shared open gates over all open gates of two carriers of one architecture; 1 if neither has any."""
    if first.layout != second.layout:
        raise InputError(f"second: expected a carrier of the same gates, {first.layout.difference(second.layout)}")
    a, b = first.gate != 0, second.gate != 0
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def gate_overlap(carriers: Sequence[Carrier]) -> dict[str, float]:
    """Mean Jaccard index of the open gates over all pairs, and what sets of those sizes share by chance."""
    if len(carriers) < 2:
        raise InputError(f"carriers: expected at least two, got {len(carriers)}")
    found, chance = [], []
    for a, b in combinations(carriers, 2):
        found.append(jaccard(a, b))
        shared = a.n_open * b.n_open / a.layout.n_gates
        union = a.n_open + b.n_open - shared
        chance.append(shared / union if union else 1.0)
    return {"jaccard": sum(found) / len(found), "chance": sum(chance) / len(chance)}
