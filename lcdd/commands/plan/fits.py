"""What would fit on a device: for each way to need less memory, how many GPUs, and how large a batch on each."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lcdd.commands.plan.predict import Case, memory_of, seconds_of

MOST_GPUS, LARGEST_BATCH = 1024, 1024


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A way to train that fits, lcdd's: settings, and what is predicted of them.

    largest_batch: sequences in a micro-batch on each GPU, at most. per_device_train_batch_size and
    gradient_accumulation_steps: such that a step has the sequences that were asked for, or a few more.
    peak: bytes on each GPU at that batch. tokens_per_second: of all GPUs.
    """

    num_gpus: int
    gradient_checkpointing: bool
    moment_dtype: str
    largest_batch: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    peak: float
    tokens_per_second: float


def what_fits(case: Case) -> list[Fit]:
    """One for each of the asked and the more frugal choices of checkpointing and moments; first the fewest GPUs, then
    the fastest (to three digits), then what was asked for. Empty: not one sequence fits, on whatever number of GPUs."""
    found = (_fit(choice) for choice in _choices(case))
    return sorted((fit for fit in found if fit), key=lambda fit: (fit.num_gpus, -float(f"{fit.tokens_per_second:.3g}")))


def longest_sequence(case: Case) -> int:
    """Tokens of a sequence of which one alone fits, with every frugal choice, on the GPUs that were asked for."""
    frugal = list(_choices(case))[-1]
    return _largest(lambda length: _fits(_changed(frugal, per_device_train_batch_size=1, max_length=length)),
                    case.config.max_length)  # fmt: skip


def _choices(case: Case) -> Iterator[Case]:
    checkpointing = sorted({case.config.gradient_checkpointing, True})
    moments = list(
        dict.fromkeys([case.config.moment_dtype, *(["bfloat16"] if case.config.moment_dtype == "float32" else [])])
    )
    for again, moment in itertools.product(checkpointing, moments):
        yield _changed(case, gradient_checkpointing=again, moment_dtype=moment)


def _changed(case: Case, **settings: Any) -> Case:
    config = replace(case.config, **settings)
    return Case.of(case.model, config, case.device, case.parametrization)


def _fits(case: Case) -> bool:
    return memory_of(case, "lcdd").peak <= case.device.usable


def _largest_batch(case: Case) -> int:
    return _largest(lambda batch: _fits(_changed(case, per_device_train_batch_size=batch)), LARGEST_BATCH)


def _fit(case: Case) -> Fit | None:
    asked = case.config
    sequences = asked.per_device_train_batch_size * asked.gradient_accumulation_steps * asked.num_gpus
    for gpus in _numbers_of_gpus(case):
        one = _changed(case, num_gpus=gpus, per_device_train_batch_size=1, gradient_accumulation_steps=2)
        if not _fits(one):
            continue
        largest = _largest_batch(one)
        steps = -(-sequences // (gpus * largest))
        batch = -(-sequences // (gpus * steps))
        chosen = _changed(one, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        tokens = gpus * steps * chosen.tokens
        return Fit(
            num_gpus=gpus,
            gradient_checkpointing=asked.gradient_checkpointing,
            moment_dtype=asked.moment_dtype,
            largest_batch=largest,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            peak=memory_of(chosen, "lcdd").peak,
            tokens_per_second=tokens / sum(seconds_of(chosen, "lcdd").values()),
        )
    return None


def _numbers_of_gpus(case: Case) -> Iterator[int]:
    """Those asked for; where they share state twice as many, and so on; one CPU is all there is."""
    gpus = case.config.num_gpus
    while gpus <= MOST_GPUS:
        yield gpus
        if case.config.device == "cpu" or case.config.parallel == "ddp":
            return
        gpus *= 2


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits; 0 if 1 does not. Needs that what is smaller fits too."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
