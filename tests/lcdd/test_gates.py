"""Gate geometry against hand-worked cases and the published sizes; `Gates` against its own promises."""

import json

import pytest
import torch
from transformers import LlamaConfig

from lcdd.models import GROUPS, GateLayout, Matrix, Weave, layout_of, skeleton_of
from lcdd.optimizer import Gates

SMALL = {"hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 11}


def layout_for(**sizes) -> GateLayout:
    """Of a Llama of these sizes, without weights."""
    return layout_of(skeleton_of(LlamaConfig(**{**SMALL, "num_key_value_heads": 2, "head_dim": 3} | sizes)))


def matrix(layout: GateLayout, kind: str, layer: int) -> Matrix:
    return next(m for m in layout.matrices if (m.kind, m.layer) == (kind, layer))


@pytest.fixture(scope="module")
def layout() -> GateLayout:
    return layout_for()


def gates_of(layout, logits, kind="hard_concrete", seed=0) -> Gates:
    return Gates(layout, kind=kind, seed=seed, logits=logits)


QWEN3_06B = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 3072, "num_hidden_layers": 28}
LLAMA3_8B = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 14_336, "num_hidden_layers": 32}


@pytest.mark.parametrize(("sizes", "expected"), [(QWEN3_06B, 315_392), (LLAMA3_8B, 1_179_648)])
def test_gate_counts_of_published_models(sizes, expected):
    assert layout_for(**sizes, num_key_value_heads=8, head_dim=128).n_gates == expected


def test_slices_tile_the_vector_in_layer_then_group_order(layout):
    sizes = dict(zip(GROUPS, (8, 12, 6, 6, 8, 8, 10, 8), strict=True))
    end = 0
    for layer in range(2):
        for group in GROUPS:
            part = layout.slice(layer, group)
            assert part.start == end
            assert part.stop - part.start == sizes[group]
            end = part.stop
    assert end == layout.n_gates == layout.n_slots
    assert layout.totals == {group: 2 * size for group, size in sizes.items()}


def test_o_columns_are_value_channels_repeated_for_the_query_heads_they_serve(layout):
    o = matrix(layout, "o", 1)
    found, values = layout.gate_map(o), layout.slice(1, "attn_v")
    columns = [
        found.col_start + (j // (found.repeat * found.head_dim)) * found.head_dim + j % found.head_dim
        for j in range(12)
    ]
    # query heads 0 and 1 read KV head 0 (channels 0-2), heads 2 and 3 read KV head 1 (channels 3-5)
    expected = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert columns == [values.start + c for c in expected]
    assert layout.row_and_col_gates(torch.arange(layout.n_gates), o)[1].tolist() == columns
    assert found.row_start == layout.slice(1, "attn_write").start


def test_gate_up_and_down_share_the_hidden_gates(layout):
    hidden = layout.slice(0, "ffn_hidden").start
    starts = {kind: layout.gate_map(matrix(layout, kind, 0)) for kind in ("gate", "up", "down")}
    assert starts["gate"].row_start == starts["up"].row_start == starts["down"].col_start == hidden


# ---------------------------------------------------------------- runs that are no group

HEADS = Weave(2, (("attn_q", 2), ("attn_k", 1), ("attn_v", 1)))
"""Two heads of a fused weight: the rows q0 q1 k0 v0 | q2 q3 k1 v1."""
TWICE = Weave(1, (("ffn_hidden", 3), ("ffn_hidden", 3)))
PAIRS = Weave(3, (("ffn_hidden", 1), ("ffn_hidden", 1)))


def odd_layout() -> GateLayout:
    """A fused, interleaved qkv, its o, a fused gate and up, and an expert's in pairs, transposed."""

    def make(name, rows, cols, part=None):
        parameter = name if part is None else f"{name}[{part}]"
        shape = (rows.size, cols.size)
        return Matrix(name=parameter, kind="any", layer=0, parameter=name, part=part, shape=shape, rows=rows, cols=cols)

    read, write, hidden = Weave.of("attn_read", 2), Weave.of("attn_write", 2), Weave.of("ffn_hidden", 3)
    o = Weave(2, (("attn_v", 1),) * 2)
    return GateLayout.for_matrices([
        make("qkv", HEADS, read), make("o", write, o), make("gate_up", TWICE, Weave.of("ffn_read", 2)),
        make("down", Weave.of("ffn_write", 2), hidden), make("expert", Weave.of("ffn_read", 2), PAIRS, part=1),
    ])  # fmt: skip


def test_copies_of_gates_stand_behind_the_gates_in_the_order_of_their_rows():
    layout = odd_layout()
    assert [name for _, name, _ in layout.groups] == list(GROUPS)
    q, k, v, f = (layout.slice(0, group).start for group in ("attn_q", "attn_k", "attn_v", "ffn_hidden"))
    gates = torch.arange(layout.n_gates, dtype=torch.float32)
    slots = layout.expand(gates)
    qkv, o, gate_up, down, expert = layout.matrices
    rows, cols = layout.runs(qkv)
    assert slots[rows.slots].tolist() == [q, q + 1, k, v, q + 2, q + 3, k + 1, v + 1]
    assert cols.slots == layout.slice(0, "attn_read")
    assert layout.runs(o)[1].slots == layout.slice(0, "attn_v")  # the kernels repeat heads themselves
    assert slots[layout.runs(gate_up)[0].slots].tolist() == [f, f + 1, f + 2] * 2
    assert layout.runs(expert)[1].slots == layout.slice(0, "ffn_hidden")  # likewise
    assert [layout.is_direct(m) for m in (qkv, o, gate_up, down, expert)] == [False, True, False, True, False]
    assert layout.n_slots == layout.n_gates + 8 + 6
    for m in layout.matrices:  # what kernels are told, and the gates spelled out
        found = layout.gate_map(m)
        rows, cols = layout.row_and_col_gates(gates, m)
        j = torch.arange(m.shape[1])
        period = found.repeat * found.head_dim
        assert torch.equal(slots[found.row_start : found.row_start + m.shape[0]], rows)
        assert torch.equal(slots[found.col_start + j // period * found.head_dim + j % found.head_dim], cols)


def test_folding_is_the_transpose_of_expanding():
    layout = odd_layout()
    gates = torch.randn(layout.n_gates, dtype=torch.float64, requires_grad=True)
    by_slot = torch.randn(layout.n_slots, dtype=torch.float64)
    (expected,) = torch.autograd.grad(layout.expand(gates), gates, by_slot)
    torch.testing.assert_close(layout.fold(by_slot), expected, rtol=1e-14, atol=0)


def test_a_layout_comes_back_from_a_file():
    for layout in (odd_layout(), layout_for()):
        again = GateLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
        assert again == layout
        assert hash(again) == hash(layout)


def test_what_does_not_fit_together_is_refused():
    read = Weave.of("attn_read", 2)
    with pytest.raises(ValueError, match=r"q: expected gates for its shape \(3, 2\), got \(4, 2\)"):
        Matrix(name="q", kind="q", layer=0, parameter="q", shape=(3, 2), rows=Weave.of("attn_q", 4), cols=read)
    q = Matrix(name="q", kind="q", layer=0, parameter="q", shape=(4, 2), rows=Weave.of("attn_q", 4), cols=read)
    k = Matrix(name="k", kind="k", layer=0, parameter="k", shape=(1, 3), rows=Weave.of("attn_k", 1),
               cols=Weave.of("attn_read", 3))  # fmt: skip
    with pytest.raises(ValueError, match="k: expected 2 cols gated by attn_read, got 3"):
        GateLayout.for_matrices([q, k])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.slice(2, "attn_q"), "layer: expected 0 to 1, got 2"),
        (lambda x: x.slice(0, "attn"), "group: expected one of .*got 'attn'"),
    ],
)
def test_names_that_do_not_exist_are_refused(layout, call, message):
    with pytest.raises(ValueError, match=message):
        call(layout)


