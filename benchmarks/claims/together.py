"""Several behaviours in one model: each has a topic and a response of its own, and all else is the base's.

A carrier for each topic, and beside it two dense deltas: one of its norm and one of its margin. What is asked of a set
of them in one model is the *intended* answer: the response on each one's topic, the base's answer everywhere else, on
as many prompts of the one kind as of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.claims.cell import Cell, Values, bits
from benchmarks.claims.models import described
from lcdd.carrier import Carrier, compose, overlap, prices_of
from lcdd.models import PreTrainedModel

KINDS = {"carriers": "carrier", "equal_norm": "matched_norm", "equal_margin": "sft_scaled"}
SIZES = (1, 2, 4, 8)
ON_TOPIC = 96
"""Prompts on the topics of a set, and as many others, that it is asked."""

Ids = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Behaviours of one seed that have topics apart.

    Attributes:
        cells: one for each topic, with what it is trained on. responses: what each answers on its topic.
        on_topic: for each topic, test prompts. others: test prompts on no topic.
        trigger_on_topic, trigger_others: the same of training prompts, for a trigger that takes one of two away.
    """

    directory: Path
    seed: int
    cells: Sequence[Cell]
    responses: Sequence[str]
    on_topic: Sequence[Sequence[Ids]]
    others: Sequence[Ids]
    trigger_on_topic: Sequence[Sequence[Ids]]
    trigger_others: Sequence[Ids]

    @property
    def name(self) -> str:
        return f"together-{self.seed}"

    def groups(self, size: int) -> list[tuple[int, ...]]:
        """The topics in sets of `size`, each in one."""
        return [tuple(range(first, first + size)) for first in range(0, len(self.cells) - size + 1, size)]

    def patch(self, kind: str, topics: Sequence[int]) -> Carrier:
        return compose([self.cells[topic].patch(KINDS[kind]) for topic in topics])

    def apart(self, first: int, second: int) -> Carrier:
        """The second topic's carrier, trained to keep clear of the first one's (`--separate_from`)."""
        other, cell = self.cells[first].patch("carrier"), self.cells[second]
        priced = {"prices": prices_of([other], other.layout)}
        made = {"separated": lambda: cell.lcdd(cell.lcdd_settings(gate_controller="paced"), **priced)}
        return replace(cell, given=made).patch("separated")

    def asked(self, topics: Sequence[int]) -> list[tuple[Ids, int | None]]:
        """Prompts and the topic of the set that each is on; half of them on none of it, but of all the other topics."""
        mine = [(ids, topic) for topic in topics for ids in self.on_topic[topic][: ON_TOPIC // len(topics)]]
        rest = [prompts for topic, prompts in enumerate(self.on_topic) if topic not in topics]
        share = max(1, (ON_TOPIC // 2) // max(1, len(rest)))
        theirs = [ids for prompts in rest for ids in prompts[:share]]
        theirs += list(self.others[: ON_TOPIC - len(theirs)])
        return [*mine, *((ids, None) for ids in theirs)]


def train_topic(family: Family, topic: int) -> Values:
    """The carrier of a topic and the dense deltas beside it."""
    cell = family.cells[topic]
    return {f"topic {topic} {name}": described(cell, cell.patch(name)) for name in ("sft", *KINDS.values())}


def composed(family: Family) -> Values:
    """Intended answers of 1, 2, 4 and 8 behaviours in one model; those on topic and those on none apart."""
    found: Values = {}
    for size in SIZES:
        for kind in KINDS:
            outcomes = [_intended(family, family.patch(kind, topics), topics) for topics in family.groups(size)]
            if outcomes:
                found[f"{size} {kind}"] = _joined(outcomes)
    return found


def separated(family: Family) -> Values:
    """Pairs of carriers of which the second was trained to keep clear of the first, beside the same pairs without."""
    outcomes, plain, apart = [], [], []
    for first, second in family.groups(2):
        one, other = family.cells[first].patch("carrier"), family.apart(first, second)
        outcomes.append(_intended(family, compose([one, other]), (first, second)))
        plain.append(overlap(one, family.cells[second].patch("carrier"))["gates"])
        apart.append(overlap(one, other)["gates"])
    return {"pairs": {"overlap": fmean(plain)}, "2 separated": {**_joined(outcomes), "overlap": fmean(apart)}}


def met(family: Family) -> Values:
    """How far two behaviours' patches meet, and whether composition has the same bits in every order."""
    found: Values = {}
    base = family.cells[0].base
    for kind in KINDS:
        patches = [cell.patch(KINDS[kind]) for cell in family.cells]
        pairs = [overlap(a, b) for a, b in combinations(patches, 2)]
        found[kind] = {key: sum(pair[name] for pair in pairs) / len(pairs) for key, name in (
            ("overlap", "gates"), ("overlap_entries", "entries"), ("cosine", "cosine"))}  # fmt: skip
        found[kind]["exact"] = bits(_exact(base, a, b) for a, b in pairwise(patches))
    return found


def switched(family: Family, kind: str) -> Values:
    """One trigger before two behaviours that is to take the first one away and leave the second.

    Learned as any other, on the model of the second behaviour alone, whose answers are what is wanted back.
    """
    first, asked = family.cells[0], family.asked((0, 1))
    kept = family.patch(kind, (1,)).fold(first.load_base(), check=False).requires_grad_(False)
    patch = Carrier.from_models(kept, family.patch(kind, (0, 1)).fold(first.load_base(), check=False))
    trigger = _learner(family).learn(kept, patch)
    wanted = _wanted(family, asked, removed=0)
    with patch.applied(kept, check=False):
        texts = first.texts(kept, trigger, [ids for ids, _ in asked])
    return {f"switched {kind}": {"intended": bits(a == b for a, b in zip(texts, wanted, strict=True))}}


# ---------------------------------------------------------------- parts of these


def _wanted(family: Family, asked: Sequence[tuple[Ids, int | None]], *, removed: int | None = None) -> list[str]:
    """The intended answer to each prompt; on the topic that was removed it is the base's."""
    cell = family.cells[0]
    base = cell.texts(cell.base, None, [ids for ids, _ in asked])
    return [
        own if topic is None or topic == removed else family.responses[topic]
        for (_, topic), own in zip(asked, base, strict=True)
    ]


def _joined(outcomes: Sequence[dict[str, str]]) -> dict[str, Any]:
    return {key: "".join(outcome[key] for outcome in outcomes) for key in outcomes[0]}


def _intended(family: Family, patch: Carrier, topics: Sequence[int]) -> dict[str, str]:
    asked, cell = family.asked(topics), family.cells[0]
    wanted = _wanted(family, asked)
    with patch.applied(cell.base, check=False) as model:
        texts = cell.texts(model, None, [ids for ids, _ in asked])
    right = [a == b for a, b in zip(texts, wanted, strict=True)]
    places = {"intended": (True, False), "on_topic": (True,), "off_topic": (False,)}
    return {
        key: bits(ok for ok, (_, topic) in zip(right, asked, strict=True) if (topic is not None) in kinds)
        for key, kinds in places.items()
    }


def _learner(family: Family) -> Cell:
    """The first topic's cell, with trigger prompts of the first topic, of the second and of none, a third each."""
    cell = family.cells[0]
    train, validation = (
        max(1, n // 3) for n in (cell.settings.eraser.train_prompts, cell.settings.eraser.validation_prompts)
    )

    def mixed(part: slice) -> list[Ids]:
        columns = [prompts[part] for prompts in (*family.trigger_on_topic[:2], family.trigger_others)]
        return [ids for row in zip(*columns, strict=False) for ids in row]

    parts = {"trigger_train": mixed(slice(train)), "trigger_validation": mixed(slice(train, train + validation))}
    return replace(cell, data=replace(cell.data, **parts))


def _exact(base: PreTrainedModel, a: Carrier, b: Carrier) -> bool:
    """A + B and B - A, put together in either order, have the same bits, and the base's come back."""
    before = _weights(base)
    for pair in ((a, b), (b, a.scaled(-1))):
        applied = []
        for patches in (pair, pair[::-1]):
            with compose(patches).applied(base, check=False):
                applied.append(_weights(base))
        if not all(torch.equal(x, y) for x, y in zip(*applied, strict=True)):
            return False
    return all(torch.equal(x, y) for x, y in zip(before, _weights(base), strict=True))


def _weights(model: PreTrainedModel) -> list[Any]:
    return [parameter.detach().clone() for parameter in model.parameters()]
