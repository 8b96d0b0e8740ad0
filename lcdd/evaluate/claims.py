"""The paper's claims as predicates over an audit's numbers: held, did not hold, undecided, or not measured.

A predicate is a number with a 95% interval against a bound. It holds where the whole interval is on the right side,
fails where the whole interval is on the wrong side (for a difference: below `NEGLIGIBLE`), and is undecided else. A
claim holds if all its predicates do, and does not if any fails. Nothing here knows what a run will find, and no verdict
has words of its own.

With several runs (seeds) the same predicates are judged on means over the runs, with intervals over them.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcdd.errors import InputError
from lcdd.report import t975

HELD, FAILED, UNDECIDED, MISSING = "held", "did not hold", "undecided", "not measured"
RATES = ("behavior_rate", "base_match")
NEGLIGIBLE = 0.05
"""A claim that one rate is above another fails where the difference is surely smaller than this."""
WORDS = {"behavior_rate": "behaviour rate", "base_match": "base match"}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Predicate:
    """`first` (minus `second`, where there is one) lies above or below a bound.

    key: a rate of the states' rows, or "sparsity" of the patches of that name.
    negligible: it also fails where the whole interval lies less than this beyond the bound and reaches it.
    """

    key: str
    first: str
    second: str | None = None
    above: bool = True
    bound: float = 0.0
    negligible: float = 0.0

    @property
    def words(self) -> str:
        what = f"{WORDS.get(self.key, self.key)} of {self.first}"
        return what if self.second is None else f"{what} minus that of {self.second}"

    @property
    def rule(self) -> str:
        less = f" (fails if less than {self.negligible:g})" if self.negligible else ""
        return f"{self.words} {'>' if self.above else '<'} {self.bound:g}{less}"

    def verdict(self, found: Estimate | None) -> str:
        if found is None:
            return MISSING
        if not self.above:
            found = Estimate(value=-found.value, low=-found.high, high=-found.low)
        bound = self.bound if self.above else -self.bound
        if found.low > bound:
            return HELD
        return FAILED if found.high <= bound or found.high < bound + self.negligible else UNDECIDED


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim: what the paper says (or what its words presuppose), and what would have to be seen."""

    name: str
    statement: str
    predicates: tuple[Predicate, ...]


def _rate(key: str, state: str, *, above: float | None = None, below: float | None = None) -> Predicate:
    bound = above if above is not None else below
    if bound is None:
        raise ValueError("above, below: expected one of them, got neither")
    return Predicate(key=key, first=state, above=above is not None, bound=bound)


def _more(key: str, first: str, second: str, *, by: float = 0.0) -> Predicate:
    negligible = NEGLIGIBLE if key in RATES and by == 0 else 0.0
    return Predicate(key=key, first=first, second=second, bound=by, negligible=negligible)


