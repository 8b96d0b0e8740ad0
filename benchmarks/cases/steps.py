"""Whole optimizer steps, micro-batches and all, of models with random weights: the masking tax.

    plain      forward, backward, clip, fused AdamW over the same weights: no gates. The floor.
    unfused    LCDD as its authors write it (`fixtures/unfused.py`)
    compiled   that, with the parametrization under torch.compile
    lcdd       `LCDDOptimizer` at a density of its gates, which a last case holds fixed

All of them take the same loss of the same tokens, written in the same way, so that a ratio is of the gates alone. θ
hardly moves (a tiny learning rate), which keeps the density where it was set.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Place, name_of
from benchmarks.cases.shapes import fine_tune, make_model, sized
from benchmarks.harness import Case, Check, Cost, Lane, Sample, Workload, relative_error
from fixtures.gates import gate_logits
from fixtures.unfused import DeltaMask, Settings, UnfusedLCDD
from lcdd.config import LCDDConfig
from lcdd.models import Architecture, PreTrainedModel, sites_of, skeleton_of, step_flops
from lcdd.optimizer import LCDDOptimizer
from lcdd_kernels.reference.gates import GateSpec, gate_noise_ref

SEED, POOL = 3, 8
DENSITIES = (1.0, 0.5, 0.25, 0.2, 0.15)
ALL = 1 - 2**-30  # of a run: gates are fixed from its first step on
FIXED_DENSITIES = (0.2, 0.05, 0.01, 0.001)  # real models' carriers have 99% of their gates closed, and more
KINDS = ("hard_concrete", "heaviside_ste")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is measured: the model's sizes, tokens a micro-batch and how many of them, the gates."""

    place: Place
    sizes: dict[str, Any]
    tokens: int
    micro: int
    kind: str
    checkpointing: bool = False

    def base(self) -> PreTrainedModel:
        return make_model(self.sizes, self.place, seed=0, checkpointing=self.checkpointing)

    def batches(self, tokens: int) -> Callable[[], list[Tensor]]:
        """An endless supply of steps' micro-batches [1, tokens]; random tokens, drawn beforehand."""
        generator = torch.Generator().manual_seed(1)
        size = (POOL, self.micro, 1, tokens)
        pool = torch.randint(self.sizes["vocab_size"], size, generator=generator).to(self.place.device)
        turns = itertools.cycle(range(POOL))
        return lambda: list(pool[next(turns)])

    def few(self, steps: int) -> list[list[Tensor]]:
        """So many steps' micro-batches, at most two a step, of few tokens."""
        supply = self.batches(min(self.tokens, 48))
        return [supply()[:2] for _ in range(steps)]


def _backward(model: Callable[..., Any], micro_batches: Sequence[Tensor]) -> float:
    """The reference's loss, in the reference's way; gradients are left in the weights."""
    n_tokens = sum(tokens[:, 1:].numel() for tokens in micro_batches)
    loss = 0.0
    for tokens in micro_batches:
        logits = model(input_ids=tokens).logits[:, :-1]
        part = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / n_tokens
        part.backward()
        loss += part.item()
    return loss


