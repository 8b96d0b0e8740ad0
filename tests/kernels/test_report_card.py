"""`lcdd kernels`: every op is in the tables, a failure is named and decides the exit status."""

import pytest
import torch

from lcdd import cli
from lcdd_kernels import aot, report_card, testing
from lcdd_kernels.cases import case_of
from lcdd_kernels.registry import OPS, implementation


def test_every_op_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_card.main() == 0
    printed = capsys.readouterr().out
    for op in OPS:
        rows = [line.split() for line in printed.splitlines() if line.startswith(f"{op} ")]
        served = [row for row in rows if row[1] == "cpu"]
        assert served[0][2] in ("native", "reference")
        measured = {tuple(row[1:3]) for row in rows if row[-1] == "ok"}
        dtypes = {str(dtype).removeprefix("torch.") for dtype in case_of(op).dtypes}
        assert {("reference", dtype) for dtype in dtypes} <= measured


def test_a_wrong_kernel_fails_the_card() -> None:
    case = case_of("weight_eff_")
    inputs = testing.make_inputs("weight_eff_")
    reference = implementation("weight_eff_", "reference")
    truth = testing.run(case, reference, testing.upcast(inputs))
    same = testing.run(case, reference, inputs)
    rows = testing.compare_runs(
        case,
        ("weight_eff_", "triton", torch.float32),
        got={"matrices.weights": same["matrices.weights"] + 1},
        expression=same,
        truth=truth,
        same_dtype=same,
    )
    assert "FAILED: matrices.weights" in report_card.numerics_table(rows)


def test_ahead_of_time_compilation_decides_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def main(argv: list[str]) -> int:
        asked.append(argv)
        return 1

    monkeypatch.setattr(aot, "main", main)
    assert report_card.main(["--aot", "--targets", "80,gfx942"]) == 1
    assert cli.main(["kernels", "--aot"]) == 1
    assert asked == [["--targets", "80,gfx942"], ["--targets", ",".join(aot.TARGETS)]]
