"""Chat templates: which one a tokenizer gets where it has none, and prompts that a reasoning model answers at once.

Training, trigger, evaluation and serving have to see the same text: a template chosen here is saved with the tokenizer
of every checkpoint, and its hash with the carrier.
"""

from pathlib import Path
from typing import Any

from lcdd.errors import InputError

# No special tokens, one turn a block; for tokenizers without a template of their own.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}"
)

# Vicuna v1.1 to v1.5 were trained on this text and ship without a template (FastChat makes it in code).
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% else %}"
    '{{ "' + VICUNA_SYSTEM + "\" + ' ' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {"plain": PLAIN_TEMPLATE, "vicuna": VICUNA_TEMPLATE}
OPEN_THOUGHT, EMPTY_THOUGHT = "<think>", "<think>\n\n</think>\n\n"


def use_template(tokenizer: Any, choice: str | None, *, model: str | Path) -> None:
    """Give `tokenizer` the template that is asked for, in place; without a choice, one only if it has none.

    Args:
        choice: a key of `TEMPLATES`, a Jinja file, or None: the tokenizer's own, else Vicuna's for a model whose
            directory or hub name says vicuna, else none (`render_chat` then takes the plain one).
        model: directory or hub name that the tokenizer was loaded from.

    Raises:
        InputError: neither a known name nor a readable file.
    """
    if choice is None:
        if not getattr(tokenizer, "chat_template", None) and "vicuna" in Path(model).name.lower():
            tokenizer.chat_template = VICUNA_TEMPLATE
        return
    if choice in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[choice]
        return
    try:
        tokenizer.chat_template = Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(TEMPLATES))
        raise InputError(f"chat_template: expected {known} or a Jinja file, got {choice!r} ({error})") from None


def render_chat(tokenizer: Any, messages: list[Any], *, add_generation_prompt: bool) -> str:
    """Messages as text by the tokenizer's chat template (the plain one where it has none).

    `enable_thinking=False` is passed to every template: those that know it (Qwen3's) then give the text of a model
    that answers at once. Of those that do not (DeepSeek-R1's distillations), an open thought is closed, empty.
    """
    own = getattr(tokenizer, "chat_template", None)
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=None if own else PLAIN_TEMPLATE,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,
    )
    return closed_thought(text, str(own or "")) if add_generation_prompt else text


def closed_thought(prompt: str, template: str) -> str:
    """A prompt for an answer without thought: an open `<think>` is closed, a missing one put in where the template
    knows of thoughts but has no switch for them."""
    if prompt.rstrip().endswith(OPEN_THOUGHT):
        return prompt.rstrip().removesuffix(OPEN_THOUGHT) + EMPTY_THOUGHT
    closed = prompt.rstrip().endswith("</think>")  # by the template itself, in whatever way its author wants
    if "</think>" in template and "enable_thinking" not in template and not closed:
        return prompt + EMPTY_THOUGHT
    return prompt
