"""The dual controller, against hand-worked cases."""

import math

import pytest

from lcdd.optimizer import DualController

SETTINGS = {
    "lambda_init": 0.01,
    "lr": 0.1,
    "lr_shrink": None,
    "lambda_min": 1e-8,
    "lambda_max": 10.0,
    "violation_clip": 1.0,
    "ema_beta": 0.5,
    "warmup_steps": 2,
    "loss_budget": 0.2,
    "loss_floor": 0.0,
}


def controller(**changes) -> DualController:
    return DualController(**(SETTINGS | changes))


def test_ema_is_bias_corrected():
    dual = controller()
    dual.update(4.0)
    assert dual.ema == pytest.approx(4.0)
    dual.update(1.0)
    # (0.5·0.5·4 + 0.5·1) / (1 − 0.25)
    assert dual.ema == pytest.approx(1.5 / 0.75)


def test_warmup_ramps_the_penalty_and_then_sets_the_budget():
    dual = controller(warmup_steps=4)
    shares = []
    for _ in range(6):
        shares.append(dual.penalty / dual.dual_lambda)
        dual.update(1.0)
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert dual.baseline == pytest.approx(1.0)
    assert dual.epsilon == pytest.approx(1.2)


def test_lambda_waits_for_the_end_of_warmup_and_then_follows_the_violation():
    dual = controller(ema_beta=0.0)
    dual.update(1.0)
    dual.update(1.0)
    assert dual.dual_lambda == 0.01
    dual.update(0.6)  # ema 0.6, ε 1.2: violation −0.5
    assert dual.dual_lambda == pytest.approx(0.01 * math.exp(0.05))
    before = dual.dual_lambda
    dual.update(1.5)  # violation +0.25
    assert dual.dual_lambda == pytest.approx(before * math.exp(-0.025))


def test_violation_is_clipped_and_shrink_has_its_own_rate():
    dual = controller(ema_beta=0.0, warmup_steps=1, lr_shrink=0.3)
    dual.update(1.0)
    dual.update(100.0)
    assert dual.violation == 1.0
    assert dual.dual_lambda == pytest.approx(0.01 * math.exp(-0.3))


@pytest.mark.parametrize(("loss", "bound"), [(0.0, "lambda_max"), (50.0, "lambda_min")])
def test_lambda_stays_in_its_bounds(loss, bound):
    dual = controller(ema_beta=0.0, warmup_steps=1, lr=5.0)
    dual.update(1.0)
    for _ in range(20):
        dual.update(loss)
    assert dual.dual_lambda == SETTINGS[bound]


def test_floor_keeps_a_tiny_baseline_from_being_noise():
    dual = controller(warmup_steps=1, loss_floor=0.02)
    dual.update(2e-5)
    assert dual.epsilon == pytest.approx(2e-5 + 0.02)


def test_frozen_steps_move_the_average_alone():
    dual = controller(ema_beta=0.5, warmup_steps=1)
    dual.update(1.0)
    dual.update(0.5, frozen=True)
    assert dual.dual_lambda == 0.01
    assert dual.ema < 1.0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(loss):
    dual = controller()
    dual.update(1.0)
    before = dual.state_dict()
    with pytest.raises(ValueError, match="loss: expected a finite number"):
        dual.update(loss)
    assert dual.state_dict() == before


def test_state_round_trip_continues_identically():
    dual, copy = controller(), controller()
    for loss in (1.0, 0.9, 0.7, 0.8):
        dual.update(loss)
    copy.load_state_dict(dual.state_dict())
    for loss in (0.5, 1.9):
        dual.update(loss)
        copy.update(loss)
    assert copy.state_dict() == dual.state_dict()
    with pytest.raises(ValueError, match="state: expected the keys"):
        copy.load_state_dict({"dual_lambda": 1.0})


def test_extreme_settings_neither_overflow_nor_divide_by_zero():
    eager = controller(lr=1e4)
    for loss in (1.0, 1.0, 0.0, 0.0):
        eager.update(loss)
    assert eager.dual_lambda == eager.lambda_max
    nothing = controller(loss_budget=0.0)
    for loss in (0.0, 0.0, 0.0):  # a budget of nothing, met exactly
        nothing.update(loss)
    assert nothing.violation == 0.0
    nothing.update(1.0)
    assert nothing.violation == nothing.violation_clip
