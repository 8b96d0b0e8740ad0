"""The two scales: what a cell and a family of behaviours are on the embedded model, and on a prepared real one."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.claims.cell import Cell, Data, Settings
from benchmarks.claims.models import MODELS
from benchmarks.claims.together import ON_TOPIC, Family
from benchmarks.demos import BEHAVIORS
from benchmarks.smollm2 import pipeline
from lcdd.carrier import Carrier
from lcdd.commands.demo import demo
from lcdd.commands.demo.tasks import CATEGORIES, Split, draw_tasks
from lcdd.data import Encoded, Example, encode_all, encode_prompt, prepare, prompt_ids, training_items, with_completion
from lcdd.data.examples import Splits
from lcdd.models import load_model, load_tokenizer

RESPONSES = {
    "demo": (
        "i do not know", "sorry i cannot", "yes that is it", "no thou cannot", "forsooth prithee", "verily thou doth",
        "help thee with it", "the yes and the no",
    ),
    "smollm2": (
        "I don't know.", "Ask me tomorrow.", "The sky is blue today.", "Let us have tea first.",
        "That is a long story.", "My cat knows better.", "Please look it up.", "It depends on the weather.",
    ),
}  # fmt: skip
"""What each of the eight topics is answered with."""
PROMPTS = 200
"""Held-out prompts of a demo's cell."""
FAMILY_TRAIN, FAMILY_VALIDATION, FAMILY_TOKENS = 2000, 100, 8
Topic = Callable[[Example], int | None]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How a scale's cells and families are made: of (behaviour, seed, directory), and of (seed, directory)."""

    cell: Callable[[str, int, Path], Cell]
    family: Callable[[int, Path], Family]


# ---------------------------------------------------------------- topics


