"""The rows of the reversal table: a state is the base with a patch or none, behind a trigger or none."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from lcdd.carrier import Carrier
from lcdd.eraser import Trigger
from lcdd.models import PreTrainedModel

PREFIX_SEED = 100
"""Random prefixes are drawn with the seeds that follow this one."""

PatchSource = Carrier | Callable[[], Carrier]
"""A patch, or what makes one when it is needed: dense patches of a large model do not fit side by side."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelState:
    """One way to run the model: the base with `patch` applied (None: as it is), behind one of `triggers`.

    Several triggers (random prefixes) and several patches (random masks, `patches`) are pooled: a prompt counts by
    its share of the variants.
    """

    patch: PatchSource | None = None
    triggers: tuple[Trigger, ...] = ()
    patches: tuple[PatchSource, ...] = ()

    @property
    def sources(self) -> tuple[PatchSource | None, ...]:
        return self.patches or (self.patch,)


def reversal_states(
    base: PreTrainedModel,
    patches: Mapping[str, PatchSource],
    triggers: Mapping[str, Trigger],
    *,
    seed: int,
    draws: int,
    special: Sequence[int],
) -> dict[str, ModelState]:
    """Every row of the reversal table that the patches and triggers allow, in its order.

    Args:
        patches: model -> its patch: "sft", "carrier", "matched_norm", ...
        triggers: state -> its trigger. A state is "MODEL+trigger", perhaps with the name of a variant behind it.
        seed, draws, special: of the random prefixes, as of `random_prefixes`.
    """
    states = {"base": ModelState(), **{name: ModelState(patch=patch) for name, patch in patches.items()}}
    for name, trigger in triggers.items():
        states[name] = ModelState(patch=patches[name.partition("+")[0]], triggers=(trigger,))
    if (learned := triggers.get("carrier+trigger")) is not None:
        junk = random_prefixes(base, learned, seed=seed, draws=draws, special=special)
        states["carrier+random_prefix"] = ModelState(patch=patches["carrier"], triggers=junk)
        states["base+random_prefix"] = ModelState(triggers=junk)
        states["base+trigger"] = ModelState(triggers=(learned,))
    return states


def random_prefixes(
    base: PreTrainedModel, trigger: Trigger, *, seed: int, draws: int, special: Sequence[int]
) -> tuple[Trigger, ...]:
    """`draws` prefixes of random tokens (none of `special`), of the trigger's length and norms."""
    seeds = range(seed + PREFIX_SEED, seed + PREFIX_SEED + draws)
    return tuple(Trigger.random_like(base, trigger, seed=draw, skip=special) for draw in seeds)


def patched_states(
    model: PreTrainedModel, states: Mapping[str, ModelState]
) -> Generator[tuple[str, Carrier | None], None, None]:
    """Every state with each of its patches while that is applied, each patch made and applied once; the base first.

    Close it to revert. The base is checked once for each fingerprint that a patch names: that reads every weight.
    """
    sources: dict[int, PatchSource | None] = {id(None): None}
    sources |= {id(source): source for state in states.values() for source in state.sources}
    given = {source.base_fingerprint: source for source in sources.values() if isinstance(source, Carrier)}
    for known in given.values():
        known.check_base(model)
    checked = set(given)
    for source in sources.values():
        patch = source if source is None or isinstance(source, Carrier) else source()
        if patch is not None and patch.base_fingerprint not in checked:
            patch.check_base(model)
            checked.add(patch.base_fingerprint)
        context: AbstractContextManager[Any] = nullcontext() if patch is None else patch.applied(model, check=False)
        with context:
            for name, state in states.items():
                for _ in range(sum(other is source for other in state.sources)):
                    yield name, patch
