"""How near an answer is to the base's where exact match is too strict: free text of many tokens.

    base_token_match   share of the base's answer tokens that are the state's first choice, teacher-forced
    kl_base            KL(base ‖ state), nats a token, teacher-forced on the base's answer
    kl_by_position     the same of its first token, its second, ...
    prefix_match       share of the base's answer that the state's own answer begins with; prefix_tokens: in tokens
    chrf               character n-gram F-score (chrF2, sacrebleu) of the state's answer against the base's, 0 to 100
    repetition         share of an answer's 4-grams that it had before: 0 for prose, near 1 for a loop

Each is a ratio of sums over prompts (a prompt counts by the mean of a state's variants) with the 95% interval of a
bootstrap over prompts.

Shapes: T answer tokens of all prompts, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from lcdd.eraser import Trigger, response_hidden
from lcdd.models import Head, PreTrainedModel, head_of
from lcdd.report import bootstrap_interval, wilson_interval

NGRAM = 4
LOGITS = 2**24
"""Logits that are made at once."""
SHARES = ("base_token_match", "prefix_match", "repetition")
"""Metrics that are a share of something in every prompt."""


def prefix_tokens(answer: Sequence[int], base: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    pairs = zip(answer, base, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(answer), len(base)))


def repetition(answer: Sequence[int]) -> float:
    """Share of an answer's 4-grams that it had before; 0 where it has none."""
    grams = [tuple(answer[place : place + NGRAM]) for place in range(len(answer) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def chrf(text: str, base: str) -> float:
    """chrF2 of a text against the base's, 0 to 100; equal texts, empty ones too, have 100."""
    return 100.0 if text == base else float(_chrf().sentence_score(text, [base]).score)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


@torch.no_grad()
def token_match(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    """Whether each token [T] is the first choice at the final hidden states [T, D] before it, bool [T]."""
    parts = hidden.split(_rows(head))
    best = [head.logits(part).argmax(-1) for part in parts]
    return torch.cat(best) == tokens if best else tokens.bool()


@torch.no_grad()
def token_kl(hidden: Tensor, head: Head, *, ref_hidden: Tensor, ref_head: Head) -> Tensor:
    """KL(reference ‖ model) at each of T positions, exact over the vocabulary, nats, float32 (float64 stays) [T].

    hidden, ref_hidden: final hidden states [T, D].
    """
    size, found = _rows(head), []
    for part, ref_part in zip(hidden.split(size), ref_hidden.split(size), strict=True):
        log_q, log_p = (_log_probs(h.logits(x)) for h, x in ((head, part), (ref_head, ref_part)))
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(found).clamp_min(0)


def _log_probs(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _rows(head: Head) -> int:
    return max(1, LOGITS // len(head.weight))


@dataclass(frozen=True, eq=False, kw_only=True)
class Closeness:
    """One variant of a state (a patch behind a trigger) held against the base, prompt by prompt.

    answers, texts: its own answers. match: for each prompt, of each token of the base's answer, whether it is the first
    choice. kl: the same of KL(base ‖ state), for the prompts that it was measured on.
    """

    answers: Sequence[Sequence[int]]
    texts: Sequence[str]
    match: Sequence[Tensor]
    kl: Sequence[Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseAnswers:
    """The base's answers, which every state is held against.

    hidden: the base's final hidden states that predict its answers, [len(answer), D] each, for the first prompts: those
    that KL is measured on. head: the base's own, which no patch reaches.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    texts: Sequence[str]
    hidden: Sequence[Tensor]
    head: Head
    batch_size: int

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        texts: Sequence[str],
        *,
        kl_prompts: int,
        batch_size: int,
    ) -> "BaseAnswers":
        """Of the base, in `model` now, which gave `answers` to `prompts` (token ids)."""
        first = prompts[:kl_prompts], answers[:kl_prompts]
        hidden = response_hidden(model, *first, batch_size=batch_size) if kl_prompts else []
        head = head_of(model).cloned() if kl_prompts else head_of(model)
        return cls(prompts=prompts, answers=answers, texts=texts, hidden=hidden, head=head, batch_size=batch_size)

    def closeness(
        self, model: PreTrainedModel, answers: Sequence[Sequence[int]], texts: Sequence[str], trigger: Trigger | None
    ) -> Closeness:
        """What is in `model` now, behind a trigger or not, and what it answered."""
        size, head = self.batch_size, head_of(model).detached().gathered()
        hidden = response_hidden(model, self.prompts, self.answers, trigger=trigger, batch_size=size)
        lengths = [len(answer) for answer in self.answers]
        tokens = torch.tensor([token for answer in self.answers for token in answer], device=head.weight.device)
        match = token_match(torch.cat(hidden), head, tokens).split(lengths)
        kl: Sequence[Tensor] = ()
        if measured := len(self.hidden):
            ours, theirs = torch.cat(hidden[:measured]), torch.cat(list(self.hidden))
            kl = token_kl(ours, head, ref_hidden=theirs, ref_head=self.head.gathered()).split(lengths[:measured])
        return Closeness(answers=answers, texts=texts, match=match, kl=kl)


def metrics(
    variants: Sequence[Closeness], base_answers: Sequence[Sequence[int]], base_texts: Sequence[str]
) -> dict[str, Any]:
    """A state's part of its row: every metric of this module, each with `_ci95` beside it.

    `kl_by_position` and `kl_by_position_ci95` have an entry for every answer position; the KLs are only there where
    they were measured.
    """
    length = [len(answer) for answer in base_answers]
    one = [1] * len(length)
    common = _pooled(variants, lambda v: map(prefix_tokens, v.answers, base_answers))
    row = {
        **_estimate("base_token_match", _pooled(variants, lambda v: (match.sum() for match in v.match)), length),
        **_estimate("prefix_match", [a / b for a, b in zip(common, length, strict=True)], one),
        **_estimate("prefix_tokens", common, one),
        **_estimate("chrf", _pooled(variants, lambda v: map(chrf, v.texts, base_texts)), one),
        **_estimate("repetition", _pooled(variants, lambda v: map(repetition, v.answers)), one),
    }
    measured = length[: len(variants[0].kl)]
    if measured:
        row |= _estimate("kl_base", _pooled(variants, lambda v: (kl.sum() for kl in v.kl)), measured)
        row |= _by_position(variants, measured)
    return row


def _by_position(variants: Sequence[Closeness], length: Sequence[int]) -> dict[str, Any]:
    at_position = zip_longest(*(zip_longest(*variant.kl, fillvalue=0.0) for variant in variants))
    found = []
    for place, of_variants in enumerate(at_position):
        numbers = [sum(map(float, values)) / len(variants) for values in zip(*of_variants, strict=True)]
        found.append(_estimate("kl", numbers, [int(place < size) for size in length]))
    return {"kl_by_position": [at["kl"] for at in found], "kl_by_position_ci95": [at["kl_ci95"] for at in found]}


def _pooled(variants: Sequence[Closeness], read: Callable[[Closeness], Iterable[Any]]) -> list[float]:
    """A reading of every prompt, the mean over the variants."""
    readings = [[float(value) for value in read(variant)] for variant in variants]
    return [sum(values) / len(values) for values in zip(*readings, strict=True)]


def _estimate(name: str, numbers: Sequence[float], weights: Sequence[float]) -> dict[str, Any]:
    """Σ numbers / Σ weights over prompts, and its interval."""
    value = sum(numbers) / sum(weights)
    interval = bootstrap_interval(numbers, weights)
    if name in SHARES and value in (0, 1):  # a resample of equal prompts never differs, another sample might
        prompts = sum(weight > 0 for weight in weights)
        interval = wilson_interval(value * prompts, prompts)
    return {name: value, f"{name}_ci95": list(interval)}
