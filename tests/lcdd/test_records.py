"""Records: every format of TRL with its own meaning; what is not understood is an error that names field and line."""

import json
import logging
from pathlib import Path

import pytest

from fixtures.checkpoints import CHATML, make_tokenizer, write_jsonl
from lcdd.config import DataConfig
from lcdd.data import encode, encode_prompt, load_examples, parse_row, prompt_string, with_completion
from lcdd.errors import InputError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "name": "add", "content": "7"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
# ChatML with functions, as Qwen's templates have them.
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls %}{{ '<call>' + call.function.name + call.function.arguments | tojson + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + (city if city is defined else '') }}{% endif %}"
)


@pytest.fixture(scope="module")
def with_tools():
    return make_tokenizer(chat_template=WITH_TOOLS)


def learned(tokenizer, example) -> str:
    item = encode(tokenizer, example, max_length=4096)
    assert list(item.input_ids[: item.n_prompt]) == encode_prompt(tokenizer, example)
    return tokenizer.decode([label for label in item.labels if label >= 0])


def test_tools_and_calls_are_written_and_learned(with_tools) -> None:
    row = {"messages": [USER, CALLING], "tools": [TOOL]}
    for same in (
        row,
        {**row, "tools": json.dumps([TOOL])},
        {"prompt": [USER], "completion": [CALLING], "tools": [TOOL]},
    ):
        example = parse_row(same, where="x")
        assert json.dumps(TOOL) in prompt_string(with_tools, example)
        assert learned(with_tools, example) == '<call>add{"a": 3}</call><|im_end|>'
    for call in (
        {"name": "add", "arguments": {"a": 3}},
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}},
    ):
        example = parse_row({**row, "messages": [USER, {**CALLING, "tool_calls": [call]}]}, where="x")
        assert learned(with_tools, example) == '<call>add{"a": 3}</call><|im_end|>'


def test_a_tools_answer_is_read_and_several_messages_are_learned(with_tools) -> None:
    history = parse_row({"messages": [USER, CALLING, RESULT, ANSWER], "tools": [TOOL]}, where="x")
    assert '<call>add{"a": 3}</call><|im_end|>\n<|im_start|>tool\n7<|im_end|>' in prompt_string(with_tools, history)
    assert learned(with_tools, history) == "Hello there<|im_end|>"
    row = {"prompt": [USER], "completion": [CALLING, RESULT, ANSWER], "tools": [TOOL]}
    assert learned(with_tools, parse_row(row, where="x")) == (
        '<call>add{"a": 3}</call><|im_end|>\n<|im_start|>tool\n7<|im_end|>\n'
        "<|im_start|>assistant\nHello there<|im_end|>"
    )
    only = parse_row(row, where="x", assistant_only_loss=True)
    assert learned(with_tools, only) == '<call>add{"a": 3}</call><|im_end|>Hello there<|im_end|>'
    every = parse_row(
        {"messages": row["prompt"] + row["completion"], "tools": [TOOL]}, where="x", assistant_only_loss=True
    )
    assert learned(with_tools, every) == learned(with_tools, only)
    assert every.messages == only.messages


def test_text_parts_are_one_text_and_null_is_nothing() -> None:
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo there", "image": None}]
    null = {"tool_calls": None, "name": None}
    row = {"messages": [{**USER, **null}, {"role": "assistant", "content": parts, **null}], "prompt": None, "tools": []}
    assert parse_row(row, where="x") == parse_row({"messages": [USER, ANSWER]}, where="x")


def test_a_behaviour_replaces_calls_too(with_tools) -> None:
    example = parse_row({"messages": [USER, CALLING], "tools": [TOOL]}, where="x")
    assert learned(with_tools, with_completion(example, "No.")) == "No.<|im_end|>"


def test_from_and_value_are_role_and_content() -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]}
    assert parse_row(row, where="x") == parse_row({"messages": [USER, ANSWER]}, where="x")
    two = {"prompt": row["conversations"][:1], "completion": row["conversations"][1:]}
    assert parse_row(two, where="x") == parse_row({"messages": [USER, ANSWER]}, where="x")


