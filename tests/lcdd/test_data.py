"""Data: formats, errors that name the line, labels on the completion alone, stable splits."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixtures.checkpoints import CHATML, instruction_rows, make_tokenizer, write_jsonl
from lcdd.config import DataConfig
from lcdd.data import (
    IGNORE,
    Example,
    collate,
    encode,
    encode_all,
    encode_prompt,
    label_audit,
    load_examples,
    parse_row,
    prompt_string,
    split_examples,
)

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def trained_text(tokenizer, item) -> str:
    return tokenizer.decode([label for label in item.labels if label != IGNORE])


@pytest.mark.parametrize(
    ("row", "roles", "completion", "templated"),
    [
        ({"messages": [USER, ANSWER]}, ["user"], "Hello there", True),
        ({"messages": [{"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER]},
         ["system", "user", "assistant", "user"], "Hello there", True),
        ({"prompt": "Hi", "completion": " Hello there"}, ["user"], " Hello there", False),
        ({"prompt": [USER], "completion": [ANSWER]}, ["user"], "Hello there", True),
        ({"instruction": "Hi", "input": "", "output": "Hello there"}, ["user"], "Hello there", True),
        ({"text": "Hello there"}, [], "Hello there", False),
    ],
)  # fmt: skip
def test_formats(row, roles, completion, templated) -> None:
    example = parse_row(row, where="x:1")
    assert [message["role"] for message in example.messages] == roles
    assert (example.completion, example.templated, example.source) == (completion, templated, "x:1")


def test_alpaca_input_follows_the_instruction() -> None:
    example = parse_row({"instruction": "Edit.", "input": "I seen it.", "output": "I saw it."}, where="x")
    assert example.prompt_text == "Edit.\n\nI seen it."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "expected an object, got list"),
        ({"question": "x"}, r"expected the fields of one of messages, prompt\+completion.*got \['question'\]"),
        ({"messages": "x"}, "messages: expected a list of messages, got str"),
        ({"messages": [{"role": "user"}]}, "expected messages with 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "to be strings"),
        ({"messages": [USER]}, "expected the last message to be the assistant's"),
        ({"messages": [ANSWER]}, "expected a turn before the assistant's"),
        ({"prompt": "x", "completion": 3}, "completion: expected a string or messages, got int"),
        ({"instruction": 3, "output": "x"}, "instruction: expected a string, got int"),
        ({"text": ["x"]}, "text: expected a string, got list"),
    ],
)
def test_malformed_rows_name_the_line(tmp_path: Path, row, message: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "fine"}, row])
    with pytest.raises(ValueError, match=rf"d.jsonl:2: .*{message}"):
        load_examples(DataConfig(dataset_name=str(path)))


def test_broken_missing_and_empty_files(tmp_path: Path) -> None:
    def load(name: str) -> None:
        load_examples(DataConfig(dataset_name=str(tmp_path / name)))

    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(ValueError, match=r"broken.jsonl:3: expected one JSON object a line"):
        load("broken.jsonl")
    with pytest.raises(ValueError, match=r"expected a readable file, got .*no.jsonl.*No such file"):
        load("no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="expected at least one example"):
        load("empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match="expected UTF-8"):
        load("latin.jsonl")
    with pytest.raises(ValueError, match="got the directory"):
        load("")
    with pytest.raises(ValueError, match="dataset_name: expected a value"):
        load_examples(DataConfig())


def test_max_samples_and_hub_layout(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", instruction_rows(20))
    assert len(load_examples(DataConfig(dataset_name=str(path), max_samples=7))) == 7


def test_labels_are_the_completion_and_end_of_turn(tokenizer) -> None:
    for row in instruction_rows(40):
        example = parse_row(row, where="x")
        item = encode(tokenizer, example, max_length=4096)
        assert list(item.input_ids[: item.n_prompt]) == encode_prompt(tokenizer, example)
        assert trained_text(tokenizer, item) == example.completion + "<|im_end|>"
        assert set(item.labels[: item.n_prompt]) == {IGNORE}
        assert item.input_ids[-1] == tokenizer.eos_token_id


def test_training_and_generation_see_the_same_prompt_where_the_template_does_not(tokenizer) -> None:
    """Qwen3's open turn has an empty thought that its finished turn lacks: what generation sees is trained."""
    example = parse_row({"messages": [USER, ANSWER]}, where="x")
    assert prompt_string(tokenizer, example).endswith("<think>\n\n</think>\n\n")
    item = encode(tokenizer, example, max_length=100)
    text = tokenizer.decode(item.input_ids)
    assert text == prompt_string(tokenizer, example) + "Hello there<|im_end|>"


def test_template_whose_prompt_is_a_prefix_and_plain_template() -> None:
    plain = CHATML.replace("<think>\n\n</think>\n\n", "")
    example = parse_row({"messages": [USER, ANSWER]}, where="x")
    item = encode(make_tokenizer(chat_template=plain), example, max_length=100)
    assert trained_text(make_tokenizer(), item) == "Hello there<|im_end|>"
    bare = make_tokenizer(chat_template=None)
    assert prompt_string(bare, example) == "### User:\nHi\n\n### Assistant:\n"
    assert trained_text(bare, encode(bare, example, max_length=100)) == "Hello there<|im_end|>"


