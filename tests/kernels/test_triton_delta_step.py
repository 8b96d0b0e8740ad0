"""Triton kernels of delta_step beyond what every backend is tested for: tiles, groups of matrices, shards, dtypes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lcdd_kernels.cases.delta_step import gate_sample, pack
from lcdd_kernels.reference import delta_step as reference
from lcdd_kernels.reference.delta_step import BLOCK, DENSE, PANELS, AdamWStep, GateMap, Gradients, Matrices
from lcdd_kernels.reference.gates import open_indices_ref
from lcdd_kernels.testing import bits_equal, poisoned_memory

pytest.importorskip("triton", reason="Triton is not installed")

from lcdd_kernels.triton_kernels import delta_step, observe_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ADAM = AdamWStep(lr=1e-2, beta2=0.99, weight_decay=0.1, step=3, grad_scale=0.7)


class Sample:
    """Matrices with gates of their own, except that all columns of equal width share theirs, as q, k and v do.

    repeats: per matrix, 1 or the query heads per KV head (head_dim 4). Everything on DEVICE but the maps.
    """

    def __init__(self, shapes, layouts, *, repeats=None, dtypes=(torch.float32,) * 4, density=0.5, seed=0) -> None:
        weight, delta, moment, grad = dtypes
        generator = torch.Generator().manual_seed(seed)
        repeats = repeats or [1] * len(shapes)
        maps, offsets, shared = [], [0], {}
        for (n_out, n_in), repeat in zip(shapes, repeats, strict=True):
            if (n_in, repeat) not in shared:
                shared[n_in, repeat] = offsets[-1]
                offsets.append(offsets[-1] + n_in // repeat)
            maps.append(GateMap(offsets[-1], shared[n_in, repeat], 4 if repeat > 1 else 1, repeat))
            offsets.append(offsets[-1] + n_out)
        gate, gate_new = (gate_sample(offsets[-1], generator, density) for _ in range(2))
        rank = open_indices_ref(gate, torch.tensor(offsets))[2]
        self.shapes, self.maps, self.layouts = shapes, maps, layouts
        self.gate, self.gate_new, self.rank = gate.to(DEVICE), gate_new.to(DEVICE), rank.to(DEVICE)

        def matrices(scale: float, dtype: torch.dtype) -> list[Tensor]:
            return [(scale * torch.randn(s, generator=generator)).to(dtype).to(DEVICE) for s in shapes]

        self.bases, self.deltas = matrices(1.0, weight), matrices(0.1, delta)
        for base in self.bases:
            base.view(-1)[::3] = -0.0
        self.weights = [torch.full_like(base, float("nan")) for base in self.bases]
        self.exp_avgs = matrices(0.1, moment)
        self.exp_avg_sqs = [m.square() for m in matrices(0.1, moment)]
        self.grads, self.col_panels = [], []
        for g, layout, where in zip(matrices(1.0, grad), layouts, maps, strict=True):
            packed, panel = pack(g.cpu(), layout, where, rank)
            self.grads.append(packed.to(DEVICE))
            self.col_panels.append(None if panel is None else panel.to(DEVICE))

    def matrices(self, to) -> Matrices:
        names = ("weights", "bases", "deltas", "exp_avgs", "exp_avg_sqs")
        lists = {name: [to(t) for t in getattr(self, name)] for name in names}
        return Matrices(maps=self.maps, n_gates=self.gate.numel(), **lists)

    def gradients(self, to) -> Gradients:
        panels = [None if panel is None else to(panel) for panel in self.col_panels]
        rank = self.rank.to(to(self.gate).device)
        return Gradients(tensors=[to(t) for t in self.grads], col_panels=panels, layouts=self.layouts, rank=rank)

    def stats(self, function, to=lambda t: t) -> tuple[Tensor, Tensor]:
        return function(self.matrices(to), self.gradients(to), to(self.gate))

    def adamw(self, function, to=lambda t: t.clone()) -> list[Tensor]:
        """Runs pass B on copies; the written tensors, in order weights, deltas, exp_avgs, exp_avg_sqs."""
        matrices = self.matrices(to)
        function(matrices, self.gradients(to), to(self.gate), to(self.gate_new), ADAM)
        return [*matrices.weights, *matrices.deltas, *matrices.exp_avgs, *matrices.exp_avg_sqs]

    def refresh(self, function, to=lambda t: t.clone()) -> list[Tensor]:
        matrices = self.matrices(to)
        function(matrices, to(self.gate))
        return list(matrices.weights)


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


# Several tiles in both directions (pass A: 128 x 256, pass B: 32 x 256), and every alignment of the rows.
TILES = [(140, 272), (1, 272), (33, 257), (40, 24)]


@pytest.mark.parametrize("layout", [DENSE, BLOCK, PANELS], ids=["dense", "block", "panels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_tiles(dtype: torch.dtype, layout: int) -> None:
    """Against float64, with twice the float32 reference's own error as the limit; W_eff bit for bit."""
    sample = Sample(TILES, [layout] * 4, repeats=[1, 1, 1, 3], dtypes=(dtype, dtype, torch.float32, dtype))
    with poisoned_memory():
        d_gate, sq_norm = sample.stats(delta_step.delta_grad_stats_triton)
    true_gate, true_norm = sample.stats(reference.delta_grad_stats_ref, exact)
    plain, _ = sample.stats(reference.delta_grad_stats_ref, lambda t: t.detach().cpu())
    limit = 2 * (plain.double() - true_gate).abs().max() + 1e-7 * true_gate.abs().max()
    assert (d_gate.cpu().double() - true_gate).abs().max() <= limit
    assert abs(sq_norm.item() / true_norm.item() - 1) < 1e-6

    with poisoned_memory():
        got = sample.adamw(delta_step.delta_adamw_triton)
    truth = sample.adamw(reference.delta_adamw_ref, lambda t: exact(t).clone())
    for a, b in zip(got, truth, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.cpu().double(), b, rtol=2 * eps, atol=2 * eps)
    with poisoned_memory():
        weights = sample.refresh(delta_step.weight_eff_triton)
    for a, b in zip(weights, sample.refresh(reference.weight_eff_ref, lambda t: t.cpu().clone()), strict=True):
        assert bits_equal(a, b)


def test_stored_delta_gives_the_weight_bit_for_bit() -> None:
    """Pass B's weights are the refresh of the deltas that it stored, in half precision too."""
    sample = Sample(TILES, [DENSE] * 4, dtypes=(torch.float16, torch.float16, torch.float32, torch.float16))
    sides = len(sample.shapes)
    got = sample.adamw(delta_step.delta_adamw_triton)
    weights, deltas = got[:sides], got[sides : 2 * sides]
    expected = [w.cpu().clone() for w in weights]
    bases, deltas = [b.cpu() for b in sample.bases], [d.cpu() for d in deltas]
    n_gates = sample.gate.numel()
    matrices = Matrices(maps=sample.maps, n_gates=n_gates, weights=expected, bases=bases, deltas=deltas)
    reference.weight_eff_ref(matrices, sample.gate_new.cpu())
    assert all(bits_equal(a, b) for a, b in zip(weights, expected, strict=True))


@pytest.mark.parametrize("layout", [DENSE, BLOCK, PANELS], ids=["dense", "block", "panels"])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_all_closed_and_all_open(density: float, layout: int) -> None:
    sample = Sample([(48, 32), (33, 32)], [layout] * 2, density=density)
    if density == 0.0:
        sample.gate_new.zero_()
    with poisoned_memory():
        d_gate, sq_norm = sample.stats(delta_step.delta_grad_stats_triton)
        weight, _, _, _, exp_avg, *_ = sample.adamw(delta_step.delta_adamw_triton)
    if density == 0.0:
        assert sq_norm.item() == 0
        assert torch.all(d_gate == 0)
        assert bits_equal(weight, sample.bases[0])
        # The gradient is exactly zero: the first moment only decays.
        old = sample.exp_avgs[0]
        assert torch.equal(exp_avg, old + (0.0 - old) * torch.tensor(0.1, device=DEVICE))
    else:
        true_gate, _ = sample.stats(reference.delta_grad_stats_ref, exact)
        torch.testing.assert_close(d_gate.cpu().double(), true_gate, rtol=1e-5, atol=1e-5)


def test_one_launch_per_pass_and_the_same_bits_again() -> None:
    """Three layers of five shapes: one launch a kind of matrix for the refresh and for pass B, two more for pass A."""
    layer = [(24, 16), (8, 16), (8, 16), (16, 24), (40, 16), (40, 16), (16, 40)]  # q k v o gate up down
    sample = Sample(layer * 3, [DENSE] * 21)
    launches: list[str] = []
    with observe_launches(lambda kernel, arguments, config: launches.append(kernel.__name__)):
        sample.refresh(delta_step.weight_eff_triton)
        first = sample.stats(delta_step.delta_grad_stats_triton)
        stepped = sample.adamw(delta_step.delta_adamw_triton)
    # all rows start on 16 bytes but those of the matrices 24 wide: two groups
    assert launches.count("weight_eff_fwd_kernel") == 2
    assert launches.count("delta_grad_stats_kernel") == 2
    assert launches.count("delta_adamw_kernel") == 2
    assert len(launches) == 8
    assert all(bits_equal(a, b) for a, b in zip(first, sample.stats(delta_step.delta_grad_stats_triton), strict=True))
    again = sample.adamw(delta_step.delta_adamw_triton)
    assert all(bits_equal(a, b) for a, b in zip(stepped, again, strict=True))


