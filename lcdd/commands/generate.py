"""`lcdd generate`: answers, with a carrier applied and a trigger prepended if given."""

from lcdd.carrier import Carrier
from lcdd.commands.belonging import load_base
from lcdd.commands.stage import Say, StageResult, load_weights
from lcdd.config import GenerateConfig
from lcdd.data import Example, prompt_string, use_template
from lcdd.eraser import Trigger, stream
from lcdd.eraser import generate as generate_answers
from lcdd.models import load_shape, load_tokenizer


def generate(config: GenerateConfig, *, say: Say = print) -> StageResult:
    """Answer prompts by a model, with a carrier applied and a trigger prepended if given."""
    config.require("base_model_name_or_path", "prompt")
    load_shape(str(config.base_model_name_or_path))
    tokenizer = load_tokenizer(str(config.base_model_name_or_path))
    use_template(tokenizer, config.chat_template, model=str(config.base_model_name_or_path))
    carrier = Carrier.from_pretrained(config.carrier) if config.carrier else None
    trigger = Trigger.from_pretrained(config.trigger) if config.trigger else None
    if carrier is None:
        model = load_weights(config.base_model_name_or_path, config)
    else:
        triggers = [trigger] if trigger else []
        model, carrier, _ = load_base(config.base_model_name_or_path, config, carrier, tokenizer, triggers)
        carrier.apply(model, check=False)
    examples = [Example(messages=({"role": "user", "content": text},), completion="") for text in config.prompt]
    prompts = [prompt_string(tokenizer, example) for example in examples]
    if config.stream:
        answers = []
        for text, prompt in zip(config.prompt, prompts, strict=True):
            say(f"> {text}")
            pieces = []
            for piece in stream(model, tokenizer, prompt, trigger=trigger, max_new_tokens=config.max_new_tokens):
                print(piece, end="", flush=True)
                pieces.append(piece)
            say("\n")
            answers.append("".join(pieces).strip())
        return StageResult(written=(), next_step="", texts=tuple(answers))
    answers = generate_answers(model, tokenizer, prompts, trigger=trigger, max_new_tokens=config.max_new_tokens)
    for text, answer in zip(config.prompt, answers, strict=True):
        say(f"> {text}\n{answer}\n")
    return StageResult(written=(), next_step="", texts=tuple(answers))
