"""Comparison with the float64 reference, on the sample inputs of `cases`: one place for tests, self-test, benchmarks
and report card.

A backend is judged by its distance to the float64 reference, against the distance of the *same-dtype PyTorch
expression* of its `Case`: tolerances calibrate themselves.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from lcdd_kernels.cases import Case, Inputs, case_of
from lcdd_kernels.registry import implementation


class Measure(NamedTuple):
    """Absolute errors, or magnitudes: the largest, the 99th percentile, the root of the mean square."""

    max: float
    p99: float
    rms: float


@dataclass(frozen=True)
class Comparison:
    """One output's error to float64, of a backend and of the same-dtype expression, and what is allowed.

    Each passes with twice the expression's error plus `floor`: 1 + depth half-ulps, where half an ulp, in the output's
    dtype and at the magnitude of the exact result, is what rounding a perfect result to storage costs (the expression
    can be exact by luck, and a kernel that rounds correctly must not fail for that), and what approximations may cost.
    """

    op: str
    backend: str
    dtype: str
    output: str
    error: Measure
    expression: Measure
    half_ulp: Measure
    floor: Measure
    exact: bool | None  # equal to the same-dtype reference bit for bit; None where that is not asked

    @property
    def ratio(self) -> Measure:
        """Error over the expression's error (or over half an ulp, where that is larger): 1 is as good as PyTorch."""
        parts = zip(self.error, self.expression, self.half_ulp, strict=True)
        return Measure(*(error / max(other, ulp, 1e-300) for error, other, ulp in parts))

    @property
    def limit(self) -> Measure:
        """The largest errors that pass."""
        return Measure(*(2 * other + floor for other, floor in zip(self.expression, self.floor, strict=True)))

    @property
    def ok(self) -> bool:
        within = all(error <= limit for error, limit in zip(self.error, self.limit, strict=True))
        return within and self.exact is not False


def make_inputs(
    op: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    size: int = 1,
) -> Inputs:
    """Keyword arguments for `implementation(op, ...)`, equal for equal (dtype, seed, size) on every device."""
    return case_of(op).make(dtype, torch.device(device), seed, size)


def clone(value: Any) -> Any:
    """A copy of inputs: tensors, and lists, tuples, dicts and dataclasses of them."""
    return _map(value, lambda t: t.clone())


def upcast(value: Any) -> Any:
    """Inputs with every floating-point tensor in float64, on the CPU."""
    return _map(value, lambda t: t.cpu().double() if t.is_floating_point() else t.cpu())


def _map(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, list | tuple):
        return type(value)(_map(v, f) for v in value)
    if isinstance(value, Mapping):
        return {k: _map(v, f) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{x.name: _map(getattr(value, x.name), f) for x in fields(value) if x.init})
    return value


