"""Patches from patches: against folding with the same gates written out, and by what they leave of a model."""

import copy

import pytest
import torch

from lcdd.carrier import (
    Carrier,
    only_channels,
    random_channels,
    with_gates,
    without_channels,
    without_group,
    without_layer,
)
from lcdd.models import GROUPS, sites_of


@pytest.fixture(params=["qwen3", "llama"])
def setting(request, make_models, make_carrier):
    base, tuned = make_models(request.param)
    return base, tuned, Carrier.from_models(base, tuned), make_carrier(base, tuned, density=0.5)


def weights(base, patch):
    return {site.name: site.weight for site in sites_of(patch.fold(copy.deepcopy(base)))}


def expected(base, tuned, gate, layout, site_gates):
    """W = W_base + (r ⊗ c) ∘ (W_tuned − W_base), by the method's table."""
    for ours, theirs in zip(sites_of(base), sites_of(tuned), strict=True):
        rows, cols = site_gates(gate, layout, ours)
        weight = ours.weight
        yield ours.name, weight + rows[:, None] * cols * (theirs.weight - weight)


def test_other_gates_give_the_weights_of_the_definition(setting, site_gates):
    base, tuned, dense, carrier = setting
    generator = torch.Generator().manual_seed(3)
    for patch in (dense, carrier):
        gate = patch.gate * (torch.rand(len(patch.gate), generator=generator) < 0.6)
        found = weights(base, with_gates(patch, gate))
        for name, weight in expected(base, tuned, gate, patch.layout, site_gates):
            torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-6)


def test_closing_everything_is_the_base_and_closing_nothing_changes_nothing(setting):
    base, _, dense, carrier = setting
    for patch in (dense, carrier):
        nothing = with_gates(patch, torch.zeros_like(patch.gate))
        assert all(
            torch.equal(w, dict(base.named_parameters())[f"{n}.weight"]) for n, w in weights(base, nothing).items()
        )
        same, before = weights(base, with_gates(patch, patch.gate)), weights(base, patch)
        assert all(torch.equal(same[name], before[name]) for name in before)


def test_groups_and_layers_are_closed_and_the_others_are_not(setting):
    _, _, _, carrier = setting
    for group in GROUPS:
        left = without_group(carrier, group).sparsity_by_layer()
        before = carrier.sparsity_by_layer()
        assert all(row[group] == 1.0 for row in left)
        assert all(
            row[other] == old[other]
            for row, old in zip(left, before, strict=True)
            for other in GROUPS
            if other != group
        )
    left, before = without_layer(carrier, 1).sparsity_by_layer(), carrier.sparsity_by_layer()
    assert set(left[1].values()) == {1.0}
    assert left[0] == before[0]


def test_a_transplant_and_what_it_leaves_behind_share_no_gate(setting):
    _, _, dense, carrier = setting
    channels = carrier.gate != 0
    inside, outside = only_channels(dense, channels), without_channels(dense, channels)
    assert torch.equal(inside.gate != 0, channels)
    assert torch.equal(outside.gate == 0, channels)
    assert inside.n_open + outside.n_open == dense.n_open


def test_random_channels_have_the_carriers_size_in_every_group_of_every_layer(setting):
    _, _, dense, carrier = setting
    draws = [random_channels(carrier, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    found = only_channels(dense, draws[0]).sparsity_by_layer()
    for row, before in zip(found, carrier.sparsity_by_layer(), strict=True):
        assert row == pytest.approx(before)


def test_gates_that_the_patch_has_no_delta_for_are_refused(setting):
    _, _, dense, carrier = setting
    with pytest.raises(ValueError, match="open only where the patch's are"):
        with_gates(carrier, dense.gate)
    with pytest.raises(ValueError, match="gate: expected shape"):
        with_gates(carrier, carrier.gate[:-1])
    with pytest.raises(ValueError, match="group: expected one of"):
        without_group(carrier, "ffn")
    with pytest.raises(ValueError, match="layer: expected 0 to 1, got 2"):
        without_layer(carrier, 2)
