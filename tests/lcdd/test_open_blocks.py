"""Gates that are fixed: Δ, its moments and gradients of the open blocks alone, with the results of whole matrices."""

import copy

import pytest
import torch

from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import layout_of, sites_of
from lcdd.optimizer import LCDDOptimizer, open_blocks, weights
from tests.lcdd.test_optimizer import attach, models, train

KINDS = ("hard_concrete", "heaviside_ste")
STEPS = 6


def logits_of(model, share: float) -> torch.Tensor:
    n = layout_of(model).n_gates
    generator = torch.Generator().manual_seed(3)
    return torch.where(torch.rand(n, generator=generator) < share, 6.0, -9.0)


def attached(dtype=torch.float32, *, share=0.3, **changes):
    """An optimizer whose gates are fixed after three of six steps, without clipping, so that bits can agree."""
    base, tuned = models(dtype)
    settings = {"freeze_fraction": 0.5, "max_grad_norm": 0.0, "gate_controller": "dual", **changes}
    return attach(tuned, base, total_steps=STEPS, initial_logits=logits_of(tuned, share), **settings)


def whole(monkeypatch, *args, **changes):
    """The same, on whole tensors."""
    monkeypatch.setattr(weights, "WORTH_IT", -1.0)
    optimizer = attached(*args, **changes)
    losses = train(optimizer.model, optimizer, STEPS, micro_batches=2)
    assert not optimizer._masked.settled
    monkeypatch.undo()
    return optimizer, losses


def equal(a, b) -> bool:
    return all(torch.equal(x.weight, y.weight) for x, y in zip(sites_of(a.model), sites_of(b.model), strict=True))


@pytest.mark.parametrize("pack", ["auto", "never"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_open_blocks_train_as_whole_matrices_do(dtype, kind, pack, monkeypatch):
    expected, losses = whole(monkeypatch, dtype, gate_kind=kind, pack=pack)
    got = attached(dtype, gate_kind=kind, pack=pack)
    assert train(got.model, got, STEPS, micro_batches=2) == losses
    assert got._masked.settled
    assert equal(got, expected)
    ours, theirs = got.carrier(), expected.carrier()
    assert all(torch.equal(ours.deltas[name], delta) for name, delta in theirs.deltas.items())
    assert any(delta.numel() for delta in ours.deltas.values())


def test_clipping_and_weight_decay_are_those_of_whole_matrices(monkeypatch):
    changes = {"max_grad_norm": 1e-3, "weight_decay": 0.1}
    expected, _ = whole(monkeypatch, **changes)
    got = attached(**changes)
    train(got.model, got, STEPS, micro_batches=2)
    assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    for name, delta in expected.carrier().deltas.items():
        torch.testing.assert_close(got.carrier().deltas[name], delta, rtol=1e-5, atol=1e-8)


def test_what_is_held_is_what_is_open():
    got = attached(share=0.2)
    train(got.model, got, STEPS)
    gate, layout, held = got.gates.evaluation_values(), got.gates.layout, 0
    for matrix in layout.matrices:
        rows, cols = layout.row_and_col_gates(gate, matrix)
        held += int(rows.count_nonzero() * cols.count_nonzero())
    saved = got.state_dict()["state"]
    for key in ("delta", "exp_avg", "exp_avg_sq"):
        assert sum(state[key].numel() for state in saved.values()) == held
    assert 0 < held < 0.1 * sum(site.weight.numel() for site in sites_of(got.model))


def test_paced_gates_that_have_settled_are_fixed_too():
    base, tuned = models()
    settings = {"gate_controller": "paced", "target_sparsity": 0.6, "loss_budget": 50.0, "learning_rate": 1e-4}
    got = LCDDOptimizer.attach(tuned, base, LCDDConfig(**settings), total_steps=120)
    for _ in range(120):
        train(tuned, got, 1)
        if got.gates_frozen:
            break
    assert got._masked.settled
    logits = got.carrier().gate
    train(tuned, got, 3)
    assert got._masked.settled
    assert torch.equal(got.carrier().gate, logits)


@pytest.mark.parametrize("at", [2, 4])
def test_a_run_resumed_before_or_after_goes_on_bit_for_bit(at):
    reference = attached()
    train(reference.model, reference, at)
    saved = copy.deepcopy(reference.state_dict())
    expected = train(reference.model, reference, STEPS - at)
    fresh = attached()
    train(fresh.model, fresh, 5)  # it has open blocks of its own, which go
    fresh.load_state_dict(saved)
    assert fresh._masked.settled == (at == 4)
    assert train(fresh.model, fresh, STEPS - at) == expected
    assert equal(fresh, reference)


def test_a_state_of_other_gates_is_refused_and_changes_nothing():
    got = attached()
    train(got.model, got, 4)
    saved = copy.deepcopy(got.state_dict())
    saved["lcdd"]["gate_logits"] = -saved["lcdd"]["gate_logits"]
    before = copy.deepcopy(got.state_dict())
    with pytest.raises(InputError, match="of shape"):
        got.load_state_dict(saved)
    after = got.state_dict()
    assert torch.equal(after["lcdd"]["gate_logits"], before["lcdd"]["gate_logits"])
    assert all(torch.equal(after["state"][i]["delta"], s["delta"]) for i, s in before["state"].items())


def test_modes_and_carriers_go_on_as_before(monkeypatch):
    expected, _ = whole(monkeypatch)
    got = attached()
    train(got.model, got, STEPS, micro_batches=2)
    for optimizer in (got, expected):
        optimizer.eval()
    assert equal(got, expected)
    got.train()
    assert equal(got, expected)
    earlier = attached()  # a carrier may be of other gates: whole tensors again
    got.load_carrier(earlier.carrier())
    assert not got._masked.settled
    assert all(torch.equal(got.carrier().deltas[n], d) for n, d in earlier.carrier().deltas.items())


@pytest.mark.parametrize("is_open", [True, False])
def test_weights_written_by_somebody_else_are_taken_in_or_refused(is_open):
    got = attached()
    train(got.model, got, STEPS)
    site = sites_of(got.model)[2]
    rows, cols = (gate.bool() for gate in got.gates.layout.row_and_col_gates(got.gates.values, site.matrix))
    row, col = int((rows == is_open).nonzero()[0]), int((cols == is_open).nonzero()[0])
    with torch.no_grad():
        site.weight[row, col] += 1.0
    if not is_open:
        with pytest.raises(InputError, match="somebody else"):
            got.eval()
        return
    before = got.masked()[site.name][1][row, col].item()
    got.eval()
    assert got.masked()[site.name][1][row, col].item() == pytest.approx(before + 1.0)


def test_with_every_gate_closed_a_step_leaves_the_base(monkeypatch):
    got = attached(share=0.0)
    train(got.model, got, STEPS)
    assert got._masked.settled
    for ours, base in zip(sites_of(got.model), sites_of(got.base), strict=True):
        assert torch.equal(ours.weight, base.weight)


def test_mostly_open_gates_keep_whole_tensors():
    got = attached(share=0.9)
    train(got.model, got, STEPS)
    assert not got._masked.settled
    assert open_blocks.WORTH_IT < 0.81