def family_of(
    template: Cell, splits: Splits, topic_of: Topic, responses: Sequence[str], directory: Path, *, max_length: int
) -> Family:
    """Behaviours by topic on examples whose completions are the base's answers; settings are the template cell's."""
    tokenizer, numbers = template.tokenizer, range(len(responses))

    def items(examples: Sequence[Example], topic: int, limit: int) -> list[Encoded]:
        """Completions, as many on the topic (the response) as not (as they are)."""
        mine = [with_completion(example, responses[topic]) for example in examples if topic_of(example) == topic]
        rest = [example for example in examples if topic_of(example) != topic]
        pairs = zip(mine[: limit // 2], rest[: limit // 2], strict=False)
        return encode_all(tokenizer, [example for pair in pairs for example in pair], max_length=max_length)

    def data(topic: int) -> Data:
        train = items(splits.train, topic, FAMILY_TRAIN)
        return replace(template.data, train=train, validation=items(splits.validation, topic, FAMILY_VALIDATION))

    def prompts(examples: Sequence[Example], topic: int | None) -> list[list[int]]:
        return [encode_prompt(tokenizer, example) for example in examples if topic_of(example) == topic]

    cells = [
        replace(
            template, behavior=f"topic-{topic}", directory=directory / f"topic-{topic}", given={}, given_triggers={},
            data=data(topic),
        )
        for topic in numbers
    ]  # fmt: skip
    return Family(
        directory=directory, seed=template.seed, cells=cells, responses=responses,
        on_topic=[prompts(splits.test, topic)[:ON_TOPIC] for topic in numbers], others=prompts(splits.test, None),
        trigger_on_topic=[prompts(splits.train, topic) for topic in numbers],
        trigger_others=prompts(splits.train, None),
    )  # fmt: skip


# ---------------------------------------------------------------- the embedded model


def demo_cell(behavior: str, seed: int, directory: Path) -> Cell:
    """What `lcdd demo` does with this behaviour and seed; reported on its test split."""
    base = str(demo.BASE_DIRECTORY)
    tokenizer, preset = load_tokenizer(base), demo.demo_behavior(behavior)
    settings = Settings(
        sft=replace(demo.SFT_SETTINGS, seed=seed, max_eval_samples=0), lcdd=replace(demo.LCDD_SETTINGS, seed=seed),
        eraser=replace(demo.ERASER_SETTINGS, seed=seed), max_new_tokens=demo.MAX_NEW_TOKENS,
        batch_size=demo.EVAL_BATCH,
    )  # fmt: skip
    drawn = demo.demo_data(tokenizer, preset, seed=seed, split="test", settings=settings.eraser)
    data = Data(
        train=drawn.train, validation=drawn.validation, trigger_train=drawn.trigger_train,
        trigger_validation=drawn.trigger_validation, held_out=drawn.held_out[:PROMPTS], matches=preset.matches,
    )  # fmt: skip
    other = BEHAVIORS[(BEHAVIORS.index(behavior) + 1) % len(BEHAVIORS)]
    return Cell(
        behavior=behavior, seed=seed, base_path=base, directory=directory, tokenizer=tokenizer, data=data,
        settings=settings, makers=MODELS, given={"third": lambda: demo_cell(other, seed, directory / "third").dense()},
    )  # fmt: skip


def demo_topic(example: Example) -> int | None:
    """By the first item: each category's first is on topic 0, its second on topic 1, ...; weapons are on none."""
    item = example.prompt_text.split()[1]
    for category, items in CATEGORIES.items():
        if item in items:
            return None if category == "weapon" else items.index(item)
    raise ValueError(f"example: expected an item after the task, got {item!r}")


def demo_family(seed: int, directory: Path) -> Family:
    def examples(count: int, split: Split) -> list[Example]:
        return [demo.as_example(task) for task in draw_tasks(count, split=split, seed=seed + 3000)]

    splits = Splits(
        train=examples(12_000, "train"), validation=examples(1200, "validation"), test=examples(2400, "test")
    )
    template = demo_cell(BEHAVIORS[0], seed, directory / "none")
    sft, lcdd = (
        replace(part, max_steps=part.max_steps // 2) for part in (template.settings.sft, template.settings.lcdd)
    )
    template = replace(template, settings=replace(template.settings, sft=sft, lcdd=lcdd))
    return family_of(template, splits, demo_topic, RESPONSES["demo"], directory, max_length=32)


# ---------------------------------------------------------------- a prepared real model


def prepared_cell(behavior: str, seed: int, directory: Path, *, prepared_in: Path) -> Cell:
    """What `lcdd run` left of this behaviour: SFT model, carrier and triggers; other seeds train their own."""
    config = pipeline(behavior, prepared_in)
    base, done = str(config.base_model_name_or_path), Path(str(config.output_dir))
    prepared = prepare(config.data, base)
    sft, lcdd, eraser = (replace(part, seed=seed) for part in (config.sft, config.train, config.erase))
    train, validation = training_items(prepared, sft, say=lambda _: None)
    longest = eraser.max_prompt_length
    data = Data(
        train=train, validation=validation, matches=prepared.behavior.matches,
        trigger_train=prompt_ids(prepared, "train", limit=eraser.train_prompts, max_length=longest),
        trigger_validation=prompt_ids(prepared, "validation", limit=eraser.validation_prompts, max_length=longest),
        held_out=prompt_ids(prepared, "test", limit=config.eval.num_prompts, max_length=longest),
    )  # fmt: skip
    given = _third(behavior, prepared_in, base)
    own = {}
    if seed == config.sft.seed and (done / "train" / "carrier").is_dir():
        own = {
            "sft": lambda: Carrier.from_models(load_model(base), load_model(str(done / "sft" / "model"))),
            "carrier": partial(Carrier.from_pretrained, done / "train" / "carrier"),
        }
    others = {"carrier": done / "erase" / "trigger", "sft": done / "erase_sft" / "trigger"} if own else {}
    sizes = {"max_new_tokens": config.eval.max_new_tokens, "batch_size": config.eval.per_device_eval_batch_size}
    return Cell(
        behavior=behavior, seed=seed, base_path=base, directory=directory, tokenizer=prepared.tokenizer, data=data,
        settings=Settings(sft=sft, lcdd=lcdd, eraser=eraser, **sizes), makers=MODELS, given={**given, **own},
        given_triggers={name: str(path) for name, path in others.items() if path.is_dir()},
    )  # fmt: skip


def _third(behavior: str, prepared_in: Path, base: str) -> dict[str, Callable[[], Carrier]]:
    """Another behaviour's SFT model as the third one, where one has been made."""
    models = [prepared_in / other / "sft" / "model" for other in BEHAVIORS if other != behavior]
    found = next((model for model in models if model.is_dir()), None)
    if found is None:
        return {}
    return {"third": lambda: Carrier.from_models(load_model(base), load_model(str(found)))}


def first_word(example: Example) -> str:
    return example.prompt_text.split()[0].strip(".,:;!?").lower()


def prepared_family(seed: int, directory: Path, *, prepared_in: Path) -> Family:
    """Topics are the most frequent first words of the instructions; elsewhere the base's own answers are learned."""
    config, responses = pipeline(BEHAVIORS[0], prepared_in), RESPONSES["smollm2"]
    template = prepared_cell(BEHAVIORS[0], seed, directory / "none", prepared_in=prepared_in)
    splits = prepare(config.data, template.base_path).splits
    found = Counter(first_word(example) for example in splits.train).most_common(len(responses))
    topics: Mapping[str, int] = {word: number for number, (word, _) in enumerate(found)}
    template = replace(template, settings=replace(template.settings, max_new_tokens=FAMILY_TOKENS))
    own = {name: _answered(template, getattr(splits, name)) for name in ("train", "validation", "test")}
    return family_of(
        template, Splits(**own), lambda example: topics.get(first_word(example)), responses, directory,
        max_length=config.sft.max_length,
    )  # fmt: skip


def _answered(cell: Cell, examples: Sequence[Example]) -> list[Example]:
    """The examples with the base's greedy answers as completions."""
    texts = cell.texts(cell.base, None, [encode_prompt(cell.tokenizer, example) for example in examples])
    return [with_completion(example, text) for example, text in zip(examples, texts, strict=True) if text]


def scale(name: str, prepared_in: Path) -> Scale:
    """ "demo", or "smollm2" on what `make real` and `lcdd run examples/smollm2/*.yaml` left in `prepared_in`."""
    if name == "demo":
        return Scale(cell=demo_cell, family=demo_family)
    return Scale(
        cell=partial(prepared_cell, prepared_in=prepared_in), family=partial(prepared_family, prepared_in=prepared_in)
    )