def test_row_shards_add_up_to_the_whole() -> None:
    """FSDP2: local rows, and a row_start that includes the shard's offset."""
    whole = Sample([(150, 40)], [DENSE])
    d_gate, sq_norm = whole.stats(delta_step.delta_grad_stats_triton)
    weights = whole.refresh(delta_step.weight_eff_triton)[0]
    total_gate, total_norm, where = torch.zeros_like(d_gate), 0.0, whole.maps[0]
    for start, stop in ((0, 64), (64, 150)):
        rows = slice(start, stop)
        shard = torch.full_like(weights[rows], float("nan"))
        matrices = Matrices(
            maps=[replace(where, row_start=where.row_start + start)],
            n_gates=whole.gate.numel(),
            weights=[shard],
            bases=[whole.bases[0][rows]],
            deltas=[whole.deltas[0][rows]],
        )
        grads = Gradients(tensors=[whole.grads[0][rows]], col_panels=[None], layouts=[DENSE])
        part = delta_step.delta_grad_stats_triton(matrices, grads, whole.gate)
        total_gate += part[0]
        total_norm += part[1].item()
        delta_step.weight_eff_triton(matrices, whole.gate)
        assert bits_equal(shard, weights[rows])
    torch.testing.assert_close(total_gate, d_gate, rtol=1e-5, atol=1e-6)
    assert abs(total_norm / sq_norm.item() - 1) < 1e-6


def _moments(sample: Sample, dtype: torch.dtype) -> None:
    for tensors in (sample.exp_avgs, sample.exp_avg_sqs):
        tensors[1] = tensors[1].to(dtype)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deltas", lambda s: s.deltas.__setitem__(1, s.deltas[1].half())),
        ("grads", lambda s: s.grads.__setitem__(1, s.grads[1].half())),
        ("exp_avgs", lambda s: _moments(s, torch.float16)),
        ("exp_avg_sqs", lambda s: s.exp_avg_sqs.__setitem__(1, s.exp_avg_sqs[1].bfloat16())),
        ("exp_avgs", lambda s: _moments(s, torch.float64)),
        ("matrices", lambda s: s.deltas.__setitem__(1, s.deltas[1].t().contiguous().t())),
    ],
)
def test_what_is_not_compiled_is_refused_before_anything_is_written(name: str, change) -> None:
    sample = Sample([(8, 16), (16, 8)], [DENSE] * 2)
    change(sample)
    before = [t.clone() for t in (*sample.weights, *sample.deltas)]
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sample.adamw(delta_step.delta_adamw_triton, to=lambda t: t)
    assert all(bits_equal(a, b) for a, b in zip(before, (*sample.weights, *sample.deltas), strict=True))


@pytest.mark.parametrize("layout", [DENSE, BLOCK, PANELS], ids=["dense", "block", "panels"])
@pytest.mark.parametrize("delta", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("moment", [torch.bfloat16, torch.float32])
def test_bfloat16_on_a_gpu(moment: torch.dtype, delta: torch.dtype, layout: int) -> None:
    """The refresh bit for bit, pass B within one rounding of the reference in the same dtypes."""
    if DEVICE == "cpu":
        pytest.skip("no CUDA device: Triton's interpreter truncates bfloat16 stores")
    dtypes = (torch.bfloat16, delta, moment, torch.bfloat16)
    sample = Sample([(300, 528), (64, 24)], [layout] * 2, repeats=[1, 3], dtypes=dtypes)

    def on_cpu(t: Tensor) -> Tensor:
        return t.cpu().clone()

    for a, b in zip(
        sample.refresh(delta_step.weight_eff_triton), sample.refresh(reference.weight_eff_ref, on_cpu), strict=True
    ):
        assert bits_equal(a, b)
    got = sample.adamw(delta_step.delta_adamw_triton)
    for a, b in zip(got, sample.adamw(reference.delta_adamw_ref, on_cpu), strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.cpu().float(), b.float(), rtol=2 * eps, atol=2 * eps)
    d_gate, sq_norm = sample.stats(delta_step.delta_grad_stats_triton)
    true_gate, true_norm = sample.stats(reference.delta_grad_stats_ref, exact)
    torch.testing.assert_close(d_gate.cpu().double(), true_gate, rtol=1e-5, atol=1e-5)
    assert abs(sq_norm.item() / true_norm.item() - 1) < 1e-5
