"""DeltaStepPlan: what it keeps from step to step, what it notices, whose memory it refuses."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lcdd_kernels as k
from lcdd_kernels import AdamWStep, DeltaStepPlan, GateMap, GateSpec, use_backend
from lcdd_kernels.cases.delta_step import Layer, gate_sample
from lcdd_kernels.testing import bits_equal

BACKENDS = ("reference", "triton", "native")
LISTS = ("weights", "bases", "deltas", "exp_avgs", "exp_avg_sqs")


class Tensors:
    """A small layer's matrices and gates, by name."""

    def __init__(self, device: str = "cpu", seed: int = 0) -> None:
        layer, generator = Layer(1), torch.Generator().manual_seed(seed)
        self.maps, self.n_gates, self.offsets = layer.maps, layer.n_gates, layer.offsets

        def draw(scale: float) -> list[Tensor]:
            return [(scale * torch.randn(shape, generator=generator)).to(device) for shape in layer.shapes]

        self.bases, self.weights, self.deltas = draw(1.0), draw(1.0), draw(0.1)
        self.exp_avgs, self.exp_avg_sqs = draw(0.1), [x.square() for x in draw(0.1)]
        self.grads = draw(1.0)
        self.gates = [gate_sample(self.n_gates, generator).to(device) for _ in range(4)]

    def plan(self) -> DeltaStepPlan:
        return DeltaStepPlan(self.maps, n_gates=self.n_gates, **{name: getattr(self, name) for name in LISTS})

    def state(self) -> list[Tensor]:
        return [tensor for name in LISTS for tensor in getattr(self, name)]


