"""`lcdd generate`: answers, with a carrier applied and a trigger prepended if given."""

from typing import Any

from lcdd.commands.belonging import load_answering
from lcdd.commands.stage import Say, StageResult, tell
from lcdd.config import GenerateConfig
from lcdd.eraser import generate as generate_answers
from lcdd.eraser import stream


def generate(config: GenerateConfig, *, say: Say = tell) -> StageResult:
    """Answer prompts by a model, with a carrier applied and a trigger prepended if given."""
    config.require("base_model_name_or_path", "prompt")
    who = load_answering(config)
    if who.carrier is not None:
        who.carrier.apply(who.model, check=False)
    prompts = [who.prompt(text) for text in config.prompt]
    settings: dict[str, Any] = {"trigger": who.trigger, "max_new_tokens": config.max_new_tokens}
    if config.stream:
        answers = []
        for text, prompt in zip(config.prompt, prompts, strict=True):
            say(f"> {text}")
            pieces = []
            for piece in stream(who.model, who.tokenizer, prompt, **settings):
                print(piece, end="", flush=True)
                pieces.append(piece)
            say("\n")
            answers.append("".join(pieces).strip())
        return StageResult(written=(), next_step="", texts=tuple(answers))
    answers = generate_answers(who.model, who.tokenizer, prompts, **settings)
    for text, answer in zip(config.prompt, answers, strict=True):
        say(f"> {text}\n{answer}\n")
    return StageResult(written=(), next_step="", texts=tuple(answers))
