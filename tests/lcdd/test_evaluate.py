"""Evaluation against hand-worked numbers and against full softmaxes."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcdd.carrier import Carrier
from lcdd.eraser import Trigger, generate, generate_ids, prompt_embeds
from lcdd.evaluate import (
    ModelState,
    evaluate,
    gate_overlap,
    gate_summary,
    jaccard,
)
from lcdd.report import newcombe_paired_interval, wilson_interval

TEXTS = [
    "<user> copy red dog <assistant>",
    "<user> rev red dog fig saw <assistant>",
    "<user> first fig <assistant>",
    "<user> next plum <assistant>",
]


# ---------------------------------------------------------------- proportions


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),  # Newcombe 1998, Statistics in Medicine 17, 857, Table I, method 3
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval_gives_the_published_examples(successes, n, expected):
    assert wilson_interval(successes, n) == pytest.approx(expected, abs=5e-5)


def pairs(both, only_first, only_second, neither):
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ((36, 12, 2, 0), (0.2, 0.0569, 0.3404)),  # Newcombe 1998, Statistics in Medicine 17, 2635, Table II, method 10
        ((0, 0, 0, 50), (0.0, -0.0713, 0.0713)),
        ((50, 0, 0, 0), (0.0, -0.0713, 0.0713)),
    ],
)
def test_newcombes_interval_gives_the_published_examples(table, expected):
    assert newcombe_paired_interval(*pairs(*table)) == pytest.approx(expected, abs=2e-4)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_intervals_hold_their_estimate_and_turn_with_the_order(outcomes):
    first, second = zip(*outcomes, strict=True)
    difference, low, high = newcombe_paired_interval(first, second)
    assert -1 - 1e-12 <= low <= difference <= high <= 1 + 1e-12
    turned, turned_low, turned_high = newcombe_paired_interval(second, first)
    assert (turned, turned_low, turned_high) == pytest.approx((-difference, -high, -low))
    low, high = wilson_interval(sum(first), len(first))
    assert 0 <= low <= sum(first) / len(first) <= high <= 1


def test_bad_proportions_are_named():
    with pytest.raises(ValueError, match="successes: expected 0 to n = 3"):
        wilson_interval(4, 3)
    with pytest.raises(ValueError, match="second: expected as many outcomes as first"):
        newcombe_paired_interval([True], [True, False])


# ---------------------------------------------------------------- gates


def test_gate_summary_counts_and_notices_gates_that_the_noise_chose(make_models, make_carrier):
    base, tuned = make_models()
    carrier = make_carrier(base, tuned)
    found = gate_summary(carrier)
    z = carrier.gate
    assert found["n"] == len(z)
    assert found["open"] == int((z > 0).sum())
    assert found["fractional"] == int(((z > 0) & (z < 1)).sum()) > 0
    assert 0.3 < found["auc_initial_theta"] < 0.7
    assert gate_summary(replace(carrier, initial_logits=(z != 0).float()))["auc_initial_theta"] == 1.0
    assert gate_summary(replace(carrier, initial_logits=None))["auc_initial_theta"] is None
    assert gate_summary(Carrier.from_models(base, tuned))["open"] == len(z)


def test_jaccard_of_open_gates_and_what_chance_gives(make_models, make_carrier):
    base, tuned = make_models()
    one, two = make_carrier(base, tuned, seed=0), make_carrier(base, tuned, seed=1)
    a, b = (set((c.gate != 0).nonzero()[:, 0].tolist()) for c in (one, two))
    assert jaccard(one, two) == pytest.approx(len(a & b) / len(a | b))
    assert jaccard(one, one) == 1.0
    found = gate_overlap([one, two])
    assert found["jaccard"] == pytest.approx(jaccard(one, two))
    assert found["chance"] == pytest.approx(found["jaccard"], abs=0.08)  # the two were drawn independently
    with pytest.raises(ValueError, match="carriers: expected at least two, got 1"):
        gate_overlap([one])


# ---------------------------------------------------------------- the table


@pytest.fixture
def setting(make_models, make_carrier, tokenizer):
    base, tuned = make_models(spread=0.2)
    carrier = make_carrier(base, tuned, density=0.5)
    trigger = Trigger.random_tokens(base, 3, seed=0)
    prefixes = tuple(Trigger.random_tokens(base, 3, seed=s) for s in (1, 2))
    states = {
        "base": ModelState(),
        "sft": ModelState(patch=Carrier.from_models(base, tuned)),
        "carrier": ModelState(patch=carrier),
        "carrier+trigger": ModelState(patch=carrier, triggers=(trigger,)),
        "carrier+random_prefix": ModelState(patch=carrier, triggers=prefixes),
    }
    return base, tuned, states


def matches(text):
    return "a" in text


def run(base, tokenizer, states, **changes):
    return evaluate(base, tokenizer, TEXTS, states, **{"matches": matches, "max_new_tokens": 6} | changes)


def patched_copy(base, state):
    return copy.deepcopy(base) if state.patch is None else state.patch.fold(copy.deepcopy(base))


def test_rates_are_those_of_each_models_own_answers(setting, tokenizer):
    base, _, states = setting
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    found = run(base, tokenizer, states)
    answers = {}
    for name, state in states.items():
        model = patched_copy(base, state)
        used = state.triggers or (None,)
        answers[name] = [generate(model, tokenizer, TEXTS, trigger=t, max_new_tokens=6) for t in used]
    for name, variants in answers.items():
        row, texts = found["models"][name], [text for variant in variants for text in variant]
        assert row["n"] == 4
        assert row["behavior_rate"] == pytest.approx(sum(map(matches, texts)) / len(texts))
        equal = [text == base_text for v in variants for text, base_text in zip(v, answers["base"][0], strict=True)]
        assert row["base_match"] == pytest.approx(sum(equal) / len(equal))
        low, high = row["base_match_ci95"]
        assert 0 <= low <= row["base_match"] <= high <= 1
    assert found["models"]["base"]["base_match"] == 1.0
    assert found["samples"][1]["answers"]["sft"] == answers["sft"][0][1]
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())


def test_kl_is_the_full_softmax_sum_over_response_tokens(setting, tokenizer):
    base, _, states = setting
    found = run(base, tokenizer, states, kl_prompts=3)["kl"]
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS[:3]]
    models = {name: patched_copy(base, state) for name, state in states.items()}
    assert set(found) == {"sft||carrier", "sft||carrier+trigger", "base||carrier+trigger"}
    for pair, row in found.items():
        p, q = pair.split("||")
        for source in ("sft", "base"):
            answers = generate_ids(models[source], tokenizer, prompts, max_new_tokens=6)
            values = []
            for ids, answer in zip(prompts, answers, strict=True):
                log = {}
                for name in (p, q):
                    trigger = states[name].triggers[0] if states[name].triggers else None
                    embeds = prompt_embeds(models[name], [*ids, *answer], trigger)
                    with torch.no_grad():
                        logits = models[name](inputs_embeds=embeds[None]).logits[0].double()
                    log[name] = logits[-len(answer) - 1 : -1].log_softmax(-1)
                values.append((log[p].exp() * (log[p] - log[q])).sum(-1))
            expected = float(torch.cat(values).mean())
            assert row[f"{source}_answers"] == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_differences_are_given_for_the_states_that_are_there(setting, tokenizer):
    base, _, states = setting
    found = run(base, tokenizer, states)
    assert list(found["differences"]) == ["carrier+trigger - carrier"]
    row = found["differences"]["carrier+trigger - carrier"]
    rates = found["models"]
    expected = rates["carrier+trigger"]["base_match"] - rates["carrier"]["base_match"]
    assert row["base_match"]["difference"] == pytest.approx(expected)
    assert row["base_match"]["ci95"][0] <= expected <= row["base_match"]["ci95"][1]
    assert "Newcombe" in row["method"]


def test_delta_norms_and_numbers_are_plain_json(setting, tokenizer):
    base, _, states = setting
    found = run(base, tokenizer, states, n_samples=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["delta_norm"]["base"] == 0
    assert (
        found["delta_norm"]["carrier"] == found["delta_norm"]["carrier+trigger"] == states["carrier"].patch.delta_norm()
    )
    assert len(found["samples"]) == 2


def test_a_patched_head_is_used_for_its_own_states_only(make_models, tokenizer):
    base, tuned = make_models(spread=0.0)
    with torch.no_grad():
        tuned.lm_head.weight.mul_(3.0)
    patch = Carrier.from_models(base, tuned)
    states = {"base": ModelState(), "sft": ModelState(patch=patch), "carrier": ModelState(patch=patch)}
    states["carrier+trigger"] = ModelState()
    kl = run(base, tokenizer, states)["kl"]
    assert kl["sft||carrier"]["sft_answers"] == pytest.approx(0, abs=1e-6)
    assert kl["base||carrier+trigger"]["base_answers"] == pytest.approx(0, abs=1e-6)
    assert kl["sft||carrier+trigger"]["base_answers"] > 0.01
    assert math.isfinite(kl["sft||carrier+trigger"]["base_answers"])


def test_an_error_in_the_middle_leaves_the_base_in_the_model(setting, tokenizer):
    base, _, states = setting
    before = {n: p.detach().clone() for n, p in base.named_parameters()}

    def fails(*_):
        if any(not torch.equal(p, before[n]) for n, p in base.named_parameters()):
            raise RuntimeError("while patched")

    handle = base.model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="while patched"):
        run(base, tokenizer, states)
    handle.remove()
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())


def test_pooled_patches_and_patches_made_when_needed_count_like_each_alone(setting, tokenizer):
    base, tuned, states = setting
    made = []

    def dense():
        made.append(Carrier.from_models(base, tuned))
        return made[-1]

    carrier = states["carrier"].patch
    pooled = {
        "base": ModelState(),
        "both": ModelState(patches=(carrier, dense)),
        "carrier": ModelState(patch=carrier),
        "sft": ModelState(patch=dense),
    }
    found = run(base, tokenizer, pooled, comparisons=(("both", "base"), ("carrier", "sft")), kl_prompts=0)
    assert len(made) == 1
    rows = found["models"]
    for key in ("behavior_rate", "base_match"):
        mean = (rows["carrier"][key] + rows["sft"][key]) / 2
        assert rows["both"][key] == pytest.approx(mean)
        row = found["differences"]["both - base"][key]
        assert row["difference"] == pytest.approx(rows["both"][key] - rows["base"][key])
        assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]
    assert set(found["differences"]) == {"both - base", "carrier - sft"}
    assert found["kl"] == {}
    assert found["delta_norm"]["both"] == pytest.approx((carrier.delta_norm() + made[0].delta_norm()) / 2)


def test_further_measures_are_read_from_the_same_answers(setting, tokenizer):
    base, _, states = setting
    found = run(base, tokenizer, states, measures={"same": matches, "any": lambda text: True})
    for row in found["models"].values():
        assert row["rates"]["same"] == {"rate": row["behavior_rate"], "ci95": row["behavior_rate_ci95"]}
        assert row["rates"]["any"]["rate"] == 1.0


def test_bad_input_is_named(setting, tokenizer):
    base, tuned, states = setting
    with pytest.raises(ValueError, match="prompts: expected at least one, got none"):
        evaluate(base, tokenizer, [], states, matches=matches)
    with pytest.raises(ValueError, match="states: expected 'base' without patch and trigger among them"):
        run(base, tokenizer, {"base": states["sft"]})
    with pytest.raises(ValueError, match="expected the carrier's base"):
        run(tuned, tokenizer, states)
