"""Numbers and verdicts: the reversal table, intervals, perplexity, utility, audit and claims.

`lcdd.evaluate` is this room and the function `evaluate` in one: calling the module calls the function.
"""

import sys
from types import ModuleType
from typing import Any

from lcdd.evaluate.audit import Study, audit
from lcdd.evaluate.claims import (
    CLAIMS,
    FAILED,
    HELD,
    MISSING,
    UNDECIDED,
    Estimate,
    Predicate,
    combine,
    comparisons,
    judge,
    over_runs,
    overall,
)
from lcdd.evaluate.evaluate import evaluate
from lcdd.evaluate.gates import describe, gate_overlap, gate_summary, jaccard
from lcdd.evaluate.perplexity import perplexity, read_texts, windows
from lcdd.evaluate.states import ModelState, PatchSource, patched_states, random_prefixes, reversal_states
from lcdd.evaluate.utility import Harness, TriggeredModel, parse_tasks, utility

__all__ = [
    "CLAIMS",
    "FAILED",
    "HELD",
    "MISSING",
    "UNDECIDED",
    "Estimate",
    "Harness",
    "ModelState",
    "PatchSource",
    "Predicate",
    "Study",
    "TriggeredModel",
    "audit",
    "combine",
    "comparisons",
    "describe",
    "evaluate",
    "gate_overlap",
    "gate_summary",
    "jaccard",
    "judge",
    "over_runs",
    "overall",
    "parse_tasks",
    "patched_states",
    "perplexity",
    "random_prefixes",
    "read_texts",
    "reversal_states",
    "utility",
    "windows",
]


class _CallableRoom(ModuleType):
    """`from lcdd import evaluate` finds this room before any function of its name: calling it has to work."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableRoom
