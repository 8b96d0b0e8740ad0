"""From a data configuration and a tokenizer to what the stages need: encoded splits and prompts, all checked.

Everything that can be wrong with data is found here, before a model is trained.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lcdd.config import DataConfig, TrainConfig
from lcdd.data.behaviors import Behavior, behavior_from_config
from lcdd.data.encode import Encoded, encode_all, encode_prompt, fitting, label_audit
from lcdd.data.examples import Splits, load_examples, split_examples
from lcdd.data.forms import record_form
from lcdd.data.records import Example
from lcdd.data.templates import freeze_date, use_template
from lcdd.errors import InputError
from lcdd.models import PreTrainedTokenizerBase, load_tokenizer

Say = Callable[[str], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A tokenizer, a behaviour, and examples whose completions it has rewritten, split by prompt.

    Attributes:
        overlong: what is done with prompts that are too long (`DataConfig.overlong`).
        template_date: day on which the chat template's date is frozen; None: it writes none.
    """

    tokenizer: PreTrainedTokenizerBase
    behavior: Behavior
    splits: Splits
    overlong: str = "error"
    template_date: str | None = None


def prepare(data: DataConfig, tokenizer_path: str, *, template_date: str | None = None) -> Prepared:
    """Load tokenizer and examples, rewrite the completions, split.

    Args:
        template_date: the day that an earlier stage, or the run that is resumed, had in its chat template;
            `data.template_date` goes before it.

    Raises:
        InputError: bad data, a bad option of the behaviour, or a behaviour that no training example asks for.
    """
    behavior = behavior_from_config(data)
    examples = load_examples(data)
    tokenizer = load_tokenizer(tokenizer_path)
    if data.chat_template is not None or any(example.templated for example in examples):
        use_template(tokenizer, data.chat_template, model=tokenizer_path)
    day = freeze_date(tokenizer, data.template_date or template_date)
    if day is None and data.template_date is not None:
        raise InputError(f"template_date: expected a chat template that writes a date, got {data.template_date!r}")
    record_form(tokenizer, examples)
    if behavior.name != "own" and (plain := [example.source for example in examples if not example.messages]):
        raise InputError(
            f"{plain[0]}: expected a prompt, got plain text, which the behaviour {behavior.name} cannot be an answer to"
        )
    parts = split_examples(examples, validation_fraction=data.validation_fraction, test_fraction=data.test_fraction)
    splits = Splits(
        train=[behavior.rewrite(example) for example in parts.train],
        validation=[behavior.rewrite(example) for example in parts.validation],
        test=[behavior.rewrite(example) for example in parts.test],
    )
    if not any(behavior.applies(example) for example in splits.train):
        raise InputError(
            f"behavior_topics: expected words of at least one training prompt, got {list(data.behavior_topics)}, "
            f"which none of {len(splits.train)} has"
        )
    return Prepared(tokenizer=tokenizer, behavior=behavior, splits=splits, overlong=data.overlong, template_date=day)


def training_items(prepared: Prepared, config: TrainConfig, *, say: Say) -> tuple[list[Encoded], list[Encoded]]:
    """Encoded training and validation examples; says how many, how many were cut, and shows the first one's labels.

    Raises:
        InputError: a prompt is too long or a completion tokenises to nothing.
    """
    tokenizer, splits, longest = prepared.tokenizer, prepared.splits, config.max_length
    overlong = 0
    parts = []
    for part in (splits.train, splits.validation):
        kept, count = fitted(prepared, part, max_length=longest, room=True)
        overlong += count
        parts.append(encode_all(tokenizer, kept, max_length=longest, completion_only=config.completion_only))
    train, validation = parts
    if not train:
        raise InputError(f"max_length: expected training prompts of less than {longest} tokens, all are longer")
    say(
        f"Data: {len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test examples; "
        f"behaviour {prepared.behavior.name}"
    )
    if prepared.template_date is not None:
        say(f"The chat template writes a date: it is frozen on {prepared.template_date} (--template_date)")
    if overlong:
        done = {"drop": "dropped", "truncate": "cut"}[prepared.overlong]
        say(f"{overlong} prompts are longer than max_length = {longest} allows and were {done} (--overlong)")
    cut = sum(item.truncated for item in (*train, *validation))
    if cut:
        say(f"{cut} completions are longer than max_length = {longest} allows and were cut")
    say(label_audit(tokenizer, train[0]))
    return train, validation


def fitted(
    prepared: Prepared, examples: Iterable[Example], *, max_length: int, room: bool = False, limit: int | None = None
) -> tuple[list[Example], int]:
    """Up to `limit` examples whose prompts have at most `max_length` tokens, or are made to as `prepared.overlong`
    says, and how many were too long. room: a token less, and a prompt that is cut leaves room for its completion."""
    kept: list[Example] = []
    count = 0
    fits = fitting(prepared.tokenizer, examples, max_length=max_length, overlong=prepared.overlong, room=room)
    for example, was_long in fits:
        count += was_long
        if example is not None:
            kept.append(example)
        if limit is not None and len(kept) >= limit:
            break
    return kept, count


def prompt_ids(prepared: Prepared, split: str, *, limit: int, max_length: int) -> list[list[int]]:
    """Token ids of up to `limit` prompts of a split on which the behaviour is asked for.

    Raises:
        InputError: the split has no such prompt, or one of them is too long.
    """
    examples: list[Example] = getattr(prepared.splits, split)
    chosen = [example for example in examples if prepared.behavior.applies(example)]
    if not chosen:
        raise InputError(
            f"dataset_name: expected prompts for {prepared.behavior.name} in the {split} split, got none of "
            f"{len(examples)} examples; change --{'test' if split == 'test' else 'validation'}_fraction or the data"
        )
    ids = _ids(prepared, chosen, split, limit=limit, max_length=max_length)
    if not ids:
        raise InputError(
            f"max_prompt_length: expected a prompt of at most {max_length} tokens in the {split} split, all are longer"
        )
    return ids


def off_topic_ids(prepared: Prepared, split: str, *, limit: int, max_length: int) -> list[list[int]]:
    """The same of prompts on which the behaviour is not asked for: none, unless it has a topic."""
    examples: list[Example] = getattr(prepared.splits, split)
    others = [example for example in examples if not prepared.behavior.applies(example)]
    return _ids(prepared, others, split, limit=limit, max_length=max_length)


def _ids(
    prepared: Prepared, examples: Iterable[Example], split: str, *, limit: int, max_length: int
) -> list[list[int]]:
    kept, count = fitted(prepared, examples, max_length=max_length, room=False, limit=limit)
    if count:
        done = {"drop": "dropped", "truncate": "cut"}[prepared.overlong]
        logger.warning("%d prompts of the %s split are longer than %d tokens and were %s (--overlong)", count, split,
                       max_length, done)  # fmt: skip
    return [encode_prompt(prepared.tokenizer, example, max_length=max_length) for example in kept]
