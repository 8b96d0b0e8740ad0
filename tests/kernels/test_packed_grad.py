"""pack_columns, packed_weight_grad and the plan: against float64, through every backend, at the edges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lcdd_kernels as K
from lcdd_kernels import testing, use_backend
from lcdd_kernels.functional import packed_grad
from lcdd_kernels.functional.packed_grad import pack_cost

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("reference", "triton")


def _backend_takes(backend: str, dtype: torch.dtype) -> bool:
    # Interpreter only: its bfloat16 arithmetic is not to be trusted. Packing moves bits, so it is tested in every
    # dtype.
    return backend != "triton" or torch.cuda.is_available() or dtype != torch.bfloat16


def _device(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def _problem(tokens: int, n_out: int, n_in: int, density: float, dtype: torch.dtype, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n_in, generator=g).to(dtype)
    dy = torch.randn(tokens, n_out, generator=g).to(dtype)
    rows = torch.nonzero(torch.rand(n_out, generator=g) < density).view(-1).int()
    cols = torch.nonzero(torch.rand(n_in, generator=g) < density).view(-1).int()
    return x, dy, rows, cols


def _parts(dense: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, layout: str) -> list[torch.Tensor]:
    if layout == "block":
        return [dense[rows.long()][:, cols.long()]]
    return [dense[rows.long()], dense[:, cols.long()]]


def _as_list(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["pack_columns", "unpack_columns"])
def test_backend_moves_the_very_bits(op, backend, dtype, poisoned):
    testing.assert_calibrated(testing.compare(op, backend, dtype, device=_device(backend)))


@pytest.mark.parametrize("layout", ["block", "panels"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_gradient_matches_float64(layout, dtype, backend, poisoned):
    if not _backend_takes(backend, dtype):
        pytest.skip("Triton's interpreter does not compute in bfloat16")
    x, dy, rows, cols = (t.to(_device(backend)) for t in _problem(129, 67, 53, 0.3, dtype))
    with use_backend(backend):
        got = _as_list(K.packed_weight_grad(x, dy, rows, cols, layout=layout))
    truth = _parts(dy.double().t() @ x.double(), rows, cols, layout)
    plain = _parts(dy.t() @ x, rows, cols, layout)  # the same-dtype expression: what autograd computes, then cut out
    for value, exact, other in zip(got, truth, plain, strict=True):
        assert value.dtype == dtype
        assert value.is_contiguous()
        floor = torch.finfo(dtype).eps / 2 * float(exact.abs().max()) * 8
        assert (value.double() - exact).abs().max() <= 2 * (other.double() - exact).abs().max() + floor


@given(
    tokens=st.integers(1, 40),
    n_out=st.integers(1, 37),
    n_in=st.integers(1, 41),
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    layout=st.sampled_from(["block", "panels"]),
    backend=st.sampled_from(BACKENDS),
    transposed=st.booleans(),
)
def test_shapes_densities_and_strides(tokens, n_out, n_in, density, layout, backend, transposed):
    x, dy, rows, cols = (t.to(_device(backend)) for t in _problem(tokens, n_out, n_in, density, torch.float32, n_in))
    if transposed:
        x, dy = x.t().contiguous().t(), dy.t().contiguous().t()
    with use_backend(backend):
        got = _as_list(K.packed_weight_grad(x, dy, rows, cols, layout=layout))
    for value, exact in zip(got, _parts(dy.double().t() @ x.double(), rows, cols, layout), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["block", "panels"])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_micro_batches_accumulate_in_place(layout, dtype, out_dtype):
    x, dy, rows, cols = _problem(64, 19, 23, 0.4, dtype)
    first = K.packed_weight_grad(x[:40], dy[:40], rows, cols, layout=layout)
    out = [t.to(out_dtype) for t in _as_list(first)]
    pointers = [t.data_ptr() for t in out]
    again = K.packed_weight_grad(x[40:], dy[40:], rows, cols, layout=layout, out=out)
    assert [t.data_ptr() for t in _as_list(again)] == pointers
    for value, exact in zip(out, _parts(dy.double().t() @ x.double(), rows, cols, layout), strict=True):
        torch.testing.assert_close(
            value.double(), exact, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.02 * float(exact.abs().max())
        )


@pytest.mark.parametrize("layout", ["block", "panels"])
@pytest.mark.parametrize("small", [0, 2**40], ids=["large products", "small products"])
def test_what_is_added_to_a_wider_gradient_is_rounded_first(layout, small, monkeypatch):
    """As autograd does: on a CPU small 16-bit products are computed in float32, and still rounded."""
    monkeypatch.setattr(packed_grad, "_SMALL_PRODUCT", small)
    x, dy, rows, cols = _problem(40, 37, 29, 0.4, torch.bfloat16)
    alone = _as_list(K.packed_weight_grad(x, dy, rows, cols, layout=layout))
    out = [torch.zeros(part.shape) for part in alone]
    K.packed_weight_grad(x, dy, rows, cols, layout=layout, out=out[0] if layout == "block" else out)
    assert all(torch.equal(wide, part.float()) for wide, part in zip(out, alone, strict=True))


def test_a_shared_panel_gives_the_same_bits():
    x, dy, rows, cols = _problem(64, 19, 23, 0.4, torch.float32)
    panel = K.pack_columns(x, cols, multiple=K.packed_multiple(x.device))
    for layout in ("block", "panels"):
        alone = _as_list(K.packed_weight_grad(x, dy, rows, cols, layout=layout))
        shared = _as_list(K.packed_weight_grad(x, dy, rows, cols, layout=layout, x_open=panel))
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_padding_is_zero_and_dropped(monkeypatch):
    """The padded panels of a GPU, computed on the CPU: same result, contiguous, no trace of the padding."""
    x, dy, rows, cols = _problem(64, 19, 23, 0.4, torch.float64)
    plain = {k: _as_list(K.packed_weight_grad(x, dy, rows, cols, layout=k)) for k in ("block", "panels")}
    monkeypatch.setattr("lcdd_kernels.functional.packed_grad.packed_multiple", lambda device: 8)
    packed = K.pack_columns(x, cols, multiple=8)
    assert packed.shape[1] % 8 == 0
    assert not packed[:, cols.numel() :].any()
    for layout, expected in plain.items():
        out = [torch.zeros_like(t) for t in expected]
        for got in (K.packed_weight_grad(x, dy, rows, cols, layout=layout, out=o) for o in (None, out)):
            for value, exact in zip(_as_list(got), expected, strict=True):
                assert value.is_contiguous()
                torch.testing.assert_close(value, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_tokens_permutes_nothing_else(backend):
    x, _, _, cols = (t.to(_device(backend)) for t in _problem(50, 19, 23, 0.4, torch.float32))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1)).to(x.device)
    with use_backend(backend):
        assert torch.equal(K.pack_columns(x[order], cols), K.pack_columns(x, cols)[order])


def test_gradcheck_and_opcheck():
    x = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    cols = torch.tensor([0, 4, 10], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: K.pack_columns(x, cols, multiple=4), x)
    torch.library.opcheck(torch.ops.lcdd.pack_columns.default, (x, cols, 8))
    packed = torch.randn(5, 8)
    torch.library.opcheck(torch.ops.lcdd.unpack_columns.default, (packed, cols, 11))


@pytest.mark.parametrize(("n_kv", "repeat", "head_dim"), [(1, 1, 5), (2, 3, 4), (3, 2, 1), (1, 7, 8)])
def test_expanded_columns_are_copy_major_and_are_what_the_gate_map_says(n_kv, repeat, head_dim):
    n_gates, n_cols = n_kv * head_dim, n_kv * repeat * head_dim
    gates = torch.arange(n_gates)[::2].int()
    cols = K.expand_columns(gates, head_dim=head_dim, repeat=repeat)
    assert cols.numel() == gates.numel() * repeat
    j = torch.arange(n_cols)
    gate_of_column = (j // (repeat * head_dim)) * head_dim + j % head_dim
    assert sorted(cols.tolist()) == [c for c in range(n_cols) if gate_of_column[c] in gates]
    rank = {int(g): i for i, g in enumerate(gates)}
    for position, column in enumerate(cols.tolist()):
        copy = (column // head_dim) % repeat
        assert position == copy * gates.numel() + rank[int(gate_of_column[column])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="out-of-range values are a ValueError on the CPU only")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cols": torch.tensor([0, 23])}, r"cols: expected indices in \[0, 23\), got indices in \[0, 23\]"),
        ({"rows": torch.tensor([-1])}, r"rows: expected indices in \[0, 19\)"),
        ({"rows": torch.tensor([0.0])}, "rows: expected dtype int32 or int64"),
        ({"rows": torch.zeros(2, 2, dtype=torch.int32)}, r"rows: expected shape \[any\]"),
        ({"dy": torch.zeros(63, 19)}, r"dy: expected shape \[64, any\], got shape \[63, 19\]"),
        ({"dy": torch.zeros(64, 19, dtype=torch.float64)}, "dy: expected dtype float32"),
        ({"x": torch.zeros(64, 23, dtype=torch.int32)}, "x: expected dtype"),
        ({"layout": "dense"}, "layout: expected one of 'block', 'panels', got 'dense'"),
        ({"out": torch.zeros(2, 3)}, r"out: expected shape \[8, 11\]"),
        ({"x_open": torch.zeros(64, 2)}, r"x_open: expected shape \[64, 11\]"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(change, message):
    x, dy, _, _ = _problem(64, 19, 23, 0.4, torch.float32)
    rows, cols = torch.arange(8), torch.arange(11)
    out = torch.zeros(8, 11)
    arguments = {"x": x, "dy": dy, "rows": rows, "cols": cols, "layout": "block", "out": out} | change
    with pytest.raises(ValueError, match=message):
        K.packed_weight_grad(**arguments)
    assert not out.any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernel through the interpreter")
def test_the_kernel_answers_a_column_out_of_range_with_nan():
    from lcdd_kernels.triton_kernels.packed_grad import pack_columns_triton

    for dtype in DTYPES:
        packed = pack_columns_triton(torch.ones(3, 5, dtype=dtype), torch.tensor([1, 5, -1], dtype=torch.int32), 1)
        assert packed[:, 0].eq(1).all()
        assert packed[:, 1:].isnan().all()


# ---------------------------------------------------------------- the plan


def _layout(kind: str, rows: int, cols: int, **change) -> str:
    figures = {"gather": 10.0, "crossover": 0.8, "min_elements": 0, "source": "test"} | change
    return K.pack_layout(
        gate_kind=kind,
        out_features=1000,
        in_features=500,
        n_rows=rows,
        n_cols=cols,
        crossover=K.PackCrossover(**figures),
    )


def test_plan_packs_what_is_sparse():
    assert _layout("hard_concrete", 200, 100) == "block"
    assert _layout("heaviside_ste", 200, 100) == "panels"
    assert _layout("hard_concrete", 1000, 500) == "dense"
    assert _layout("heaviside_ste", 500, 250) == "dense"  # the panels cost 0.5 + 0.5 of the dense product
    assert _layout("hard_concrete", 500, 250) == "block"  # the block only 0.25
    assert _layout("hard_concrete", 0, 500) == "block"  # nothing to compute
    assert _layout("heaviside_ste", 0, 0) == "panels"
    assert _layout("hard_concrete", 200, 100, gather=1e4) == "dense"  # gathers dearer than the product
    assert _layout("hard_concrete", 200, 100, min_elements=500_001) == "dense"


@given(rows=st.integers(0, 64), cols=st.integers(0, 48), kind=st.sampled_from(["hard_concrete", "heaviside_ste"]))
def test_opening_a_gate_never_turns_dense_into_packed(rows, cols, kind):
    crossover = K.PackCrossover(gather=3.0, crossover=0.6, min_elements=0, source="test")
    size = {"gate_kind": kind, "out_features": 65, "in_features": 49, "crossover": crossover}
    if K.pack_layout(n_rows=rows, n_cols=cols, **size) == "dense":
        assert K.pack_layout(n_rows=rows + 1, n_cols=cols, **size) == "dense"
        assert K.pack_layout(n_rows=rows, n_cols=cols + 1, **size) == "dense"


def test_cost_counts_products_and_gathers():
    size = {"out_features": 8, "in_features": 4, "n_rows": 2, "n_cols": 1}
    assert pack_cost("block", **size, gather=0.0) == 2 / 32
    assert pack_cost("panels", **size, gather=0.0) == (2 * 4 + 8 * 1) / 32
    assert pack_cost("block", **size, gather=2.0) == (2 + 2 * 3) / 32


def test_defaults_say_where_they_come_from():
    for dtype in (*DTYPES, torch.float64):
        assert K.default_crossover("cpu", dtype).source.startswith("measured")
        assert K.default_crossover("cuda", dtype).source
    assert K.default_crossover("cpu", torch.float16) == K.default_crossover("cpu", torch.bfloat16)


def test_plan_rejects_impossible_counts():
    with pytest.raises(ValueError, match=r"n_rows: expected an int in \[0, 1001\), got 1001"):
        _layout("hard_concrete", 1001, 0)
    with pytest.raises(ValueError, match="gate_kind: expected one of"):
        _layout("soft", 1, 1)
