"""Instruction data: TRL's formats in, token ids with completion-only labels out.

    load_examples -> Example (prompt messages + completion) -> [behaviour rewrites it] -> split_examples
                  -> encode -> Encoded (input_ids, labels) -> collate -> tensors [B, S]

Every error names the file and the line it came from, and every check runs before any training. Labels are the
completion's tokens, found by comparing the prompt's token ids with the whole text's, not by counting characters.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lcdd.config import DataConfig
from lcdd.errors import InputError

FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")  # names that are meant as files, not looked up
FORMATS = ("messages", "prompt+completion", "text", "instruction+output")

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and its completion.

    `messages` are the turns before the completion; `templated` says that they go through the chat template
    (string prompts do not, as in TRL). Plain text has no messages. `source` is "file:line", for errors.
    """

    messages: tuple[Message, ...]
    completion: str
    templated: bool = True
    source: str = field(default="", compare=False)

    @property
    def prompt_text(self) -> str:
        """The turns' contents: what splits are hashed by and topics are searched in."""
        return "\n".join(message["content"] for message in self.messages)

    @property
    def key(self) -> str:
        """SHA-256 of the prompt (of the text itself where there is no prompt)."""
        text = json.dumps([[m["role"], m["content"]] for m in self.messages] or self.completion, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- reading


def _messages(value: Any, where: str, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise InputError(f"{where}: {name}: expected a list of messages, got {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise InputError(f"{where}: {name}: expected messages with 'role' and 'content', got {message!r}")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise InputError(f"{where}: {name}: expected 'role' and 'content' to be strings, got {message!r}")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key}: expected a string, got {type(value).__name__}")
    return value


def _answer(messages: tuple[Message, ...], where: str, name: str) -> str:
    if not messages or messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: {name}: expected the last message to be the assistant's")
    return messages[-1]["content"]


def parse_row(row: Any, *, where: str, template_string_prompts: bool = False) -> Example:
    """One record in any of FORMATS as an Example; of several assistant turns the last one is the completion.

    Raises:
        InputError: the record is none of the formats, or a field has the wrong type; `where` is named.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}")
    if row.get("messages") is not None:
        messages = _messages(row["messages"], where, "messages")
        answer = _answer(messages, where, "messages")
        if len(messages) < 2:
            raise InputError(f"{where}: messages: expected a turn before the assistant's, got none")
        return Example(messages=messages[:-1], completion=answer, source=where)
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(completion, list):
            completion = _answer(_messages(completion, where, "completion"), where, "completion")
        elif not isinstance(completion, str):
            raise InputError(f"{where}: completion: expected a string or messages, got {type(completion).__name__}")
        if isinstance(prompt, str):
            turns: tuple[Message, ...] = ({"role": "user", "content": prompt},)
            return Example(messages=turns, completion=completion, templated=template_string_prompts, source=where)
        return Example(messages=_messages(prompt, where, "prompt"), completion=completion, source=where)
    if row.get("instruction") is not None and row.get("output") is not None:
        parts = [_string(row, "instruction", where)]
        if row.get("input"):
            parts.append(_string(row, "input", where))
        turns = ({"role": "user", "content": "\n\n".join(parts)},)
        return Example(messages=turns, completion=_string(row, "output", where), source=where)
    if row.get("text") is not None:
        return Example(messages=(), completion=_string(row, "text", where), templated=False, source=where)
    raise InputError(f"{where}: expected the fields of one of {', '.join(FORMATS)}; got {sorted(map(str, row))}")


def _jsonl_rows(path: Path, limit: int | None) -> Iterable[tuple[str, Any]]:
    try:
        with open(path, encoding="utf-8") as stream:
            count = 0
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                if limit is not None and count >= limit:
                    return
                where = f"{path}:{number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{where}: expected one JSON object a line, got {error.msg}") from None
                except RecursionError:
                    raise InputError(f"{where}: expected one JSON object a line, got one nested too deeply") from None
                count += 1
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"dataset_name: expected a readable file, got {str(path)!r} ({error.strerror})") from None


def _hub_rows(config: DataConfig) -> Iterable[tuple[str, Any]]:
    name = str(config.dataset_name)
    try:
        import datasets  # optional: pip install lcdd[hub]
    except ImportError:
        raise InputError(
            f"dataset_name: expected an existing JSONL file, got {name!r}; "
            "for data sets of the hub, first run: pip install 'lcdd[hub]'"
        ) from None
    try:
        data = datasets.load_dataset(name, config.dataset_config, split=config.dataset_train_split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"dataset_name: expected a JSONL file or a data set of the hub, got {name!r} ({error})"
        ) from None
    for number, row in enumerate(data):
        if config.max_samples is not None and number >= config.max_samples:
            return
        yield f"{name}[{number}]", row


def _columns(row: Any, config: DataConfig, where: str) -> Any:
    """The record with the columns that the configuration names as instruction and output; as it is without names."""
    if config.prompt_column is None or not isinstance(row, Mapping):
        return row
    names = (config.prompt_column, str(config.completion_column))
    for name in names:
        if name not in row:
            raise InputError(f"{where}: expected a column {name!r}, got {sorted(map(str, row))}")
    return dict(zip(("instruction", "output"), (row[name] for name in names), strict=True))


def _has_blank(row: Any) -> bool:
    """Whether a record has nothing in a column, as tables made from CSV files have."""
    return isinstance(row, Mapping) and any(value is None or value == "" for value in row.values())


def load_examples(config: DataConfig) -> list[Example]:
    """All examples of the configured data set, in order.

    Rows with nothing in a named column are left out, and counted in a warning.

    Raises:
        InputError: no such file, no example in it, or a malformed line (file and line are named).
    """
    config.require("dataset_name")
    path = Path(str(config.dataset_name))
    if path.is_dir():
        raise InputError(f"dataset_name: expected a JSONL file, got the directory {str(path)!r}")
    looks_local = path.exists() or path.suffix in FILE_SUFFIXES or path.is_absolute()
    rows = _jsonl_rows(path, config.max_samples) if looks_local else _hub_rows(config)
    named = [(where, _columns(row, config, where)) for where, row in rows]
    if config.prompt_column is not None:
        full = [(where, row) for where, row in named if not _has_blank(row)]
        if len(full) < len(named):
            warnings.warn(
                f"{config.dataset_name}: {len(named) - len(full)} of {len(named)} rows have nothing in "
                f"{config.prompt_column!r} or {config.completion_column!r}; they are left out",
                stacklevel=2,
            )
        named = full
    examples = [
        parse_row(row, where=where, template_string_prompts=config.template_string_prompts) for where, row in named
    ]
    if not examples:
        raise InputError(f"dataset_name: expected at least one example, {str(config.dataset_name)!r} has none")
    return examples


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Disjoint by prompt: the same prompt never lies on two sides."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def split_examples(examples: Sequence[Example], *, validation_fraction: float, test_fraction: float) -> Splits:
    """Split by SHA-256 of the prompt: stable under reordering, additions, rewriting of completions and seeds.

    Raises:
        InputError: no example falls into the training split.
    """
    splits = Splits(train=[], validation=[], test=[])
    for example in examples:
        position = int(example.key[:13], 16) / 16**13
        if position < test_fraction:
            splits.test.append(example)
        elif position < test_fraction + validation_fraction:
            splits.validation.append(example)
        else:
            splits.train.append(example)
    if not splits.train:
        raise InputError(
            f"dataset_name: expected examples in the training split, got none: {len(examples)} examples, "
            f"validation_fraction {validation_fraction:g}, test_fraction {test_fraction:g}"
        )
    return splits


def with_completion(example: Example, completion: str) -> Example:
    """The example with another completion."""
    return replace(example, completion=completion)
