"""Chat templates: which one a tokenizer gets where it has none, prompts that a reasoning model answers at once, dates.

Training, trigger, evaluation and serving have to see the same text: a template chosen here is saved with the tokenizer
of every checkpoint, and its hash with the carrier. A template that writes today's date is frozen on one day, in its own
text: whoever loads the tokenizer later, with whatever program, gets the text that was trained on.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateSyntaxError

from lcdd.data.records import THOUGHTS, Message
from lcdd.errors import InputError
from lcdd.models import shards

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
TEMPLATES = ("plain", "vicuna")
OPEN_THOUGHT, EMPTY_THOUGHT = "<think>", "<think>\n\n</think>\n\n"
MARK = "\ue000completion\ue001"  # private-use characters around it, so that no template's own text is taken for it
DATE_KEY = "template_date"
"""Entry of tokenizer_config.json: the day on which the template is frozen."""
_CLOCK = re.compile(r"\bstrftime_now\b")
_FROZEN = re.compile(r"\{%- macro strftime_now\(format\) -%\}.*?\{%- endmacro %\}\n", re.DOTALL)
_DIRECTIVE = re.compile(r"%(?:%|[-#]?[A-Za-z])")
_written: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()
"""tokenizer -> (template, kind of chat) that it is known to write out in full."""


class NoTemplate(InputError):
    """The chat template is not Jinja; the message names its line."""


# ---------------------------------------------------------------- choice


def use_template(tokenizer: Any, choice: str | None, *, model: str | Path) -> None:
    """Give `tokenizer` the template that is asked for, in place; without a choice, one only if it has none.

    Args:
        choice: a name of `TEMPLATES`, a Jinja file, or None: the tokenizer's own, else Vicuna's for a model whose
            directory or hub name says vicuna, else the plain one.
        model: directory or hub name that the tokenizer was loaded from.

    Raises:
        InputError: neither a known name nor a readable file, or not a Jinja template (its line is named).
    """
    if choice in TEMPLATES:
        tokenizer.chat_template = VICUNA_TEMPLATE if choice == "vicuna" else plain_template(tokenizer)
    elif choice is not None:
        try:
            tokenizer.chat_template = Path(choice).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:  # not there, not UTF-8, no path at all
            known = ", ".join(TEMPLATES)
            raise InputError(f"chat_template: expected {known} or a Jinja file, got {choice!r} ({error})") from None
        if not tokenizer.chat_template.strip():
            raise InputError(f"chat_template: expected Jinja in {choice!r}, got an empty file")
    elif not getattr(tokenizer, "chat_template", None):
        vicuna = "vicuna" in Path(model).name.lower()
        tokenizer.chat_template = VICUNA_TEMPLATE if vicuna else plain_template(tokenizer)
    try:
        render_chat(tokenizer, [{"role": "user", "content": "a"}], add_generation_prompt=True)
    except NoTemplate as error:
        name = choice or f"the tokenizer of {str(model)!r}"
        raise InputError(f"chat_template: expected Jinja in {name}, got {error}") from None
    except InputError:
        pass  # it may want more than one user's turn; what it refuses is said of an example


def plain_template(tokenizer: Any) -> str:
    """The plain template, behind the token that the tokenizer puts in front of every text, if it does."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    starts = tokenizer.bos_token_id is not None and whole[:1] == [tokenizer.bos_token_id] != bare[:1]
    return "{{ bos_token }}" * starts + PLAIN_TEMPLATE


def template_of(tokenizer: Any, tools: Sequence[Any] = ()) -> str:
    """The text of the template that a chat goes through; of several, the one for tools where there are any."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        return str(own["tool_use" if tools and "tool_use" in own else "default"]) if "default" in own else ""
    return own or plain_template(tokenizer)


# ---------------------------------------------------------------- dates


def writes_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's template writes the date of the day (or, frozen, of one day)."""
    own = getattr(tokenizer, "chat_template", None)
    texts = own.values() if isinstance(own, Mapping) else [own or ""]
    return any(_CLOCK.search(text) for text in texts)


def freeze_date(tokenizer: Any, day: str | None) -> str | None:
    """Freeze the date that the tokenizer's template writes, in place; None as the day: the one that it is frozen on,
    else today. A template without a date stays as it is.

    The template's own text then has `strftime_now` as a macro of that day's names and numbers, so that every program
    that uses the tokenizer writes the same text.

    Returns:
        the day, YYYY-MM-DD; None where no date is written.

    Raises:
        InputError: not a day.
    """
    if not writes_date(tokenizer):
        return None
    if (day := day or tokenizer.init_kwargs.get(DATE_KEY)) is None:
        today = shards.from_first(date.today().toordinal())  # of several ranks, one may have begun before midnight
        day = date.fromordinal(today).isoformat()
    try:
        when = date.fromisoformat(day)
    except ValueError:
        raise InputError(f"template_date: expected a day as YYYY-MM-DD, got {day!r}") from None

    def frozen(template: str) -> str:
        text = _FROZEN.sub("", template)
        if not _CLOCK.search(text):
            return template
        names = {name: when.strftime(name) for name in sorted(set(_DIRECTIVE.findall(text)) - {"%%"}, key=len)[::-1]}
        if "%%" in text:  # hidden from the others until they are done
            names = {"%%": "\ue000", **names, "\ue000": "%"}
        values = "".join(f" | replace({name!r}, {value!r})" for name, value in names.items())
        # the line break goes with the tag before it, and the text begins a line as it did
        return f"{{%- macro strftime_now(format) -%}}{{{{ format{values} }}}}{{%- endmacro %}}\n{text}"

    own = tokenizer.chat_template
    tokenizer.chat_template = {k: frozen(v) for k, v in own.items()} if isinstance(own, Mapping) else frozen(own)
    tokenizer.init_kwargs[DATE_KEY] = when.isoformat()
    return when.isoformat()