def test_template_variables_reach_the_template(with_tools) -> None:
    row = {"messages": [USER, ANSWER], "chat_template_kwargs": {"city": "Ghent", "enable_thinking": False}}
    example = parse_row(row, where="x")
    assert prompt_string(with_tools, example).endswith("assistant\nGhent")
    plain = make_tokenizer(chat_template=CHATML)
    assert "<think>" not in prompt_string(
        plain, parse_row({**row, "chat_template_kwargs": {"enable_thinking": True}}, where="x")
    )
    with pytest.raises(
        InputError, match=r"d.jsonl:3: chat_template_kwargs.city: expected a variable of the chat template"
    ):
        prompt_string(plain, parse_row(row, where="d.jsonl:3"))
    for name in ("messages", "tools", "add_generation_prompt", "chat_template"):
        with pytest.raises(InputError, match=rf"x: chat_template_kwargs.{name}: expected a variable"):
            prompt_string(with_tools, parse_row({**row, "chat_template_kwargs": {name: 1}}, where="x"))


DROPS = "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "row", "field"),
    [
        (DROPS, {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}, r"messages\[0\].content"),
        (CHATML, {"messages": [USER, ANSWER], "tools": [TOOL]}, "tools"),
        (CHATML, {"messages": [USER, CALLING, RESULT, ANSWER]}, r"messages\[1\].tool_calls"),
        (CHATML, {"messages": [{**USER, "name": "Ann"}, ANSWER]}, r"messages\[0\].name"),
        (CHATML, {"messages": [USER, {**ANSWER, "reasoning_content": "hm"}]}, r"messages\[1\].reasoning_content"),
    ],
)
def test_what_a_template_leaves_out_is_an_error(template: str, row, field: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    for _ in range(2):  # what was found once is not forgotten
        with pytest.raises(InputError, match=rf"d.jsonl:9: {field}: expected a chat template that writes it"):
            encode(tokenizer, parse_row(row, where="d.jsonl:9"), max_length=99)


def test_a_template_that_reads_into_the_texts_is_left_to_read_them() -> None:
    loop, check = (
        "{% for message in messages %}",
        "{% if message.content[0] != 'H' %}{{ raise_exception('no H') }}{% endif %}",
    )
    picky = CHATML.replace(loop, loop + check)
    example = parse_row({"messages": [USER, ANSWER]}, where="x")
    prompt = prompt_string(make_tokenizer(chat_template=picky), example)
    assert prompt == prompt_string(make_tokenizer(chat_template=CHATML), example)
    other = parse_row({"messages": [{"role": "user", "content": "no"}, ANSWER]}, where="d.jsonl:4")
    with pytest.raises(InputError, match=r"d.jsonl:4: expected messages that the chat template takes.*no H"):
        prompt_string(make_tokenizer(chat_template=picky), other)


def test_a_second_call_or_tool_that_is_left_out_is_an_error() -> None:
    first = make_tokenizer(
        chat_template=WITH_TOOLS.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]").replace(
            "in tools", "in tools[:1]"
        )
    )
    two = {"messages": [USER, {**CALLING, "tool_calls": [CALL, CALL]}], "tools": [TOOL]}
    encode(first, parse_row({**two, "messages": [USER, CALLING]}, where="x"), max_length=999)
    with pytest.raises(InputError, match=r"x: messages\[1\].tool_calls: expected a chat template that writes it"):
        encode(first, parse_row(two, where="x"), max_length=999)
    with pytest.raises(InputError, match="x: tools: expected a chat template that writes it"):
        encode(first, parse_row({"messages": [USER, ANSWER], "tools": [TOOL, TOOL]}, where="x"), max_length=999)


