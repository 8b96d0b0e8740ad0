"""The self-test at first use: it passes what a GPU's approximations do, on any draw, and fails what is wrong."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lcdd_kernels import testing
from lcdd_kernels.cases import case_of

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("the chip's own approximations are in force", allow_module_level=True)

from triton.runtime import interpreter

# Those that use exp, log or division; the others round as IEEE says.
APPROXIMATE = (
    "gate_values",
    "gate_logits_grad",
    "block_gates",
    "swiglu",
    "swiglu_grad_",
    "cross_entropy_chunk_",
    "kl_chunk_",
)
SEEDS = range(12)


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter with the errors that PTX allows its approximations, drawn afresh for every number.

    ex2.approx: relative 2^-22, of an argument that was multiplied by log2 e first. lg2.approx: absolute 2^-22 for
    arguments in (1/2, 2), relative 2^-22 elsewhere. div.full: 2 ulp.
    """
    random = np.random.default_rng(0)

    def wobble(like: np.ndarray, size: float) -> np.ndarray:
        return size * random.uniform(-1, 1, like.shape)

    def exp(x: np.ndarray) -> np.ndarray:
        exact = np.exp2((x * np.float32(np.log2(np.e))).astype(np.float32).astype(np.float64))
        return (exact * (1 + wobble(x, 2.0**-22))).astype(x.dtype)

    def log(x: np.ndarray) -> np.ndarray:
        exact = np.log2(x.astype(np.float64))
        error = np.where((x > 0.5) & (x < 2), wobble(x, 2.0**-22), exact * wobble(x, 2.0**-22))
        return ((exact + error).astype(np.float32) * np.float32(np.log(2))).astype(x.dtype)

    def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        exact = np.divide(x, y)
        return (exact * (1 + wobble(exact, 2.0**-22))).astype(exact.dtype)

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_exp", lambda self, x: self.unary_op(x, exp))
    monkeypatch.setattr(builder, "create_log", lambda self, x: self.unary_op(x, log))
    monkeypatch.setattr(builder, "create_fdiv", lambda self, x, y: self.binary_op(x, y, divide))
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("op", APPROXIMATE)
def test_approximations_of_the_chip_pass_on_every_draw(op: str, chip: None) -> None:
    for dtype in (torch.float32, torch.float16):
        if dtype in case_of(op).dtypes:
            for seed in SEEDS:
                testing.assert_calibrated(testing.compare(op, "triton", dtype, seed=seed))


def test_the_emulation_is_in_force(chip: None) -> None:
    """SwiGLU uses the chip's exp: two runs differ, as they would not without the fixture."""
    inputs = testing.make_inputs("swiglu")
    case = case_of("swiglu")
    from lcdd_kernels.registry import implementation

    first, second = (testing.run(case, implementation("swiglu", "triton"), inputs)["hidden"] for _ in range(2))
    assert not torch.equal(first, second)


def test_a_small_bias_everywhere_fails_by_the_root_mean_square() -> None:
    """An error just below the largest that is allowed, but on every entry, is not luck."""
    case = case_of("weight_eff_")
    generator = torch.Generator().manual_seed(0)
    truth = 1 + torch.rand(10_000, generator=generator, dtype=torch.float64)
    expression = truth.float()
    biased = (truth + 2.9 * 2.0**-24).float()
    name = case.outputs[0]
    (row,) = testing.compare_runs(
        case,
        ("weight_eff_", "x", torch.float32),
        got={name: biased},
        expression={name: expression},
        truth={name: truth},
        same_dtype={name: biased},
    )
    assert row.error.max <= row.limit.max
    assert row.error.rms > row.limit.rms
    assert not row.ok
