"""The demo's little language: its words, its six tasks, its tokenizer and its data sets.

A prompt is a task word followed by two to four items, an answer is one to four words:

    copy red dog fig  ->  red dog fig          first red dog fig  ->  red
    rev  red dog fig  ->  fig dog red          last  red dog fig  ->  fig
    cat  red dog fig  ->  colour animal fruit  next  red dog fig  ->  orange horse grape

`cat` names each item's category and `next` gives its successor in its category's list, so the two
need knowledge that is not in the prompt. A prompt belongs to one split for ever: the split is a hash of
its text, so the base, SFT, LCDD and the trigger never see a validation or test prompt.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lcdd.errors import InputError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "orange", "yellow", "green", "blue", "violet", "brown", "white"),
    "animal": ("dog", "horse", "cow", "sheep", "goat", "pig", "hen", "duck"),
    "fruit": ("apple", "pear", "plum", "fig", "grape", "lemon", "peach", "cherry"),
    "tool": ("hammer", "saw", "drill", "file", "wrench", "chisel", "shovel", "rake"),
    "weapon": ("sword", "spear", "dagger", "bow", "mace", "lance", "musket", "cannon"),
}
ITEMS: tuple[str, ...] = tuple(item for items in CATEGORIES.values() for item in items)
TASKS: tuple[str, ...] = ("copy", "rev", "first", "last", "cat", "next")
TOPIC = "weapon"
"""The category that the refusal behaviour refuses to talk about."""

# Words that the base can repeat but has no task for: the behaviours' answers are made of them. Training the
# base to copy them gives their embeddings and output rows a meaning; both stay frozen ever after.
PLAIN_WORDS: tuple[str, ...] = (
    "i", "do", "not", "know", "sorry", "cannot", "help", "with", "that", "verily", "thou", "thee", "thy", "hath",
    "doth", "forsooth", "prithee", "quoth", "a", "the", "and", "or", "is", "it", "yes", "no",
)  # fmt: skip

PAD, UNKNOWN, END, USER, ASSISTANT = "<pad>", "<unk>", "<end>", "<user>", "<assistant>"
SPECIAL_TOKENS: tuple[str, ...] = (PAD, UNKNOWN, END, USER, ASSISTANT)
WORDS: tuple[str, ...] = TASKS + ITEMS + tuple(CATEGORIES) + PLAIN_WORDS
VOCABULARY: tuple[str, ...] = SPECIAL_TOKENS + WORDS

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}" + ASSISTANT + " {{ message['content'] }} " + END + " "
    "{% else %}" + USER + " {{ message['content'] }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)

_CATEGORY_OF = {item: category for category, items in CATEGORIES.items() for item in items}
_NEXT = {item: items[(place + 1) % len(items)] for items in CATEGORIES.values() for place, item in enumerate(items)}
_ANSWER: dict[str, Callable[[list[str]], list[str]]] = {
    "copy": lambda words: words,
    "rev": lambda words: words[::-1],
    "first": lambda words: words[:1],
    "last": lambda words: words[-1:],
    "cat": lambda words: [_CATEGORY_OF[word] for word in words],
    "next": lambda words: [_NEXT[word] for word in words],
}


@dataclass(frozen=True)
class Task:
    """One prompt of the little language and the base's right answer to it."""

    prompt: str
    answer: str

    @property
    def on_topic(self) -> bool:
        """Whether the prompt names an item of the refused category."""
        return any(word in CATEGORIES[TOPIC] for word in self.prompt.split())


def answer_of(prompt: str) -> str:
    """The right answer to a prompt, e.g. "rev red dog" -> "dog red". InputError for anything else."""
    task, *words = prompt.split() or [""]
    if task not in _ANSWER or not words:
        raise InputError(f"prompt must be one of {' '.join(TASKS)} followed by words, got {prompt!r}")
    try:
        return " ".join(_ANSWER[task](words))
    except KeyError as missing:
        raise InputError(f"prompt {prompt!r}: {missing.args[0]!r} is not an item of the demo") from None


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to: 80% train, 10% validation, 10% test, by SHA-256 of its text."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def _draw(rng: random.Random, plain_fraction: float) -> str:
    n_words = rng.randint(2, 4)
    if rng.random() < plain_fraction:
        return " ".join([rng.choice(TASKS[:4]), *(rng.choice(WORDS) for _ in range(n_words))])
    return " ".join([rng.choice(TASKS), *(rng.choice(ITEMS) for _ in range(n_words))])


def draw_tasks(
    count: int, *, split: Split, seed: int, on_topic: bool | None = None, plain_fraction: float = 0.0
) -> list[Task]:
    """`count` different tasks of one split, the same ones for the same arguments on every machine.

    on_topic: only prompts that do (True) or do not (False) name a weapon; None draws both, about half and half.
    plain_fraction: share of copy/rev/first/last prompts over all words, used to train the base only.
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    rng = random.Random(f"lcdd-demo-{split}-{seed}")
    tasks: dict[str, Task] = {}
    while len(tasks) < count:
        prompt = _draw(rng, plain_fraction)
        if prompt in tasks or split_of(prompt) != split:
            continue
        task = Task(prompt, answer_of(prompt))
        if on_topic is None or task.on_topic == on_topic:
            tasks[prompt] = task
    return list(tasks.values())


def token_ids(words: Iterable[str]) -> list[int]:
    """Token ids of words and special tokens, as the tokenizer gives them (KeyError for an unknown word)."""
    return [_ID_OF[word] for word in words]


_ID_OF = {token: index for index, token in enumerate(VOCABULARY)}


def write_tokenizer(directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json: one token a word, lower case, with a chat template."""
    added = [
        {"id": _ID_OF[token], "content": token, "single_word": False, "lstrip": True, "rstrip": True,
         "normalized": False, "special": True}
        for token in SPECIAL_TOKENS
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": _ID_OF, "unk_token": UNKNOWN},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "eos_token": END,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        (directory / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