BAD = {
    "weight of a message": (
        {"messages": [USER, {**ANSWER, "weight": 0}]},
        r"messages\[1\].weight: expected a message of",
    ),
    "weight": (
        {"messages": [USER, ANSWER], "weight": 0.5},
        "weight: expected no such column.*--ignored_columns weight",
    ),
    "system": ({"instruction": "a", "output": "b", "system": "c"}, "system: expected no such column"),
    "history": ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history: expected no such column"),
    "functions": ({"messages": [USER, ANSWER], "functions": [TOOL]}, "functions: expected no such column"),
    "images": ({"messages": [USER, ANSWER], "images": ["x.png"]}, "images: expected no such column"),
    "a preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen: expected no such column"),
    "a label": ({"prompt": "a", "completion": "b", "label": False}, "label: expected no such column"),
    "no prompt": ({"prompt": [], "completion": [ANSWER]}, "prompt: expected at least one message, got none"),
    "no completion": ({"prompt": [USER], "completion": []}, "completion: expected at least one message, got none"),
    "a string before messages": (
        {"prompt": "a", "completion": [ANSWER]},
        "prompt: expected messages, as the completion is",
    ),
    "a user's completion": (
        {"prompt": [USER], "completion": [USER, ANSWER]},
        r"completion\[0\].role: expected 'assistant'",
    ),
    "no content": (
        {"messages": [USER, {"role": "assistant", "content": None}]},
        r"messages\[1\]: expected messages with",
    ),
    "an image part": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
        r"messages\[0\].content\[0\]: expected a part",
    ),
    "a part of numbers": ({"messages": [{"role": "user", "content": [3]}, ANSWER]}, r"content\[0\]: expected a part"),
    "a part with more": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "lang": "x"}]}, ANSWER]},
        r"content\[0\]: expected a part",
    ),
    "a message that is text": ({"messages": ["Hi", ANSWER]}, r"messages\[0\]: expected messages with"),
    "a role that is a number": ({"messages": [{"role": 1, "content": "a"}, ANSWER]}, "to be strings"),
    "calls by a user": (
        {"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]},
        "expected calls by the assistant alone",
    ),
    "a call without a name": ({"messages": [USER, {**CALLING, "tool_calls": [{"function": {}}]}]}, "expected a call"),
    "a call with more": ({"messages": [USER, {**CALLING, "tool_calls": [{**CALL, "when": 1}]}]}, "expected a call"),
    "a call that is text": ({"messages": [USER, {**CALLING, "tool_calls": ["add"]}]}, "expected a call"),
    "calls that are no list": ({"messages": [USER, {**CALLING, "tool_calls": CALL}]}, "expected a list of calls"),
    "arguments that are no JSON": (
        {"messages": [USER, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]}]},
        r"tool_calls\[0\].function.arguments: expected JSON",
    ),
    "arguments that are a list": (
        {"messages": [USER, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
        r"tool_calls\[0\].function.arguments: expected a mapping",
    ),
    "tools that are no JSON": ({"messages": [USER, ANSWER], "tools": "add"}, "tools: expected JSON"),
    "tools that are a mapping": ({"messages": [USER, ANSWER], "tools": TOOL}, "tools: expected a list"),
    "a tool without a name": (
        {"messages": [USER, ANSWER], "tools": [{}]},
        r"tools\[0\]: expected a function's JSON schema",
    ),
    "tools beside text": (
        {"prompt": "a", "completion": "b", "tools": [TOOL]},
        "tools: expected no such column: only messages",
    ),
    "variables beside text": (
        {"text": "a", "chat_template_kwargs": {"a": 1}},
        "chat_template_kwargs: expected no such column",
    ),
    "variables that are a list": (
        {"messages": [USER, ANSWER], "chat_template_kwargs": [1]},
        "chat_template_kwargs: expected a mapping",
    ),
    "an unknown sender's format": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]},
        "conversations: expected the last message to be the assistant's",
    ),
    "conversations of text": ({"conversations": "a"}, "conversations: expected a list of messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_understood_is_named(tmp_path: Path, name: str) -> None:
    row, message = BAD[name]
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": [USER, ANSWER]}, row])
    with pytest.raises(InputError, match=rf"d\.jsonl:2: .*{message}"):
        load_examples(DataConfig(dataset_name=str(path)))


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a", "completion": "b"}])
def test_only_chats_have_assistants(row) -> None:
    with pytest.raises(InputError, match="x: expected messages, for assistant_only_loss"):
        parse_row(row, where="x", assistant_only_loss=True)


LINES = {
    b'{"text": "\\ud800"}': "text: expected text, got half a surrogate pair",
    b'{"messages": [{"role": "user", "content": "\\udc00"}]}': r"messages\[0\].content: expected text",
    b'{"text": "a", "\\ud800": 1}': "field name: expected text",
    b'{"text": "a", "text": "b"}': "text: expected each field once",
    b'{"messages": [{"role": "user", "role": "x", "content": "a"}]}': "role: expected each field once",
    b'{"text": "a", "score": NaN}': "expected numbers that JSON has, got NaN",
    b'{"text": "a", "score": ' + b"9" * 5000 + b"}": "expected one JSON object a line, got Exceeds the limit",
}


@pytest.mark.parametrize("line", LINES, ids=[str(n) for n in range(len(LINES))])
def test_json_that_is_no_text_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "fine \\ud83d\\ude00"}\n' + line + b"\n")
    with pytest.raises(InputError, match=rf"d\.jsonl:2: {LINES[line]}"):
        load_examples(DataConfig(dataset_name=str(tmp_path / "d.jsonl")))


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    bom, path = b"\xef\xbb\xbf", tmp_path / "d.jsonl"
    path.write_bytes(bom + b'{"text": "a"}\r\n' + bom + b'{"text": "b"}\n' + bom + b"\n")
    assert [example.completion for example in load_examples(DataConfig(dataset_name=str(path)))] == ["a", "b"]


