"""One matrix: the masked update against the unfused parametrization, and a linear layer with packed gradients."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lcdd_kernels as k
from benchmarks.cases import Place, name_of
from benchmarks.harness import Case, Check, Cost, Lane, Workload, relative_error
from fixtures.unfused import DeltaMask, UnfusedGates
from lcdd.models import adamw_bytes, grad_stats_bytes, refresh_bytes
from lcdd.optimizer import BlockGrad, PackedGradLinear
from lcdd_kernels.reference.gates import gate_noise_ref

KIND, SEED = "hard_concrete", 7
ADAMW = k.AdamWStep(lr=1e-5, weight_decay=0.01, step=1)
EIGHT_B, SIX_TENTHS_B = (4096, 14336), (3072, 1024)  # [out, in]: Llama-3-8B's down, Qwen3-0.6B's gate and up


def _draw(step: int) -> k.GateSpec:
    return k.GateSpec(kind=KIND, seed=SEED, step=step)


class Problem:
    """Inputs of one matrix: base, Δ and G in `dtype`, θ in float32 (float64) with about half of the gates open."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, device: torch.device, density: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(0)

        def matrix(scale: float) -> Tensor:
            return (scale * torch.randn(rows, cols, generator=generator)).to(dtype).to(device)

        self.base, self.delta, self.grad = matrix(0.02), matrix(1e-3), matrix(1e-4)
        self.theta = torch.where(torch.rand(rows + cols, generator=generator) < density, 2.5, -5.0).to(device)
        self.rows, self.cols, self.device = rows, cols, device

    def double(self) -> "Problem":
        """The same numbers in float64."""
        other = Problem.__new__(Problem)
        other.__dict__ = {n: v.double() if isinstance(v, Tensor) else v for n, v in self.__dict__.items()}
        return other

    def noise(self, step: int, dtype: torch.dtype) -> Tensor:
        return gate_noise_ref(self.rows + self.cols, _draw(step), dtype=dtype, device=self.device)


class Fused:
    """What `LCDDOptimizer` does for this matrix between two steps; moments in `moments`."""

    def __init__(self, problem: Problem, moments: torch.dtype) -> None:
        self.p, self.delta, self.weight = problem, problem.delta.clone(), torch.empty_like(problem.base)
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.delta, dtype=moments) for _ in range(2))
        self.maps = [k.GateMap(row_start=0, col_start=problem.rows, head_dim=1, repeat=1)]
        self.d_theta = torch.empty(0)
        self.gate, _ = k.gate_values(problem.theta, _draw(1))  # as the step before left them

    def step(self) -> None:
        p, deltas, gate = self.p, [self.delta], self.gate
        d_gate, sq_norm = k.delta_grad_stats([p.grad], deltas, gate, self.maps)
        self.d_theta = k.gate_logits_grad(p.theta, d_gate, _draw(1))
        new_gate, _ = k.gate_values(p.theta, _draw(2))
        scale = min(1.0, 1e9 / (float(sq_norm) ** 0.5 + 1e-6))
        k.delta_adamw_(
            [self.weight], [p.base], deltas, [self.exp_avg], [self.exp_avg_sq], [p.grad], gate, new_gate, self.maps,
            replace(ADAMW, grad_scale=scale),
        )  # fmt: skip

    def step_and_refresh(self) -> None:
        self.step()
        self.refresh()

    def refresh(self) -> None:
        """W_eff alone, which a step writes anyway: what `eval()` costs."""
        gate, _ = k.gate_values(self.p.theta, _draw(2))
        k.weight_eff_([self.weight], [self.p.base], [self.delta], gate, self.maps)


class Unfused:
    """The parametrization's forward and backward, from G; `optimizer`: then AdamW on Δ."""

    def __init__(self, problem: Problem, *, backend: str = "", optimizer: bool = True) -> None:
        self.p, self.delta = problem, problem.delta.clone().requires_grad_(True)
        self.gates = UnfusedGates(problem.theta, KIND)
        self.gates.noise = problem.noise(1, self.gates.logits.dtype)
        n = problem.rows + problem.cols
        rows, cols = torch.arange(problem.rows), torch.arange(problem.rows, n)
        mask = DeltaMask(problem.base, self.gates, rows.to(problem.device), cols.to(problem.device))
        self.forward: Callable[[Tensor], Tensor] = mask
        if backend:  # not dynamic: the gate's small matrix must not make the timed one a kernel for any shape
            self.forward = torch.compile(mask, backend=backend, dynamic=False)
        self.optimizer = None
        if optimizer:
            settings = {"lr": ADAMW.lr, "eps": ADAMW.eps, "weight_decay": ADAMW.weight_decay}
            betas = (ADAMW.beta1, ADAMW.beta2)
            self.optimizer = torch.optim.AdamW([self.delta], betas=betas, fused=bool(backend), **settings)

    def step(self) -> None:
        self.delta.grad = self.gates.logits.grad = None
        self.forward(self.delta).backward(self.p.grad)
        if self.optimizer is not None:
            self.optimizer.step()

    def next_weight(self) -> Tensor:
        self.gates.noise = self.p.noise(2, self.gates.logits.dtype)
        with torch.no_grad():
            return self.forward(self.delta)


