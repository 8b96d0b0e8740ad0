"""Estimates of a gate's worth: by hand, in the controller, and how they are judged."""

import json

import pytest
import torch

from benchmarks import importance
from benchmarks.records import RESULTS
from lcdd.config import LCDDConfig
from lcdd.optimizer.pacing import WORTH_BETA

RECORD = RESULTS / "cpu" / "importance.json"


class OpenGates:
    """Two gates, both open throughout."""

    kind = "heaviside_ste"

    def __init__(self) -> None:
        self.logits = torch.ones(2)
        self.values = torch.ones(2)

    def draw(self, *, step: int, training: bool) -> None: ...


def worth(estimate: str, *gradients: list[float]) -> list[float]:
    config = LCDDConfig(warmup_steps=50, target_sparsity=0.0)
    controller = importance.ESTIMATES[estimate](OpenGates(), config, total_steps=1000)
    for gradient in gradients:
        controller.propose(torch.tensor(gradient), 1.0, penalties=1)
    return controller.worth.tolist()


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        ("squared gradient", [0.9 * 0.1 * 4 + 0.1 * 4, 0.9 * 0.1 * 9 + 0.1 * 1]),
        ("absolute", [0.9 * 0.1 * 2 + 0.1 * 2, 0.9 * 0.1 * 3 + 0.1 * 1]),
        ("Taylor", [(0.9 * 0.1 * 2 - 0.1 * 2) ** 2, (0.9 * 0.1 * 3 + 0.1 * 1) ** 2]),
        ("signed", [-(0.9 * 0.1 * 2 - 0.1 * 2), -(0.9 * 0.1 * 3 + 0.1 * 1)]),
        ("second order", [0.5 * 0.76 - (0.18 - 0.2), 0.5 * 0.91 - 0.37]),
    ],
)
def test_estimates_by_hand(estimate: str, expected: list[float]) -> None:
    assert WORTH_BETA == 0.9
    assert worth(estimate, [2.0, 3.0], [-2.0, 1.0]) == pytest.approx(expected, abs=1e-6)


def test_a_random_order_stays_what_it_was() -> None:
    assert worth("random", [2.0, 3.0]) == worth("random", [2.0, 3.0], [0.0, 9.0])


def test_better_is_ahead_by_the_bound_with_an_interval_that_excludes_zero() -> None:
    def rows(estimate: str, *sparsities: float) -> list[dict]:
        return [
            {"behavior": "style", "seed": seed, "estimate": estimate, "sparsity": sparsity}
            for seed, sparsity in enumerate(sparsities)
        ]

    found = importance.judged(
        rows(importance.OURS, 0.9, 0.9, 0.9)
        + rows("absolute", 0.93, 0.93, 0.931)
        + rows("Taylor", 0.905, 0.905, 0.905)
        + rows("random", 0.99, 0.8, 0.95)
    )
    assert {name: row["better"] for name, row in found.items()} == {
        importance.OURS: False, "absolute": True, "Taylor": False, "random": False,
    }  # fmt: skip
    assert found["absolute"]["ahead"] == pytest.approx(0.0303, abs=1e-4)


def test_the_default_is_named_for_comparison(capsys, tmp_path) -> None:
    with pytest.raises(SystemExit):
        importance.main(["--estimates", "random", "--output", str(tmp_path / "x.json")])
    assert "--estimates: expected 'squared gradient' among them" in capsys.readouterr().err


def test_no_estimate_on_record_is_better_than_the_default() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["estimates"] == importance.judged(record["runs"])
    assert set(record["estimates"]) == set(importance.ESTIMATES)
    assert not any(found["better"] for found in record["estimates"].values())