ERASED = "carrier+trigger"
CLAIMS = (
    Claim(
        name="behaviour kept",
        statement="The carrier shows the behaviour as the fully fine-tuned model does (within 0.05).",
        predicates=(_more("behavior_rate", "carrier", "sft", by=-0.05),),
    ),
    Claim(
        name="sparse",
        statement="At least 73% of the gates are closed (the paper reports 73 to 84%).",
        predicates=(_rate("sparsity", "carrier", above=0.73),),
    ),
    Claim(
        name="sufficient",
        statement="The carrier is sufficient: added to the base, it alone gives the behaviour.",
        predicates=(_rate("behavior_rate", "carrier", above=0.9), _more("behavior_rate", "carrier", "base", by=0.5)),
    ),
    Claim(
        name="sufficient inside SFT",
        statement="What SFT changed on the carrier's channels alone gives the behaviour.",
        predicates=(_rate("behavior_rate", "sft-only:carrier", above=0.5),),
    ),
    Claim(
        name="necessary inside SFT",
        statement="The carrier's channels are causally necessary: SFT without its change on them loses the behaviour.",
        predicates=(_rate("behavior_rate", "sft-without:carrier", below=0.5),),
    ),
    Claim(
        name="necessary more than chance",
        statement="Taking the carrier's channels out of SFT costs more behaviour than taking out random ones.",
        predicates=(_more("behavior_rate", "sft-without:random", "sft-without:carrier"),),
    ),
    Claim(
        name="better than a random mask, untrained",
        statement="On the carrier's channels SFT's change gives more behaviour than on random ones of the same number.",
        predicates=(_more("behavior_rate", "sft-only:carrier", "sft-only:random"),),
    ),
    Claim(
        name="better than a random mask, trained",
        statement="A random mask of the same size, with equal training of the weights, gives less of the behaviour.",
        predicates=(_more("behavior_rate", "carrier", "random_mask"),),
    ),
    Claim(
        name="reversible",
        statement="The trigger takes the behaviour away and gives most of the base's answers back.",
        predicates=(_rate("behavior_rate", ERASED, below=0.2), _rate("base_match", ERASED, above=0.5)),
    ),
    Claim(
        name="SFT is not reversible",
        statement="The same trigger optimisation on plain SFT fails, and does worse than on the carrier.",
        predicates=(_rate("base_match", "sft+trigger", below=0.5), _more("base_match", ERASED, "sft+trigger")),
    ),
    Claim(
        name="the trigger acts on the carrier",
        statement="The carrier's trigger gives less of the base back when it stands before plain SFT.",
        predicates=(_more("base_match", ERASED, "sft+carrier_trigger"),),
    ),
    Claim(
        name="not any prefix",
        statement="Random tokens of the trigger's length and norm give less of the base back than the trigger.",
        predicates=(_more("base_match", ERASED, "carrier+random_prefix"),),
    ),
    Claim(
        name="harmless to the base",
        statement="Before the base, the trigger leaves the answers as they are.",
        predicates=(_rate("base_match", "base+trigger", above=0.9),),
    ),
    Claim(
        name="sparsity, not a small change",
        statement="A dense SFT as close to the base as the carrier is less reversible than the carrier.",
        predicates=(_more("base_match", ERASED, "matched_norm+trigger"),),
    ),
    Claim(
        name="sparsity, not more training",
        statement="SFT continued for as long as LCDD trained, without gates, is less reversible than the carrier.",
        predicates=(_more("base_match", ERASED, "continued_sft+trigger"),),
    ),
    Claim(
        name="the selection, not the size",
        statement="A random mask of the same size, trained equally, is less reversible than the carrier.",
        predicates=(_more("base_match", ERASED, "random_mask+trigger"),),
    ),
    Claim(
        name="training with the gates, not a mask afterwards (cross-entropy)",
        statement="A mask found with frozen weights by cross-entropy is less reversible than the carrier.",
        predicates=(_more("base_match", ERASED, "posthoc_ce+trigger"),),
    ),
    Claim(
        name="training with the gates, not a mask afterwards (KL)",
        statement="A mask found with frozen weights by KL to the SFT model is less reversible than the carrier.",
        predicates=(_more("base_match", ERASED, "posthoc_kl+trigger"),),
    ),
    Claim(
        name="training with the gates prunes more",
        statement="Masks found with frozen weights close fewer gates than the carrier.",
        predicates=(_more("sparsity", "carrier", "posthoc_ce"), _more("sparsity", "carrier", "posthoc_kl")),
    ),
    Claim(
        name="the carrier's channels matter to the trigger",
        statement="Matching random channels instead of the carrier's gives less of the base back.",
        predicates=(_more("base_match", ERASED, "carrier+trigger_random_channels"),),
    ),
    Claim(
        name="matching matters",
        statement="Without activation matching (KL only) less of the base comes back.",
        predicates=(_more("base_match", ERASED, "carrier+trigger_kl_only"),),
    ),
    Claim(
        name="KL matters",
        statement="Without the KL terms (activation matching only) less of the base comes back.",
        predicates=(_more("base_match", ERASED, "carrier+trigger_matching_only"),),
    ),
)


def part_claims(states: Sequence[str]) -> tuple[Claim, ...]:
    """The claims whose predicates depend on the model: every group, and every layer, of the carrier counts."""
    found = []
    for name, prefix in (("group", "carrier-without:group "), ("layer", "carrier-without:layer ")):
        parts = [state for state in states if state.startswith(prefix)]
        if parts:
            found.append(
                Claim(
                    name=f"every {name} is needed",
                    statement=f"Closing any one {name} of the carrier lowers the behaviour rate.",
                    predicates=tuple(_more("behavior_rate", "carrier", state) for state in parts),
                )
            )
    return tuple(found)


