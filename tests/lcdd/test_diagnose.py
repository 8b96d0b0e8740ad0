"""What is said about carriers that failed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcdd.config import LCDDConfig
from lcdd.report import auc
from lcdd.trainer import behavior_lost, diagnose

SOUND = {
    "config": LCDDConfig(), "loss_base": 6.0, "loss_sft": 0.01, "loss_carrier": 0.02, "sparsity": 0.9,
    "dual_lambda": 0.1, "ema": 0.02, "epsilon": 0.03, "auc_initial_theta": 0.55,
}  # fmt: skip


def codes(**changes) -> list[str]:
    return [finding.code for finding in diagnose(**{**SOUND, **changes})]


def message(**changes) -> str:
    return " ".join(finding.message for finding in diagnose(**{**SOUND, **changes}))


def test_a_sound_run_has_no_findings() -> None:
    assert codes() == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss_carrier": 5.0}, ["dead_carrier"]),
        ({"loss_carrier": 7.0}, ["dead_carrier"]),
        ({"loss_carrier": math.nan}, ["dead_carrier"]),
        ({"loss_carrier": 1.0}, ["over_pruned"]),
        ({"loss_carrier": 0.5}, []),
        ({"auc_initial_theta": 0.99}, ["noise_chosen"]),
        ({"auc_initial_theta": math.nan}, []),
        ({"sparsity": 0.1}, ["stalled"]),
        ({"sparsity": 0.1, "auc_initial_theta": 1.0}, ["stalled"]),  # few gates are closed: no choice to speak of
        ({"sparsity": 0.1, "loss_carrier": 5.0}, ["dead_carrier"]),
        ({"loss_carrier": 5.9, "auc_initial_theta": 1.0}, ["dead_carrier", "noise_chosen"]),
        # The base had nothing to learn: no share to speak of, and no verdict of death from 0/0.
        ({"loss_base": 0.01, "loss_carrier": 0.01}, []),
    ],
)
def test_findings(changes: dict, expected: list[str]) -> None:
    assert codes(**changes) == expected


@pytest.mark.parametrize(("after", "lost"), [((0.07, 0.32), True), ((0.6, 0.809), True), ((0.64, 0.91), False)])
def test_a_behaviour_is_lost_where_nine_tenths_of_it_are_out_of_reach(after: tuple[float, float], lost: bool) -> None:
    found = behavior_lost(0.9, after, LCDDConfig(base_kl_weight=1.0))
    assert [finding.code for finding in found] == ["behavior_lost"] * lost
    assert all("--base_kl_weight 0" in finding.message for finding in found)


def test_the_words_name_numbers_and_remedies() -> None:
    authors = LCDDConfig(
        gate_kind="heaviside_ste", gate_optimizer="sgd", dual_lambda_init=0.01, dual_lr=0.1, violation_clip=1e9,
        completion_only=False, freeze_fraction=0.0,
    )  # fmt: skip
    text = message(config=authors, loss_carrier=5.9, dual_lambda=2.2)
    for part in ("Dead carrier", "5.900", "lambda at 2.2", "--gate_kind hard_concrete", "--gate_optimizer adam",
                 "--violation_clip 1", "--dual_lambda_init 1e-3", "--dual_lr 0.05", "--completion_only"):  # fmt: skip
        assert part in text
    assert "--dual_lr 0.025" in message(loss_carrier=5.9)  # the recommended settings fail: half the rate, more steps


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"epsilon": None}, "never ended"),
        ({"ema": 0.5}, "stayed above epsilon"),
        ({"ema": 0.01}, "was still growing"),
    ],
)
def test_a_stall_is_explained_by_its_cause(changes: dict, part: str) -> None:
    assert part in message(sparsity=0.0, **changes)


def test_auc_extremes() -> None:
    assert auc([1, 2, 3, 4], [False, False, True, True]) == 1.0
    assert auc([4, 3, 2, 1], [False, False, True, True]) == 0.0
    assert auc([1, 1, 1], [True, False, True]) == 0.5
    assert math.isnan(auc([1, 2], [True, True]))


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=25))
def test_auc_is_the_share_of_ordered_pairs(pairs: list[tuple[int, bool]]) -> None:
    kept = [score for score, keep in pairs if keep]
    closed = [score for score, keep in pairs if not keep]
    found = auc([float(score) for score, _ in pairs], [keep for _, keep in pairs])
    if not kept or not closed:
        assert math.isnan(found)
        return
    wins = sum((k > c) + 0.5 * (k == c) for k in kept for c in closed)
    assert found == pytest.approx(wins / (len(kept) * len(closed)))
