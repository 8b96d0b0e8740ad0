"""gated_mlp, gated_qkv and SwiGLU: against autograd through an unfused block; shared gates, what is saved, edges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, silu
from unfused_gates import assert_as_close_as, unfused_gate, unfused_linear

import lcdd_kernels as K
from lcdd_kernels import GateMap, GateSpec, testing, use_backend
from lcdd_kernels.ops import gated_block as ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("hard_concrete", "heaviside_ste")
BACKENDS = ("reference", "triton")
DRAW = {"seed": 99, "step": 4}
HARD = GateSpec(kind="hard_concrete")
MLP_OFFSETS = (40, 100, 300)  # read, hidden, write
QKV_OFFSETS = (3, 200, 400, 500)  # read, q, k, v

Tensors = dict[str, Tensor]


def _tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str, seed: int = 0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = {}
    for name, shape in shapes.items():
        if name.endswith("_logits"):
            made[name] = (2 * torch.randn(shape, generator=g)).to(wide).to(device)
        else:
            scale = {"x": 1.0, "b": shape[-1] ** -0.5, "d": 0.3 * shape[-1] ** -0.5}[name[0]]
            made[name] = (scale * torch.randn(shape, generator=g)).to(dtype).to(device)
    return made


def mlp_sample(tokens: int, width: int, hidden: int, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    matrices = [(hidden, width), (hidden, width), (width, hidden)]
    shapes = {"x": (tokens, width), **{f"base{i}": s for i, s in enumerate(matrices)}}
    shapes |= {f"delta{i}": s for i, s in enumerate(matrices)}
    return _tensors(
        shapes | {"read_logits": (width,), "hidden_logits": (hidden,), "write_logits": (width,)}, dtype, device
    )


def qkv_sample(tokens: int, width: int, rows: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"x": (tokens, width)}
    shapes |= {f"base{i}": (n, width) for i, n in enumerate(rows)}
    shapes |= {f"delta{i}": (n, width) for i, n in enumerate(rows)}
    shapes |= {"read_logits": (width,), **{f"{p}_logits": (n,) for p, n in zip("qkv", rows, strict=True)}}
    return _tensors(shapes, dtype, device)


def _call(function, inputs: Tensors, **settings):
    bases, deltas = ([inputs[f"{what}{i}"] for i in range(3)] for what in ("base", "delta"))
    logits = {name: value for name, value in inputs.items() if name.endswith("_logits")}
    return function(inputs["x"], bases, deltas, **logits, **settings)


def unfused_mlp(x, bases, deltas, read_logits, hidden_logits, write_logits, spec, *, offsets):
    read, hidden, write = offsets
    into, out = GateMap(hidden, read), GateMap(write, hidden)
    gate = unfused_linear(x, bases[0], deltas[0], hidden_logits, read_logits, spec, where=into)
    up = unfused_linear(x, bases[1], deltas[1], hidden_logits, read_logits, spec, where=into)
    return unfused_linear(silu(gate) * up, bases[2], deltas[2], write_logits, hidden_logits, spec, where=out)


def unfused_qkv(x, bases, deltas, read_logits, q_logits, k_logits, v_logits, spec, *, offsets):
    read, *at = offsets
    rows = (q_logits, k_logits, v_logits)
    return tuple(
        unfused_linear(x, base, delta, part, read_logits, spec, where=GateMap(start, read))
        for base, delta, part, start in zip(bases, deltas, rows, at, strict=True)
    )


def _run(function, inputs: Tensors, **settings) -> Tensors:
    """Outputs, and the gradient of every input but the bases under a fixed weighting of the outputs."""
    leaves = {n: v.detach().clone().requires_grad_(not n.startswith("base")) for n, v in inputs.items()}
    outputs = _call(function, leaves, **settings)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(y.shape, generator=g).half().to(y.dtype).to(y.device) for y in outputs]
    torch.autograd.backward(outputs, weights)
    grads = {f"d_{n}": leaf.grad for n, leaf in leaves.items() if not n.startswith("base")}
    return {**{f"y{i}": y.detach() for i, y in enumerate(outputs)}, **grads}


def _backward(outputs: Tensor | tuple[Tensor, ...]) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def _double(inputs: Tensors) -> Tensors:
    return {n: v.cpu().double() for n, v in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["swiglu", "swiglu_grad_"])
def test_swiglu_matches_the_reference(op, backend, dtype, device_of, poisoned):
    testing.assert_calibrated(testing.compare(op, backend, dtype, device=device_of(op, backend, dtype)))


@given(count=st.integers(1, 2100))
def test_swiglu_of_any_length_on_triton(count):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate, up = torch.randn(2, 1, count, generator=torch.Generator().manual_seed(count)).to(device)
    with testing.poisoned_memory(), use_backend("triton"):
        hidden = ops.choose("swiglu", gate)(gate, up)
    torch.testing.assert_close(hidden, silu(gate) * up)


@pytest.mark.parametrize("small_batch", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mlp_matches_float64_autograd(backend, dtype, kind, small_batch, device_of):
    inputs = mlp_sample(13, 20, 48, dtype, device_of("gated_weights", backend, dtype))
    settings = {"spec": GateSpec(kind=kind, **DRAW), "offsets": MLP_OFFSETS}
    with use_backend(backend):
        got = _run(K.gated_mlp, inputs, small_batch=small_batch, **settings)
    plain = _run(unfused_mlp, inputs, **settings)
    assert_as_close_as(got, plain, _run(unfused_mlp, _double(inputs), **settings))


@pytest.mark.parametrize("small_batch", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_qkv_matches_float64_autograd(backend, dtype, kind, small_batch, device_of):
    inputs = qkv_sample(13, 20, (24, 8, 8), dtype, device_of("gated_weights", backend, dtype))
    settings = {"spec": GateSpec(kind=kind, **DRAW), "offsets": QKV_OFFSETS}
    with use_backend(backend):
        got = _run(K.gated_qkv, inputs, small_batch=small_batch, **settings)
    plain = _run(unfused_qkv, inputs, **settings)
    assert_as_close_as(got, plain, _run(unfused_qkv, _double(inputs), **settings))


@given(
    tokens=st.integers(1, 5),
    width=st.sampled_from([1, 3, 16, 37]),
    hidden=st.sampled_from([1, 5, 32, 41]),
    kind=st.sampled_from(KINDS),
)
def test_mlp_of_any_shape_in_float64(tokens, width, hidden, kind):
    inputs = mlp_sample(tokens, width, hidden, torch.float64)
    settings = {"spec": GateSpec(kind=kind, **DRAW), "offsets": MLP_OFFSETS}
    got, truth = _run(K.gated_mlp, inputs, **settings), _run(unfused_mlp, inputs, **settings)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)


@given(
    tokens=st.integers(1, 5),
    width=st.sampled_from([1, 3, 16, 37]),
    heads=st.integers(1, 3),
    repeat=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
)
def test_attention_with_shared_value_gates_in_float64(tokens, width, heads, repeat, kind):
    """q, k, v and o of one block: the value gates get the gradients of v's rows and of o's repeated columns."""
    head_dim = 5
    queries, keys = heads * repeat * head_dim, heads * head_dim
    inputs = qkv_sample(tokens, width, (queries, keys, keys), torch.float64)
    g = torch.Generator().manual_seed(8)
    o_base, o_delta = torch.randn(2, width, queries, dtype=torch.float64, generator=g)
    write = torch.randn(width, dtype=torch.float64, generator=g)
    spec, gqa = GateSpec(kind=kind, **DRAW), GateMap(900, 500, head_dim, repeat)

    def block(qkv, o, x, bases, deltas, **logits):
        q, k, v = qkv(x, bases, deltas, **logits, spec=spec, offsets=QKV_OFFSETS)
        mixed = v.view(tokens, heads, 1, head_dim).expand(-1, -1, repeat, -1).reshape(tokens, queries)
        mixed = mixed * torch.sigmoid(q) + k.sum(dim=1, keepdim=True)
        return o(mixed, o_base, o_delta, write, logits["v_logits"], spec, where=gqa)

    got = _run(lambda *a, **s: block(K.gated_qkv, K.gated_linear, *a, **s), inputs)
    truth = _run(lambda *a, **s: block(unfused_qkv, unfused_linear, *a, **s), inputs)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-11)


def test_gradcheck_of_both_blocks():
    settings = {"spec": GateSpec(kind="hard_concrete", training=False, **DRAW)}
    for function, inputs in (
        (K.gated_mlp, mlp_sample(2, 3, 4, torch.float64)),
        (K.gated_qkv, qkv_sample(2, 3, (4, 2, 2), torch.float64)),
    ):
        # Evaluation gates of small logits are strictly inside (0, 1), where they are smooth.
        inputs |= {n: v * 0.2 for n, v in inputs.items() if n.endswith("_logits")}
        names = [n for n in inputs if not n.startswith("base")]

        def call(*leaves, function=function, inputs=inputs, names=names):
            return _call(function, {**inputs, **dict(zip(names, leaves, strict=True))}, **settings)

        torch.autograd.gradcheck(call, [inputs[n].requires_grad_() for n in names])


@pytest.mark.parametrize("needs", ["all", "deltas", "logits"])
def test_opcheck(needs):
    chosen = {
        "all": lambda n: not n.startswith("base"),
        "deltas": lambda n: n.startswith("delta"),
        "logits": lambda n: n.endswith("_logits"),
    }[needs]
    for op, backward, inputs, offsets, dys in (
        (
            ops.gated_mlp,
            ops.gated_mlp_backward,
            mlp_sample(3, 6, 8, torch.float32),
            [0, 6, 14],
            torch.randn(3, 6),
        ),
        (
            ops.gated_qkv,
            ops.gated_qkv_backward,
            qkv_sample(3, 6, (8, 4, 4), torch.float32),
            [0, 6, 14, 18],
            [torch.randn(3, n) for n in (8, 4, 4)],
        ),
    ):
        names = [n for n in inputs if not n.startswith("base")]
        flags = [chosen(n) for n in names]
        for name, flag in zip(names, flags, strict=True):
            inputs[name].requires_grad_(flag)
        bases, deltas = ([inputs[f"{what}{i}"] for i in range(3)] for what in ("base", "delta"))
        logits = [v for n, v in inputs.items() if n.endswith("_logits")]
        settings = (offsets, "hard_concrete", 5, 2, True)
        torch.library.opcheck(op, (inputs["x"], bases, deltas, logits, *settings, False))
        detached = ([t.detach() for t in ts] for ts in (bases, deltas, logits))
        torch.library.opcheck(backward, (dys, inputs["x"].detach(), *detached, flags, *settings))


def test_all_gates_closed_is_the_base_block():
    inputs = mlp_sample(20, 16, 24, torch.float32)
    inputs |= {n: torch.full_like(v, -50.0) for n, v in inputs.items() if n.endswith("_logits")}
    got = _call(K.gated_mlp, inputs, spec=HARD)
    base = [inputs[f"base{i}"] for i in range(3)]
    x = inputs["x"]
    torch.testing.assert_close(got, linear(silu(linear(x, base[0])) * linear(x, base[1]), base[2]))
    inputs = qkv_sample(20, 16, (24, 8, 8), torch.float32)
    inputs |= {n: torch.full_like(v, -50.0) for n, v in inputs.items() if n.endswith("_logits")}
    for i, y in enumerate(_call(K.gated_qkv, inputs, spec=HARD)):
        assert testing.bits_equal(y, linear(inputs["x"], inputs[f"base{i}"]))


def test_backward_keeps_inputs_only():
    """No [T, F] activation survives the forward: the MLP saves what it was given and nothing else."""
    inputs = mlp_sample(20, 16, 24, torch.float32)
    leaves = {n: v.requires_grad_(not n.startswith("base")) for n, v in inputs.items()}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        _call(K.gated_mlp, leaves, spec=HARD)
    assert sorted(saved) == sorted(value.data_ptr() for value in leaves.values())


def test_frozen_gates_and_deltas_get_no_gradient_work(monkeypatch):
    from lcdd_kernels.ops import gated_linear as linear_ops

    called: list[str] = []
    choose = linear_ops.choose
    monkeypatch.setattr(linear_ops, "choose", lambda op, *tensors: called.append(op) or choose(op, *tensors))
    for function, inputs in (
        (K.gated_mlp, mlp_sample(20, 16, 24, torch.float32)),
        (K.gated_qkv, qkv_sample(20, 16, (24, 8, 8), torch.float32)),
    ):
        called.clear()
        inputs["x"].requires_grad_()
        outputs = _call(function, inputs, spec=HARD)
        _backward(outputs)
        assert called == ["block_gates", "gated_weights"] * 2  # three W_eff at a time, forward and backward
        called.clear()
        frozen = inputs["x"].detach()
        inputs["delta1"].requires_grad_()
        outputs = _call(function, {**inputs, "x": frozen}, spec=HARD)
        _backward(outputs)
        assert called.count("gated_weight_grad") == 1
        assert "gate_logits_grad" not in called


def test_shared_gates_are_the_same_gates():
    """The hidden gates of gate's rows and of down's columns are one draw: a closed one closes its channel in both."""
    inputs = mlp_sample(4, 16, 24, torch.float64)
    spec = GateSpec(kind="hard_concrete", **DRAW)
    drawn = unfused_gate(inputs["hidden_logits"], spec, offset=MLP_OFFSETS[1])
    grads = _run(K.gated_mlp, inputs, spec=spec, offsets=MLP_OFFSETS)
    closed = drawn == 0
    assert closed.any()
    assert torch.count_nonzero(grads["d_delta0"][closed]) == 0
    assert torch.count_nonzero(grads["d_delta2"][:, closed]) == 0
    assert torch.count_nonzero(grads["d_hidden_logits"][closed]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deltas": []}, "deltas: expected 3 entries"),
        ({"weight_bases": [torch.zeros(8, 6)] * 3}, r"weight_bases\[2\]: expected shape"),
        ({"read_logits": torch.zeros(5)}, "read_logits: expected shape"),
        ({"hidden_logits": torch.full((8,), float("nan"))}, "hidden_logits: expected no NaN"),
        ({"offsets": (0, 0, -3)}, r"offsets\[2\]: expected an int"),
        ({"offsets": (0, 0)}, "offsets: expected 3 entries"),
        ({"x": torch.zeros(3, 7)}, "x: expected shape"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = mlp_sample(3, 6, 8, torch.float32)
    arguments = {
        "x": inputs["x"],
        "weight_bases": [inputs[f"base{i}"] for i in range(3)],
        "deltas": [inputs[f"delta{i}"] for i in range(3)],
        **{n: v for n, v in inputs.items() if n.endswith("_logits")},
        "spec": HARD,
    }
    with pytest.raises(ValueError, match=message):
        K.gated_mlp(**{**arguments, **change})
