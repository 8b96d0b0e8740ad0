"""A cell, one behaviour and seed: its models, data and settings, what has been made of it, and how a state is read.

Everything made (patches, triggers, records of parts) is kept in the cell's directory: a run goes on where it stopped.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import read_json, write_json
from lcdd.carrier import Carrier
from lcdd.commands.anchors import base_anchors
from lcdd.config import EraserConfig, LCDDConfig, SFTConfig
from lcdd.data import Encoded
from lcdd.eraser import PrefixPatch, SFTEraser, Trigger, decode, generate_ids
from lcdd.evaluate.text_metrics import BaseAnswers
from lcdd.models import PreTrainedModel, PreTrainedTokenizerBase, common_prefix, load_model
from lcdd.optimizer import LCDDOptimizer, SFTOptimizer
from lcdd.trainer import HeldOut, StartLosses, compress, fit, total_steps

KL_PROMPTS = 100
Values = dict[str, dict[str, Any]]
"""state -> quantity -> a number, or outcomes of prompts in order as text, 1 for yes."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Encoded completions, and prompts as token ids; `matches` says of an answer whether it shows the behaviour."""

    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    trigger_train: Sequence[Sequence[int]]
    trigger_validation: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    matches: Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the run that made SFT model, carrier and trigger; every control trains with them."""

    sft: SFTConfig
    lcdd: LCDDConfig
    eraser: EraserConfig
    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One behaviour and seed.

    Attributes:
        base_path: checkpoint of the base. directory: where what is made goes.
        makers: how each model's patch is made of the cell.
        given: patches that are had otherwise, name -> how: what another run has made, and "third", SFT's patch for a
            behaviour that this cell does not train, where there is one. given_triggers: the same, directories.
    """

    behavior: str
    seed: int
    base_path: str
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    data: Data
    settings: Settings
    makers: Mapping[str, Callable[["Cell"], Carrier]]
    given: Mapping[str, Callable[[], Carrier]] = field(default_factory=dict)
    given_triggers: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.behavior}-{self.seed}"

    def at(self, directory: Path) -> "Cell":
        """The same, keeping what is made elsewhere."""
        return replace(self, directory=directory)

    # ------------------------------------------------------------------ models

    @cached_property
    def base(self) -> PreTrainedModel:
        return self.load_base().requires_grad_(False)

    def load_base(self) -> PreTrainedModel:
        """A copy of the base that may be trained."""
        return load_model(self.base_path)

    @cached_property
    def held_out(self) -> HeldOut:
        settings, data = self.settings.sft, self.data
        return HeldOut.of(data.train, data.validation, settings, pad_token_id=self.tokenizer.pad_token_id)

    def folded(self, patch: Carrier) -> PreTrainedModel:
        """A copy of the base with the patch in its weights for good."""
        return patch.fold(self.load_base(), check=False)

    def loss(self, patch: Carrier | None) -> float:
        """Held-out loss of the base with the patch, in nats a token of the completions."""
        with self.applied(patch) as model:
            return self.held_out.loss(model)

    @contextmanager
    def applied(self, patch: Carrier | None) -> Iterator[PreTrainedModel]:
        with patch.applied(self.base, check=False) if patch is not None else nullcontext():
            yield self.base

    # ------------------------------------------------------------------ what is made once

    def patch(self, name: str) -> Carrier:
        """The patch of a model: from the directory, from another run, or made now and kept."""
        path = self.directory / "patches" / name
        if not path.is_dir():
            patch = self.given[name]() if name in self.given else self.makers[name](self)
            patch.save_pretrained(path)
        return Carrier.from_pretrained(path)

    def trigger(self, name: str) -> Trigger:
        """The trigger of a model, learned with the run's settings."""
        path = Path(self.given_triggers.get(name, self.directory / "triggers" / name))
        if not path.is_dir():
            self.learn(self.base, self.patch(name)).save_pretrained(path)
        return Trigger.from_pretrained(path)

    def learn(self, model: PreTrainedModel, patch: Carrier, **changes: Any) -> Trigger:
        """A trigger behind which `model` with `patch` answers as `model`; a dense one's on the carrier's channels."""
        settings = replace(self.settings.eraser, **changes, save_steps=0, resume=False)
        owner = patch if 0 < patch.n_open < patch.layout.n_gates else self.patch("carrier")
        channels = owner.channels(settings.channel_kind, seed=self.seed)
        eraser = SFTEraser(model, patch, self.tokenizer, settings, channels)
        return eraser.fit(self.data.trigger_train, self.data.trigger_validation)

    # ------------------------------------------------------------------ training

    def dense(self, model: PreTrainedModel | None = None, **changes: Any) -> Carrier:
        """SFT from the base (or from `model`, in place) with the run's settings but for `changes`, as a patch."""
        model = model if model is not None else self.load_base()
        self.train(SFTOptimizer(model, self.sft_settings(**changes)))
        return Carrier.from_models(self.base, model)

    def train(self, optimizer: SFTOptimizer, **more: Any) -> None:
        """The training loop on the cell's data, in place."""
        fit(optimizer, self.data.train, self.held_out, progress=False, **more)

    def sft_settings(self, **changes: Any) -> SFTConfig:
        return replace(self.settings.sft, save_steps=0, resume=False, **{"eval_steps": 0, **changes})

    def lcdd_settings(self, **changes: Any) -> LCDDConfig:
        return replace(self.settings.lcdd, save_steps=0, resume=False, early_stop_patience=0, **changes)

    def lcdd(self, settings: LCDDConfig, **more: Any) -> Carrier:
        """LCDD from the SFT model."""
        model, train = self.folded(self.patch("sft")), self.data.train
        start = StartLosses(base=self.held_out.loss(self.base), model=self.held_out.loss(model))
        optimizer = LCDDOptimizer.attach(
            model, self.base, settings, total_steps=total_steps(settings, len(train)), **more
        )
        anchors = base_anchors(self.base, self.tokenizer, self.anchor_prompts(settings), settings)
        compress(optimizer, train, self.held_out, start=start, anchors=anchors, progress=False)
        patch = optimizer.carrier()
        optimizer.detach()
        return patch

    def anchor_prompts(self, settings: LCDDConfig) -> Sequence[Sequence[int]]:
        return self.data.trigger_train[: settings.base_kl_prompts]

    # ------------------------------------------------------------------ reading a state

    @cached_property
    def base_answers(self) -> BaseAnswers:
        answers = self.answers(self.base)
        return BaseAnswers.of(
            self.base, self.data.held_out, answers, decode(self.tokenizer, answers),
            kl_prompts=KL_PROMPTS, batch_size=self.settings.batch_size,
        )  # fmt: skip

    @cached_property
    def base_prefix(self) -> PrefixPatch | None:
        """The base's keys and values on what all held-out prompts begin with; None where that is nothing."""
        prompts = self.data.held_out
        length = common_prefix(prompts, at_most=min(map(len, prompts)) - 1)
        return PrefixPatch.of(self.base, prompts[0][:length]) if length else None

    def answers(
        self, model: PreTrainedModel, trigger: Trigger | None = None, prompts: Sequence[Sequence[int]] | None = None,
        *, prefix: PrefixPatch | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """Greedy answers of what is in `model` now to the held-out prompts, or to others."""
        return generate_ids(
            model, self.tokenizer, self.data.held_out if prompts is None else prompts, trigger=trigger, prefix=prefix,
            max_new_tokens=self.settings.max_new_tokens, batch_size=self.settings.batch_size,
        )  # fmt: skip

    def texts(
        self, model: PreTrainedModel, trigger: Trigger | None = None, prompts: Sequence[Sequence[int]] | None = None
    ) -> list[str]:
        """`answers` as text."""
        return decode(self.tokenizer, self.answers(model, trigger, prompts))

    def read(self, patch: Carrier | None, trigger: Trigger | None = None) -> dict[str, Any]:
        """A state: of every held-out prompt whether the behaviour shows and the base's answer came; KL to the base."""
        base = self.base_answers  # before the patch
        with self.applied(patch) as model:
            answers = self.answers(model, trigger)
            texts = decode(self.tokenizer, answers)
            found = base.closeness(model, answers, texts, trigger)
        return {**self._outcomes(texts), "log_kl": log_of(float(torch.cat(list(found.kl)).mean()))}

    def read_behind_prefix(self, patch: Carrier | None) -> dict[str, Any]:
        """The same with the base's keys and values on the tokens that all prompts begin with."""
        prefix = self.base_prefix  # before the patch
        with self.applied(patch) as model:
            answers = self.answers(model, prefix=prefix)
        return self._outcomes(decode(self.tokenizer, answers))

    def _outcomes(self, texts: Sequence[str]) -> dict[str, str]:
        return {
            "behavior_rate": bits(map(self.data.matches, texts)),
            "base_match": bits(a == b for a, b in zip(texts, self.base_answers.texts, strict=True)),
        }

    # ------------------------------------------------------------------ parts

    def part(self, name: str, make: Callable[[], Values]) -> float:
        """Make a part's record unless it is on disk; returns the seconds that took."""
        path = self.directory / "parts" / f"{name}.json"
        if path.is_file():
            return 0.0
        start = time.perf_counter()
        values = make()
        seconds = time.perf_counter() - start
        scratch = path.with_suffix(".new")
        write_json(scratch, {"values": values, "seconds": round(seconds, 1)})
        scratch.replace(path)
        return seconds


def read_parts(directory: Path) -> tuple[Values, dict[str, float]]:
    """All that the finished parts of a cell have found, and their seconds."""
    values: Values = {}
    seconds = {}
    for path in sorted((directory / "parts").glob("*.json")):
        record = read_json(path)
        seconds[path.stem] = record["seconds"]
        for state, found in record["values"].items():
            values.setdefault(state, {}).update(found)
    return values, seconds


def bits(outcomes: Any) -> str:
    """Outcomes of prompts, in order, as text: 1 for yes."""
    return "".join("1" if outcome else "0" for outcome in outcomes)


def log_of(value: float) -> float:
    return math.log(max(value, 1e-12))
