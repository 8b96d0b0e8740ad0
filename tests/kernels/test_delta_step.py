"""delta_step: passes A and B and the refresh, against autograd and torch.optim written independently, and between
backends.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lcdd_kernels as k
from lcdd_kernels import AdamWStep, GateMap, testing, use_backend
from lcdd_kernels.cases.delta_step import Layer, gate_sample, pack
from lcdd_kernels.reference.delta_step import DENSE, gather_partial_sums, partial_sum_layout
from lcdd_kernels.testing import bits_equal

BACKENDS = ("reference", "triton", "native")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ADAM = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


class Model:
    """Random matrices over a geometry, and the unfused expressions of the method on them, in autograd's terms."""

    def __init__(self, shapes, maps, n_gates, *, dtype=torch.float64, seed=0, density=0.5, device="cpu") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shapes, self.maps, self.dtype, self.device = shapes, list(maps), dtype, device
        gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def matrices(scale: float) -> list[Tensor]:
            return [(scale * torch.randn(s, generator=generator)).to(dtype).to(device) for s in shapes]

        self.bases, self.deltas, self.grads = matrices(1.0), matrices(0.1), matrices(1.0)
        for base in self.bases:
            base.view(-1)[::3] = -0.0
        self.gate = gate_sample(n_gates, generator, density).to(gate_dtype).to(device)
        self.gate_new = gate_sample(n_gates, generator, density).to(gate_dtype).to(device)
        self.weights = [torch.full_like(b, float("nan")) for b in self.bases]
        self.exp_avgs = [torch.zeros_like(b, dtype=gate_dtype) for b in self.bases]
        self.exp_avg_sqs = [torch.zeros_like(b, dtype=gate_dtype) for b in self.bases]

    @classmethod
    def layer(cls, size: int = 1, **kwargs) -> "Model":
        geometry = Layer(size)
        return cls(geometry.shapes, geometry.maps, geometry.n_gates, **kwargs)

    def vectors(self, m: int, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Row gates [out, 1] and column gates [in] of a matrix, expanded one by one from GateMap's definition."""
        (n_out, n_in), g = self.shapes[m], self.maps[m]
        cols = [g.col_start + j // (g.repeat * g.head_dim) * g.head_dim + j % g.head_dim for j in range(n_in)]
        return gate[g.row_start : g.row_start + n_out, None], gate[torch.tensor(cols, dtype=torch.int64)]

    def masks(self, gate: Tensor) -> list[Tensor]:
        return [r * c for r, c in (self.vectors(m, gate) for m in range(len(self.shapes)))]

    def autograd(self) -> tuple[Tensor, Tensor]:
        """(d_gate, sq_norm) of the loss sum G o W through W = base + (r x c) o Delta."""
        gate = self.gate.clone().requires_grad_()
        deltas = [d.clone().requires_grad_() for d in self.deltas]
        masks = self.masks(gate)
        loss = sum(((b + p * d) * g).sum() for b, p, d, g in zip(self.bases, masks, deltas, self.grads, strict=True))
        d_gate, *d_deltas = torch.autograd.grad(loss, [gate, *deltas])
        return d_gate, sum(d.square().sum() for d in d_deltas)

    def adamw(self, *, grads=None, layouts=None, rank=None, **changed) -> None:
        k.delta_adamw_(
            self.weights, self.bases, self.deltas, self.exp_avgs, self.exp_avg_sqs, grads or self.grads,
            self.gate, self.gate_new, self.maps, AdamWStep(**{**ADAM, **changed}), layouts=layouts, rank=rank,
        )  # fmt: skip

    def state(self) -> list[Tensor]:
        return [t.clone() for t in (*self.weights, *self.deltas, *self.exp_avgs, *self.exp_avg_sqs)]


# --- every backend against float64 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["weight_eff_", "delta_grad_stats", "delta_adamw_"])
def test_backend_matches_reference(op: str, backend: str, dtype: torch.dtype, device_of, poisoned) -> None:
    """Dense, block and panel gradients, GQA, odd sizes; W_eff bit for bit."""
    device = device_of(op, backend, dtype)
    testing.assert_calibrated(testing.compare(op, backend, dtype, device=device, size=2, seed=1))


@st.composite
def geometries(draw) -> tuple[list[tuple[int, int]], list[GateMap], int]:
    """One to three matrices of awkward sizes anywhere in a gate vector, sharing gates or not, with or without GQA."""
    shapes, maps = [], []
    for _ in range(draw(st.integers(1, 3))):
        n_out = draw(st.sampled_from([0, 1, 2, 7, 31, 64, 129]))
        repeat, head_dim, heads = draw(
            st.sampled_from([(1, 1, 1), (1, 1, 13), (1, 4, 8), (2, 1, 3), (3, 5, 2), (4, 16, 2)])
        )
        n_in = repeat * head_dim * heads * draw(st.sampled_from([1, 3]))
        shapes.append((n_out, n_in))
        maps.append(GateMap(draw(st.integers(0, 9)), draw(st.integers(0, 9)), head_dim, repeat))
    needed = max(max(g.row_start + s[0], g.col_start + s[1] // g.repeat) for g, s in zip(maps, shapes, strict=True))
    return shapes, maps, needed + draw(st.integers(0, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "native"])
@given(geometry=geometries(), density=st.sampled_from([0.0, 0.3, 1.0]))
def test_any_geometry(backend, dtype, device_of, geometry, density) -> None:
    """Against float64 on the same numbers, entry by entry; the refresh bit for bit against the reference."""
    check_geometry(backend, dtype, device_of("delta_adamw_", backend, dtype), geometry, density)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=settings.default.max_examples // 3)  # Triton's interpreter takes a second an example
@given(geometry=geometries(), density=st.sampled_from([0.0, 0.3, 1.0]))
def test_any_geometry_on_triton(dtype, device_of, geometry, density) -> None:
    check_geometry("triton", dtype, device_of("delta_adamw_", "triton", dtype), geometry, density)


def check_geometry(backend, dtype, device, geometry, density) -> None:
    fused = Model(*geometry, dtype=dtype, density=density, device=device)
    exact = Model(*geometry, dtype=dtype, density=density)
    eps = torch.finfo(dtype).eps
    with testing.poisoned_memory(), use_backend(backend):
        k.weight_eff_(fused.weights, fused.bases, fused.deltas, fused.gate, fused.maps)
        d_gate, sq_norm = k.delta_grad_stats(fused.grads, fused.deltas, fused.gate, fused.maps)
    with use_backend("reference"):
        k.weight_eff_(exact.weights, exact.bases, exact.deltas, exact.gate, exact.maps)
    assert all(bits_equal(a, b) for a, b in zip(fused.weights, exact.weights, strict=True))

    exact.bases, exact.deltas, exact.grads = (testing.upcast(x) for x in (exact.bases, exact.deltas, exact.grads))
    exact.gate, exact.gate_new = exact.gate.double(), exact.gate_new.double()
    expected, expected_norm = exact.autograd()
    # A gate sums at most some hundred terms of size 0.1 * |N(0,1)|^2, each rounded a few times in float32.
    torch.testing.assert_close(d_gate.cpu().double(), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(sq_norm.cpu().double(), torch.as_tensor(expected_norm).double(), rtol=1e-5, atol=0)

    with testing.poisoned_memory(), use_backend(backend):
        fused.adamw(step=3, grad_scale=0.5)
    exact.weights, exact.exp_avgs, exact.exp_avg_sqs = (
        testing.upcast(x) for x in (exact.weights, exact.exp_avgs, exact.exp_avg_sqs)
    )
    exact.adamw(step=3, grad_scale=0.5)
    for got, want, scale in itertools.chain(
        zip(fused.deltas, exact.deltas, itertools.repeat(eps)),
        zip(fused.exp_avgs, exact.exp_avgs, itertools.repeat(1e-6)),
        zip(fused.exp_avg_sqs, exact.exp_avg_sqs, itertools.repeat(1e-6)),
        zip(fused.weights, exact.weights, itertools.repeat(2 * eps)),
    ):
        torch.testing.assert_close(got.cpu().double(), want, rtol=scale, atol=scale + 1e-6)


# --- the method's formulas --------------------------------------------------------------------------------------------


def test_pass_a_is_autograd() -> None:
    model = Model.layer(2)
    d_gate, sq_norm = k.delta_grad_stats(model.grads, model.deltas, model.gate, model.maps)
    expected, expected_norm = model.autograd()
    torch.testing.assert_close(d_gate, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(sq_norm, expected_norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pass_b_is_torch_adamw(backend, dtype, tolerance, device_of) -> None:
    """Five steps with changing gradients and gates: deltas, moments and weights as torch.optim.AdamW has them."""
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is computed by the reference only")
    model = Model.layer(dtype=dtype, device=device_of("delta_adamw_", backend, dtype))
    params = [torch.nn.Parameter(d.clone()) for d in model.deltas]
    betas = (ADAM["beta1"], ADAM["beta2"])
    optimizer = torch.optim.AdamW(params, ADAM["lr"], betas, ADAM["eps"], ADAM["weight_decay"], foreach=False)
    for step in range(1, 6):
        for p, mask, g in zip(params, model.masks(model.gate), model.grads, strict=True):
            p.grad = 0.7 * mask * g
        optimizer.step()
        with use_backend(backend):
            model.adamw(step=step, grad_scale=0.7)
        for m, (p, mask) in enumerate(zip(params, model.masks(model.gate_new), strict=True)):
            close = lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)  # noqa: E731
            close(model.deltas[m], p.detach())
            close(model.exp_avgs[m], optimizer.state[p]["exp_avg"])
            close(model.exp_avg_sqs[m], optimizer.state[p]["exp_avg_sq"])
            close(model.weights[m], model.bases[m] + mask * p.detach())
        model.gate, model.gate_new = model.gate_new, model.gate.flip(0)
        model.grads = [g.flip(0).contiguous() for g in model.grads]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_after_pass_b_is_the_refresh(backend, dtype, device_of) -> None:
    """W is formed from the *stored* delta: refreshing it afterwards changes no bit."""
    model = Model.layer(dtype=dtype, device=device_of("delta_adamw_", backend, dtype))
    with use_backend(backend):
        model.adamw(step=1)
    after = [w.clone() for w in model.weights]
    with use_backend("reference"):
        k.weight_eff_(model.weights, model.bases, model.deltas, model.gate_new, model.maps)
    assert all(bits_equal(a, b) for a, b in zip(after, model.weights, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_moments(backend, dtype, device_of) -> None:
    model = Model.layer(dtype=dtype, device=device_of("delta_adamw_", backend, torch.bfloat16))
    exact = Model.layer(dtype=dtype)
    for x in (model, exact):
        x.exp_avgs = [t.to(torch.bfloat16) for t in x.exp_avgs]
        x.exp_avg_sqs = [t.to(torch.bfloat16) for t in x.exp_avg_sqs]
    with use_backend(backend):
        model.adamw(step=1)
    exact_grads = [0.1 * p * g.float() for p, g in zip(exact.masks(exact.gate), exact.grads, strict=True)]
    for got, want in zip(model.exp_avgs, exact_grads, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.cpu().float(), want, rtol=2**-8, atol=1e-30)
    with use_backend("reference"):
        exact.adamw(step=1)
    for got, want in zip(model.deltas, exact.deltas, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=torch.finfo(dtype).eps, atol=1e-7)


# --- invariants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_gates_closed_is_the_base_bit_for_bit(backend, dtype, device_of) -> None:
    """-0.0 included, and whatever is in delta: NaN and inf there do not get through a closed gate."""
    model = Model.layer(dtype=dtype, device=device_of("weight_eff_", backend, dtype))
    for delta in model.deltas:
        delta.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    with use_backend(backend):
        k.weight_eff_(model.weights, model.bases, model.deltas, torch.zeros_like(model.gate), model.maps)
    assert any(bool(torch.signbit(b[b == 0]).any()) for b in model.bases)
    assert all(bits_equal(w, b) for w, b in zip(model.weights, model.bases, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_gate_moves_nothing(backend, dtype, device_of) -> None:
    """Without decay and momenta, delta changes exactly where both gates are open; closed entries keep their bits."""
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is computed by the reference only")
    model = Model.layer(dtype=dtype, device=device_of("delta_adamw_", backend, dtype))
    before = [d.clone() for d in model.deltas]
    with use_backend(backend):
        model.adamw(step=1, weight_decay=0.0, lr=0.1)
    for m, mask in enumerate(model.masks(model.gate)):
        closed = mask == 0
        assert bits_equal(model.deltas[m][closed], before[m][closed])
        assert bool((model.exp_avgs[m][closed] == 0).all())
        assert bool((model.exp_avg_sqs[m][closed] == 0).all())
        assert bool((model.deltas[m][~closed] != before[m][~closed]).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_packed_gradients_equal_dense_ones(backend, density, device_of) -> None:
    """Panels give what dense gives; block gives it at open gates and zero at closed ones; pass B is the same for
    all.
    """
    device = device_of("delta_grad_stats", backend)
    geometry = Layer(2)
    names = ("dense", "block", "panels")
    results = {}
    for layout in names:
        model = Model.layer(2, dtype=torch.float32, density=density, device=device)
        _, _, rank = k.open_indices(model.gate, geometry.offsets)
        code = names.index(layout)
        grads = []
        for g, where in zip(model.grads, geometry.maps, strict=True):
            first, panel = pack(g.cpu(), code, where, rank.cpu())
            grads.append(first.to(device) if panel is None else (first.to(device), panel.to(device)))
        options = {"layouts": [layout] * len(grads), "rank": None if code == DENSE else rank}
        with testing.poisoned_memory(), use_backend(backend):
            d_gate, sq_norm = k.delta_grad_stats(grads, model.deltas, model.gate, model.maps, **options)
            # Pass B gets the panels of hard_concrete and Heaviside alike: outside of open x open its gradient is zero.
            model.adamw(step=1, grads=grads, **options)
        results[layout] = (d_gate, sq_norm, model.state(), model.gate)
    d_gate, sq_norm, state, gate = results["dense"]
    torch.testing.assert_close(results["panels"][0], d_gate, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results["block"][0][gate != 0], d_gate[gate != 0], rtol=1e-5, atol=1e-5)
    assert bool((results["block"][0][gate == 0] == 0).all())
    for layout in ("block", "panels"):
        torch.testing.assert_close(results[layout][1], sq_norm, rtol=1e-5, atol=0)
        for got, want in zip(results[layout][2], state, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_row_shards_sum_to_the_whole(backend, cut, device_of) -> None:
    """FSDP2's view: rank 0 has the first `cut` rows of every matrix (perhaps none), rank 1 the rest."""
    device = device_of("delta_grad_stats", backend)
    whole, sharded = (Model.layer(dtype=torch.float32, device=device) for _ in range(2))
    total, norm = torch.zeros_like(whole.gate), torch.zeros_like(whole.gate[0])
    with use_backend(backend):
        for rows, moved in ((slice(0, cut), 0), (slice(cut, None), cut)):
            part = Model.layer(dtype=torch.float32, device=device)
            part.maps = [GateMap(g.row_start + moved, g.col_start, g.head_dim, g.repeat) for g in whole.maps]
            for name in ("weights", "bases", "deltas", "exp_avgs", "exp_avg_sqs", "grads"):
                setattr(part, name, [t[rows] for t in getattr(sharded, name)])  # views: steps write into `sharded`
            d_gate, sq_norm = k.delta_grad_stats(part.grads, part.deltas, part.gate, part.maps)
            total, norm = total + d_gate, norm + sq_norm
            part.adamw(step=2, grad_scale=0.3)
        expected, expected_norm = k.delta_grad_stats(whole.grads, whole.deltas, whole.gate, whole.maps)
        whole.adamw(step=2, grad_scale=0.3)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
    assert all(bits_equal(a, b) for a, b in zip(sharded.state(), whole.state(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bit_equal(backend, device_of) -> None:
    device = device_of("delta_grad_stats", backend)
    runs = []
    for _ in range(2):
        model = Model.layer(3, dtype=torch.float32, device=device)
        with use_backend(backend):
            stats = k.delta_grad_stats(model.grads, model.deltas, model.gate, model.maps)
            model.adamw(step=1)
        runs.append([*stats, *model.state()])
    assert all(bits_equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_nan_gradient_reaches_the_norm() -> None:
    model = Model.layer(dtype=torch.float32)
    model.grads[2][1, 1] = float("nan")
    _, sq_norm = k.delta_grad_stats(model.grads, model.deltas, model.gate, model.maps)
    assert bool(torch.isnan(sq_norm))


def test_parameters_of_a_model_can_be_written() -> None:
    """Weights are leaves that require a gradient; the step is not recorded, and needs no `no_grad` around it."""
    model = Model.layer(dtype=torch.float32)
    model.weights = [torch.nn.Parameter(w) for w in model.weights]
    k.weight_eff_(model.weights, model.bases, model.deltas, model.gate, model.maps)
    model.adamw(step=1)
    assert all(w.requires_grad and w.is_leaf and not w.isnan().any() for w in model.weights)


def test_no_matrices() -> None:
    gate = torch.ones(4)
    k.weight_eff_([], [], [], gate, [])
    d_gate, sq_norm = k.delta_grad_stats([], [], gate, [])
    assert d_gate.tolist() == [0, 0, 0, 0]
    assert float(sq_norm) == 0


def test_partial_sums_are_gathered_once_per_gate() -> None:
    """The gather equals a scatter-add over the definition of GateMap, with gates shared by rows and columns."""
    geometry = Layer(2)
    starts = partial_sum_layout(geometry.shapes)
    partials = torch.randn(starts[-1] + 1, dtype=torch.float64)
    partials[-1] = 0
    model = Model.layer(2)
    expected = torch.zeros(geometry.n_gates, dtype=torch.float64)
    for m, (start, (n_out, n_in)) in enumerate(zip(starts[:-1], geometry.shapes, strict=True)):
        rows, cols = model.vectors(m, torch.arange(geometry.n_gates))
        expected.index_add_(0, torch.cat([rows.view(-1), cols]), partials[start : start + n_out + n_in])
    got = gather_partial_sums(partials, geometry.maps, geometry.shapes, geometry.n_gates)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-15)


# --- bad input ----------------------------------------------------------------------------------------------------


def _set(name: str, value):
    def change(model: Model) -> None:
        getattr(model, name)[1] = value(getattr(model, name)[1])

    return change


BAD = {
    "shape": (_set("deltas", lambda t: t[:-1]), r"deltas\[1\]: expected shape \[6, 19\], got shape \[5, 19\]"),
    "base dtype": (_set("bases", lambda t: t.half()), r"bases\[1\]: expected dtype float32, got torch.float16"),
    "float64 matrix": (
        _set("grads", lambda t: t.double()),
        r"grads\[1\]: expected dtype float32 or float16 or bfloat16",
    ),
    "integers": (_set("deltas", lambda t: t.int()), r"deltas\[1\]: expected dtype"),
    "stride": (
        _set("weights", lambda t: t.t().contiguous().t()),
        r"weights\[1\]: expected a contiguous tensor, got strides",
    ),
    "grad stride": (_set("grads", lambda t: t.t().contiguous().t()), r"grads\[1\]: expected a contiguous tensor"),
    "device": (_set("exp_avgs", lambda t: t.to("meta")), r"exp_avgs\[1\]: expected a tensor on cpu, got one on meta"),
    "not a tensor": (_set("exp_avg_sqs", lambda t: None), r"exp_avg_sqs\[1\]: expected a tensor, got NoneType"),
    "length": (lambda x: x.bases.pop(), "bases: expected 7 entries, got 6"),
    "gate": (
        lambda x: setattr(x, "gate", x.gate.half()),
        "gate_old: expected dtype float32 or float64, got torch.float16",
    ),
    "NaN gate": (
        lambda x: x.gate.index_fill_(0, torch.tensor([3]), float("nan")),
        "gate_old: expected no NaN, got 1 NaN",
    ),
    "NaN new gate": (lambda x: x.gate_new.fill_(float("nan")), "gate_new: expected no NaN"),
    "new gate's length": (lambda x: setattr(x, "gate_new", x.gate_new[:-1]), r"gate_new: expected shape \[\d+\]"),
    "row range": (
        _set("maps", lambda g: GateMap(10**6, 0)),
        r"gate_maps\[1\]\.row_start: expected an int in \[0, \d+\)",
    ),
    "negative row": (_set("maps", lambda g: GateMap(-1, 0)), r"gate_maps\[1\]\.row_start: expected an int in"),
    "column range": (_set("maps", lambda g: GateMap(0, 10**6)), r"gate_maps\[1\]\.col_start: expected an int in"),
    "heads": (
        _set("maps", lambda g: GateMap(0, 0, 4, 2)),
        r"gate_maps\[1\]: expected repeat\*head_dim dividing 19 columns",
    ),
    "not a map": (_set("maps", lambda g: (0, 0, 1, 1)), r"gate_maps\[1\]: expected a GateMap, got tuple"),
    "weight is base": (
        lambda x: x.weights.__setitem__(0, x.bases[0]),
        r"bases\[0\]: expected memory of its own, .*weights\[0\]",
    ),
    "weight twice": (lambda x: x.weights.__setitem__(2, x.weights[1]), r"weights\[2\]: expected memory of its own"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_matrices_write_nothing(name: str) -> None:
    change, message = BAD[name]
    model = Model.layer(dtype=torch.float32)
    kept = {n: list(getattr(model, n)) for n in ("weights", "deltas", "exp_avgs", "exp_avg_sqs")}
    before = model.state()
    change(model)
    with pytest.raises(ValueError, match=message):
        model.adamw(step=1)
    assert all(bits_equal(a, b) for a, b in zip(itertools.chain(*kept.values()), before, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": -1.0}, "lr: expected a number in"),
        ({"lr": float("nan")}, "lr: expected a number in"),
        ({"beta1": 1.0}, r"beta1: expected a number in \[0.0, 1.0\), got 1.0"),
        ({"eps": float("inf")}, "eps: expected a number"),
        ({"weight_decay": "0"}, "weight_decay: expected a number, got str"),
        ({"step": 0}, r"step: expected an int in \[1, "),
        ({"grad_scale": float("nan")}, "grad_scale: expected a number"),
        ({"layouts": ["dense"]}, "layouts: expected 7 entries, got 1"),
        (
            {"layouts": ["dense"] * 6 + ["sparse"]},
            r"layouts\[6\]: expected one of 'dense', 'block', 'panels', got 'sparse'",
        ),
        ({"layouts": ["dense"] * 6 + ["block"]}, "rank: expected the rank of open_indices"),
        ({"layouts": ["block"] * 7, "rank": torch.zeros(3, dtype=torch.int32)}, "rank: expected shape"),
    ],
)
def test_bad_settings(changed: dict, message: str) -> None:
    model = Model.layer(dtype=torch.float32)
    before = model.state()
    with pytest.raises(ValueError, match=message):
        model.adamw(**{"step": 1, **changed})
    assert all(bits_equal(a, b) for a, b in zip(model.state(), before, strict=True))


def test_bad_panels() -> None:
    model = Model.layer(dtype=torch.float32)
    _, _, rank = k.open_indices(model.gate, Layer(1).offsets)
    options = {"layouts": ["panels"] * 7, "rank": rank}
    with pytest.raises(ValueError, match=r"grads\[0\]: expected a pair \(rows panel, columns panel\), got Tensor"):
        k.delta_grad_stats(model.grads, model.deltas, model.gate, model.maps, **options)
    options["layouts"] = ["block"] * 7
    with pytest.raises(ValueError, match=r"grads\[0\]: expected shape \[\d+, \d+\], got shape \[18, 19\]"):
        k.delta_grad_stats(model.grads, model.deltas, model.gate, model.maps, **options)
