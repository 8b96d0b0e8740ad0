"""The device's ceilings, measured, and each kernel against them; and every kernel's exactness first."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lcdd_kernels as k
from benchmarks.cases import Place, name_of
from benchmarks.harness import Case, Check, Cost, Lane, Workload
from lcdd.models import adamw_bytes, grad_stats_bytes, refresh_bytes
from lcdd_kernels import backends, registry, testing
from lcdd_kernels.cases import case_of
from lcdd_kernels.registry import OPS

GATES = 28 * (4 * 1024 + 3072 + 2048 + 2 * 1024)  # of Qwen3-0.6B


def ceilings(place: Place) -> Case:
    """What a copy moves and what a matrix product computes here, the two roofs of every other record."""
    n = {"tiny": 1 << 10, "cpu": 1 << 26, "gpu": 1 << 29}[place.size]
    side = {"tiny": 32, "cpu": 2048, "gpu": 8192}[place.size]

    def copy() -> Workload:
        source = torch.ones(n, dtype=torch.float32, device=place.device)
        target = torch.empty_like(source)
        return Workload(run=lambda: target.copy_(source), cost=Cost(bytes=8.0 * n))

    def product(dtype: torch.dtype) -> Workload:
        a, b = (torch.randn(side, side, device=place.device).to(dtype) for _ in range(2))
        return Workload(run=lambda: torch.mm(a, b), cost=Cost(flops=2.0 * side**3))

    builds: dict[str, Callable[[], Workload]] = {"copy": copy, "matrix product": lambda: product(place.dtype)}
    if place.dtype != torch.bfloat16:
        builds["matrix product, bfloat16"] = lambda: product(torch.bfloat16)
    lanes = [
        Lane(provider="plain", build=build, params={"what": what}, exempt="the library's own")
        for what, build in builds.items()
    ]
    return Case(name="ceilings", params={"dtype": name_of(place.dtype)}, lanes=lanes, budget_s=4.0)


def _checks(op: str, backend: str, dtype: torch.dtype, place: Place) -> list[Check]:
    """The package's own self-calibrating comparison with float64."""
    return [
        Check(f"{op} on {backend}: {row.output}", row.error.max if row.ok else float("inf"), row.limit.max)
        for row in testing.compare(op, backend, dtype, device=place.device, size=4)
    ]


def _serving(op: str, place: Place, dtype: torch.dtype) -> str:
    """The backend that serves an op here."""
    wanted = {"cuda": "triton", "cpu": "native"}[place.device.type]
    return wanted if backends.available(op, place.device, dtype)[wanted] is None else "reference"


def correctness(place: Place) -> Case:
    """Every op of every backend that a GPU has, in bfloat16, against float64: nothing is timed before this."""

    def lane(op: str) -> Lane:
        dtypes = case_of(op).dtypes
        dtype = torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0]
        backend, inputs = _serving(op, place, dtype), testing.make_inputs(op, dtype, place.device, 0, 1)
        return Lane(
            provider=f"lcdd:{backend}", build=lambda: Workload(run=lambda: _call(op, backend, inputs)),
            params={"op": op}, verify=lambda: _checks(op, backend, dtype, place),
        )  # fmt: skip

    params = {"dtype": "bfloat16", "inputs": "small, copied within the time"}
    return Case(name="every kernel", params=params, lanes=[lane(op) for op in OPS], budget_s=1.0)


def _call(op: str, backend: str, inputs: testing.Inputs) -> Any:
    with torch.no_grad():
        return registry.implementation(op, backend)(**testing.clone(inputs))


# --- passes at real size ----------------------------------------------------------------------------------------------


class Matrices:
    """M matrices [out, in] with their own gates, dense or packed gradients."""

    def __init__(self, shape: tuple[int, int], count: int, place: Place, density: float, layout: str) -> None:
        rows, cols = shape
        generator = torch.Generator().manual_seed(6)

        def draw(scale: float, of: torch.dtype, *size: int) -> list[Tensor]:
            size = size or shape
            one = (scale * torch.randn(size, generator=generator)).to(of).to(place.device)
            return [one.clone() for _ in range(count)]

        dtype = torch.bfloat16
        self.bases, self.deltas = draw(0.02, dtype), draw(1e-3, dtype)
        self.weights = [torch.empty_like(base) for base in self.bases]
        self.exp_avgs, self.exp_avg_sqs = draw(1e-5, torch.float32), [x.square() for x in draw(1e-5, torch.float32)]
        n = rows + cols
        gate = (torch.rand(n, generator=generator) < density).float().repeat(count).to(place.device)
        self.gate, self.count, self.numel = gate, count, rows * cols * count
        offsets = torch.tensor([edge for m in range(count) for edge in (m * n, m * n + rows)] + [count * n])
        _, counts, rank = k.open_indices(gate, offsets)
        open_rows, open_cols = counts[:2].tolist()
        self.maps = [k.GateMap(row_start=m * n, col_start=m * n + rows, head_dim=cols, repeat=1) for m in range(count)]
        self.grads: list[Any]
        if layout == "dense":
            self.grads, self.share = draw(1e-4, dtype), 1.0
            self.packed: dict[str, Any] = {}
        else:
            self.share = open_rows * open_cols / (rows * cols)
            self.grads = draw(1e-4, dtype, open_rows, open_cols)
            self.packed = {"layouts": [layout] * count, "rank": rank}

    def grad_stats(self) -> None:
        k.delta_grad_stats(self.grads, self.deltas, self.gate, self.maps, **self.packed)

    def adamw(self) -> None:
        k.delta_adamw_(
            self.weights, self.bases, self.deltas, self.exp_avgs, self.exp_avg_sqs, self.grads, self.gate, self.gate,
            self.maps, k.AdamWStep(lr=1e-6, step=2), **self.packed,
        )  # fmt: skip

    def refresh(self) -> None:
        k.weight_eff_(self.weights, self.bases, self.deltas, self.gate, self.maps)


def _passes(place: Place, shape: tuple[int, int], count: int) -> Case:
    """Passes A, B and the refresh; dense at full density, and on packed blocks with 80% closed."""
    shape = (61, 90) if place.tiny else shape

    def lane(
        op: str, method: str, density: float, layout: str, cost: Callable[[Matrices], float], backend: str = ""
    ) -> Lane:
        backend = backend or _serving(op, place, torch.bfloat16)

        def build() -> Workload:
            matrices = Matrices(shape, count, place, density, layout)

            def run() -> None:
                with k.use_backend(backend):
                    getattr(matrices, method)()

            return Workload(run=run, cost=Cost(bytes=cost(matrices)), capturable=True)

        return Lane(
            provider=f"lcdd:{backend}", build=build, params={"op": op, "density": density, "gradients": layout},
            verify=lambda: _checks(op, backend, torch.bfloat16, place),
        )  # fmt: skip

    def stats_cost(m: Matrices) -> float:
        return grad_stats_bytes(m.numel, grad=2, delta=2, share=m.share)

    def adamw_cost(m: Matrices) -> float:
        return adamw_bytes(m.numel, weight=2, delta=2, moment=4, grad=2, share=m.share)

    lanes = [
        lane("delta_grad_stats", "grad_stats", 1.0, "dense", stats_cost),
        lane("delta_adamw_", "adamw", 1.0, "dense", adamw_cost),
        lane("weight_eff_", "refresh", 1.0, "dense", lambda m: refresh_bytes(m.numel, weight=2, delta=2)),
        lane("delta_grad_stats", "grad_stats", 0.2, "block", stats_cost),
        lane("delta_adamw_", "adamw", 0.2, "block", adamw_cost),
    ]
    if backends.available("delta_adamw_", place.device, torch.bfloat16)["cuda"] is None:  # where it was built
        lanes += [
            lane("delta_grad_stats", "grad_stats", 1.0, "dense", stats_cost, "cuda"),
            lane("delta_adamw_", "adamw", 1.0, "dense", adamw_cost, "cuda"),
        ]
    params = {"shape": f"{count} x {shape[0]}x{shape[1]}", "dtype": "bfloat16"}
    return Case(name="passes", params=params, lanes=lanes, budget_s=8.0)


def _gate_kernels(place: Place) -> Case:
    """Gates of a whole model in one launch."""
    n = 1000 if place.tiny else GATES
    generator = torch.Generator().manual_seed(8)
    spec = k.GateSpec(kind="hard_concrete", seed=5, step=3)
    sizes = torch.full((8,), n // 8)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])

    def logits() -> Tensor:
        return (2 * torch.randn(n // 8 * 8, generator=generator)).to(place.device)

    def lane(op: str, make: Callable[[], Callable[[], Any]], cost: float) -> Lane:
        backend = _serving(op, place, torch.float32)
        return Lane(
            provider=f"lcdd:{backend}", build=lambda: Workload(run=make(), cost=Cost(bytes=cost), capturable=True),
            params={"op": op}, verify=lambda: _checks(op, backend, torch.float32, place),
        )  # fmt: skip

    def values() -> Callable[[], Any]:
        theta = logits()
        return lambda: k.gate_values(theta, spec)

    def grads() -> Callable[[], Any]:
        theta, d_gate = logits(), logits()
        return lambda: k.gate_logits_grad(theta, d_gate, spec, l0_weight=0.1)

    def lists() -> Callable[[], Any]:
        gate = logits().clamp(0, 1)
        return lambda: k.open_indices(gate, offsets)

    lanes = [
        lane("gate_values", values, 8.0 * n), lane("gate_logits_grad", grads, 12.0 * n),
        lane("open_indices", lists, 12.0 * n),
    ]  # fmt: skip
    return Case(name="gates", params={"gates": n}, lanes=lanes, budget_s=2.0)


def cpu_cases(place: Place) -> list[Case]:
    return [_passes(place, (4096, 14336), 1), _gate_kernels(place)]


def gpu_cases(place: Place) -> list[Case]:
    """Passes over one 8B-sized matrix and over 28 of the 0.6B model's; gates."""
    return [_passes(place, (4096, 14336), 1), _passes(place, (3072, 1024), 28), _gate_kernels(place)]
