"""Graded agreement with the base's answers: hand-worked cases, the full softmax, intervals."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fixtures.checkpoints import make_model, make_tokenizer
from lcdd.carrier import Carrier
from lcdd.eraser import Trigger, generate_ids
from lcdd.evaluate import ModelState, evaluate
from lcdd.evaluate.text_metrics import (
    BaseAnswers,
    Closeness,
    chrf,
    metrics,
    prefix_tokens,
    repetition,
    token_kl,
    token_match,
)
from lcdd.models import Head, head_of, sites_of
from lcdd.report import bootstrap_interval, wilson_interval

TOKENIZER = make_tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("river bread", "music", "winter garden letters", "engine market")]


def test_common_prefix_and_repetition_by_hand() -> None:
    assert prefix_tokens([1, 2, 3], [1, 2, 3]) == 3
    assert prefix_tokens([1, 2], [1, 2, 3]) == 2
    assert prefix_tokens([1, 9, 3], [1, 2, 3]) == 1
    assert prefix_tokens([], [1]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2, 3]) == 0.0  # no 4-gram
    assert repetition([7] * 11) == pytest.approx(1 - 1 / 8)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_chrf_is_sacrebleus_and_equal_texts_have_100() -> None:
    from sacrebleu.metrics import CHRF

    assert (
        chrf("the cat sat", "the cat sat on the mat")
        == CHRF().sentence_score("the cat sat", ["the cat sat on the mat"]).score
    )
    assert chrf("", "") == chrf("same", "same") == 100.0
    assert chrf("abc", "xyz") == 0.0
    assert chrf("", "xyz") == 0.0


@pytest.mark.parametrize("shape", [{}, {"scale": 0.5, "softcap": 3.0, "bias": torch.linspace(-1, 1, 40)}])
def test_token_kl_and_match_are_the_full_softmaxs(shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcdd.evaluate.text_metrics.LOGITS", 40 * 3)  # three rows at once
    torch.manual_seed(0)
    hidden, reference = torch.randn(11, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    shape = {name: value.double() if name == "bias" else value for name, value in shape.items()}
    heads = [Head(weight=torch.randn(40, 8, dtype=torch.float64), **shape) for _ in range(2)]
    tokens = torch.arange(11)
    logits = heads[0].logits(hidden)
    tokens[:5] = logits[:5].argmax(-1)
    assert token_match(hidden, heads[0], tokens).tolist() == (logits.argmax(-1) == tokens).tolist()
    p, q = heads[1].logits(reference).softmax(-1), logits.softmax(-1)
    found = token_kl(hidden, heads[0], ref_hidden=reference, ref_head=heads[1])
    assert torch.allclose(found, (p * (p / q).log()).sum(-1), rtol=1e-10)
    assert token_kl(hidden, heads[0], ref_hidden=hidden, ref_head=heads[0]).abs().max() < 1e-12


def variant(answers: list[list[int]], match: list[list[int]], kl: list[list[float]]) -> Closeness:
    return Closeness(
        answers=answers,
        texts=[" ".join(map(str, answer)) for answer in answers],
        match=[torch.tensor(row).bool() for row in match],
        kl=[torch.tensor(row) for row in kl],
    )


def test_a_row_by_hand() -> None:
    base = [[1, 2, 3, 4], [5, 6]]
    texts = ["1 2 3 4", "5 6"]
    first = variant([[1, 2, 9], [5, 6]], [[1, 1, 0, 1], [1, 1]], [[0.0, 0.0, 4.0, 2.0], [1.0, 1.0]])
    second = variant([[9], [5, 6]], [[0, 0, 0, 0], [1, 1]], [[2.0, 2.0, 2.0, 2.0], [1.0, 3.0]])
    one = metrics([first], base, texts)
    assert one["base_token_match"] == 5 / 6  # of tokens, not of prompts
    assert one["prefix_match"] == (0.5 + 1) / 2
    assert one["prefix_tokens"] == 2.0
    assert one["kl_base"] == pytest.approx(8 / 6)
    assert one["kl_by_position"] == pytest.approx([0.5, 0.5, 4.0, 2.0])
    assert len(one["kl_by_position_ci95"]) == 4
    assert one["chrf"] == pytest.approx((chrf("1 2 9", "1 2 3 4") + 100) / 2)
    both = metrics([first, second], base, texts)
    assert both["base_token_match"] == pytest.approx((1.5 + 2) / 6)
    assert both["kl_by_position"] == pytest.approx([1.0, 1.5, 3.0, 2.0])
    none = metrics([replace(first, kl=[])], base, texts)
    assert "kl_base" not in none
    assert "kl_by_position" not in none
    for name in ("base_token_match", "prefix_match", "chrf", "repetition", "kl_base"):
        low, high = one[f"{name}_ci95"]
        assert low <= one[name] <= high, name
    assert one["repetition_ci95"] == list(wilson_interval(0, 2))  # a share that no resample can leave


def test_bootstrap_keeps_prompts_together_and_covers_as_it_says() -> None:
    generator = torch.Generator().manual_seed(3)
    hits = 0
    for _ in range(200):  # the mean of exponentials, 40 prompts: about 93% of intervals have it
        values = torch.empty(40, dtype=torch.float64).exponential_(generator=generator).tolist()
        low, high = bootstrap_interval(values, [1.0] * 40)
        hits += low <= 1.0 <= high
    assert 178 <= hits <= 199
    # ten prompts of ten equal tokens each: as wide as ten prompts, not as a hundred tokens
    numbers, weights = [10.0, 0.0] * 5, [10.0] * 10
    low, high = bootstrap_interval(numbers, weights)
    assert high - low > 0.5
    assert bootstrap_interval(numbers, weights) == (low, high)
    assert all(map(math.isnan, bootstrap_interval([1.0, 0.0], [1.0, 0.0])))
    with pytest.raises(ValueError, match="expected 2 weights, some above 0"):
        bootstrap_interval([1.0, 2.0], [0.0, 0.0])


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    base, other = make_model("llama"), make_model("llama")
    with torch.no_grad():
        for site in sites_of(other):
            site.linear.weight.mul_(1.3)
    return base, other


def test_every_state_of_the_table_has_them(models) -> None:
    base, other = models
    patch = Carrier.from_models(base, other)
    junk = tuple(Trigger.random_tokens(base, 3, seed=seed) for seed in (1, 2))
    # the base comes last here, and is nevertheless what the others are held against
    states = {"sft": ModelState(patch=patch), "base+random_prefix": ModelState(triggers=junk), "base": ModelState()}
    found = evaluate(
        base, TOKENIZER, PROMPTS, states, matches=lambda _: False, max_new_tokens=6, kl_prompts=3, comparisons=()
    )["models"]
    assert list(found) == list(states)
    assert found["base"]["base_token_match"] == found["base"]["prefix_match"] == 1.0
    assert found["base"]["chrf"] == 100.0
    assert found["base"]["kl_base"] == pytest.approx(0, abs=1e-6)
    assert max(found["base"]["kl_by_position"]) == pytest.approx(0, abs=1e-5)
    # against the model itself, one prompt at a time
    answers = generate_ids(base, TOKENIZER, PROMPTS, max_new_tokens=6)
    right = total = 0
    kl = []
    for number, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        logits, theirs = (m(input_ids=ids).logits[0, len(prompt) - 1 :] for m in (other, base))
        right += int((logits.argmax(-1) == torch.tensor(answer)).sum())
        total += len(answer)
        if number < 3:
            p = theirs.log_softmax(-1)
            kl += (p.exp() * (p - logits.log_softmax(-1))).sum(-1).tolist()
    assert found["sft"]["base_token_match"] == pytest.approx(right / total)
    assert found["sft"]["kl_base"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert 0 < found["base+random_prefix"]["kl_base"] < math.inf
    assert head_of(base).weight.data_ptr() == base.get_output_embeddings().weight.data_ptr()


def test_the_bases_head_is_out_of_a_patchs_reach(models) -> None:
    base, _ = models
    held = BaseAnswers.of(base, PROMPTS, [[3, 4]] * 4, ["x"] * 4, kl_prompts=2, batch_size=2)
    assert held.head.weight.data_ptr() != base.get_output_embeddings().weight.data_ptr()
    assert len(held.hidden) == 2
