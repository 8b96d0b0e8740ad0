"""The statistics behind what is reported: intervals of rates and differences, Student's t, area under the curve."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

Z95 = 1.959963984540054
"""97.5% point of the normal distribution."""
RESAMPLES = 2000


# ---------------------------------------------------------------- proportions


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion; `successes` may be fractional (pooled answers)."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes: expected 0 to n = {n} with n at least 1, got {successes}")
    p = successes / n
    centre = p + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    # at the ends the bound is exactly 0 or 1; rounding must not cut the estimate out of its own interval
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return max(0.0, low), min(1.0, high)


def newcombe_paired_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float, float]:
    """Difference of two proportions over the same prompts, first − second, and its 95% interval.

    Newcombe (1998), Statistics in Medicine 17, 2635, method 10: Wilson intervals of the two, combined with the
    continuity-corrected correlation of the pairs. Stays inside [−1, 1] and does not collapse where all pairs agree.
    """
    n = len(first)
    if n < 1 or len(second) != n:
        raise ValueError(f"second: expected as many outcomes as first ({n}, at least 1), got {len(second)}")
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    both, only_first = pairs.count((True, True)), pairs.count((True, False))
    only_second, neither = pairs.count((False, True)), pairs.count((False, False))
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    low1, high1 = wilson_interval(both + only_first, n)
    low2, high2 = wilson_interval(both + only_second, n)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    phi = 0.0
    if margins:
        numerator: float = both * neither - only_first * only_second
        if numerator > 0:
            numerator = max(numerator - n / 2, 0)
        phi = numerator / math.sqrt(margins)
    down, up, down2, up2 = p1 - low1, high1 - p1, p2 - low2, high2 - p2
    below = math.sqrt(max(0.0, down**2 - 2 * phi * down * up2 + up2**2))
    above = math.sqrt(max(0.0, up**2 - 2 * phi * up * down2 + down2**2))
    return p1 - p2, p1 - p2 - below, p1 - p2 + above


# ---------------------------------------------------------------- means and rankings


def bootstrap_interval(numbers: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """95% percentile interval of Σ numbers / Σ weights over prompts, by resampling prompts; NaN of one prompt alone.

    Weights of 1 make it a mean over prompts; token counts make it a rate over tokens whose prompts stay together.
    Resamples without weight are left out. The draws are fixed: the same numbers have the same interval.
    """
    import numpy as np

    if len(numbers) != len(weights) or not any(weight > 0 for weight in weights):
        raise ValueError(f"weights: expected {len(numbers)} weights, some above 0, got {list(weights)}")
    if sum(weight > 0 for weight in weights) < 2:
        return math.nan, math.nan
    counts = _resamples(len(numbers))
    total = counts @ np.asarray(weights, dtype=np.float64)
    ratios = (counts @ np.asarray(numbers, dtype=np.float64))[total > 0] / total[total > 0]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


@lru_cache(maxsize=4)
def _resamples(n: int) -> Any:
    """How often each of n prompts is in each resample, [draws, n]."""
    import numpy as np

    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


def t975(freedom: int) -> float:
    """97.5% point of Student's t with `freedom` degrees of freedom: tabled up to 10, then the Cornish–Fisher series."""
    table = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    if freedom < 1:
        raise ValueError(f"freedom: expected at least 1, got {freedom}")
    if freedom <= len(table):
        return table[freedom - 1]
    z = Z95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def auc(scores: Sequence[float], kept: Sequence[bool]) -> float:
    """Area under the ROC curve of `scores` as a predictor of `kept`, ties counted half; NaN if all or none is kept.

    1.0 means that exactly the gates with the highest scores were kept; 0.5 that the scores say nothing.
    """
    order = sorted(range(len(scores)), key=scores.__getitem__)
    ranks = [0.0] * len(scores)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + end + 1) / 2
        start = end
    positives = sum(map(bool, kept))
    negatives = len(kept) - positives
    if positives == 0 or negatives == 0:
        return math.nan
    total = sum(rank for rank, keep in zip(ranks, kept, strict=True) if keep)
    return (total - positives * (positives + 1) / 2) / (positives * negatives)
