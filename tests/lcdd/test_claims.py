"""Claims: verdicts follow the numbers, over prompts and over runs, and nothing is said of what was not measured."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcdd.evaluate import (
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
from lcdd.report import t975


def row(behavior, match, width=0.05, part="table"):
    return {
        "part": part,
        "n": 100,
        "behavior_rate": behavior,
        "behavior_rate_ci95": [max(0.0, behavior - width), min(1.0, behavior + width)],
        "base_match": match,
        "base_match_ci95": [max(0.0, match - width), min(1.0, match + width)],
    }


def audit(states, patches=None, width=0.05):
    rows = {name: row(*rates) for name, rates in states.items()}
    differences = {}
    for first, second in comparisons(list(rows)):
        if first in rows and second in rows:
            found = {"method": "made up"}
            for key in ("behavior_rate", "base_match"):
                value = rows[first][key] - rows[second][key]
                found[key] = {"difference": value, "ci95": [value - width, value + width]}
            differences[f"{first} - {second}"] = found
    return {"states": rows, "differences": differences, "patches": patches or {}}


def verdicts(found):
    return {claim["name"]: claim["verdict"] for claim in found}


@pytest.mark.parametrize(
    ("low", "high", "above", "expected"),
    [
        (0.6, 0.9, True, HELD),
        (0.1, 0.4, True, FAILED),
        (0.4, 0.6, True, UNDECIDED),
        (0.5, 0.6, True, UNDECIDED),  # the bound itself is not above it
        (0.6, 0.9, False, FAILED),
        (0.1, 0.4, False, HELD),
        (0.4, 0.6, False, UNDECIDED),
    ],
)
def test_a_predicate_needs_the_whole_interval_on_one_side(low, high, above, expected):
    predicate = Predicate(key="base_match", first="x", above=above, bound=0.5)
    assert predicate.verdict(Estimate(value=(low + high) / 2, low=low, high=high)) == expected
    assert predicate.verdict(None) == MISSING


def test_a_difference_that_is_surely_negligible_fails_a_claim_of_more():
    predicate = Predicate(key="base_match", first="x", second="y", negligible=0.05)
    assert predicate.verdict(Estimate(value=0.0, low=-0.03, high=0.03)) == FAILED
    assert predicate.verdict(Estimate(value=0.0, low=-0.1, high=0.1)) == UNDECIDED
    assert predicate.verdict(Estimate(value=0.02, low=0.01, high=0.03)) == HELD
    assert "fails if less than 0.05" in predicate.rule


def test_a_claim_holds_only_if_everything_it_rests_on_does():
    assert overall([HELD, HELD]) == HELD
    assert overall([HELD, UNDECIDED]) == UNDECIDED
    assert overall([HELD, MISSING, UNDECIDED]) == MISSING
    assert overall([MISSING, FAILED, HELD]) == FAILED


GOOD = {
    "base": (0.0, 1.0),
    "sft": (1.0, 0.0),
    "carrier": (1.0, 0.0),
    "carrier+trigger": (0.0, 0.9),
    "sft+trigger": (0.4, 0.1),
    "sft-without:carrier": (0.9, 0.0),
    "carrier-without:layer 0": (0.1, 0.5),
    "carrier-without:layer 1": (0.99, 0.0),
}


def test_verdicts_turn_with_the_numbers():
    found = verdicts(judge(audit(GOOD, {"carrier": {"sparsity": 0.95}})))
    assert found["sparse"] == found["sufficient"] == found["reversible"] == found["SFT is not reversible"] == HELD
    assert found["necessary inside SFT"] == FAILED
    assert found["every layer is needed"] == UNDECIDED
    assert found["KL matters"] == MISSING
    assert "every group is needed" not in found
    turned = {**GOOD, "carrier+trigger": (0.6, 0.1), "sft+trigger": (0.0, 0.9), "sft-without:carrier": (0.0, 0.1)}
    found = verdicts(judge(audit(turned, {"carrier": {"sparsity": 0.5}})))
    assert found["sparse"] == found["reversible"] == found["SFT is not reversible"] == FAILED
    assert found["necessary inside SFT"] == HELD


def test_every_verdict_comes_with_its_numbers_and_an_empty_audit_says_nothing():
    for claim in judge(audit(GOOD)):
        for evidence in claim["evidence"]:
            assert ("value" in evidence) == (evidence["verdict"] != MISSING)
    empty = judge({"states": {}, "differences": {}, "patches": {}})
    assert {claim["verdict"] for claim in empty} == {MISSING}
    assert len(empty) == len(CLAIMS)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (30, 2.0423), (1000, 1.9623)]
)
def test_students_t_is_the_published_table(freedom, expected):
    assert t975(freedom) == pytest.approx(expected, abs=1e-3)


def test_runs_are_averaged_with_students_t_or_their_own_intervals_whichever_is_wider():
    def sure(value):
        return Estimate(value=value, low=value, high=value)

    spread = over_runs([sure(0.1), sure(0.2), sure(0.3)])
    assert spread.value == pytest.approx(0.2)
    assert spread.high - spread.value == pytest.approx(4.3027 * 0.1 / math.sqrt(3))
    agreeing = over_runs([Estimate(value=1.0, low=0.97, high=1.0)] * 3)
    assert (agreeing.value, agreeing.high) == (1.0, 1.0)
    assert agreeing.low == pytest.approx(1 - 0.03 / math.sqrt(3))
    assert over_runs([sure(0.4)]) == sure(0.4)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_the_mean_lies_in_its_interval(values):
    found = over_runs([Estimate(value=v, low=v - 0.01, high=v + 0.01) for v in values])
    assert found.low <= found.value <= found.high


def test_several_runs_are_judged_on_their_means():
    unlike = {**GOOD, "sft+trigger": (0.0, 0.95)}
    runs = [audit(GOOD, {"carrier": {"sparsity": 0.95, "delta_norm": 2.0}}) for _ in range(3)]
    together = combine(runs)
    assert together["runs"] == 3
    assert verdicts(together["claims"])["SFT is not reversible"] == HELD
    assert together["states"]["carrier"]["n"] == 300
    assert together["patches"]["carrier"] == pytest.approx({"sparsity": 0.95, "delta_norm": 2.0})
    mixed = combine([audit(GOOD), audit(unlike), audit(GOOD)])
    assert verdicts(mixed["claims"])["SFT is not reversible"] == UNDECIDED
    low, high = mixed["states"]["sft+trigger"]["base_match_ci95"]
    assert low == 0.0
    assert high == 1.0
    with pytest.raises(ValueError, match="audits: expected at least one"):
        combine([])