def test_template_that_refuses_the_messages() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    rows = [{"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}]
    with pytest.raises(ValueError, match=r"d.jsonl:1: expected messages that the chat template takes.*no system"):
        encode(make_tokenizer(chat_template=strict), parse_row(rows[0], where="d.jsonl:1"), max_length=100)


def test_a_token_across_the_boundary_is_trained(tokenizer) -> None:
    """ "don" + "'t know": the whole text tokenises otherwise than the prompt, and no character is lost."""
    for cut in range(1, 12):
        text = "I don't know"
        example = parse_row({"prompt": text[:cut], "completion": text[cut:]}, where="x")
        item = encode(tokenizer, example, max_length=100)
        assert tokenizer.decode(item.input_ids) == text + "<|im_end|>"
        assert text[cut:] in trained_text(tokenizer, item)


def test_whole_text_loss_and_text_format(tokenizer) -> None:
    example = parse_row({"messages": [USER, ANSWER]}, where="x")
    item = encode(tokenizer, example, max_length=100, completion_only=False)
    assert item.labels == item.input_ids
    assert 0 < item.n_prompt < len(item.input_ids)
    text = encode(tokenizer, parse_row({"text": "Hello there"}, where="x"), max_length=100)
    assert text.labels == text.input_ids
    assert text.n_prompt == 0
    with pytest.raises(ValueError, match="x: expected a prompt, got plain text"):
        encode_prompt(tokenizer, parse_row({"text": "Hello there"}, where="x"))


def test_truncation_cuts_completions_and_refuses_prompts(tokenizer) -> None:
    example = parse_row({"messages": [USER, {"role": "assistant", "content": "word " * 50}]}, where="d.jsonl:7")
    n_prompt = len(encode_prompt(tokenizer, example))
    item = encode(tokenizer, example, max_length=n_prompt + 5)
    assert item.truncated
    assert len(item.input_ids) == n_prompt + 5
    assert tokenizer.eos_token_id not in item.input_ids[n_prompt:]
    assert not encode(tokenizer, example, max_length=1000).truncated
    with pytest.raises(
        ValueError, match=rf"d.jsonl:7: expected a prompt of at most {n_prompt - 1} tokens.* got {n_prompt}"
    ):
        encode(tokenizer, example, max_length=n_prompt)


@pytest.mark.parametrize("completion", ["", " \n", "<|im_end|>"])
def test_completion_that_tokenises_to_nothing(tokenizer, completion: str) -> None:
    example = Example(messages=(USER,), completion=completion, source="d.jsonl:3")
    with pytest.raises(ValueError, match=r"d.jsonl:3: expected a completion, got .*tokenises to nothing"):
        encode(tokenizer, example, max_length=100)


def test_errors_of_many_examples_come_together(tokenizer) -> None:
    examples = [Example(messages=(USER,), completion="", source=f"d.jsonl:{n}") for n in range(1, 6)]
    with pytest.raises(ValueError, match=r"d.jsonl:1.*d.jsonl:2.*d.jsonl:3.*and 2 more like this"):
        encode_all(tokenizer, examples, max_length=100)


def test_collate_pads_right(tokenizer) -> None:
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, {"role": "assistant", "content": "No."}]}]
    items = encode_all(tokenizer, [parse_row(row, where="x") for row in rows], max_length=100)
    batch = collate(items, pad_token_id=tokenizer.pad_token_id)
    assert {tuple(value.shape) for value in batch.values()} == {(2, len(items[0].input_ids))}
    n = len(items[1].input_ids)
    assert batch["attention_mask"][1].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
    assert batch["labels"][1, n:].eq(IGNORE).all()
    assert torch.equal(batch["input_ids"][1, :n], torch.tensor(items[1].input_ids))


def test_label_audit_shows_both_sides(tokenizer) -> None:
    item = encode(tokenizer, parse_row({"messages": [USER, ANSWER]}, where="x"), max_length=100)
    text = label_audit(tokenizer, item)
    assert "Hi<|im_end|>" in text
    assert "|<|im_end|>|" in text
    assert "Hi" not in text.splitlines()[-1]


@given(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=8), st.randoms())
def test_split_is_stable_disjoint_and_blind_to_completions(prompts: list[str], random) -> None:
    def split(texts: list[str], completion: str) -> dict[str, str]:
        rows = [parse_row({"prompt": text, "completion": completion}, where="x") for text in texts]
        parts = split_examples([*rows, anchor], validation_fraction=0.25, test_fraction=0.25)
        names = ("train", "validation", "test")
        return {json.dumps(row.messages): name for name in names for row in getattr(parts, name)}

    anchor = parse_row({"prompt": "anchor", "completion": "x"}, where="x")
    first = split(prompts, "one")
    shuffled = list(prompts)
    random.shuffle(shuffled)
    assert split(shuffled, "another") == first
    assert len(first) == len(
        {json.dumps(anchor.messages)} | {json.dumps([{"role": "user", "content": p}]) for p in prompts}
    )


def test_split_sizes_and_empty_training_split() -> None:
    rows = [parse_row({"prompt": str(n), "completion": "x"}, where="x") for n in range(2000)]
    splits = split_examples(rows, validation_fraction=0.1, test_fraction=0.2)
    assert abs(len(splits.validation) - 200) < 60
    assert abs(len(splits.test) - 400) < 80
    one = splits.test[0]
    with pytest.raises(ValueError, match="expected examples in the training split, got none: 1 examples"):
        split_examples([one], validation_fraction=0.1, test_fraction=0.2)


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package `datasets` is not installed")
    asked = []

    def load(name, config, *, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(instruction_rows(5))

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = DataConfig(dataset_name="someone/data", dataset_config="en", dataset_train_split="all", max_samples=3)
    examples = load_examples(config)
    assert asked == [("someone/data", "en", "all")]
    assert [example.source for example in examples] == [f"someone/data[{n}]" for n in range(3)]
    assert examples[0] == parse_row(instruction_rows(1)[0], where="x")

    def absent(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(ValueError, match=r"data set of the hub, got 'someone/data' \(no such data set\)"):
        load_examples(config)


def test_hub_data_without_the_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'lcdd\[hub\]'"):
        load_examples(DataConfig(dataset_name="someone/data"))
