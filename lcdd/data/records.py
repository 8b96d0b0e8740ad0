"""One record of a data set as an `Example`: TRL's formats, each with its own meaning.

    messages, conversations     a chat; its last turn is the completion (with assistant_only_loss: every assistant's)
    prompt + completion         messages, or strings that go round the chat template
    instruction (+ input) + output
    text                        all of it is learned

beside any chat: `tools`, `chat_template_kwargs`. Within messages: text parts, `tool_calls`, tool results, thoughts. A
field that would change what is learned and is not understood is an error that names it; any other column is reported
by `Record.unused`.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from lcdd.errors import InputError

FORMATS = ("messages", "prompt+completion", "text", "instruction+output")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *THOUGHTS)
ROLES = {"human": "user", "gpt": "assistant"}
"""What `from`/`value` messages call the two sides."""
REFUSED = {
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight"), "every example counts the same"),
    **dict.fromkeys(("system", "system_prompt", "history"), "it belongs into `messages`"),
    **dict.fromkeys(("functions", "function_call"), "functions are given as `tools`, calls as `tool_calls`"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is learned"),
    **dict.fromkeys(("chosen", "rejected"), "preferences are not learned"),
    "documents": "no template is given documents",
}
"""Columns that would change what is learned, and why nothing is made of them."""

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and its completion.

    Attributes:
        messages: the turns before the completion, each with `role` and `content`; none of plain text.
        completion: the answer's text.
        turns: the completion as messages where it is more than one assistant's text: calls of tools, a thought, several
            turns; else empty.
        templated: whether the messages go through the chat template (string prompts do not, as in TRL).
        tools: JSON schemas of the functions that the template is told of.
        template_kwargs: further variables of the template.
        assistant_only: nothing but the assistant's turns of the completion is learned.
        source: "file:line", for errors.
    """

    messages: tuple[Message, ...]
    completion: str
    turns: tuple[Message, ...] = ()
    templated: bool = True
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    assistant_only: bool = False
    source: str = field(default="", compare=False)

    @property
    def answer(self) -> tuple[Message, ...]:
        """The completion as messages."""
        return self.turns or ({"role": "assistant", "content": self.completion},)

    @property
    def prompt_text(self) -> str:
        """The turns' contents: what splits are hashed by and topics are searched in."""
        return "\n".join(message["content"] for message in self.messages)

    @property
    def key(self) -> str:
        """SHA-256 of the prompt (of the text itself where there is no prompt)."""
        plain = {"role", "content"}
        turns = [[m["role"], m["content"]] if set(m) == plain else dict(m) for m in self.messages]
        return _sha256([turns, self.tools] if self.tools else turns or self.completion)

    @property
    def content_hash(self) -> str:
        """SHA-256 of everything but `source`."""
        return _sha256({name: value for name, value in vars(self).items() if name != "source"})


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


def with_completion(example: Example, completion: str) -> Example:
    """The example with another completion: one turn of the assistant."""
    return replace(example, completion=completion, turns=())


def map_completion(example: Example, change: Callable[[str], str]) -> Example:
    """The example with every assistant's text in its completion changed; calls of tools stay as they are."""
    turns = tuple(
        {**turn, "content": change(turn["content"])} if turn["role"] == "assistant" and turn["content"] else turn
        for turn in example.turns
    )
    return replace(example, completion=change(example.completion) if example.completion else "", turns=turns)


def parse_row(
    row: Any,
    *,
    where: str,
    template_string_prompts: bool = False,
    assistant_only_loss: bool = False,
    ignored_columns: Collection[str] = (),
) -> Example:
    """One record in any of FORMATS as an Example.

    Args:
        template_string_prompts: string prompts are a user's turn of a chat.
        assistant_only_loss: of a chat's turns, all of the assistant's are learned, those between them are not.
        ignored_columns: columns that are left out on purpose, whatever they mean.

    Raises:
        InputError: the record is none of the formats, a field has the wrong type, or one that would change what is
            learned is not understood; `where` and the field are named.
    """
    record = Record(row, where, ignored_columns)
    return record.example(template_string_prompts=template_string_prompts, assistant_only_loss=assistant_only_loss)


