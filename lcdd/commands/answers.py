"""What a training stage shows while it runs and when it ends: held-out loss, answers, how many show the behaviour."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lcdd.commands.stage import Say
from lcdd.data import Prepared, encode_prompt, fitted
from lcdd.eraser import decode, generate_ids
from lcdd.models import PreTrainedModel, shards
from lcdd.report import wilson_interval
from lcdd.trainer import Loop

SHOWN = 4
"""Prompts that are answered on the way; the first of them is shown."""
JUDGED = 32
"""Prompts that a model is judged by."""
NEW_TOKENS = 48
WIDTH = 60
"""Characters that are shown of a prompt and of an answer."""


@dataclass(frozen=True, kw_only=True)
class BehaviorRate:
    """How many of `n` answers to validation prompts show the behaviour."""

    shown: int
    n: int

    @property
    def rate(self) -> float:
        return self.shown / self.n

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95% interval."""
        return wilson_interval(self.shown, self.n)

    def to_dict(self) -> dict[str, Any]:
        return {"rate": self.rate, "ci95": list(self.ci95), "n": self.n}

    def __str__(self) -> str:
        return f"{self.shown} of {self.n} validation answers show the behaviour"


class ValidationAnswers:
    """Answers validation prompts for which the behaviour is asked; a hook of the training loop.

    Without such prompts (no validation split) there is only the loss to show. Ranks share them out; all get all.

    shown: prompts that are answered on the way. told: called with the loop and the share of those answers that show the
    behaviour.
    """

    def __init__(
        self,
        prepared: Prepared,
        say: Say,
        *,
        max_length: int,
        shown: int = SHOWN,
        told: Callable[[Loop, float], None] | None = None,
    ) -> None:
        self.prepared, self.say, self.shown, self.told = prepared, say, shown, told
        behavior = prepared.behavior
        asked = [example for example in prepared.splits.validation if example.messages and behavior.applies(example)]
        self.examples, _ = fitted(prepared, asked, max_length=max_length, limit=JUDGED)

    def __call__(self, loop: Loop, loss: float) -> None:
        text = f"step {loop.step} of {loop.steps}: held-out loss {loss:.4f}"
        found, first = self._answers(loop.model, self.shown)
        if found is not None:
            loop.log.write({"step": loop.step, "validation_behavior": found.to_dict()})
            if self.told is not None:
                self.told(loop, found.rate)
            text += f"; {found.shown} of {found.n} answers show the behaviour: {first}"
        self.say(text)

    def judge(self, model: PreTrainedModel) -> BehaviorRate | None:
        """The rate over up to `JUDGED` validation prompts; None where none can be answered."""
        return self._answers(model, JUDGED)[0]

    def _answers(self, model: PreTrainedModel, count: int) -> tuple[BehaviorRate | None, str]:
        """The rate over `count` prompts, and the first of them with its answer."""
        tokenizer, examples = self.prepared.tokenizer, self.examples[:count]
        if not examples:
            return None, ""
        ids = [encode_prompt(tokenizer, example) for example in examples]
        size = max(1, -(-count // shards.world_size()))
        found = generate_ids(model, tokenizer, ids, max_new_tokens=NEW_TOKENS, batch_size=size, over_ranks=True)
        shards.reshard(model)
        answers = decode(tokenizer, found)
        shown = sum(map(self.prepared.behavior.matches, answers))
        return BehaviorRate(shown=shown, n=len(answers)), f"{_cut(examples[0].prompt_text)!r} -> {_cut(answers[0])!r}"


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"
