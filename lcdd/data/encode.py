"""From examples to token ids: one function for training, erasing, evaluating, auditing, generating and the Python API.

`encode(example)` begins with `encode_prompt(example)`, which is what generation starts from; what follows is tokenised
behind those ids, never across their end.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from lcdd.data.records import Example, Message
from lcdd.data.templates import MARK, render_chat
from lcdd.errors import InputError

IGNORE = -100
MOST_ERRORS = 100


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of one example; `labels` is IGNORE where nothing is learned. `truncated`: the completion was cut."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    n_prompt: int
    truncated: bool = False


# ---------------------------------------------------------------- prompts


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    example: Example | None = None,
) -> str:
    """Messages as text by the tokenizer's chat template, with the tools and template variables of their `example`.

    Raises:
        InputError: the template refuses the messages (roles that do not alternate, say), or leaves something out.
    """
    of = example or Example(messages=(), completion="")
    return render_chat(
        tokenizer,
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=of.tools,
        variables=of.template_kwargs,
        where=of.source,
    )


def prompt_string(tokenizer: Any, example: Example) -> str:
    """The text that generation starts from."""
    if not example.templated:
        return example.prompt_text
    return render(tokenizer, example.messages, add_generation_prompt=True, example=example)


def _bare(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def text_start(tokenizer: Any, text: str) -> list[int]:
    """What the tokenizer puts in front of a text by itself (Llama's <s>), unless the text has its own beginning.

    It has one if it begins with those tokens, or as the chat template begins every chat: a template writes its special
    tokens itself, and a text that comes from it is taken as it is.
    """
    probe = text or "a"
    bare, whole = _bare(tokenizer, probe), list(tokenizer(probe)["input_ids"])
    places = range(len(whole) - len(bare) + 1)
    start = next((whole[:place] for place in places if whole[place : place + len(bare)] == bare), [])
    if not start or bare[: len(start)] == start:
        return []
    opening = _opening(tokenizer)
    return [] if opening and text.startswith(opening) else start


def _opening(tokenizer: Any) -> str:
    """The text with which the tokenizer's own chat template begins every chat; empty without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    texts = []
    user: Message = {"role": "user", "content": "a"}
    for messages in ([user], [{"role": "user", "content": "b"}], [{"role": "system", "content": "c"}, user]):
        try:
            texts.append(render(tokenizer, messages, add_generation_prompt=True))
        except InputError:
            continue  # a template without a system's turn, say
    return "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that something is to follow: with what the tokenizer puts in front of it (see `text_start`),
    without what it may put behind it."""
    return [*text_start(tokenizer, text), *_bare(tokenizer, text)]


def encode_prompt(tokenizer: Any, example: Example, *, max_length: int | None = None) -> list[int]:
    """Token ids that generation starts from.

    Raises:
        InputError: no prompt (plain text data), or one of more than `max_length` tokens.
    """
    return _prompt(tokenizer, example, max_length)[2]


def _prompt(tokenizer: Any, example: Example, max_length: int | None) -> tuple[str, list[int], list[int]]:
    """A prompt's text, what the tokenizer puts in front of it, and all its token ids; see `encode_prompt`."""
    if not example.messages:
        raise InputError(f"{example.source}: expected a prompt, got plain text, which nothing can be asked of")
    text = prompt_string(tokenizer, example)
    start = [] if example.templated else text_start(tokenizer, text)  # a chat template writes its own special tokens
    ids = [*start, *_bare(tokenizer, text)]
    if not ids:
        raise InputError(f"{example.source}: expected a prompt of at least one token, got {example.prompt_text!r}")
    if max_length is not None and len(ids) > max_length:
        raise InputError(
            f"{example.source}: expected a prompt of at most {max_length} tokens (the maximum length), got {len(ids)}; "
            "--overlong drop or truncate goes on without it or with its beginning"
        )
    return text, start, ids


# ---------------------------------------------------------------- completions


def _around(tokenizer: Any, example: Example, chat: Sequence[Message], index: int, whole: str) -> tuple[str, str]:
    """What the template writes before and behind the own text of the assistant's turn `index` of a chat (`whole` as
    text): seen by a mark there."""
    mark = MARK
    while mark in whole:
        mark += MARK
    marked = [*chat[:index], {"role": "assistant", "content": mark}, *chat[index + 1 :]]
    before, _, after = render(tokenizer, marked, add_generation_prompt=False, example=example).partition(mark)
    return before, after


def _same_text(written: str, content: str) -> bool:
    """Whether a template wrote a content out: white space and marks around a thought may be its own."""
    return written.strip() == content.strip() or re.sub(r"\W", "", written) == re.sub(r"\W", "", content)


def _pieces(tokenizer: Any, example: Example, prompt: str) -> list[tuple[str, bool]]:
    """What follows the prompt, in pieces of text: (text, whether it is learned). The last ends with the turn's end.

    What a template writes after the end token is never generated, and left out.

    Raises:
        InputError: the template leaves the completion out, or writes it so that it does not follow the prompt.
    """
    if not example.templated:
        return [(example.completion, True)]
    chat, first = [*example.messages, *example.answer], len(example.messages)
    whole = render(tokenizer, chat, add_generation_prompt=False, example=example)
    after = _around(tokenizer, example, chat, len(chat) - 1, whole)[1]
    # A template may write a finished turn differently from an open one (an empty thought, say). What generation will
    # see counts: its prompt, then the first turn's own text.
    start, end = _start(tokenizer, example, chat, whole, prompt, first), len(whole) - len(after)
    plain = len(chat) == first + 1 and set(chat[-1]) == {"role", "content"}
    if start > end or not whole.endswith(after) or (plain and not _same_text(whole[start:end], example.completion)):
        raise InputError(f"{example.source}: expected the chat template to contain the completion, it does not")
    eos = str(tokenizer.eos_token)
    close = after[: after.index(eos) + len(eos)] if eos in after else after
    stop = end + len(close)
    if not example.assistant_only or len(chat) == first + 1:
        return [(whole[start:stop], True)]
    pieces, at = [], start
    for index in range(first, len(chat)):
        if chat[index]["role"] != "assistant":
            continue
        asked = render(tokenizer, chat[:index], add_generation_prompt=True, example=example)
        low = start if index == first else _start(tokenizer, example, chat, whole, asked, index)
        high = len(whole) - len(_around(tokenizer, example, chat, index, whole)[1])
        high += len(close) * whole.startswith(close, high)
        pieces += [(whole[at:low], False), (whole[low:high], True)]
        at = high
    return [(text, learned) for text, learned in pieces if text]


def _start(tokenizer: Any, example: Example, chat: Sequence[Message], whole: str, asked: str, index: int) -> int:
    """Where in `whole`, the chat as text, begins what is generated when turn `index` is asked for by the text `asked`.

    Raises:
        InputError: the turn cannot be found there.
    """
    if whole.startswith(asked):
        return len(asked)
    before = _around(tokenizer, example, chat, index, whole)[0]
    if not whole.startswith(before):
        raise InputError(
            f"{example.source}: expected the chat template to contain the completion behind the prompt that generation "
            "starts from, it does not (a thought needs chat_template_kwargs with enable_thinking)"
        )
    return len(before)


def _continued(tokenizer: Any, before: list[int], start: list[int], text: str, more: str) -> list[int]:
    """Token ids of `more` behind `before`, which are those of `text` behind `start`.

    Where a token would lie across the border, `more` is tokenised by itself, as the one that generation begins with:
    in front of it a text that the tokenizer cuts there, so that it puts no space of its own in.
    """
    whole = [*start, *_bare(tokenizer, text + more)]
    if whole[: len(before)] == before:
        return whole[len(before) :]
    alone = _bare(tokenizer, more)
    wanted = _decoded(tokenizer, whole)
    for anchor in ("", "\n", "a"):
        head, both = _bare(tokenizer, anchor), _bare(tokenizer, anchor + more)
        ids = both[len(head) :]
        if both[: len(head)] == head and _decoded(tokenizer, [*before, *ids]) == wanted:
            return ids
    return alone


def encode(tokenizer: Any, example: Example, *, max_length: int, completion_only: bool = True) -> Encoded:
    """Token ids and labels of one example; the completion ends with the end-of-text token unless it is cut.

    Args:
        max_length: tokens in all; a longer completion is cut and `truncated` set.
        completion_only: False puts the loss on the prompt too (the first token has none to predict it from).

    Raises:
        InputError: the prompt leaves no room for the completion, or the completion tokenises to nothing.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("tokenizer: expected an end-of-text token (eos_token), got none")
    if not completion_only and example.assistant_only and any(m["role"] == "assistant" for m in example.messages):
        raise InputError(
            f"{example.source}: expected completion_only beside assistant_only_loss for a prompt with answers in it"
        )
    empty = InputError(
        f"{example.source}: expected a completion, got {example.completion!r}, which tokenises to nothing"
    )
    if not (example.completion.strip() or example.turns):
        raise empty
    if example.messages:
        text, start, ids = _prompt(tokenizer, example, max_length - 1)
        n_prompt, learned = len(ids), [not (completion_only or example.assistant_only)] * len(ids)
        pieces = _pieces(tokenizer, example, text)
    else:
        start, text, n_prompt, pieces = text_start(tokenizer, example.completion), "", 0, [(example.completion, True)]
        ids, learned = start, [True] * len(start)
    for piece, wanted in pieces:
        new = _continued(tokenizer, ids, start, text, piece)
        ids, learned, text = [*ids, *new], [*learned, *[wanted] * len(new)], text + piece
    if not tokenizer.decode(ids[n_prompt:], skip_special_tokens=True).strip():
        raise empty
    if ids[-1] != eos:
        ids, learned = [*ids, eos], [*learned, True]
    labels = [token if wanted else IGNORE for token, wanted in zip(ids, learned, strict=True)]
    return Encoded(
        input_ids=tuple(ids[:max_length]),
        labels=tuple(labels[:max_length]),
        n_prompt=n_prompt,
        truncated=len(ids) > max_length,
    )


def encode_all(
    tokenizer: Any, examples: Iterable[Example], *, max_length: int, completion_only: bool = True
) -> list[Encoded]:
    """`encode` every example; errors (the first three spelled out, a hundred at most) are raised together.

    Raises:
        InputError: any example cannot be encoded.
    """
    encoded, errors = [], []
    for example in examples:
        try:
            encoded.append(encode(tokenizer, example, max_length=max_length, completion_only=completion_only))
        except InputError as error:
            errors.append(str(error))
        if len(errors) == MOST_ERRORS:
            break
    if errors:
        more = f"; and {len(errors) - 3} more like this" if len(errors) > 3 else ""
        raise InputError("; ".join(errors[:3]) + more)
    return encoded


# ---------------------------------------------------------------- lengths


def fitting(
    tokenizer: Any, examples: Iterable[Example], *, max_length: int, overlong: str, room: bool = False
) -> Iterator[tuple[Example | None, bool]]:
    """Every example, and whether its prompt was longer than `max_length` tokens: then it is dropped (None) or cut, as
    `overlong` says; under "error" it is left to `encode_prompt`, which refuses it.

    Args:
        room: a prompt that is cut leaves room for its completion, up to half of `max_length`.
    """
    for example in examples:
        limit = max_length - room
        if overlong == "error" or not example.messages or len(encode_prompt(tokenizer, example)) <= limit:
            yield example, False
        elif overlong == "drop":
            yield None, True
        else:
            needed = min(len(_bare(tokenizer, example.completion)) + 1, max_length // 2) if room else 0
            least = len(encode_prompt(tokenizer, _cut(example, 0)))
            yield shortened(tokenizer, example, max_length=min(limit, max(max_length - needed, least))), True


def shortened(tokenizer: Any, example: Example, *, max_length: int) -> Example:
    """The example with its prompt's texts cut so that the prompt has at most `max_length` tokens.

    All messages are cut after the same number of characters, the greatest that will do: the longest are cut, short ones
    (a system's, say) stay, and whatever the chat template writes stays too.

    Raises:
        InputError: the template alone is longer.
    """
    low, high = 0, max(len(message["content"]) for message in example.messages)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(encode_prompt(tokenizer, _cut(example, middle))) <= max_length
        low, high = (middle, high) if fits else (low, middle - 1)
    encode_prompt(tokenizer, _cut(example, low), max_length=max_length)
    return _cut(example, low)


def _cut(example: Example, characters: int) -> Example:
    messages = tuple({**message, "content": message["content"][:characters]} for message in example.messages)
    return replace(example, messages=messages)


# ---------------------------------------------------------------- batches


def collate(batch: Sequence[Encoded], *, pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded int64 tensors [B, S]: input_ids, attention_mask (1 on real tokens), labels (IGNORE on padding)."""
    width = max(len(item.input_ids) for item in batch)

    def pad(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (width - len(values))]

    return {
        "input_ids": torch.tensor([pad(item.input_ids, pad_token_id) for item in batch]),
        "attention_mask": torch.tensor([pad([1] * len(item.input_ids), 0) for item in batch]),
        "labels": torch.tensor([pad(item.labels, IGNORE) for item in batch]),
    }


def label_audit(tokenizer: Any, item: Encoded) -> str:
    """One encoded example for the eye: the tokens without loss as text, those with loss one by one."""
    silent = [token for token, label in zip(item.input_ids, item.labels, strict=True) if label == IGNORE]
    trained = [token for token, label in zip(item.input_ids, item.labels, strict=True) if label != IGNORE]
    pieces = "|".join(re.sub(r"\n", "\\\\n", _decoded(tokenizer, [token])) for token in trained)
    cut = " (cut at the maximum length)" if item.truncated else ""
    return (
        f"First example, as the model sees it\n"
        f"  no loss, {len(silent)} tokens: {_decoded(tokenizer, silent)!r}\n"
        f"  loss,    {len(trained)} tokens{cut}: |{pieces}|"
    )