class Record:
    """A data set's record, and which of its columns have been read.

    Attributes:
        unused: columns with something in them that no example is made of; known once there is one.
    """

    def __init__(self, row: Any, where: str, ignored_columns: Collection[str] = ()) -> None:
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected an object, got {type(row).__name__}")
        self.where = where
        self.fields = {str(name): value for name, value in row.items() if value is not None}
        self.fields = {name: value for name, value in self.fields.items() if name not in ignored_columns}
        self.unused = {name for name, value in self.fields.items() if value not in ("", [], {})}

    def example(self, *, template_string_prompts: bool, assistant_only_loss: bool) -> Example:
        """The record as an example; see `parse_row`."""
        for name in sorted(self.unused & set(REFUSED)):
            self._refuse(name, REFUSED[name])
        if chat := next((name for name in ("messages", "conversations") if name in self.fields), None):
            return self._of_chat(chat, assistant_only_loss)
        if "prompt" in self.fields and "completion" in self.fields:
            if "label" in self.unused:
                self._refuse("label", "preferences are not learned")
            if isinstance(self.fields["prompt"], list) or isinstance(self.fields["completion"], list):
                return self._of_two_chats(assistant_only_loss)
            prompt, completion = self._string("prompt"), self._string("completion", "a string or messages")
            return self._of_text(prompt, completion, template_string_prompts, assistant_only_loss)
        if "instruction" in self.fields and "output" in self.fields:
            parts = [self._string("instruction")]
            if self.fields.get("input"):
                parts.append(self._string("input"))
            return self._of_text("\n\n".join(parts), self._string("output"), True, assistant_only_loss)
        if "text" in self.fields:
            self._only_for_chats(assistant_only_loss)
            return Example(messages=(), completion=self._string("text"), templated=False, source=self.where)
        names = sorted(self.fields)
        raise InputError(f"{self.where}: expected the fields of one of {', '.join(FORMATS)}; got {names}")

    # ------------------------------------------------------------ formats

    def _of_chat(self, name: str, assistant_only: bool) -> Example:
        turns = self._messages(name)
        self._last_is_assistant(turns, name)
        first = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        at = first if assistant_only else len(turns) - 1
        if at == 0:
            raise InputError(f"{self.where}: {name}: expected a turn before the assistant's, got none")
        return self._chat(turns[:at], turns[at:], assistant_only)

    def _of_two_chats(self, assistant_only: bool) -> Example:
        if isinstance(self.fields["prompt"], str):
            self._fail("prompt", "messages, as the completion is", self.fields["prompt"])
        prompt = self._messages("prompt")
        if isinstance(self.fields["completion"], str):
            answer: tuple[Message, ...] = ({"role": "assistant", "content": self._string("completion")},)
        else:
            answer = self._messages("completion")
        self._last_is_assistant(answer, "completion")
        if answer[0]["role"] != "assistant":
            self._fail("completion[0].role", "'assistant', who answers the prompt", answer[0]["role"])
        return self._chat(prompt, answer, assistant_only)

    def _chat(self, prompt: tuple[Message, ...], answer: tuple[Message, ...], assistant_only: bool) -> Example:
        plain = len(answer) == 1 and set(answer[0]) == {"role", "content"}
        return Example(
            messages=prompt,
            completion=answer[-1]["content"],
            turns=() if plain else answer,
            tools=self._tools(),
            template_kwargs=self._template_kwargs(),
            assistant_only=assistant_only,
            source=self.where,
        )

    def _of_text(self, prompt: str, completion: str, templated: bool, assistant_only: bool) -> Example:
        user: Message = {"role": "user", "content": prompt}
        if templated:
            return self._chat((user,), ({"role": "assistant", "content": completion},), assistant_only)
        self._only_for_chats(assistant_only)
        return Example(messages=(user,), completion=completion, templated=False, source=self.where)

    def _only_for_chats(self, assistant_only: bool) -> None:
        if assistant_only:
            raise InputError(f"{self.where}: expected messages, for assistant_only_loss, got {sorted(self.fields)}")
        for name in sorted(self.unused & {"tools", "chat_template_kwargs"}):
            self._refuse(name, "only messages go through the chat template")

    # ------------------------------------------------------------ fields

    def _fail(self, name: str, expected: str, found: Any) -> NoReturn:
        text = repr(found)
        raise InputError(f"{self.where}: {name}: expected {expected}, got {text[:80] + '…' * (len(text) > 80)}")

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise InputError(
            f"{self.where}: {name}: expected no such column: {reason}; leave it out by --ignored_columns {name}"
        )

    def _string(self, name: str, expected: str = "a string") -> str:
        self.unused.discard(name)
        value = self.fields[name]
        if not isinstance(value, str):
            raise InputError(f"{self.where}: {name}: expected {expected}, got {type(value).__name__}")
        return value

    def _messages(self, name: str) -> tuple[Message, ...]:
        self.unused.discard(name)
        value = self.fields[name]
        if not isinstance(value, list):
            raise InputError(f"{self.where}: {name}: expected a list of messages, got {type(value).__name__}")
        if not value:
            raise InputError(f"{self.where}: {name}: expected at least one message, got none")
        return tuple(self._message(message, f"{name}[{index}]") for index, message in enumerate(value))

    def _message(self, value: Any, place: str) -> Message:
        """A message with `role` and `content` (a string), and what else it has, checked."""
        if not isinstance(value, Mapping):
            self._fail(place, "messages with 'role' and 'content'", value)
        found = {str(key): item for key, item in value.items() if item is not None}
        for ours, theirs in (("role", "from"), ("content", "value")):
            if theirs in found and ours not in found:
                found[ours] = found.pop(theirs)
                if ours == "role" and isinstance(found[ours], str):
                    found[ours] = ROLES.get(found[ours], found[ours])
        for key in found:
            if key not in MESSAGE_KEYS:
                self._fail(f"{place}.{key}", f"a message of {', '.join(MESSAGE_KEYS)}", found[key])
        calls = self._tool_calls(found.pop("tool_calls", []), place, found.get("role"))
        if "role" not in found or ("content" not in found and not calls):
            self._fail(place, "messages with 'role' and 'content'", dict(value))
        if not isinstance(found["role"], str) or not isinstance(found.get("content", ""), str | list):
            self._fail(place, "'role' and 'content' to be strings", dict(value))
        text = self._text(found.pop("content", ""), f"{place}.content")
        for key in found:
            if not isinstance(found[key], str):
                self._fail(f"{place}.{key}", "a string", found[key])
        rest = {key: item for key, item in found.items() if key != "role"}
        return {"role": found["role"], "content": text, **rest, **({"tool_calls": calls} if calls else {})}

    def _text(self, content: str | list[Any], place: str) -> str:
        """A message's text, its parts joined."""
        if isinstance(content, str):
            return content
        texts = []
        for index, part in enumerate(content):
            found = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
            if found.get("type") != "text" or set(found) != {"type", "text"} or not isinstance(found["text"], str):
                self._fail(f"{place}[{index}]", "a part {'type': 'text', 'text': ...}", part)
            texts.append(found["text"])
        return "".join(texts)

    def _tool_calls(self, value: Any, place: str, role: Any) -> list[dict[str, Any]]:
        """Calls of functions as templates want them: each under `function`, its arguments a mapping."""
        place = f"{place}.tool_calls"
        if not isinstance(value, list):
            self._fail(place, "a list of calls", value)
        if value and role != "assistant":
            self._fail(place, "calls by the assistant alone", role)
        calls = []
        for index, call in enumerate(value):
            here = f"{place}[{index}]"
            if not isinstance(call, Mapping):
                self._fail(here, "a call {'type': 'function', 'function': {'name', 'arguments'}}", call)
            outer = dict(call) if "function" in call else {"type": "function", "function": call}
            outer = {key: item for key, item in outer.items() if item is not None}
            function = outer["function"]
            if (
                set(outer) - {"id", "type", "index", "function"}
                or not isinstance(function, Mapping)
                or {key for key, item in function.items() if item is not None} - {"name", "arguments"}
                or not isinstance(function.get("name"), str)
            ):
                self._fail(here, "a call {'type': 'function', 'function': {'name', 'arguments'}}", dict(call))
            arguments = self._json(function.get("arguments") or {}, f"{here}.function.arguments")
            if not isinstance(arguments, Mapping):
                self._fail(f"{here}.function.arguments", "a mapping, or its JSON", function["arguments"])
            calls.append({**outer, "function": {"name": function["name"], "arguments": dict(arguments)}})
        return calls

    def _tools(self) -> tuple[Mapping[str, Any], ...]:
        """The functions that a chat may call: a list of JSON schemas, or its JSON."""
        self.unused.discard("tools")
        tools = self._json(self.fields.get("tools") or [], "tools")
        if not isinstance(tools, list):
            self._fail("tools", "a list of functions' JSON schemas, or its JSON", tools)
        for index, tool in enumerate(tools):
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                self._fail(f"tools[{index}]", "a function's JSON schema with its name", tool)
        return tuple(tools)

    def _template_kwargs(self) -> Mapping[str, Any]:
        self.unused.discard("chat_template_kwargs")
        value = self.fields.get("chat_template_kwargs", {})
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            self._fail("chat_template_kwargs", "a mapping of template variables", value)
        return {key: item for key, item in value.items() if item is not None}

    def _json(self, value: Any, name: str) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            self._fail(name, "JSON", value)

    def _last_is_assistant(self, turns: tuple[Message, ...], name: str) -> None:
        if turns[-1]["role"] != "assistant":
            raise InputError(f"{self.where}: {name}: expected the last message to be the assistant's")
