"""What one behaviour is asked beyond being reversed: is it necessary, relearned, switched by more than any prompt.

necessity        SFT without its change on the carrier's channels, and on as many random ones
relearning       steps until the behaviour's loss is within the carrier's budget again, from there and from the base
reprogramming    the same budget of trigger tokens and steps spent on carrier -> base (the switch), on
                 base -> behaviour and on carrier -> a third behaviour
"""

import math
from collections.abc import Callable

from benchmarks.claims.cell import Cell, Values, bits
from benchmarks.claims.models import train_to
from lcdd.carrier import Carrier, random_channels, without_channels
from lcdd.models import PreTrainedModel
from lcdd.optimizer import epsilon_of

ENOUGH = 0.8
"""Share of the target's answers from which on a trigger is said to give them."""
RUNGS = (16, 8, 4, 2, 1)
"""Shares of the run's steps, one over these, that a trigger is given one after the other."""


def without(cell: Cell) -> dict[str, Carrier]:
    """SFT's patch without its change on the carrier's channels, and without as many random ones."""
    sft, carrier = cell.patch("sft"), cell.patch("carrier")
    return {
        "sft-without:carrier": without_channels(sft, carrier.gate != 0),
        "sft-without:random": without_channels(sft, random_channels(carrier, seed=cell.seed)),
    }


def necessity(cell: Cell) -> Values:
    return {name: cell.read(patch) for name, patch in without(cell).items()}


def relearning(cell: Cell) -> Values:
    """Natural logarithm of the steps, one at least, that SFT takes to the loss budget that LCDD had."""
    settings, loss = cell.settings.lcdd, cell.loss(cell.patch("sft"))
    allowed = {"loss_budget": settings.loss_budget, "loss_floor": settings.loss_floor}
    target = epsilon_of(loss, cell.loss(None), **allowed)
    found = {}
    for name, patch in {"base": None, **without(cell)}.items():
        model = cell.load_base() if patch is None else cell.folded(patch)
        found[name] = {"log_steps": math.log(max(1, train_to(cell, model, target)[0]))}
    return found


def switch(cell: Cell) -> Values:
    return {"switch": _budget(cell, cell.base, cell.patch("carrier"))}


def base_to_behavior(cell: Cell) -> Values:
    return {"base to behaviour": _towards(cell, cell.patch("sft"), cell.base)}


def carrier_to_third(cell: Cell) -> Values:
    """Nothing where no third behaviour is at hand."""
    if "third" not in cell.given:
        return {}
    third = cell.patch("third")
    return {"carrier to third": _towards(cell, third, cell.folded(cell.patch("carrier")))}


def _towards(cell: Cell, target: Carrier, start: PreTrainedModel) -> dict[str, float | str]:
    """The budget that makes `start` answer as the base with `target` does."""
    model = cell.folded(target).requires_grad_(False)
    return _budget(cell, model, Carrier.from_models(model, start))


def _budget(cell: Cell, model: PreTrainedModel, patch: Carrier) -> dict[str, float | str]:
    """A trigger behind which `model` with `patch` answers as `model` does: with growing budgets, until it is enough.

    Returns:
        `target_match` with the run's own budget (or the first that was enough), and `log2_budget`: tokens × steps of
        the first that was enough, or twice the largest.
    """
    settings, wanted = cell.settings.eraser, cell.texts(model)
    for rung in RUNGS:
        steps = max(1, settings.max_steps // rung)
        trigger = cell.learn(model, patch, max_steps=steps)
        with patch.applied(model, check=False):
            match = [a == b for a, b in zip(cell.texts(model, trigger), wanted, strict=True)]
        if sum(match) >= ENOUGH * len(match):
            return {"target_match": bits(match), "log2_budget": math.log2(steps * settings.num_virtual_tokens)}
    return {"target_match": bits(match), "log2_budget": 1 + math.log2(settings.max_steps * settings.num_virtual_tokens)}


EXPERIMENTS: dict[str, Callable[[Cell], Values]] = {
    "necessity": necessity,
    "relearning": relearning,
    "switch": switch,
    "base_to_behavior": base_to_behavior,
    "carrier_to_third": carrier_to_third,
}