def _verify(problem: Problem, make: Callable[[Problem], Any], moments: torch.dtype) -> list[Check]:
    """Against float64: an error at most twice the unfused expression's in the same dtype, plus storage rounding."""
    exact, same_dtype, got = Unfused(problem.double()), Unfused(problem), make(problem)
    for lane in (exact, same_dtype, got):
        lane.step()
    truth = _results(exact)
    eps = max(torch.finfo(problem.delta.dtype).eps, torch.finfo(moments).eps)
    checks = []
    for name, value in _results(got).items():
        allowed = 2 * relative_error(_results(same_dtype)[name], truth[name]) + eps
        checks.append(Check(name, relative_error(value, truth[name]), allowed))
    return checks


def _results(lane: Any) -> dict[str, Tensor]:
    if isinstance(lane, Fused):
        return {"gradient of theta": lane.d_theta, "first moment": lane.exp_avg, "next W_eff": lane.weight}
    moment = lane.optimizer.state[lane.delta]["exp_avg"]
    return {"gradient of theta": lane.gates.logits.grad, "first moment": moment, "next W_eff": lane.next_weight()}


def masked_matrix(place: Place) -> list[Case]:
    """Everything LCDD does to one bfloat16 matrix in a step (gates, pass A, θ's chain, AdamW, next W_eff), one
    micro-batch, against the parametrization's forward, backward and AdamW, and torch.compile of those; then, with a
    refresh of W_eff on top, against their forward and backward alone."""
    return [_matrix_case(place, optimizer=True), _matrix_case(place, optimizer=False)]


def _matrix_case(place: Place, *, optimizer: bool) -> Case:
    """optimizer: whether the unfused lanes take AdamW's step, as ours always do."""
    rows, cols = (61, 90) if place.tiny else EIGHT_B
    dtype, device = torch.bfloat16, place.device
    backend = "eager" if place.tiny else "inductor"
    n = rows * cols
    refresh_cost = refresh_bytes(n, weight=2, delta=2)

    def ours(moments: torch.dtype) -> Workload:
        lane = Fused(Problem(rows, cols, dtype, device), moments)
        cost = grad_stats_bytes(n, grad=2, delta=2)
        cost += adamw_bytes(n, weight=2, delta=2, moment=moments.itemsize, grad=2)
        cost += 0 if optimizer else refresh_cost
        run = lane.step if optimizer else lane.step_and_refresh
        return Workload(run=run, cost=Cost(bytes=cost), weights=[lane.p.base, lane.delta])

    def refresh() -> Workload:
        lane = Fused(Problem(rows, cols, dtype, device), dtype)
        return Workload(run=lane.refresh, cost=Cost(bytes=refresh_cost), capturable=True)

    def theirs(backend: str) -> Workload:
        lane = Unfused(Problem(rows, cols, dtype, device), backend=backend, optimizer=optimizer)
        return Workload(run=lane.step, weights=[lane.p.base, lane.delta])

    def small() -> Problem:
        return Problem(min(rows, 509), min(cols, 1790), dtype, device)

    def our_lane(moments: torch.dtype) -> Lane:
        return Lane(
            provider="lcdd", build=lambda: ours(moments), params={"moments": name_of(moments)},
            verify=lambda: _verify(small(), lambda p: Fused(p, moments), moments),
        )  # fmt: skip

    lanes = [
        Lane(provider="unfused", build=lambda: theirs(""), exempt="the same-dtype expression that errors are held to"),
        Lane(
            provider="compiled", build=lambda: theirs(backend),
            verify=lambda: _verify(small(), lambda p: Unfused(p, backend=backend), dtype),
        ),
        our_lane(torch.bfloat16), our_lane(torch.float32),
    ]  # fmt: skip
    if optimizer:
        alone = {"part": "refresh of W_eff"}
        lanes.append(Lane(provider="lcdd", build=refresh, params=alone, exempt="its bits are checked by weight_eff_"))
    return Case(
        name="masked matrix step" if optimizer else "masked matrix step over forward and backward alone",
        params={"shape": f"{rows}x{cols}", "dtype": "bfloat16", "micro_batches": 1}, lanes=lanes, floor="unfused",
        memory=not optimizer, budget_s=12.0 if optimizer else 8.0,
    )  # fmt: skip


