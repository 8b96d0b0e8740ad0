"""What the carrier and the trigger did, in numbers: behaviour, exact match to the base, exact KL (method, section 5).

One copy of the weights: a state is the base with a patch applied or not, run with a trigger or not. A behaviour rate
near zero is not a reversal (garbage also has none), so every state's answers are also compared with the base's own.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lcdd.eraser import Prompt, decode, encode_prompts, generate_ids, response_hidden
from lcdd.errors import InputError
from lcdd.evaluate.states import ModelState, patched_states
from lcdd.evaluate.text_metrics import BaseAnswers, Closeness, metrics
from lcdd.models import Head, PreTrainedModel, PreTrainedTokenizerBase, head_of, head_weight
from lcdd.report import Bar, newcombe_paired_interval, wilson_interval

KL_PAIRS = (("sft", "carrier"), ("sft", "carrier+trigger"), ("base", "carrier+trigger"))
COMPARISONS = (
    ("carrier+trigger", "sft+trigger"),
    ("carrier+trigger", "matched_norm+trigger"),
    ("carrier+trigger", "carrier"),
    ("carrier+trigger", "carrier+trigger_random_channels"),
    ("carrier+trigger", "carrier+trigger_kl_only"),
    ("matched_norm+trigger", "sft+trigger"),
)
DIFFERENCE_METHOD = (
    "Newcombe's score interval for the difference of two paired proportions (1998, method 10), 95%; where a state "
    "pools several variants, the mean over pairs of variants"
)


@dataclass(frozen=True, eq=False)
class Outcome:
    """A state's answers (the first variant's). behaved, matched, extra: of each variant and prompt, bool [v, n]."""

    answers: Sequence[Sequence[int]]
    texts: Sequence[str]
    behaved: Tensor
    matched: Tensor
    extra: dict[str, Tensor]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    states: Mapping[str, ModelState],
    *,
    matches: Callable[[str], bool],
    measures: Mapping[str, Callable[[str], bool]] = MappingProxyType({}),
    comparisons: Sequence[tuple[str, str]] = COMPARISONS,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    kl_prompts: int = 64,
    n_samples: int = 8,
    progress: bool = False,
    over_ranks: bool = False,
) -> dict[str, Any]:
    """Answer every prompt in every state; the reversal table and what belongs to it.

    Args:
        model: the base, unpatched; unchanged afterwards.
        prompts: held-out prompts on which the behaviour is asked for, chat-formatted.
        states: must have "base" (no patch, no trigger). The names in `KL_PAIRS` and `comparisons` that are there are
            also compared.
        matches: answer text -> whether it shows the behaviour.
        measures: further readings of the answers, name -> (answer text -> whether), for each row's `rates`.
        comparisons: pairs of states whose rates are subtracted, over the same prompts.
        kl_prompts: prompts (the first ones) that the exact KLs are taken over; 0: none.
        n_samples: prompts whose answers are kept side by side.
        over_ranks: called on every rank alike, each answers its share of the prompts; the result is that of one rank.

    Returns:
        The report's `models`, `kl`, `delta_norm`, `differences` and `samples`.

    Raises:
        InputError: no prompts, no state "base", or a patch of another base.
    """
    if not prompts:
        raise InputError("prompts: expected at least one, got none")
    reference = states.get("base")
    if reference is None or reference.sources != (None,) or reference.triggers:
        raise InputError("states: expected 'base' without patch and trigger among them")
    ids = encode_prompts(tokenizer, prompts)
    outcomes: dict[str, Outcome] = {}
    variants: dict[str, list[Closeness]] = {name: [] for name in states}
    norms: dict[str, list[float]] = {name: [] for name in states}
    passes = sum(len(state.sources) * max(len(state.triggers), 1) for state in states.values())
    bar = Bar(passes, "states", main=True, hidden=not progress)
    base: BaseAnswers | None = None
    with bar, closing(patched_states(model, {"base": reference, **states})) as runs:
        for name, patch in runs:
            norms[name].append(patch.delta_norm() if patch is not None else 0.0)
            for trigger in states[name].triggers or (None,):
                answers = generate_ids(
                    model,
                    tokenizer,
                    ids,
                    trigger=trigger,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    progress=progress,
                    over_ranks=over_ranks,
                )
                texts = decode(tokenizer, answers)
                if base is None:  # the first state
                    base = BaseAnswers.of(model, ids, answers, texts, kl_prompts=kl_prompts, batch_size=batch_size)
                variants[name].append(base.closeness(model, answers, texts, trigger))
                bar.update()
    assert base is not None
    outcomes = {name: _outcome(found, base.texts, matches, measures) for name, found in variants.items()}

    n = len(ids)
    return {
        "models": {
            name: _row(outcomes[name], n) | metrics(variants[name], base.answers, base.texts) for name in states
        },
        "kl": _kl_table(model, ids[:kl_prompts], states, outcomes, batch_size=batch_size) if kl_prompts else {},
        "delta_norm": {name: sum(found) / len(found) for name, found in norms.items()},
        "differences": _differences(outcomes, comparisons),
        "samples": [
            {
                "prompt": decode(tokenizer, ids[i : i + 1])[0],
                "answers": {name: outcomes[name].texts[i] for name in states},
            }
            for i in range(min(n_samples, n))
        ],
    }


# ---------------------------------------------------------------- parts


def _outcome(
    variants: Sequence[Closeness],
    base_texts: Sequence[str],
    matches: Callable[[str], bool],
    measures: Mapping[str, Callable[[str], bool]],
) -> Outcome:
    def readings(found: Callable[[str], bool]) -> Tensor:
        return torch.tensor([[bool(found(text)) for text in variant.texts] for variant in variants])

    pairs = [[text == base for text, base in zip(variant.texts, base_texts, strict=True)] for variant in variants]
    return Outcome(
        answers=variants[0].answers,
        texts=variants[0].texts,
        behaved=readings(matches),
        matched=torch.tensor(pairs),
        extra={name: readings(measure) for name, measure in measures.items()},
    )


def _row(outcome: Outcome, n: int) -> dict[str, Any]:
    row: dict[str, Any] = {"n": n}
    for key, readings in (("behavior_rate", outcome.behaved), ("base_match", outcome.matched)):
        row[key], row[f"{key}_ci95"] = _rate(readings, n)
    if outcome.extra:
        row["rates"] = {}
        for name, readings in outcome.extra.items():
            rate, interval = _rate(readings, n)
            row["rates"][name] = {"rate": rate, "ci95": interval}
    return row


def _rate(readings: Tensor, n: int) -> tuple[float, list[float]]:
    """The rate over prompts and variants; the interval is that of n prompts, however many variants were pooled."""
    shares = readings.double().mean(0)
    return float(shares.mean()), list(wilson_interval(min(float(shares.sum()), n), n))


def _differences(outcomes: Mapping[str, Outcome], comparisons: Sequence[tuple[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for first, second in comparisons:
        if first not in outcomes or second not in outcomes:
            continue
        row: dict[str, Any] = {"method": DIFFERENCE_METHOD}
        for key, field in (("behavior_rate", "behaved"), ("base_match", "matched")):
            ones, others = (getattr(outcomes[name], field).tolist() for name in (first, second))
            pairs = [newcombe_paired_interval(one, other) for one in ones for other in others]
            difference, low, high = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            row[key] = {"difference": difference, "ci95": [low, high]}
        found[f"{first} - {second}"] = row
    return found


@torch.no_grad()
def _kl_table(
    model: PreTrainedModel,
    ids: list[list[int]],
    states: Mapping[str, ModelState],
    outcomes: Mapping[str, Outcome],
    *,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """KL(p ‖ q) in nats a token, exact over the vocabulary, on the greedy answers of "sft" and of "base".

    Kept between states are final hidden states (D numbers a token), never logits.
    """
    pairs = [pair for pair in KL_PAIRS if pair[0] in states and pair[1] in states]
    needed = {name for pair in pairs for name in pair}
    answer_sets = {f"{name}_answers": outcomes[name].answers[: len(ids)] for name in ("sft", "base") if name in states}
    hidden: dict[tuple[str, str], Tensor] = {}
    heads: dict[str, Head] = {}
    with closing(patched_states(model, {name: state for name, state in states.items() if name in needed})) as runs:
        for name, patch in runs:
            head, triggers = head_of(model), states[name].triggers
            changed = patch is not None and any(model.get_parameter(p) is head_weight(model) for p in patch.unmasked)
            heads[name] = head.cloned() if changed else head.detached()
            trigger = triggers[0] if triggers else None
            for key, answers in answer_sets.items():
                rows = response_hidden(model, ids, answers, trigger=trigger, batch_size=batch_size)
                hidden[name, key] = torch.cat(rows)
    table: dict[str, dict[str, float]] = {}
    for p, q in pairs:
        table[f"{p}||{q}"] = {
            key: float(heads[q].kl(hidden[q, key], ref_hidden=hidden[p, key], ref_head=heads[p])) for key in answer_sets
        }
    return table