def adam(step: int) -> AdamWStep:
    return AdamWStep(lr=1e-2, weight_decay=0.1, step=step, grad_scale=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_steps_of_a_plan_are_three_plans(backend: str, device_of) -> None:
    """Gradients in new memory each time, dense and packed, and gates that change: nothing of the last step stays."""
    device = device_of("delta_adamw_", backend)
    kept, once = Tensors(device), Tensors(device)
    plan = kept.plan()
    with use_backend(backend):
        for step in (1, 2, 3):
            old, new = kept.gates[step - 1], kept.gates[step]
            _, _, rank = k.open_indices(old, kept.offsets)
            grads, layouts = [g.clone() * step for g in kept.grads], ["dense"] * len(kept.grads)
            if step != 2:  # one of them as its open block
                where, layouts[1] = kept.maps[1], "block"
                rows = (rank[where.row_start :][: grads[1].shape[0]] >= 0).nonzero().view(-1)
                cols = (rank[where.col_start :][: grads[1].shape[1]] >= 0).nonzero().view(-1)
                grads[1] = grads[1][rows][:, cols].contiguous()
            packed = {"layouts": layouts, "rank": rank}
            found = plan.grad_stats(grads, old, **packed)
            expected = k.delta_grad_stats(grads, once.deltas, old, once.maps, **packed)
            assert all(bits_equal(a, b) for a, b in zip(found, expected, strict=True))
            plan.step(grads, old, new, adam(step), **packed)
            lists = [getattr(once, name) for name in LISTS]
            k.delta_adamw_(*lists, grads, old, new, once.maps, adam(step), **packed)
            assert all(bits_equal(a, b) for a, b in zip(kept.state(), once.state(), strict=True))
        plan.refresh(kept.gates[0])
        k.weight_eff_(once.weights, once.bases, once.deltas, once.gates[0], once.maps)
    assert all(bits_equal(a, b) for a, b in zip(kept.weights, once.weights, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_on_the_device_is_a_number_and_nan_leaves_everything_as_it_is(backend: str, device_of) -> None:
    device = device_of("delta_adamw_", backend)
    told, there = Tensors(device), Tensors(device)
    plan = there.plan()
    with use_backend(backend):
        told.plan().step(told.grads, told.gates[0], told.gates[1], adam(1))
        scaled = replace(adam(1), grad_scale=torch.tensor(0.5, device=device))
        plan.step(there.grads, there.gates[0], there.gates[1], scaled)
        assert all(bits_equal(a, b) for a, b in zip(there.state(), told.state(), strict=True))
        not_taken = replace(adam(2), grad_scale=torch.tensor(float("nan"), device=device))
        plan.step(there.grads, there.gates[1], there.gates[2], not_taken)
    assert all(bits_equal(a, b) for a, b in zip(there.state(), told.state(), strict=True))
    with pytest.raises(ValueError, match=r"grad_scale: expected shape \[\], got shape \[1\]"):
        plan.step(there.grads, *there.gates[:2], replace(scaled, grad_scale=torch.ones(1, device=device)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_refresh_would_change_is_counted(backend: str, device_of) -> None:
    tensors = Tensors(device_of("weight_differs", backend))
    plan, gate = tensors.plan(), tensors.gates[0]
    with use_backend(backend):
        plan.refresh(gate)
        tensors.weights[3].view(-1)[[0, 7, -1]] += 1
        found = [plan.differing(m, gate).item() for m in range(len(tensors.maps))]
        assert found == [0, 0, 0, 3, 0, 0, 0]
        tensors.weights[5].data = tensors.weights[5].data.clone()  # it moved
        tensors.weights[5][0, 0] = float("nan")
        assert plan.differing(5, gate) == 1
    with pytest.raises(ValueError, match=r"m: expected an int in \[0, 7\), got 7"):
        plan.differing(7, gate)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_keeps_no_gradient_alive(backend: str, device_of) -> None:
    """Its memory is that of the next forward's activations."""
    tensors = Tensors(device_of("delta_adamw_", backend))
    plan, gates = tensors.plan(), tensors.gates
    with use_backend(backend):
        taken = plan.take(tensors.grads, gates[0])
        plan.grad_stats(taken, gates[0])
        plan.step(taken, gates[0], gates[1], adam(1))
    of_grads = [weakref.ref(grad) for grad in tensors.grads]
    tensors.grads, taken = [], None
    assert [ref() for ref in of_grads] == [None] * len(of_grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_that_moved_is_found_where_it_is(backend: str, device_of) -> None:
    device = device_of("weight_eff_", backend)
    tensors = Tensors(device)
    plan = tensors.plan()
    with use_backend(backend):
        plan.refresh(tensors.gates[0])
        before = [w.clone() for w in tensors.weights]
        left = tensors.weights[2].data
        tensors.weights[2].data = torch.full_like(left, 7.0)
        plan.refresh(tensors.gates[0])
    assert bits_equal(tensors.weights[2], before[2])
    assert bits_equal(left, before[2])
    tensors.deltas[3].data = tensors.deltas[3].data[:, :-1].contiguous()
    with pytest.raises(ValueError, match=r"deltas\[3\]: expected shape \[\d+, \d+\]"):
        plan.refresh(tensors.gates[0])


def test_autograd_is_told_of_the_writes() -> None:
    """A backward through a weight that was stepped since its forward is an error, not a wrong gradient."""
    tensors = Tensors()
    tensors.weights = [torch.nn.Parameter(w) for w in tensors.weights]
    plan = tensors.plan()
    versions = [t._version for t in tensors.state()]
    plan.grad_stats(tensors.grads, tensors.gates[0])
    assert [t._version for t in tensors.state()] == versions
    y = (torch.randn(3, tensors.weights[0].shape[1], requires_grad=True) @ tensors.weights[0].T).square().sum()
    plan.step(tensors.grads, tensors.gates[0], tensors.gates[1], adam(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    moved = [t._version > v for t, v in zip(tensors.state(), versions, strict=True)]
    n = len(tensors.maps)
    assert moved == [True] * n + [False] * n + [True] * 3 * n


def overlapping(tensors: Tensors, name: str, other: str) -> None:
    """getattr(tensors, name)[0] begins in the middle of getattr(tensors, other)[1]."""
    memory = getattr(tensors, other)[1].view(-1)
    shape = getattr(tensors, name)[0].shape
    storage = torch.zeros(memory.numel() + shape.numel())
    getattr(tensors, other)[1] = storage[: memory.numel()].view(getattr(tensors, other)[1].shape)
    getattr(tensors, name)[0] = storage[memory.numel() // 2 :][: shape.numel()].view(shape)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("bases", "weights", r"bases\[0\]: expected memory of its own, got the memory of weights\[1\]"),
        ("weights", "deltas", r"weights\[0\]: expected memory of its own \(it is written\), got the memory of deltas"),
        ("exp_avgs", "exp_avg_sqs", r"expected memory of its own \(it is written\), got the memory of exp_avg"),
        ("grads", "weights", r"grads\[0\]: expected memory of its own, got the memory of weights\[1\]"),
        ("grads", "exp_avgs", r"grads\[0\]: expected memory of its own, got the memory of exp_avgs\[1\]"),
    ],
)
def test_memory_that_overlaps_in_part_is_refused(name: str, other: str, message: str) -> None:
    """Not only where two tensors begin at one address."""
    tensors = Tensors()
    overlapping(tensors, name, other)
    before = [t.clone() for t in tensors.state()]
    with pytest.raises(ValueError, match=message):
        tensors.plan().step(tensors.grads, tensors.gates[0], tensors.gates[1], adam(1))
    assert all(bits_equal(a, b) for a, b in zip(tensors.state(), before, strict=True))


def test_neighbours_in_one_storage_do_not_overlap() -> None:
    """Views that touch but do not overlap are fine: flat buffers of parameters, rows of a shard."""
    tensors, flat = Tensors(), Tensors()
    storage = torch.cat([t.view(-1) for t in (*flat.weights, *flat.grads)])
    pieces = storage.split([t.numel() for t in (*flat.weights, *flat.grads)])
    views = [piece.view(t.shape) for piece, t in zip(pieces, (*flat.weights, *flat.grads), strict=True)]
    flat.weights, flat.grads = views[: len(flat.maps)], views[len(flat.maps) :]
    for each in (tensors, flat):
        each.plan().step(each.grads, each.gates[0], each.gates[1], adam(1))
    assert all(bits_equal(a, b) for a, b in zip(tensors.state(), flat.state(), strict=True))


def test_what_a_call_needs_has_to_be_there() -> None:
    tensors = Tensors()
    plan = DeltaStepPlan(tensors.maps, n_gates=tensors.n_gates, deltas=tensors.deltas)
    plan.grad_stats(tensors.grads, tensors.gates[0])
    with pytest.raises(ValueError, match="weights: expected 7 entries, got 0"):
        plan.refresh(tensors.gates[0])
    with pytest.raises(ValueError, match=r"gate: expected shape \[\d+\], got shape"):
        plan.grad_stats(tensors.grads, tensors.gates[0][:-1])
    with pytest.raises(ValueError, match=r"gate_maps\[0\]\.row_start: expected an int in"):
        DeltaStepPlan([GateMap(5, 0)], n_gates=8, deltas=[torch.zeros(4, 4)])


def test_float32_gates_do_not_go_with_float64_matrices() -> None:
    plan = DeltaStepPlan([GateMap(0, 2)], n_gates=5, deltas=[torch.zeros(2, 3, dtype=torch.float64)])
    grad = torch.ones(2, 3, dtype=torch.float64)
    plan.grad_stats([grad], torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"deltas\[0\]: expected dtype float32 or .* got float64"):
        plan.grad_stats([grad], torch.ones(5))


def test_compiled_code_may_call_a_plan() -> None:
    """A graph break, not an error: the pointers are those of the real tensors."""
    tensors, plain = Tensors(), Tensors()
    plan = tensors.plan()

    def step(logits: Tensor) -> Tensor:
        gate, _ = k.gate_values(logits, GateSpec(kind="heaviside_ste"))
        plan.refresh(gate * 1.0)
        return gate + 1

    logits = tensors.gates[0] - 0.5
    torch.compile(step, backend="eager")(logits)
    k.weight_eff_(plain.weights, plain.bases, plain.deltas, (logits > 0).float(), plain.maps)
    assert all(bits_equal(a, b) for a, b in zip(tensors.weights, plain.weights, strict=True))