# --- one linear layer -------------------------------------------------------------------------------------------------


def _linear_case(
    place: Place,
    shape: tuple[int, int],
    dtype: torch.dtype,
    tokens: int,
    layout: str,
    densities: tuple[float, ...],
    name: str = "linear fwd+bwd",
) -> Case:
    rows, cols = (96, 64) if place.tiny else shape
    tokens = 16 if place.tiny else tokens
    device = place.device
    generator = torch.Generator().manual_seed(2)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(dtype).to(device)

    def setup(density: float) -> tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor]:
        linear = nn.Linear(cols, rows, bias=False, dtype=dtype, device=device)
        open_rows = torch.randperm(rows, generator=generator)[: round(density * rows)].sort().values.int().to(device)
        open_cols = torch.randperm(cols, generator=generator)[: round(density * cols)].sort().values.int().to(device)
        return linear, draw(tokens, cols).requires_grad_(True), draw(tokens, rows), open_rows, open_cols

    def build(density: float | None) -> Workload:
        linear, x, dy, open_rows, open_cols = setup(density or 1.0)
        if density is not None:
            PackedGradLinear.swap(linear).set_plan(layout, open_rows, open_cols)

        def run() -> None:
            linear.weight.grad = x.grad = None
            linear(x).backward(dy)

        cost = Cost(flops=6.0 * tokens * rows * cols)  # forward, input gradient and weight gradient
        return Workload(run=run, cost=cost, tokens=tokens, weights=[linear.weight])

    def verify(density: float) -> list[Check]:
        linear, x, dy, open_rows, open_cols = setup(density)
        linear(x).backward(dy)
        assert linear.weight.grad is not None
        dense, dx = linear.weight.grad, x.grad
        x.grad = linear.weight.grad = None
        packed = PackedGradLinear.swap(linear)
        packed.set_plan(layout, open_rows, open_cols)
        packed(x).backward(dy)
        r, c = open_rows.long(), open_cols.long()
        assert isinstance(packed.weight.grad, BlockGrad)
        exact = (dense[r][:, c],) if layout == "block" else (dense[r], dense[:, c])
        pairs = zip(packed.weight.grad.parts, exact, strict=True)
        limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
        checks = [Check("packed weight gradient", relative_error(a, b), limit) for a, b in pairs]
        return [*checks, Check("input gradient", relative_error(x.grad, dx), limit)]

    def lane(density: float) -> Lane:
        return Lane(
            provider="lcdd", build=lambda: build(density), params={"density": density}, verify=lambda: verify(density)
        )

    lanes = [
        Lane(provider="plain", build=lambda: build(None), exempt="the floor: nn.Linear"),
        *(lane(density) for density in densities),
    ]
    params = {"shape": f"{rows}x{cols}", "dtype": name_of(dtype), "tokens": tokens, "layout": layout}
    return Case(name=name, params=params, lanes=lanes, floor="plain", budget_s=8.0)


def packed_linears(place: Place) -> list[Case]:
    """Forward and backward of nn.Linear, weight gradient dense or on the open part alone."""
    if place.size == "gpu":
        return [
            _linear_case(place, shape, torch.bfloat16, 4096, layout, (0.2,))
            for shape in (EIGHT_B, SIX_TENTHS_B)
            for layout in ("block", "panels")
        ]
    return [
        _linear_case(place, EIGHT_B, torch.float32, 256, "block", (0.2,)),
        _linear_case(place, SIX_TENTHS_B, torch.float32, 1024, "block", (0.2,)),
        _linear_case(place, SIX_TENTHS_B, torch.float32, 1024, "panels", (0.2,)),
        _linear_case(place, EIGHT_B, torch.bfloat16, 256, "block", (0.2,)),
    ]


def crossover(place: Place) -> list[Case]:
    """Where packing begins to pay: packed at densities around it, whatever the plan would say."""
    densities = (0.15, 0.3, 0.5, 0.7, 0.9)
    return [
        _linear_case(place, shape, torch.bfloat16, 4096, layout, densities, name="packing crossover")
        for shape in (EIGHT_B, SIX_TENTHS_B)
        for layout in ("block", "panels")
    ]
