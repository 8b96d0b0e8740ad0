"""A data set's examples: read from JSONL or the hub, every fault named by file and line, and split by prompt."""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lcdd.config import DataConfig
from lcdd.data.records import Example, Record
from lcdd.errors import InputError

FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")  # names that are meant as files, not looked up
BOM = "\ufeff"

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- reading


def _jsonl_rows(path: Path, limit: int | None) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of every line that is not blank, byte-order marks left out: files that were put together have
    them at the beginning of any line."""
    try:
        with open(path, encoding="utf-8") as stream:
            count = 0
            for number, raw in enumerate(stream, start=1):
                line = raw.removeprefix(BOM)
                if not line.strip():
                    continue
                if limit is not None and count >= limit:
                    return
                where = f"{path}:{number}"
                yield where, _json_value(line, where)
                count += 1
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"dataset_name: expected a readable file, got {str(path)!r} ({error.strerror})") from None


def _json_value(line: str, where: str) -> Any:
    """The JSON value in a line: one whose strings are text, whose keys differ and whose numbers are finite."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise InputError(f"{where}: {twice}: expected each field once, got it twice")
        return found

    def constant(name: str) -> NoReturn:
        raise InputError(f"{where}: expected numbers that JSON has, got {name}")

    try:
        value = json.loads(line, object_pairs_hook=mapping, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected one JSON object a line, got {error.msg}") from None
    except RecursionError:
        raise InputError(f"{where}: expected one JSON object a line, got one nested too deeply") from None
    except InputError:
        raise
    except ValueError as error:  # an integer of more digits than Python reads
        raise InputError(f"{where}: expected one JSON object a line, got {error}") from None
    if "\\u" in line and (name := _not_text(value)) is not None:
        raise InputError(f"{where}: {name}: expected text, got half a surrogate pair, which is no character")
    return value


def _not_text(value: Any, name: str = "") -> str | None:
    """Where in a JSON value a string is that cannot be written as UTF-8; None if all can."""
    if isinstance(value, str):
        return (name or "value") if any("\ud800" <= character <= "\udfff" for character in value) else None
    if isinstance(value, Mapping):
        inside = [(key, "field name") for key in value]
        inside += [(item, f"{name}.{key}" if name else key) for key, item in value.items()]
    else:
        inside = [(item, f"{name}[{index}]") for index, item in enumerate(value)] if isinstance(value, list) else []
    return next((found for item, place in inside if (found := _not_text(item, place)) is not None), None)


def _hub_rows(config: DataConfig) -> Iterator[tuple[str, Any]]:
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
        yield f"{name}[{number}]", {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A column's value without fields that are null: a table has them wherever another row has something."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- examples


def load_examples(config: DataConfig) -> list[Example]:
    """All examples of the configured data set, in order; columns that none of them is made of are listed once.

    Rows with nothing in a named column are left out, and counted in a warning.

    Raises:
        InputError: no such file, no example in it, or a malformed line (file and line are named).
    """
    config.require("dataset_name")
    path = Path(str(config.dataset_name))
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long, a directory that may not be looked into
        raise InputError(f"dataset_name: expected a file, got {str(path)[:80]!r} ({error.strerror})") from None
    if is_directory:
        raise InputError(f"dataset_name: expected a JSONL file, got the directory {str(path)!r}")
    looks_local = exists or path.suffix in FILE_SUFFIXES or path.is_absolute()
    rows = _jsonl_rows(path, config.max_samples) if looks_local else _hub_rows(config)
    examples, unused, blank = [], Counter[str](), 0
    for where, row in rows:
        record, others = _record(row, where, config)
        if record is None:
            blank += 1
            continue
        examples.append(
            record.example(
                template_string_prompts=config.template_string_prompts, assistant_only_loss=config.assistant_only_loss
            )
        )
        unused.update(record.unused | others)
    if blank:
        warnings.warn(
            f"{config.dataset_name}: {blank} of {blank + len(examples)} rows have nothing in "
            f"{config.prompt_column!r} or {config.completion_column!r}; they are left out",
            stacklevel=2,
        )
    if unused:
        named = ", ".join(f"{name} ({count} rows)" for name, count in sorted(unused.items()))
        logger.warning("%s: nothing is made of these columns: %s", config.dataset_name, named)
    if not examples:
        raise InputError(f"dataset_name: expected at least one example, {str(config.dataset_name)!r} has none")
    return examples


def _record(row: Any, where: str, config: DataConfig) -> tuple[Record | None, set[str]]:
    """The record (None if a named column is blank), and the columns beside named ones."""
    if config.prompt_column is None or not isinstance(row, Mapping):
        return Record(row, where, config.ignored_columns), set()
    names = (config.prompt_column, str(config.completion_column))
    for name in names:
        if name not in row:
            raise InputError(f"{where}: expected a column {name!r}, got {sorted(map(str, row))}")
    others = set(map(str, row)) - {*names, *config.ignored_columns}
    if any(row[name] is None or row[name] == "" for name in names):
        return None, others
    prompt, completion = (row[name] for name in names)
    chat = isinstance(prompt, list)
    ours = {"prompt": prompt, "completion": completion} if chat else {"instruction": prompt, "output": completion}
    return Record(ours, where), others


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