def comparisons(states: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of states whose differences the claims need."""
    predicates = [predicate for claim in (*CLAIMS, *part_claims(states)) for predicate in claim.predicates]
    pairs = [(p.first, p.second) for p in predicates if p.second is not None and p.key in RATES]
    return list(dict.fromkeys(pairs))


# ---------------------------------------------------------------- one run


def estimate(audit: Mapping[str, Any], predicate: Predicate) -> Estimate | None:
    """The number of a predicate in an audit, None if it was not measured."""
    if predicate.key not in RATES:
        names = [name for name in (predicate.first, predicate.second) if name is not None]
        values = [audit["patches"].get(name, {}).get(predicate.key) for name in names]
        if None in values:
            return None
        value = values[0] - sum(values[1:])
        return Estimate(value=value, low=value, high=value)
    if predicate.second is None:
        row = audit["states"].get(predicate.first)
        if row is None:
            return None
        low, high = row[f"{predicate.key}_ci95"]
        return Estimate(value=row[predicate.key], low=low, high=high)
    row = audit["differences"].get(f"{predicate.first} - {predicate.second}")
    if row is None:
        return None
    low, high = row[predicate.key]["ci95"]
    return Estimate(value=row[predicate.key]["difference"], low=low, high=high)


def judge(audit: Mapping[str, Any], *, over: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Every claim with its verdict and its numbers.

    Args:
        audit: `states`, `differences` and `patches` of one run.
        over: several runs instead; the numbers are then their means, with intervals over the runs.
    """
    runs = over or (audit,)
    names = list(dict.fromkeys(name for run in runs for name in run["states"]))
    found = []
    for claim in (*CLAIMS, *part_claims(names)):
        evidence, verdicts = [], []
        for predicate in claim.predicates:
            estimates = [value for run in runs if (value := estimate(run, predicate)) is not None]
            number = over_runs(estimates) if estimates else None
            verdicts.append(predicate.verdict(number))
            row: dict[str, Any] = {"rule": predicate.rule, "verdict": verdicts[-1], "runs": len(estimates)}
            if number is not None:
                row |= {"value": number.value, "ci95": [number.low, number.high]}
            evidence.append(row)
        found.append(
            {
                "name": claim.name,
                "statement": claim.statement,
                "verdict": overall(verdicts),
                "evidence": evidence,
            }
        )
    return found


def overall(verdicts: Sequence[str]) -> str:
    """A conjunction's verdict: a failure decides; what is missing or undecided keeps it from holding."""
    return next((word for word in (FAILED, MISSING, UNDECIDED) if word in verdicts), HELD)


# ---------------------------------------------------------------- several runs


def over_runs(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over runs and its 95% interval; of one run its own.

    The wider of two intervals at each end: Student's t over the runs' values, and what the runs' own intervals over
    prompts leave of uncertainty in their mean (runs that agree exactly would otherwise pretend to know it exactly).
    """
    if len(estimates) == 1:
        return estimates[0]
    n = len(estimates)
    values = [found.value for found in estimates]
    mean = statistics.fmean(values)
    spread = t975(n - 1) * statistics.stdev(values) / math.sqrt(n)
    below = math.sqrt(sum((found.value - found.low) ** 2 for found in estimates)) / n
    above = math.sqrt(sum((found.high - found.value) ** 2 for found in estimates)) / n
    return Estimate(value=mean, low=mean - max(spread, below), high=mean + max(spread, above))


def combine(audits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs of one behaviour as one audit: means over runs with intervals over runs, and the claims on them.

    Raises:
        InputError: no audit.
    """
    if not audits:
        raise InputError("audits: expected at least one, got none")

    def rows(section: str) -> list[str]:
        return list(dict.fromkeys(name for audit in audits for name in audit[section]))

    states: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, Any]] = {}
    patches: dict[str, dict[str, float]] = {}
    for name in rows("states"):
        found = [audit["states"][name] for audit in audits if name in audit["states"]]
        states[name] = {"n": sum(row["n"] for row in found), "runs": len(found), "part": found[0]["part"]}
        for key in RATES:
            number = over_runs([_row_estimate(row, key) for row in found])
            states[name][key] = number.value
            states[name][f"{key}_ci95"] = [max(0.0, number.low), min(1.0, number.high)]
    for name in rows("differences"):
        found = [audit["differences"][name] for audit in audits if name in audit["differences"]]
        differences[name] = {"method": "mean over runs; the wider of Student's t over runs and the runs' own intervals"}
        for key in RATES:
            number = over_runs([_difference_estimate(row[key]) for row in found])
            differences[name][key] = {"difference": number.value, "ci95": [number.low, number.high]}
    for name in rows("patches"):
        found = [audit["patches"][name] for audit in audits if name in audit["patches"]]
        patches[name] = {
            key: statistics.fmean(row[key] for row in found if row.get(key) is not None)
            for key in ("sparsity", "delta_norm")
            if any(row.get(key) is not None for row in found)
        }
    return {
        "runs": len(audits),
        "states": states,
        "differences": differences,
        "patches": patches,
        "claims": judge({}, over=audits),
    }


def _row_estimate(row: Mapping[str, Any], key: str) -> Estimate:
    low, high = row[f"{key}_ci95"]
    return Estimate(value=row[key], low=low, high=high)


def _difference_estimate(row: Mapping[str, Any]) -> Estimate:
    low, high = row["ci95"]
    return Estimate(value=row["difference"], low=low, high=high)
