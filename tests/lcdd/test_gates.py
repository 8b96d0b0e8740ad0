"""Gate geometry against hand-worked cases and the published sizes; `Gates` against its own promises."""

import pytest
import torch

from lcdd.models import GROUPS, GateLayout, ModelShape
from lcdd.optimizer import Gates

SMALL = ModelShape(n_layers=2, d_model=6, n_heads=4, n_kv_heads=2, head_dim=3, d_ff=10, vocab_size=11)
QWEN3_06B = ModelShape(n_layers=28, d_model=1024, n_heads=16, n_kv_heads=8, head_dim=128, d_ff=3072, vocab_size=151_936)
LLAMA3_8B = ModelShape(
    n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14_336, vocab_size=128_256
)


def gates_of(logits, kind="hard_concrete", seed=0) -> Gates:
    return Gates(GateLayout(SMALL), kind=kind, seed=seed, logits=logits)


@pytest.mark.parametrize(("shape", "expected"), [(QWEN3_06B, 315_392), (LLAMA3_8B, 1_179_648)])
def test_gate_counts_of_published_models(shape, expected):
    assert GateLayout(shape).n_gates == expected


def test_slices_tile_the_vector_in_layer_then_group_order():
    layout = GateLayout(SMALL)
    end = 0
    for layer in range(SMALL.n_layers):
        for group in GROUPS:
            part = layout.slice(layer, group)
            assert part.start == end
            assert part.stop - part.start == layout.group_sizes[group]
            end = part.stop
    assert end == layout.n_gates


def test_o_columns_are_value_channels_repeated_for_the_query_heads_they_serve():
    layout = GateLayout(SMALL)
    found = layout.gate_map("o", 1)
    values = layout.slice(1, "attn_v")
    columns = [
        found.col_start + (j // (found.repeat * found.head_dim)) * found.head_dim + j % found.head_dim
        for j in range(SMALL.n_heads * SMALL.head_dim)
    ]
    # query heads 0 and 1 read KV head 0 (channels 0-2), heads 2 and 3 read KV head 1 (channels 3-5)
    expected = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert columns == [values.start + c for c in expected]
    assert found.row_start == layout.slice(1, "attn_write").start


def test_gate_up_and_down_share_the_hidden_gates():
    layout = GateLayout(SMALL)
    hidden = layout.slice(0, "ffn_hidden").start
    assert layout.gate_map("gate", 0).row_start == layout.gate_map("up", 0).row_start == hidden
    assert layout.gate_map("down", 0).col_start == hidden


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.slice(2, "attn_q"), "layer: expected 0 to 1, got 2"),
        (lambda x: x.slice(0, "attn"), "group: expected one of .*got 'attn'"),
        (lambda x: x.gate_map("qkv", 0), "kind: expected one of .*got 'qkv'"),
    ],
)
def test_names_that_do_not_exist_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(GateLayout(SMALL))


def test_by_group_and_open_counts_agree():
    layout = GateLayout(SMALL)
    gates = gates_of(torch.randn(layout.n_gates) * 2, kind="heaviside_ste")
    totals = {group: int(total) for group, total in layout.by_group((gates.values > 0).int()).items()}
    assert gates.open_counts() == totals
    part = gates.values[layout.slice(1, "ffn_hidden")]
    assert gates.open_in(1, "ffn_hidden").tolist() == part.nonzero().flatten().tolist()


def test_noise_depends_on_seed_and_step_alone():
    logits = torch.zeros(GateLayout(SMALL).n_gates)
    one, same, other = gates_of(logits), gates_of(logits), gates_of(logits, seed=1)
    for gates in (one, same, other):
        gates.draw(step=3, training=True)
    assert torch.equal(one.values, same.values)
    assert not torch.equal(one.values, other.values)
    same.draw(step=4, training=True)
    assert not torch.equal(one.values, same.values)
    same.draw(step=3, training=True)
    assert torch.equal(one.values, same.values)


def test_bad_logits_are_refused():
    n = GateLayout(SMALL).n_gates
    with pytest.raises(ValueError, match=f"logits: expected shape \\({n},\\), got \\({n - 1},\\)"):
        gates_of(torch.zeros(n - 1))
    with pytest.raises(ValueError, match="logits: expected finite"):
        gates_of(torch.full((n,), torch.nan))
