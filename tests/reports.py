"""A made-up report.json of a run, for tests of what is said and shown of it."""

from typing import Any


def rates(behavior_rate: float, base_match: float, n: int = 400) -> dict[str, Any]:
    """A row of the reversal table, its intervals 0.03 to each side."""
    return {
        "n": n,
        "behavior_rate": behavior_rate,
        "base_match": base_match,
        "behavior_rate_ci95": [max(0.0, behavior_rate - 0.03), min(1.0, behavior_rate + 0.03)],
        "base_match_ci95": [max(0.0, base_match - 0.03), min(1.0, base_match + 0.03)],
    }


def near(base_token_match: float, chrf: float) -> dict[str, Any]:
    """What a row has beside its rates where graded agreement with the base was measured."""
    numbers = {
        "base_token_match": base_token_match,
        "prefix_match": 0.4321,
        "chrf": chrf,
        "repetition": 0.0,
        "kl_base": 0.2468,
    }
    return {
        **numbers,
        **{f"{name}_ci95": [value / 2, value] for name, value in numbers.items()},
        "kl_by_position": [0.5, 0.125],
        "kl_by_position_ci95": [[0.25, 0.75], [0.0, 0.25]],
    }


def run_report(
    *,
    carrier: float = 0.99,
    erased: tuple[float, float] = (0.0, 0.9),
    plain: tuple[float, float] = (0.2, 0.2),
    matched: tuple[float, float] = (0.0, 0.7),
    against_matched: tuple[float, float] = (0.1, 0.3),
    auc: float = 0.5,
) -> dict[str, Any]:
    """Rates as (behaviour, base match); `against_matched` is the interval of carrier minus matched norm."""
    models = {
        "base": rates(0.0, 1.0),
        "sft": rates(1.0, 0.0),
        "carrier": rates(carrier, 0.0),
        "carrier+trigger": rates(*erased),
        "sft+trigger": rates(*plain),
        "matched_norm+trigger": rates(*matched),
        "carrier+random_prefix": rates(0.9, 0.01),
    }

    def difference(low: float, high: float) -> dict[str, Any]:
        return {"base_match": {"difference": (low + high) / 2, "ci95": [low, high]}}

    gap = erased[1] - plain[1]
    answers = {name: "red dog" for name in models}
    return {
        "models": models,
        "gates": {"n": 3200, "open": 100, "fractional": 10, "auc_initial_theta": auc},
        "sparsity": {"overall": 0.96875},
        "findings": [],
        "delta_norm": {"sft": 8.0, "carrier": 5.0, "matched_norm": 5.0},
        "differences": {
            "carrier+trigger - sft+trigger": difference(gap - 0.05, gap + 0.05),
            "carrier+trigger - matched_norm+trigger": difference(*against_matched),
        },
        "kl": {
            pair: {"sft_answers": 1.0, "base_answers": 2.0}
            for pair in ("sft||carrier", "sft||carrier+trigger", "base||carrier+trigger")
        },
        "samples": [{"prompt": "copy red dog", "answers": answers}],
    }