def run(case: Case, function: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    """Runs an implementation on a copy of the inputs; every output flattened, lists concatenated, on the CPU."""
    inputs = clone(inputs)
    with torch.no_grad():
        result = function(**inputs)
    if case.in_place:
        values = [_named(inputs, name) for name in case.outputs]
    else:
        values = list(result) if isinstance(result, list | tuple) and len(case.outputs) > 1 else [result]
    if len(values) != len(case.outputs):
        raise AssertionError(f"expected outputs {case.outputs}, got {len(values)} results")
    return {name: _flat(value) for name, value in zip(case.outputs, values, strict=True)}


def _named(inputs: Inputs, name: str) -> Any:
    """An argument, or an attribute of one ("matrices.weights")."""
    argument, _, attribute = name.partition(".")
    return getattr(inputs[argument], attribute) if attribute else inputs[argument]


def _flat(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(-1).cpu()
    return torch.cat([_flat(v) for v in value]) if len(value) else torch.empty(0)


def compare(
    op: str,
    backend: str,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    size: int = 1,
) -> list[Comparison]:
    """A backend's outputs against the float64 reference, with the same-dtype PyTorch expression beside it."""
    case = case_of(op)
    inputs = make_inputs(op, dtype, device, seed, size)
    reference = implementation(op, "reference")
    return compare_runs(
        case,
        (op, backend, dtype),
        got=run(case, implementation(op, backend), inputs),
        expression=run(case, case.expression, inputs),
        truth=run(case, reference, upcast(inputs)),
        same_dtype=run(case, reference, _map(inputs, lambda t: t.cpu())) if case.exact else {},
    )


def compare_runs(
    case: Case,
    label: tuple[str, str, torch.dtype],
    *,
    got: dict[str, Tensor],
    expression: dict[str, Tensor],
    truth: dict[str, Tensor],
    same_dtype: dict[str, Tensor],
) -> list[Comparison]:
    """The comparison of results already at hand, for tests that call the public functions themselves."""
    op, backend, dtype = label
    rows = []
    for name in case.outputs:
        value, exact_value = got[name], truth[name].double()
        exact = None
        if name in case.exact:
            exact = bits_equal(value, same_dtype[name])
        half_ulp = torch.finfo(value.dtype).eps / 2 if value.is_floating_point() else 0.0
        floor = (1 + case.depth.get(name, 0)) * half_ulp + case.approximations.get(name, 0) * 2.0**-24
        size = _measure(exact_value.abs())
        rows.append(
            Comparison(
                op=op,
                backend=backend,
                dtype=str(dtype).removeprefix("torch."),
                output=name,
                error=_measure((value.double() - exact_value).abs()),
                expression=_measure((expression[name].double() - exact_value).abs()),
                half_ulp=Measure(*(half_ulp * magnitude for magnitude in size)),
                floor=Measure(*(floor * magnitude for magnitude in size)),
                exact=exact,
            )
        )
    return rows


def _measure(errors: Tensor) -> Measure:
    """Of what is not negative. A NaN counts as infinite: an entry left unwritten must not pass."""
    if errors.numel() == 0:
        return Measure(0.0, 0.0, 0.0)
    ordered = errors.nan_to_num(nan=float("inf")).sort().values
    p99 = ordered[int(0.99 * (ordered.numel() - 1))]
    return Measure(float(ordered[-1]), float(p99), float(ordered.square().mean().sqrt()))


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bits: tells -0.0 from 0.0, and takes equal NaN as equal."""
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def assert_calibrated(rows: list[Comparison]) -> None:
    """Every error at most twice the same-dtype expression's, plus the floor; exact outputs equal; nothing left
    unwritten.
    """
    for row in rows:
        errors, limits, expression = (
            ", ".join(f"{name} {value:.3e}" for name, value in measure._asdict().items())
            for measure in (row.error, row.limit, row.expression)
        )
        assert row.ok, (
            f"{row.op} on {row.backend} in {row.dtype}: output {row.output}: error to float64 {errors}, allowed "
            f"{limits} (the same-dtype expression has {expression}); bit-equal where asked: {row.exact}"
        )


def known_answer(op: str, backend: str, device: torch.device | str = "cpu") -> None:
    """The self-test at first use: small fixed inputs, float32 and bfloat16, poisoned memory. Raises `AssertionError`.

    bfloat16 is left out for Triton's interpreter, whose bfloat16 stores truncate.
    """
    case = case_of(op)
    device = torch.device(device)
    for dtype in (torch.float32, torch.bfloat16):
        if dtype in case.dtypes and not truncates_bfloat16(backend, device, dtype):
            with poisoned_memory():
                rows = compare(op, backend, dtype, device=device)
            assert_calibrated(rows)


def truncates_bfloat16(backend: str, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Triton's interpreter (Triton on the CPU) is wrong in bfloat16: it truncates stores, and its dots are garbage."""
    return backend == "triton" and torch.device(device).type == "cpu" and dtype == torch.bfloat16


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty`, `empty_like` and `Tensor.new_empty` return NaN (integers: the lowest value), so that
    what a kernel fails to write is seen. For tests and the self-test: it patches torch, and is not thread-safe."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out.fill_(torch.iinfo(out.dtype).min) if out.dtype not in (torch.bool, torch.uint64) else out

        return poisoned

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield
