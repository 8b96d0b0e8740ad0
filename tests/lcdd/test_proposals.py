"""A step proposes its gates before anything of it is known: what turns out not to be finite leaves no trace."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.optimizer import LCDDOptimizer

CONFIGS = {
    "dual": LCDDConfig(gate_controller="dual", warmup_steps=1, gate_lr=0.5, freeze_fraction=0.3),
    "paced": LCDDConfig(gate_controller="paced", warmup_steps=1, freeze_fraction=0.3),
}


class Twin:
    """A small model under LCDD, and steps on gradients that are drawn anew in each."""

    def __init__(self, make_models: Any, config: LCDDConfig) -> None:
        base, tuned = make_models()
        self.optimizer = LCDDOptimizer.attach(tuned, base, config, total_steps=20)
        self.weights = self.optimizer.param_groups[0]["params"]

    def step(self, number: int, *, poison: str = "", loss: float | Tensor = 0.5) -> None:
        draw = torch.Generator().manual_seed(number)
        for weight in self.weights:
            weight.grad = torch.randn(weight.shape, generator=draw)
        if poison == "gradient":
            self.weights[3].grad[1, 2] = math.nan
        self.optimizer.step(math.inf if poison == "loss" else loss)

    def state(self) -> dict[str, Any]:
        """All that a step may move."""
        controller, gates = self.optimizer._controller, self.optimizer.gates
        tensors = {f"weight {n}": weight.detach() for n, weight in enumerate(self.weights)}
        for number, weight in enumerate(self.weights):
            tensors |= {f"{key} {number}": value for key, value in self.optimizer.state[weight].items()}
        of_gates = {name: getattr(gates, name) for name in ("logits", "values", "slots", "indices", "rank")}
        tensors |= _tensors("controller", controller.state_dict()) | of_gates
        return {name: value.clone() for name, value in tensors.items()} | {"counts": list(gates.counts)}


def _tensors(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, dict):
        return {key: t for k, part in value.items() for key, t in _tensors(f"{name} {k}", part).items()}
    if isinstance(value, list | tuple):
        return {key: t for k, part in enumerate(value) for key, t in _tensors(f"{name} {k}", part).items()}
    return {name: value if isinstance(value, Tensor) else torch.tensor(math.nan if value is None else float(value))}


def _assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(got[name].nan_to_num(), value.nan_to_num()), name
        else:
            assert got[name] == value, name


@pytest.mark.parametrize("poison", ["gradient", "loss"])
@pytest.mark.parametrize("controller", list(CONFIGS))
def test_a_proposal_that_is_not_finite_is_taken_back_bit_for_bit(make_models, controller: str, poison: str) -> None:
    """And the run goes on as if it had never been made, frozen phase and all."""
    one, other = (Twin(make_models, CONFIGS[controller]) for _ in range(2))
    for number in range(18):
        if number in (0, 5, 16):
            before = one.state()
            one.step(100 + number, poison=poison)
            _assert_same(one.state(), before)
        one.step(number)
        other.step(number)
        _assert_same(one.state(), other.state())
    assert one.optimizer.skipped_steps == 3
    assert one.optimizer.gates_frozen


def test_a_loss_may_stay_on_its_device(make_models) -> None:
    one, other = (Twin(make_models, CONFIGS["dual"]) for _ in range(2))
    for number in range(4):
        one.step(number, loss=0.25)
        other.step(number, loss=torch.tensor(0.25))
    _assert_same(one.state(), other.state())
    assert other.optimizer.last_loss == 0.25
    with pytest.raises(InputError, match=r"loss: expected one number, got a tensor of shape \[2\]"):
        one.step(9, loss=torch.ones(2))
