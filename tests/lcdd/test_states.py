"""The reversal table's rows: which patch and which trigger a state has, from whatever was given."""

import pytest
import torch

from lcdd.eraser import Trigger
from lcdd.evaluate import random_prefixes, reversal_states


@pytest.fixture
def parts(make_models, make_carrier):
    base, tuned = make_models()
    carrier = make_carrier(base, tuned)
    triggers = {
        name: Trigger.random_tokens(base, 3, seed=seed)
        for seed, name in enumerate(["carrier+trigger", "sft+trigger", "carrier+trigger_kl_only"])
    }
    return base, {"sft": lambda: carrier, "carrier": carrier}, triggers


def test_every_row_that_patches_and_triggers_allow_in_order(parts):
    base, patches, triggers = parts
    states = reversal_states(base, patches, triggers, seed=0, draws=2, special=[0])
    assert list(states) == [
        "base", "sft", "carrier", *triggers, "carrier+random_prefix", "base+random_prefix", "base+trigger",
    ]  # fmt: skip
    for name in triggers:
        assert states[name].patch is patches[name.partition("+")[0]]
        assert states[name].triggers == (triggers[name],)
    assert states["base"].patch is None
    assert states["base+trigger"].triggers == states["carrier+trigger"].triggers
    assert states["carrier+random_prefix"].triggers == states["base+random_prefix"].triggers
    assert len(states["carrier+random_prefix"].triggers) == 2


def test_without_a_trigger_there_are_no_prefixes(parts):
    base, patches, _ = parts
    assert list(reversal_states(base, patches, {}, seed=0, draws=2, special=[])) == ["base", "sft", "carrier"]
    with pytest.raises(KeyError, match="matched_norm"):
        reversal_states(base, patches, {"matched_norm+trigger": object()}, seed=0, draws=1, special=[])


def test_random_prefixes_are_of_the_triggers_size_and_the_seeds_own(parts):
    base, _, triggers = parts
    learned = triggers["carrier+trigger"]
    drawn = random_prefixes(base, learned, seed=5, draws=3, special=[0])
    again = random_prefixes(base, learned, seed=5, draws=3, special=[0])
    other = random_prefixes(base, learned, seed=6, draws=3, special=[0])
    for one in drawn:
        torch.testing.assert_close(one.embeds.norm(dim=1), learned.embeds.norm(dim=1))
    assert all(torch.equal(a.embeds, b.embeds) for a, b in zip(drawn, again, strict=True))
    assert not torch.equal(drawn[0].embeds, drawn[1].embeds)
    assert torch.equal(drawn[1].embeds, other[0].embeds), "the seeds follow each other"
