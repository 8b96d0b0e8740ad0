"""In what form a model was asked in training: kept with its tokenizer and its carrier, so that it is asked so later.

`tokenizer_config.json` and `carrier.json` then have `prompt_form`: {"format": "chat", "text" or "mixed",
"chat_template_kwargs": the template variables that all examples share}. None of it stands for chats without any.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lcdd.data.records import Example, Message
from lcdd.errors import InputError

FORM_KEY = "prompt_form"


def record_form(tokenizer: Any, examples: Sequence[Example]) -> None:
    """Take note, in place, of the form that the examples ask in."""
    formats = {"chat" if example.templated else "text" for example in examples}
    shared = examples[0].template_kwargs if examples else {}
    if any(example.template_kwargs != shared for example in examples):
        shared = {}
    form: dict[str, Any] = {"format": "mixed" if len(formats) > 1 else formats.pop()} if formats else {}
    if shared:
        form["chat_template_kwargs"] = dict(shared)
    if form in ({}, {"format": "chat"}):
        tokenizer.init_kwargs.pop(FORM_KEY, None)
    else:
        tokenizer.init_kwargs[FORM_KEY] = form


def recorded_form(tokenizer: Any, carrier: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """The form in a carrier's `tokenizer`; without a carrier (or one that knows of no tokenizer), the tokenizer's own.

    A base may have been trained before, in another form than the carrier.
    """
    form = (carrier or tokenizer.init_kwargs).get(FORM_KEY)
    return form if isinstance(form, Mapping) else {}


def question(prompt: str | Sequence[Message], form: Mapping[str, Any], *, source: str = "prompt") -> Example:
    """A prompt, or a chat that an answer is wanted to, in the form that a model was trained on (`recorded_form`).

    Raises:
        InputError: the model was trained on both forms, or a chat is asked of one that was trained on text.
    """
    kind = form.get("format", "chat")
    if kind not in ("chat", "text"):
        raise InputError(f"prompt_format: expected chat or text, for a model that was trained on both, got {kind!r}")
    chat: tuple[Message, ...] = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
    if kind == "text":
        if len(chat) != 1:
            raise InputError(
                f"{source}: expected one prompt, for a model that was trained on text, got {len(chat)} turns"
            )
        return Example(messages=chat, completion="", templated=False, source=source)
    variables = form.get("chat_template_kwargs", {})
    return Example(messages=chat, completion="", template_kwargs=variables, source=source)
