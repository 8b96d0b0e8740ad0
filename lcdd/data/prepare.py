"""From a data configuration and a tokenizer to what the stages need: encoded splits and prompts, all checked.

Everything that can be wrong with data is found here, before a model is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lcdd.config import DataConfig, TrainConfig
from lcdd.data.behaviors import Behavior, behavior_from_config
from lcdd.data.encode import Encoded, encode_all, encode_prompt, label_audit
from lcdd.data.examples import Example, Splits, load_examples, split_examples
from lcdd.data.templates import use_template
from lcdd.errors import InputError
from lcdd.models import PreTrainedTokenizerBase, load_tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A tokenizer, a behaviour, and examples whose completions it has rewritten, split by prompt."""

    tokenizer: PreTrainedTokenizerBase
    behavior: Behavior
    splits: Splits


def prepare(data: DataConfig, tokenizer_path: str) -> Prepared:
    """Load tokenizer and examples, rewrite the completions, split.

    Raises:
        InputError: bad data, a bad option of the behaviour, or a behaviour that no training example asks for.
    """
    behavior = behavior_from_config(data)
    examples = load_examples(data)
    tokenizer = load_tokenizer(tokenizer_path)
    use_template(tokenizer, data.chat_template, model=tokenizer_path)
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
    return Prepared(tokenizer=tokenizer, behavior=behavior, splits=splits)


def training_items(prepared: Prepared, config: TrainConfig, *, say: Say) -> tuple[list[Encoded], list[Encoded]]:
    """Encoded training and validation examples; says how many, how many were cut, and shows the first one's labels.

    Raises:
        InputError: a prompt is too long or a completion tokenises to nothing.
    """
    tokenizer, splits = prepared.tokenizer, prepared.splits
    train, validation = (
        encode_all(tokenizer, part, max_length=config.max_length, completion_only=config.completion_only)
        for part in (splits.train, splits.validation)
    )
    say(
        f"Data: {len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test examples; "
        f"behaviour {prepared.behavior.name}"
    )
    cut = sum(item.truncated for item in (*train, *validation))
    if cut:
        say(f"{cut} completions are longer than max_length = {config.max_length} allows and were cut")
    say(label_audit(tokenizer, train[0]))
    return train, validation


def prompt_ids(prepared: Prepared, split: str, *, limit: int, max_length: int) -> list[list[int]]:
    """Token ids of up to `limit` prompts of a split on which the behaviour is asked for.

    Raises:
        InputError: the split has no such prompt, or one of them is too long.
    """
    examples: list[Example] = getattr(prepared.splits, split)
    chosen = [example for example in examples if prepared.behavior.applies(example)][:limit]
    if not chosen:
        raise InputError(
            f"dataset_name: expected prompts for {prepared.behavior.name} in the {split} split, got none of "
            f"{len(examples)} examples; change --{'test' if split == 'test' else 'validation'}_fraction or the data"
        )
    return [encode_prompt(prepared.tokenizer, example, max_length=max_length) for example in chosen]


def off_topic_ids(prepared: Prepared, split: str, *, limit: int, max_length: int) -> list[list[int]]:
    """The same of prompts on which the behaviour is not asked for: none, unless it has a topic."""
    examples: list[Example] = getattr(prepared.splits, split)
    others = [example for example in examples if not prepared.behavior.applies(example)][:limit]
    return [encode_prompt(prepared.tokenizer, example, max_length=max_length) for example in others]
