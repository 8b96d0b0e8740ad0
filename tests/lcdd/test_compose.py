"""Several patches in one model: their sum by the definition, the same bits in any order, and how far they meet."""

import copy
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from lcdd.carrier import Carrier, compose, overlap, prices_of
from lcdd.carrier.compose import DEAR
from lcdd.cli import main
from lcdd.errors import InputError
from lcdd.models import GateLayout, sites_of


@pytest.fixture
def setting(make_models, make_carrier):
    base, tuned = make_models("qwen3")
    patches = [make_carrier(base, tuned, density=density, seed=seed) for seed, density in enumerate((0.3, 0.5, 0.4))]
    return base, Carrier.from_models(base, tuned), patches


def weights(base, patch):
    return [site.weight.detach() for site in sites_of(patch.fold(copy.deepcopy(base)))]


def test_the_sum_is_the_base_and_what_each_patch_adds(setting):
    base, dense, patches = setting
    plain = [site.weight for site in sites_of(base)]
    for chosen in (patches, [dense, patches[0]], [patches[0], patches[1].scaled(-1)]):
        parts = [weights(base, patch) for patch in chosen]
        for at, (own, found) in enumerate(zip(plain, weights(base, compose(chosen)), strict=True)):
            wanted = own + sum(part[at] - own for part in parts)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_any_order_has_the_same_bits_and_comes_off_again(setting):
    base, _, patches = setting
    before = [p.clone() for p in base.parameters()]
    chosen = [patches[0], patches[1].scaled(-1), patches[2]]
    found = [weights(base, compose(order)) for order in permutations(chosen)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    with compose(chosen).applied(base):
        assert any(not torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))


def test_overlap_counts_gates_entries_and_the_angle(setting):
    _, dense, patches = setting
    a, b = patches[:2]
    both, either = (a.gate != 0) & (b.gate != 0), (a.gate != 0) | (b.gate != 0)
    assert overlap(a, b)["gates"] == pytest.approx(int(both.sum()) / int(either.sum()))
    assert overlap(a, b) == overlap(b, a)
    same = overlap(a, a)
    assert (same["gates"], same["entries"], same["cosine"]) == pytest.approx((1, 1, 1))
    assert overlap(a, a.scaled(-1))["cosine"] == pytest.approx(-1)
    assert overlap(a, dense)["entries"] == pytest.approx(a.entry_density())


def test_what_does_not_belong_together_is_refused(setting, make_models, make_carrier):
    _, _, patches = setting
    with pytest.raises(InputError, match="patches: expected at least one"):
        compose([])
    other_base, other = make_models("llama")
    with pytest.raises(InputError, match="patches: expected patches of one base"):
        compose([patches[0], make_carrier(other_base, other, density=0.5)])


def test_the_command_adds_and_takes_away(setting, tmp_path, capsys):
    _, _, patches = setting
    for name, patch in zip("ab", patches, strict=False):
        patch.save_pretrained(tmp_path / name)
    both, back = tmp_path / "both", tmp_path / "back"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["compose", "--carriers", a, b, "--output_dir", str(both)]) == 0
    assert "of their open gates in common" in capsys.readouterr().out
    found = Carrier.from_pretrained(both / "carrier")
    wanted = compose(patches[:2])
    assert torch.equal(found.gate, wanted.gate)
    assert all(torch.equal(found.deltas[name], delta) for name, delta in wanted.deltas.items())
    assert main(["compose", "--carriers", str(both / "carrier"), "--without", a, "--output_dir", str(back)]) == 0
    rest = Carrier.from_pretrained(back / "carrier")
    assert rest.delta_norm() == pytest.approx(patches[1].delta_norm(), rel=1e-6)
    assert main(["compose", "--carriers", a, "--output_dir", str(tmp_path / "one")]) == 2
    assert "expected at least two" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()


def test_carriers_that_were_asked_in_different_ways_are_refused(setting):
    patches = [replace(patch, tokenizer={"tokenizer": name}) for name, patch in zip("ab", setting[2], strict=False)]
    assert compose([patches[0], setting[2][2]]).tokenizer == {"tokenizer": "a"}
    with pytest.raises(InputError, match="trained with one tokenizer, got 'a' and 'b'"):
        compose(patches)


def test_what_other_carriers_have_open_is_dear(setting):
    _, _, patches = setting
    prices = prices_of(patches[:2], patches[0].layout)
    taken = (patches[0].gate != 0) | (patches[1].gate != 0)
    assert torch.equal(prices > 1, taken)
    assert set(prices.tolist()) == {1.0, DEAR}
    part = GateLayout.for_matrices(patches[0].layout.matrices[:3])
    with pytest.raises(InputError, match=r"^patches: expected a carrier "):
        prices_of(patches[:1], part)