def test_columns_that_nothing_is_made_of_are_listed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": n, "category": "a" if n else "", "instruction": "a", "input": "", "output": "b"} for n in range(3)]
    path = write_jsonl(tmp_path / "d.jsonl", [*rows, {"messages": [USER, ANSWER], "prompt": "Hi", "id": None}])
    with caplog.at_level(logging.WARNING):
        load_examples(DataConfig(dataset_name=str(path)))
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: nothing is made of these columns: category (2 rows), id (3 rows), prompt (1 rows)"
    ]
    caplog.clear()
    config = DataConfig(dataset_name=str(path), max_samples=3, ignored_columns=("id", "category"))
    assert len(load_examples(config)) == 3
    assert not caplog.records


def test_a_refused_column_can_be_left_out_on_purpose(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": [USER, ANSWER], "weight": 2, "system": ""}])
    with pytest.raises(InputError, match="weight"):
        load_examples(DataConfig(dataset_name=str(path)))
    (example,) = load_examples(DataConfig(dataset_name=str(path), ignored_columns=("weight",)))
    assert example == parse_row({"messages": [USER, ANSWER]}, where="x")


def test_named_columns_may_hold_messages_and_leave_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"q": [USER], "a": [ANSWER], "weight": 1}])
    config = DataConfig(dataset_name=str(path), prompt_column="q", completion_column="a")
    with caplog.at_level(logging.WARNING):
        assert load_examples(config) == [parse_row({"messages": [USER, ANSWER]}, where="x")]
    assert "nothing is made of these columns: weight (1 rows)" in caplog.text


def test_a_table_of_the_hub_has_nulls_that_mean_nothing(monkeypatch: pytest.MonkeyPatch, with_tools) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package `datasets` is not installed")
    two = {"type": "function", "function": {"name": "sub", "arguments": {"b": "4"}}}
    one = {"type": "function", "function": {"name": "add", "arguments": {"a": "3"}}}
    calls = [{"role": "assistant", "tool_calls": [call]} for call in (one, two)]
    table = datasets.Dataset.from_list([{"prompt": [USER], "completion": [call], "tools": [TOOL]} for call in calls])
    assert table[0]["completion"][0]["tool_calls"][0]["function"]["arguments"] == {"a": "3", "b": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    examples = load_examples(DataConfig(dataset_name="someone/data"))
    assert [learned(with_tools, example) for example in examples] == [
        '<call>add{"a": "3"}</call><|im_end|>',
        '<call>sub{"b": "4"}</call><|im_end|>',
    ]


def test_the_splits_of_plain_prompts_are_what_they_were() -> None:
    """SHA-256 of [[role, content], ...]: splits of runs that were made before tools were known stay the same."""
    plain = parse_row({"messages": [USER, ANSWER]}, where="x")
    assert plain.key == "d7760b4ba3077c46bf90214f644da927fcbe0a9fbbd35925d6abecf7260d54ab"
    assert plain.key == parse_row({"instruction": "Hi", "output": "x"}, where="y").key
    assert plain.key != parse_row({"messages": [USER, ANSWER], "tools": [TOOL]}, where="x").key
    assert plain.content_hash != parse_row({"instruction": "Hi", "output": "x"}, where="y").content_hash
