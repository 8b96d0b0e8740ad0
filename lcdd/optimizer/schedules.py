"""Learning-rate schedules of SFT, LCDD and the eraser."""

import math
from collections.abc import Callable


def schedule(kind: str, *, warmup: int, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step counted from 0: transformers' cosine, linear and constant."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = (step - warmup) / max(1, steps - warmup)
        if kind == "cosine":
            return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        return max(0.0, 1 - progress) if kind == "linear" else 1.0

    return factor