def test_by_group_and_open_counts_agree(layout):
    gates = gates_of(layout, torch.randn(layout.n_gates) * 2, kind="heaviside_ste")
    totals = {group: int(total) for group, total in layout.by_group((gates.values > 0).int()).items()}
    assert gates.open_counts() == totals
    part = gates.values[layout.slice(1, "ffn_hidden")]
    assert gates.open_in(layout.runs(matrix(layout, "up", 1))[0]).tolist() == part.nonzero().flatten().tolist()


def test_open_lists_of_copies_are_their_own():
    layout = odd_layout()
    gates = gates_of(layout, torch.randn(layout.n_gates, generator=torch.Generator().manual_seed(3)), "heaviside_ste")
    assert 0 < int(gates.values.sum()) < layout.n_gates
    assert sum(gates.open_counts().values()) == int(gates.values.sum())  # a gate counts once
    for m in layout.matrices:
        for run, values in zip(layout.runs(m), layout.row_and_col_gates(gates.values, m), strict=True):
            if run.repeat == 1:
                is_open = values.nonzero().flatten()
                assert gates.open_in(run).tolist() == is_open.tolist()
                assert gates.rank[run.slots][is_open].tolist() == list(range(len(is_open)))


def test_noise_depends_on_seed_and_step_alone(layout):
    logits = torch.zeros(layout.n_gates)
    one, same, other = gates_of(layout, logits), gates_of(layout, logits), gates_of(layout, logits, seed=1)
    for gates in (one, same, other):
        gates.draw(step=3, training=True)
    assert torch.equal(one.values, same.values)
    assert not torch.equal(one.values, other.values)
    same.draw(step=4, training=True)
    assert not torch.equal(one.values, same.values)
    same.draw(step=3, training=True)
    assert torch.equal(one.values, same.values)


def test_bad_logits_are_refused(layout):
    n = layout.n_gates
    with pytest.raises(ValueError, match=f"logits: expected shape \\({n},\\), got \\({n - 1},\\)"):
        gates_of(layout, torch.zeros(n - 1))
    with pytest.raises(ValueError, match="logits: expected finite"):
        gates_of(layout, torch.full((n,), torch.nan))
