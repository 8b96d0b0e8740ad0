"""The page of `make gpu`: of records made by hand, which default it says to change, and to what."""

import json

import pytest

from benchmarks import page
from benchmarks.harness import Case, Lane, Sample
from benchmarks.records import Environment, Record
from lcdd_kernels.functional.packed_grad import PackCrossover, pack_cost

HERE = Environment(device="a GPU", threads=1, torch="2", triton="3", python="3", commit="c")
SHAPE = (4096, 14336)


def row(case: str, metric: str, value: float, *, provider="lcdd", params=None, lane=None) -> Record:
    made = Case(name=case, params=params or {}, lanes=[])
    sample = Sample.of(metric, "", [value])
    return HERE.row(
        made, Lane(provider=provider, build=lambda: None, params=lane or {}, exempt="x"), sample, clock_mhz=0
    )


def packing(gather: float) -> list[Record]:
    """Linears whose weight gradient costs what a gather of this price says."""
    found = []
    for density in (0.15, 0.3, 0.5, 0.7, 0.9):
        opened = {"n_rows": round(density * SHAPE[0]), "n_cols": round(density * SHAPE[1])}
        cost = pack_cost("block", out_features=SHAPE[0], in_features=SHAPE[1], **opened, gather=gather)
        params = {"shape": f"{SHAPE[0]}x{SHAPE[1]}", "layout": "block"}
        found.append(row("packing crossover", "ratio", (2 + cost) / 3, params=params, lane={"density": density}))
    return found


def test_a_gather_as_predicted_is_kept_and_a_dearer_one_is_found() -> None:
    assert "packing: keep DEFAULT_CROSSOVER" in page.page(packing(900.0))
    text = page.page(packing(3000.0))
    assert 'packing: CHANGE DEFAULT_CROSSOVER["cuda", bfloat16]' in text
    assert "gather=3000, " in text
    assert ", then 0.0%" in text


def test_the_fit_is_of_what_was_measured() -> None:
    lanes = [
        page._Packed(*SHAPE, "hard_concrete", json.loads(r.lane)["density"], r.p50) for r in packing(2000.0)
    ]  # fmt: skip
    now = PackCrossover(gather=900.0, crossover=0.8, min_elements=0, source="")
    found = page.fitted(lanes, now)
    assert found.gather == pytest.approx(2000.0)
    assert max(lane.loss(found) for lane in lanes) == 0.0


def test_what_the_page_says_of_the_rest() -> None:
    layer, lane = {"model": "llama-3-8b"}, {"density": 0.2}
    rows = [
        row("every kernel", "time", 1.0, provider="lcdd:triton", lane={"op": "gates"}),
        row("every kernel", "time", 1.0, provider="lcdd:reference", lane={"op": "swiglu"}),
        row("passes", "roof", 0.9, provider="lcdd:triton", lane={"op": "a", "density": 1.0}),
        row("passes", "roof", 0.6, provider="lcdd:triton", lane={"op": "b", "density": 1.0}),
        row("passes", "time", 2.0, provider="lcdd:triton", lane={"op": "a"}),
        row("passes", "time", 1.0, provider="lcdd:cuda", lane={"op": "a"}),
        row("KL", "ratio", 1.2),
        row("optimizer step", "ratio", 0.8, params=layer, lane=lane),
        row("optimizer step", "time", 0.010, params=layer, lane=lane),
        row("optimizer step", "host_time", 0.0095, params=layer, lane=lane),
    ]  # fmt: skip
    text = page.page(rows, ["gates: wrong"])
    for line in (
        "# Defaults on a GPU",
        "- WRONG: gates: wrong",
        "- every kernel is right: 2 within tolerance; NOT SERVED BY A KERNEL: ['swiglu']",
        "- packing: not measured",
        "60% (b at density 1.0) to 90% of the copy's bandwidth",
        "CHANGE backends._DEFAULT: CUDA C++ takes 0.50 to 0.50 of Triton's time",
        "CHANGE ops/linear_loss.py's rows a chunk: KL in chunks, 1.20 of the time with whole logits",
        "llama-3-8b at density 0.2: 0.80 of plain, the host busy 95% of it (THE HOST IS WHAT IT WAITS FOR)",
        "- eraser: not measured",
    ):
        assert line in text, text
    assert "CUDA C++ was not built" in page.page(packing(900.0)) + page.page([])


def test_nothing_measured_is_said() -> None:
    assert page.page([]).count("not measured") == 5  # CUDA C++ has a line of its own
