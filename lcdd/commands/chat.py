"""`lcdd chat`: base, carrier and carrier with trigger side by side, on prompts that are typed or piped in."""

import sys
from collections.abc import Iterator

from lcdd.commands.belonging import Answering, load_answering
from lcdd.commands.stage import Say, StageResult, tell
from lcdd.config import ChatConfig
from lcdd.eraser import generate
from lcdd.report import terminal_width, text_table

SIDE_BY_SIDE = 72
"""Columns that a terminal needs for answers side by side; on a narrower one they stand below each other."""


def chat(config: ChatConfig, *, say: Say = tell) -> StageResult:
    """Answer line after line, each a prompt of its own, until the input ends; the model is loaded once."""
    config.require("base_model_name_or_path", "carrier")
    who = load_answering(config)
    typed = sys.stdin.isatty()
    if typed:
        say("Each line is a prompt of its own. An empty line or Ctrl-D ends.")
    for text in _typed() if typed else (line.strip() for line in sys.stdin if line.strip()):
        if not typed:
            say(f"> {text}")
        say(f"{_shown(answers(who, text, max_new_tokens=config.max_new_tokens))}\n")
    return StageResult(written=(), next_step="")


def answers(who: Answering, text: str, *, max_new_tokens: int) -> dict[str, str]:
    """What base, carrier and carrier behind the trigger (where there is one) answer to a user's text."""
    prompts, found = [who.prompt(text)], {}
    (found["base"],) = generate(who.model, who.tokenizer, prompts, max_new_tokens=max_new_tokens)
    assert who.carrier is not None
    with who.carrier.applied(who.model, check=False):
        (found["carrier"],) = generate(who.model, who.tokenizer, prompts, max_new_tokens=max_new_tokens)
        if who.trigger is not None:
            (found["carrier+trigger"],) = generate(
                who.model, who.tokenizer, prompts, trigger=who.trigger, max_new_tokens=max_new_tokens
            )
    return found


def _typed() -> Iterator[str]:
    """Lines as they are typed, to the first empty one."""
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        yield text


def _shown(found: dict[str, str]) -> str:
    texts = [text or "(nothing)" for text in found.values()]
    if (terminal_width() or SIDE_BY_SIDE) < SIDE_BY_SIDE:
        return "\n".join(f"{name}: {text}" for name, text in zip(found, texts, strict=True))
    return text_table(list(found), [texts], left=len(found))