class PlainStep:
    """Fine-tuning without gates: the same weights trained, the same clipping, PyTorch's fused AdamW."""

    def __init__(self, model: PreTrainedModel, learning_rate: float) -> None:
        self.model, self.weights = model, [site.weight for site in sites_of(model)]
        model.requires_grad_(False)
        for weight in self.weights:
            weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.weights, lr=learning_rate, weight_decay=0.0, fused=True)

    def step(self, micro_batches: Sequence[Tensor]) -> float:
        loss = _backward(self.model, micro_batches)
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class OurStep:
    """`LCDDOptimizer` in the same loop."""

    def __init__(self, model: PreTrainedModel, optimizer: LCDDOptimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.masked: list[nn.Parameter] = optimizer.param_groups[0]["params"]

    def weights(self) -> list[Tensor]:
        return [weight.detach() for weight in self.masked]

    def step(self, micro_batches: Sequence[Tensor]) -> float:
        loss = _backward(self.model, micro_batches)
        self.optimizer.step(loss)
        self.optimizer.zero_grad()
        return loss


LEARNING_RATE, GATE_LR, VERIFY_GATE_LR = 1e-5, 1e-6, 1e3


def plain(step: Step) -> PlainStep:
    return PlainStep(fine_tune(step.base(), seed=1), LEARNING_RATE)


def ours(
    step: Step, density: float, *, gate_lr: float = GATE_LR, pack: str = "auto", freeze_fraction: float = 0.2
) -> OurStep:
    base = step.base().requires_grad_(False)
    model = fine_tune(copy.deepcopy(base), seed=1)
    config = LCDDConfig(
        gate_controller="dual", gate_kind=step.kind, learning_rate=LEARNING_RATE,
        gate_optimizer="sgd", gate_lr=gate_lr, seed=SEED, pack=pack, freeze_fraction=freeze_fraction,
        delta_dtype="float32" if step.place.dtype == torch.float32 else "bfloat16",
    )  # fmt: skip
    logits = gate_logits(model, density)
    return OurStep(model, LCDDOptimizer.attach(model, base, config, total_steps=1_000_000, initial_logits=logits))


def unfused(
    step: Step, density: float, *, gate_lr: float = GATE_LR, compiled: bool = False, freeze_fraction: float = 0.2
) -> UnfusedLCDD:
    base = step.base().requires_grad_(False)
    model = fine_tune(copy.deepcopy(base), seed=1)
    settings = Settings(
        total_steps=1_000_000, gate_kind=step.kind, learning_rate=LEARNING_RATE, gate_optimizer="sgd", gate_lr=gate_lr,
        freeze_fraction=freeze_fraction,
    )  # fmt: skip
    logits = gate_logits(model, density)

    def noise(t: int) -> Tensor:
        n = logits.numel()
        return gate_noise_ref(n, GateSpec(kind="hard_concrete", seed=SEED, step=t), device=step.place.device)

    run = UnfusedLCDD(model, base, settings, logits=logits, noise=noise)
    if compiled:  # the masks alone: compiling 28 layers around them takes longer than everything else here together
        backend = "eager" if step.place.tiny else "inductor"
        DeltaMask.compile_all(model, backend=backend)
    return run


# --- lanes ------------------------------------------------------------------------------------------------------------


def _workload(step: Step, runner: Any, *, share: float) -> Workload:
    """Steps of `runner`. share: of the masked weights' gradients that are computed."""
    supply = step.batches(step.tokens)
    current: list[list[Tensor]] = []

    def fresh() -> None:
        current[:] = [supply()]

    model = runner.model
    state = [*model.parameters(), *model.buffers(), *getattr(runner, "deltas", [])]
    tokens = step.tokens * step.micro
    architecture = Architecture.of(skeleton_of(model.config))
    flops = step_flops(architecture, tokens, sequence=step.tokens, weight_grads=share).total
    return Workload(
        run=lambda: runner.step(current[0]), fresh=fresh, cost=Cost(flops=flops), tokens=tokens, weights=state
    )


def _limits(place: Place) -> tuple[float, float]:
    """Relative errors that pass: of losses, of gradients. bfloat16: rounding of the weights' products in another
    order."""
    return (1e-2, 6e-2) if place.dtype == torch.bfloat16 else (1e-5, 2e-3)


def verify_against_unfused(step: Step, density: float, make: Callable[..., Any]) -> list[Check]:
    """Two steps on few tokens: losses, first moments (the gradients of Δ), movement of θ, and the next W_eff."""
    batches = step.few(2)
    # a rate at which θ moves far beyond its rounding, and not so far that a gate opens or closes by it
    expected, got = unfused(step, density, gate_lr=VERIFY_GATE_LR), make(gate_lr=VERIFY_GATE_LR)
    loss_limit, limit = _limits(step.place)
    checks = _losses(got, expected, batches, loss_limit)
    moments = [expected.delta_optimizer.state[delta]["exp_avg"] for delta in expected.deltas]
    if isinstance(got, OurStep):
        found = [got.optimizer.state[weight]["exp_avg"] for weight in got.masked]
        theta = got.optimizer.gates.logits
    else:
        found = [got.delta_optimizer.state[delta]["exp_avg"] for delta in got.deltas]
        theta = got.gates.logits
    start = expected.start
    checks.append(Check("gradient of delta", _worst(found, moments), limit))
    checks.append(Check("movement of theta", relative_error(theta - start, expected.gates.logits - start), limit))
    checks.append(Check("weights after two steps", _worst(got.weights(), expected.weights()), limit))
    return checks


def _losses(got: Any, expected: Any, batches: Sequence[Sequence[Tensor]], limit: float) -> list[Check]:
    """Both take these steps."""
    pairs = [(got.step(batch), expected.step(batch)) for batch in batches]
    return [Check(f"loss of step {n}", abs(a - b) / abs(b), limit) for n, (a, b) in enumerate(pairs, start=1)]


def _worst(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(got, expected, strict=True))


def plain_lane(step: Step) -> Lane:
    return Lane(provider="plain", build=lambda: _workload(step, plain(step), share=1.0), exempt="the floor")


def unfused_lane(step: Step) -> Lane:
    return Lane(
        provider="unfused", build=lambda: _workload(step, unfused(step, 1.0), share=1.0), params={"density": 1.0},
        exempt="the definition that the others are checked against",
    )  # fmt: skip


def compiled_lane(step: Step) -> Lane:
    make = partial(unfused, step, 1.0, compiled=True)
    return Lane(
        provider="compiled", build=lambda: _workload(step, make(), share=1.0), params={"density": 1.0},
        verify=lambda: verify_against_unfused(step, 1.0, make),
    )  # fmt: skip


def our_lane(step: Step, density: float) -> Lane:
    # Work by the formula: the open block, or the open rows and columns, of every weight gradient.
    share = density**2 if step.kind == "hard_concrete" else min(1.0, 2 * density)
    make = partial(ours, step, density)
    return Lane(
        provider="lcdd", build=lambda: _workload(step, make(), share=share), params={"density": density},
        verify=lambda: verify_against_unfused(step, density, make),
    )  # fmt: skip


def fixed(step: Step, density: float) -> OurStep:
    """Ours, gates fixed from the start."""
    return ours(step, density, freeze_fraction=ALL)


def optimizer_memory(runner: OurStep) -> Sample:
    """What the optimizer holds beside weights and base, over the moments of plain AdamW in the weights' dtype.

    Counted are Δ, its moments, what belongs to the gates, and of fixed gates the blocks' weights and bases.
    """
    states = [runner.optimizer.state[weight] for weight in runner.masked]
    held = sum(tensor.nbytes for state in states for tensor in state.values())
    held += 8 * runner.optimizer.gates.logits.nbytes
    whole = sum(weight.numel() for weight in runner.masked)
    entries, item = sum(state["delta"].numel() for state in states), runner.masked[0].element_size()
    held += 2 * item * entries if entries < whole else 0
    return Sample.of("optimizer_memory", "of AdamW's", [held / (2 * item * whole)])


def verify_fixed(step: Step, density: float) -> list[Check]:
    """Three steps against the definition: losses, and what the weights have moved by."""
    expected, got = unfused(step, density, freeze_fraction=ALL), fixed(step, density)
    before = [weight.detach().clone() for weight in expected.weights()]
    loss_limit, limit = _limits(step.place)
    checks = _losses(got, expected, step.few(3), loss_limit)
    # of all weights together: a matrix with few open entries may hardly have moved
    moved = [torch.cat([(w.detach() - b).flatten() for w, b in zip(all_, before, strict=True)])
             for all_ in (got.weights(), expected.weights())]  # fmt: skip
    return [*checks, Check("movement of the weights", relative_error(*moved), limit)]


def fixed_lane(step: Step, density: float) -> Lane:
    def build() -> Workload:
        runner = fixed(step, density)
        work = _workload(step, runner, share=density**2)
        return replace(work, extra=lambda: [optimizer_memory(runner)])

    return Lane(provider="lcdd", build=build, params={"density": density}, verify=lambda: verify_fixed(step, density))


def fixed_case(
    place: Place, name: str, *, layers: int | None, divide: int, tokens: int, micro: int, budget_s: float
) -> Case:
    """Steps of the last part of a run, in which no gate moves."""
    model, sizes = sized(place, name, layers=layers, divide=divide)
    step = Step(place=place, sizes=sizes, tokens=16 if place.tiny else tokens, micro=micro, kind="hard_concrete")
    lanes = [plain_lane(step), *(fixed_lane(step, density) for density in FIXED_DENSITIES)]
    params = {"model": model, "micro_batches": micro, "tokens": step.tokens * micro, "dtype": name_of(place.dtype)}
    return Case(
        name="optimizer step, gates fixed", params=params, lanes=lanes, floor="plain", budget_s=budget_s, min_rounds=7
    )


def step_case(
    place: Place, name: str, *, layers: int | None, divide: int, tokens: int, micro: int, kind: str = "hard_concrete",
    densities: Sequence[float] = (1.0, 0.2), compiled: bool = False, checkpointing: bool = False, memory: bool = False,
    with_unfused: bool = True, budget_s: float = 20.0, min_rounds: int = 5,
) -> Case:  # fmt: skip
    """A case of this module. tokens: of a micro-batch; the record says how many a step has in all."""
    model, sizes = sized(place, name, layers=layers, divide=divide)
    tokens = 16 if place.tiny else tokens
    step = Step(place=place, sizes=sizes, tokens=tokens, micro=micro, kind=kind, checkpointing=checkpointing)
    lanes = [plain_lane(step)]
    if with_unfused:
        lanes.append(unfused_lane(step))
    if compiled:
        lanes.append(compiled_lane(step))
    lanes += [our_lane(step, density) for density in (densities[:2] if place.tiny else densities)]
    params = {
        "model": model, "gates": kind, "micro_batches": micro, "tokens": tokens * micro, "dtype": name_of(place.dtype),
        "checkpointing": checkpointing,
    }  # fmt: skip
    return Case(
        name="optimizer step", params=params, lanes=lanes, floor="plain", memory=memory, budget_s=budget_s,
        min_rounds=min_rounds,
    )  # fmt: skip


# --- lists ------------------------------------------------------------------------------------------------------------


def cpu_cases(place: Place) -> list[Case]:
    """Scaled-down stacks, and tokens scaled with them: 256 and 1,024 a step stand where a GPU takes 4,096 and 16,384,
    since a CPU computes that much less for every byte it moves. Qwen3 at every density; the others open and 80%
    closed."""
    qwen = {"name": "qwen3-0.6b", "layers": 4, "divide": 2}
    cases = [
        step_case(
            place, **qwen, tokens=64, micro=4, kind=kind, densities=DENSITIES, memory=kind == "hard_concrete",
            budget_s=25.0, min_rounds=9,
        )
        for kind in KINDS
    ]  # fmt: skip
    cases.append(step_case(place, **qwen, tokens=256, micro=4, min_rounds=7))
    cases += [fixed_case(place, **qwen, tokens=tokens, micro=4, budget_s=12.0) for tokens in (64, 256)]
    cases += [step_case(place, **qwen, tokens=256, micro=1, kind=kind, budget_s=9.0) for kind in KINDS]
    few = {"layers": 2, "divide": 8, "tokens": 64, "micro": 4}
    cases += [step_case(place, name, **few, budget_s=4.0) for name in ("llama-3-8b", "mistral-7b", "vicuna-7b")]
    qwen["layers"] = 2
    cases.append(step_case(place, **qwen, tokens=64, micro=4, checkpointing=True, budget_s=6.0))
    return cases


def one_layer(place: Place, name: str) -> list[Case]:
    """The first number: one real layer (and its share of the head), both gates."""
    shared = {"layers": 1, "divide": 1, "tokens": 4096, "micro": 1}
    return [step_case(place, name, **shared, kind=kind, budget_s=4.0) for kind in KINDS]


def whole_small_model(place: Place) -> list[Case]:
    """Qwen3-0.6B as it is: 4,096 and 16,384 tokens, 1 and 4 micro-batches."""
    shared = {"layers": None, "divide": 1}
    cases = [
        step_case(
            place, "qwen3-0.6b", **shared, tokens=tokens, micro=micro, kind=kind,
            densities=DENSITIES if micro == 1 else (1.0, 0.2), memory=micro == 1, budget_s=6.0,
            compiled=micro == 1 and kind == "hard_concrete",
        )
        for tokens, micro in ((4096, 1), (4096, 4))
        for kind in KINDS
    ]  # fmt: skip
    cases.append(step_case(place, "qwen3-0.6b", **shared, tokens=4096, micro=4, checkpointing=True, budget_s=4.0))
    cases.append(fixed_case(place, "qwen3-0.6b", **shared, tokens=4096, micro=1, budget_s=6.0))
    return cases


def four_large_layers(place: Place) -> list[Case]:
    """Four layers of Llama-3-8B: step time and peak memory."""
    shared = {"layers": 4, "divide": 1, "tokens": 4096}
    return [
        step_case(place, "llama-3-8b", **shared, micro=1, kind=kind, memory=True, budget_s=5.0) for kind in KINDS
    ] + [step_case(place, "llama-3-8b", **shared, micro=4, budget_s=5.0)]


def other_models(place: Place) -> list[Case]:
    """A layer of the other 7B shapes."""
    return [case for name in ("mistral-7b", "vicuna-7b") for case in one_layer(place, name)[:1]]


def whole_large_model(place: Place) -> list[Case]:
    """All of Llama-3-8B, 4,096 tokens, no checkpointing: does it fit, and how long does a step take?"""
    case = step_case(
        place, "llama-3-8b", layers=None, divide=1, tokens=4096, micro=1, densities=(0.2,), with_unfused=False,
        memory=True, budget_s=5.0, min_rounds=2,
    )  # fmt: skip
    (lane,) = [lane for lane in case.lanes if lane.provider == "lcdd"]
    return [replace(case, lanes=[replace(lane, verify=None, exempt="checked on four layers")], floor=None)]