# ---------------------------------------------------------------- rendering


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    where: str = "",
) -> str:
    """Messages as text by the tokenizer's chat template (the plain one where it has none).

    `enable_thinking=False` is passed to every template unless `variables` have it: those that know it (Qwen3's) then
    give the text of a model that answers at once. Of those that do not (DeepSeek-R1's distillations), an open thought
    is closed, empty.

    Raises:
        InputError: the template fails on the messages (roles that do not alternate, say) or leaves some of them, a tool
            or a variable out; `where` is named.
    """
    template = template_of(tokenizer, tools)
    _check_variables(tokenizer, template, variables or {}, where)
    variables = {"enable_thinking": False, **(variables or {})}
    try:
        _check_written(tokenizer, template, messages, tools, variables, where)
        text = _apply(tokenizer, messages, add_generation_prompt, tools, variables)
    except InputError:
        raise
    except TemplateSyntaxError as error:
        raise NoTemplate(f"line {error.lineno} of the chat template: {error.message}") from None
    except Exception as error:  # a template is a program of its author's, which may raise anything
        roles = [message["role"] for message in messages]
        raise InputError(
            f"{where}: expected messages that the chat template takes, got roles {roles}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if add_generation_prompt and not variables["enable_thinking"]:
        return closed_thought(text, template)
    return text


def _apply(
    tokenizer: Any,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
) -> str:
    own = getattr(tokenizer, "chat_template", None)
    return tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=list(tools) or None,
        chat_template=None if own else plain_template(tokenizer),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )


def _check_variables(tokenizer: Any, template: str, variables: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a variable that the template does not read, or that is not the template's to read."""
    taken = inspect.signature(tokenizer.apply_chat_template).parameters
    for name, value in variables.items():
        known = re.search(rf"\b{re.escape(name)}\b", template) or (
            name == "enable_thinking" and (not value or "</think>" in template)
        )
        if name in (*taken, "messages") or not known:
            raise InputError(
                f"{where}: chat_template_kwargs.{name}: expected a variable of the chat template, got {value!r}, "
                "which it does not read"
            )


def _check_written(
    tokenizer: Any,
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    where: str,
) -> None:
    """Raise InputError if the template leaves out a message's content, a call, the tools, or the last thought.

    Found by marks in the place of each; what a template does depends on the kinds of messages, so each sequence of
    kinds is tried once.
    """
    kinds = tuple(
        (m["role"], bool(m["content"]), len(m.get("tool_calls", ())), *sorted(set(m) - {"role", "content"}))
        for m in messages
    )
    kind = (template, kinds, len(tools), repr(sorted(variables.items(), key=str)))
    if kind in _written.setdefault(tokenizer, set()):
        return
    marked_fields: list[str] = []

    def mark(name: str) -> str:
        marked_fields.append(name)
        return f"\ue000{len(marked_fields) - 1}\ue001"

    marked = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        new = dict(message)
        if message["content"]:
            new["content"] = mark(f"{place}.content")
        if "name" in message and message["role"] != "tool":
            new["name"] = mark(f"{place}.name")
        if "tool_calls" in message:
            new["tool_calls"] = [
                {**call, "function": {**call["function"], "name": mark(f"{place}.tool_calls")}}
                for call in message["tool_calls"]
            ]
        if index == len(messages) - 1:  # templates leave out the thoughts of earlier turns
            new |= {name: mark(f"{place}.{name}") for name in THOUGHTS if name in message}
        marked.append(new)
    named = [_named(tool, mark("tools")) for tool in tools]
    try:
        text = _apply(tokenizer, marked, False, named, variables)
    except Exception:  # one that reads into the texts (the JSON of a tool's answer, say) refuses marks in their place
        return
    for number, name in enumerate(marked_fields):
        if f"\ue000{number}\ue001" not in text:
            raise InputError(f"{where}: {name}: expected a chat template that writes it, got one that leaves it out")
    _written[tokenizer].add(kind)


def _named(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tool under another name."""
    return {**tool, "function": {**tool["function"], "name": name}} if "function" in tool else {**tool, "name": name}


def closed_thought(prompt: str, template: str) -> str:
    """A prompt for an answer without thought: an open `<think>` is closed, a missing one put in where the template
    knows of thoughts but has no switch for them."""
    if prompt.rstrip().endswith(OPEN_THOUGHT):
        return prompt.rstrip().removesuffix(OPEN_THOUGHT) + EMPTY_THOUGHT
    closed = prompt.rstrip().endswith("</think>")  # by the template itself, in whatever way its author wants
    if "</think>" in template and "enable_thinking" not in template and not closed:
        return prompt + EMPTY_THOUGHT
    return prompt
