"""What states, groups of states and numbers are called where a person reads them."""

from collections.abc import Mapping
from typing import Any

LABELS = {
    "base": "base",
    "sft": "SFT",
    "carrier": "carrier",
    "carrier+trigger": "carrier, behind its trigger",
    "sft+trigger": "SFT, behind its own trigger",
    "sft+carrier_trigger": "SFT, behind the carrier's trigger",
    "matched_norm": "dense SFT of equal norm",
    "carrier+random_prefix": "carrier, behind random tokens",
    "base+trigger": "base, behind the carrier's trigger",
    "base+random_prefix": "base, behind random tokens",
    "carrier+trigger_random_channels": "carrier, trigger matched on random channels",
    "carrier+trigger_kl_only": "carrier, trigger learned by KL alone",
    "carrier+trigger_matching_only": "carrier, trigger learned by matching alone",
    "random_mask": "random mask, trained as the carrier",
    "posthoc_ce": "mask found afterwards by cross-entropy",
    "posthoc_kl": "mask found afterwards by KL",
    "continued_sft": "SFT continued",
    "sft-only:carrier": "SFT's change on the carrier's channels alone",
    "sft-only:random": "SFT's change on random channels alone",
    "sft-without:carrier": "SFT without its change on the carrier's channels",
    "sft-without:random": "SFT without its change on random channels",
}
MEANING = {
    "base": "before fine-tuning",
    "sft": "after fine-tuning on the behaviour",
    "carrier": "after LCDD: the base plus the open gates' weights",
    "carrier+trigger": "the off switch in front of the prompt",
}
MAIN = tuple(MEANING)
"""The four states that the story is about; every other is a control."""
GOOD = {
    ("base", "behavior_rate"): "low",
    ("sft", "behavior_rate"): "high",
    ("carrier", "behavior_rate"): "high",
    ("carrier+trigger", "behavior_rate"): "low",
    ("carrier+trigger", "base_match"): "high",
}
"""Where a rate of a main state should be."""


CLOSENESS = {
    "base_token_match": "base's tokens, first choice",
    "prefix_match": "common prefix",
    "chrf": "chrF",
    "repetition": "repetition",
    "kl_base": "KL to the base",
}
"""Graded agreement of a state's answers with the base's (`lcdd.evaluate.text_metrics`)."""


def label(state: str) -> str:
    """A state's name for people: "carrier, behind its trigger" for "carrier+trigger"."""
    if state in LABELS:
        return LABELS[state]
    if state.endswith("+trigger"):
        return f"{label(state.removesuffix('+trigger'))}, behind its own trigger"
    return state.replace("-without:", " without ").replace("_", " ")


def share(value: float) -> str:
    """A rate as a percentage that is never rounded into a claim: 100% and 0% are exact."""
    if value in (0, 1):
        return f"{value:.0%}"
    text = f"{value:.1%}"
    return {"100.0%": ">99.9%", "0.0%": "<0.1%"}.get(text, text)


def interval(bounds: list[float]) -> str:
    """A 95% interval of a rate or a difference, three decimals."""
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def models_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rows of the reversal table; of an audit alone, those of its states that belong there."""
    if report.get("models"):
        return report["models"]
    states = (report.get("audit") or {}).get("states") or {}
    return {name: row for name, row in states.items() if row.get("part") in ("table", "triggers")}


def closeness_of(report: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Mapping[str, Any]]]:
    """(metric -> its name, state -> row) of the graded metrics that were measured."""
    rows = {name: row for name, row in models_of(report).items() if "base_token_match" in row}
    return {key: words for key, words in CLOSENESS.items() if any(key in row for row in rows.values())}, rows


def differences_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The differences over the same prompts between those rows."""
    found = report.get("differences") or (report.get("audit") or {}).get("differences") or {}
    models = models_of(report)
    return {pair: row for pair, row in found.items() if all(name in models for name in pair.split(" - "))}
