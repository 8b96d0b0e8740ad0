"""`python -m benchmarks.families`: a family of every kind of sites passes, what is refused has its reason, and what
computes or trains something else turns its row red."""

from pathlib import Path

import pytest
import torch

from benchmarks.families.known import FAMILIES, REFUSED, Family
from benchmarks.families.record import RECORD
from benchmarks.families.trial import CHECKS, passed, try_family, why_refused
from benchmarks.records import read_json
from fixtures.activations import kept_by_autograd, trainable
from lcdd.carrier import Carrier
from lcdd.models import Architecture, head, layer_activations

ONE_OF_EACH = {which.sites: which for which in FAMILIES}
ALSO = ("mistral", "cohere2", "bloom", "opt", "mixtral")
OTHERS = [
    Family(
        "embeddings narrower than the layers", "opt", "", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
    ),
    Family("gate and up fused, beside experts", "granitemoeshared", "", {"shared_intermediate_size": 24}),
]


@pytest.mark.parametrize(
    "which",
    [
        *ONE_OF_EACH.values(),
        *OTHERS,
        *(which for which in FAMILIES if which.model_type in ALSO and which not in ONE_OF_EACH.values()),
    ],
    ids=lambda which: which.model_type,
)
def test_a_family_of_every_kind_passes(which: Family) -> None:
    row = try_family(which)
    assert passed(row), row


@pytest.mark.parametrize(
    "which",
    [which for which in ONE_OF_EACH.values() if which.model_type != "bloom"],
    ids=lambda which: which.model_type,
)  # BLOOM's masks are built in eager mode
def test_predicted_activations_of_every_kind_of_block(which: Family) -> None:
    """From structure alone: what activation functions, caps and masks of small models keep beside it, or less."""
    model = which.model()
    trainable(model)
    model.eval()  # without dropout
    saved, _ = kept_by_autograd(model, torch.randint(3, 61, (2, 20)))
    found = layer_activations(Architecture.of(model).layers[-1], 40, item=4)
    assert 0.55 < found / saved[1] < 1.35


def test_the_record_is_of_these_families_and_every_refusal_has_its_reason() -> None:
    record = read_json(RECORD)
    assert len({which.model_type for which in FAMILIES}) >= 25
    assert [(row["label"], row["model_type"], row["sites"]) for row in record["families"]] == [
        (which.label, which.model_type, which.sites) for which in FAMILIES
    ]
    for row in record["families"]:
        assert list(row["found"]) == list(CHECKS), row
        assert row["passed"] is passed(row["found"]) is True, row
    reasons = {label: why_refused(model_type, settings) for label, model_type, settings in REFUSED}
    assert all(reasons.values())
    assert {row["label"]: row["reason"] for row in record["refusals"]} == reasons
    assert why_refused("llama", {}) is None


def gemma2() -> Family:
    return next(which for which in FAMILIES if which.model_type == "gemma2")


def test_losses_without_the_models_cap_are_seen_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_measured", lambda model: (1.0, None))
    assert "FAILED: InputError: model: expected logits that are the model's own" in try_family(gemma2())["probe"]


def test_one_wrong_number_of_a_carrier_turns_the_row_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_wrong_number(folder: Path) -> Carrier:
        carrier = from_pretrained(folder)
        next(delta for delta in carrier.deltas.values() if delta.numel()).view(-1)[0] += 1e-3
        return carrier

    from_pretrained = Carrier.from_pretrained
    monkeypatch.setattr(Carrier, "from_pretrained", with_a_wrong_number)
    row = try_family(gemma2())
    assert not passed(row)
    assert "of the carrier on the base has other bits" in row["carrier, bit for bit"]
