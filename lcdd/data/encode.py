"""From examples to token ids: one function for training, erasing, evaluating and generating."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from lcdd.data.examples import Example, Message
from lcdd.data.templates import render_chat
from lcdd.errors import InputError

IGNORE = -100
MARK = "\ue000completion\ue001"  # private-use characters around it, so that no template's own text is taken for it


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of one example; `labels` is IGNORE on the prompt. `truncated`: the completion was cut."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    n_prompt: int
    truncated: bool = False


# ---------------------------------------------------------------- tokens


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool, where: str = "") -> str:
    """Messages as text by the tokenizer's chat template, for a model that answers at once (`lcdd.templates`).

    Raises:
        InputError: the template refuses the messages (roles that do not alternate, say); `where` is named.
    """
    try:
        return render_chat(tokenizer, list(messages), add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise InputError(
            f"{where}: expected messages that the chat template takes, got roles {roles}: {error}"
        ) from None


def prompt_string(tokenizer: Any, example: Example) -> str:
    """The text that generation starts from."""
    if not example.templated:
        return example.prompt_text
    return render(tokenizer, example.messages, add_generation_prompt=True, where=example.source)


def _ids(tokenizer: Any, text: str, *, templated: bool) -> list[int]:
    # A chat template writes its own special tokens; plain text gets the tokenizer's (Llama's <s>).
    return list(tokenizer(text, add_special_tokens=not templated)["input_ids"])


def encode_prompt(tokenizer: Any, example: Example, *, max_length: int | None = None) -> list[int]:
    """Token ids that generation starts from.

    Raises:
        InputError: no prompt (plain text data), or one of more than `max_length` tokens.
    """
    if not example.messages:
        raise InputError(f"{example.source}: expected a prompt, got plain text, which nothing can be asked of")
    ids = _ids(tokenizer, prompt_string(tokenizer, example), templated=example.templated)
    if not example.templated and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # tokenizers that close every text: the answer has to follow the prompt
    if not ids:
        raise InputError(f"{example.source}: expected a prompt of at least one token, got {example.prompt_text!r}")
    if max_length is not None and len(ids) > max_length:
        raise InputError(
            f"{example.source}: expected a prompt of at most {max_length} tokens (the maximum length), got {len(ids)}"
        )
    return ids


def _texts(tokenizer: Any, example: Example) -> tuple[str, str]:
    """(prompt text, whole text) such that the whole begins with the prompt exactly as generation will see it."""
    prompt = prompt_string(tokenizer, example)
    if not example.templated:
        return prompt, prompt + example.completion
    turns = [*example.messages, {"role": "assistant", "content": example.completion}]
    whole = render(tokenizer, turns, add_generation_prompt=False, where=example.source)
    if whole.startswith(prompt):
        return prompt, whole
    # The template writes a finished turn differently from an open one (an empty thought, say). What generation
    # will see counts: its prompt, then the completion and whatever the template writes after it, which a completion
    # that occurs nowhere else shows.
    marked = [*example.messages, {"role": "assistant", "content": MARK}]
    after = render(tokenizer, marked, add_generation_prompt=False, where=example.source).rpartition(MARK)[2]
    for text in (example.completion, example.completion.strip()):
        if text and whole.endswith(text + after):
            return prompt, prompt + text + after
    raise InputError(f"{example.source}: expected the chat template to contain the completion, it does not")


def _join(tokenizer: Any, prompt_ids: list[int], prompt: str, whole: str, *, templated: bool) -> tuple[list[int], int]:
    """Ids of the whole text, and how many of them are the prompt's."""
    ids = _ids(tokenizer, whole, templated=templated)
    if ids[: len(prompt_ids)] == prompt_ids:
        return ids, len(prompt_ids)
    if not tokenizer.is_fast:  # no offsets: tokenise the two sides apart, as generation will
        rest = list(tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"])
        return prompt_ids + rest, len(prompt_ids)
    # A token straddles the boundary. It holds characters of the completion, so it is trained on.
    offsets = tokenizer(whole, add_special_tokens=not templated, return_offsets_mapping=True)["offset_mapping"]
    n_prompt = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
    return ids, n_prompt


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
    empty = InputError(
        f"{example.source}: expected a completion, got {example.completion!r}, which tokenises to nothing"
    )
    if not example.completion.strip():
        raise empty
    if example.messages:
        prompt_ids = encode_prompt(tokenizer, example, max_length=max_length - 1)
        prompt, whole = _texts(tokenizer, example)
        ids, n_prompt = _join(tokenizer, prompt_ids, prompt, whole, templated=example.templated)
    else:
        ids, n_prompt = _ids(tokenizer, example.completion, templated=False), 0
    if not tokenizer.decode(ids[n_prompt:], skip_special_tokens=True).strip():
        raise empty
    tail = ids[n_prompt:]
    # What a template writes after the end of the turn is never generated: the last end-of-text token closes.
    ids = ids[: len(ids) - tail[::-1].index(eos)] if eos in tail else [*ids, eos]
    truncated = len(ids) > max_length
    ids = ids[:max_length]
    first = n_prompt if completion_only else 0
    labels = [IGNORE] * first + ids[first:]
    return Encoded(input_ids=tuple(ids), labels=tuple(labels), n_prompt=n_prompt, truncated=truncated)


def encode_all(
    tokenizer: Any, examples: Iterable[Example], *, max_length: int, completion_only: bool = True
) -> list[Encoded]:
    """`encode` every example; all errors (the first three spelled out) are raised together.

    Raises:
        InputError: any example cannot be encoded.
    """
    encoded, errors = [], []
    for example in examples:
        try:
            encoded.append(encode(tokenizer, example, max_length=max_length, completion_only=completion_only))
        except InputError as error:
            errors.append(str(error))
    if errors:
        more = f"; and {len(errors) - 3} more like this" if len(errors) > 3 else ""
        raise InputError("; ".join(errors[:3]) + more)
    return encoded


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
    pieces = "|".join(re.sub(r"\n", "\\\\n", tokenizer.decode([token])) for token in trained)
    cut = " (cut at the maximum length)" if item.truncated else ""
    return (
        f"First example, as the model sees it\n"
        f"  no loss, {len(silent)} tokens: {tokenizer.decode(silent)!r}\n"
        f"  loss,    {len(trained)} tokens{cut}: |{pieces}|"
    )
