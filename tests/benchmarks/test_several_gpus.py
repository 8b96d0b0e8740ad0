"""The page is what records and formulas give, and the bytes by formula are those that were counted."""

import json
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import ranks, several_gpus
from benchmarks.markdown import rewritten
from fixtures.checkpoints import make_model
from lcdd.commands.plan.cluster import gradient_entries
from lcdd.config import PlanConfig
from lcdd.models import Architecture, GateLayout, costs, layout_of
from lcdd_kernels.functional.packed_grad import PACKED_LAYOUT


def test_tables_and_picture_are_those_of_records_and_formulas() -> None:
    """`python -m benchmarks.several_gpus` writes them."""
    text = several_gpus.PAGE.read_text(encoding="utf-8")
    assert rewritten(text, several_gpus.blocks()) == text
    assert several_gpus.PICTURE.read_text(encoding="utf-8") == several_gpus.scaling_svg()


COUNTED = json.loads(ranks.RECORD.read_text(encoding="utf-8"))["bytes"]
MODEL = {"vocab_size": 200, "width": 128}
FLOAT32, FLOAT64 = 4, 8


def entries_of(layout: GateLayout, is_open: Tensor, engine: str, form: str) -> float:
    """By formula, of gates [n_gates], on two ranks."""
    found = 0.0
    for matrix in layout.matrices:
        rows, cols = (gates.nonzero()[:, 0] for gates in layout.row_and_col_gates(is_open, matrix))
        if engine == "ddp":
            found += costs.averaged_entries(matrix.shape, len(rows), len(cols), layout=form)
            continue
        most = float(torch.bincount(rows // (matrix.shape[0] // 2)).max()) if len(rows) else 0.0
        found += costs.scattered_entries(matrix.shape, len(rows), len(cols), most_rows=most, gpus=2, layout=form)
    return found


@pytest.mark.parametrize(("engine", "kind", "closed"), list(product(ranks.ENGINES, ranks.AT_REST, ranks.CLOSED)))
def test_bytes_by_formula_are_the_counted_ones(engine: str, kind: str, closed: float) -> None:
    """To the byte where it is known which gates are open; and a plan's are their mean over gates drawn at random."""
    model = make_model("qwen3", **MODEL)
    layout, generator = layout_of(model), torch.Generator().manual_seed(0)
    draws = []
    for _ in range(100):
        order = torch.randperm(layout.n_gates, generator=generator)
        draws.append(torch.ones(layout.n_gates).index_fill_(0, order[: round(closed * layout.n_gates)], 0))
    counted = COUNTED[f"{engine}, {kind}, {closed:g}"]
    own = costs.step_numbers(layout.n_gates, sharded=engine == "fsdp2") * FLOAT64
    form = PACKED_LAYOUT[kind]
    assert entries_of(layout, draws[0], engine, form) * FLOAT32 + own == counted["packed"]
    assert entries_of(layout, draws[0], engine, "dense") * FLOAT32 + own == counted["dense"]
    settings: dict[str, Any] = {"parallel": engine, "num_gpus": 2, "gate_kind": kind, "density": 1 - closed}
    config = PlanConfig(model_name_or_path="any", **settings)
    mean = sum(entries_of(layout, draw, engine, form) for draw in draws) / len(draws)
    assert gradient_entries(Architecture.of(model), config, packed=True) == pytest.approx(mean, rel=0.05)
    assert gradient_entries(Architecture.of(model), config, packed=False) * FLOAT32 + own == counted["dense"]


def test_the_most_crowded_of_several_chunks() -> None:
    assert costs.most_in_a_chunk(2, 0.5, 2) == pytest.approx(0.75)  # two coins: at least one head
    assert costs.most_in_a_chunk(4, 0.5, 2) == pytest.approx(sum(k * p for k, p in ((1, 0.5), (2, 7 / 16))))
    assert costs.most_in_a_chunk(64, 1.0, 8) == 8
    drawn = (torch.rand(4000, 16, 64, generator=torch.Generator().manual_seed(0)) < 0.2).sum(2).amax(1)
    assert costs.most_in_a_chunk(16 * 64, 0.2, 16) == pytest.approx(float(drawn.double().mean()), rel=0.01)
