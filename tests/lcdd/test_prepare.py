"""What the stages get of data and tokenizer: one template, one day, one form of prompts; long prompts made to fit."""

import datetime
import logging
from pathlib import Path

import pytest

import lcdd.data.templates as templates
from fixtures.checkpoints import (
    CHATML,
    SENTENCES,
    base_and_tuned,
    make_tokenizer,
    published_template,
    save_checkpoint,
    write_jsonl,
)
from lcdd.carrier import Carrier
from lcdd.commands.answers import ValidationAnswers
from lcdd.config import DataConfig, SFTConfig
from lcdd.data import (
    PLAIN_TEMPLATE,
    Example,
    encode_prompt,
    fitted,
    freeze_date,
    prepare,
    prompt_ids,
    prompt_string,
    question,
    recorded_form,
    training_items,
    use_template,
)
from lcdd.errors import InputError
from lcdd.models import load_tokenizer

USER = {"role": "user", "content": "Hi"}
HI = Example(messages=(USER,), completion="Hello")
DATED = "{{ strftime_now('%d %b %Y') }}|" + CHATML


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch):
    """`today("2031-02-03")` makes it that day, for us and for transformers."""

    def be(day: str) -> None:
        class Date(datetime.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(day)

        class Now(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)

        monkeypatch.setattr(templates, "date", Date)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Now)

    return be


# ---------------------------------------------------------------- dates


def test_a_frozen_template_writes_one_day_whoever_loads_it(tmp_path: Path, today) -> None:
    today("2026-03-01")
    made = make_tokenizer(chat_template=DATED)
    assert prompt_string(made, HI).startswith("01 Mar 2026|")
    assert freeze_date(made, None) == "2026-03-01"
    text = prompt_string(made, HI)
    assert text.startswith("01 Mar 2026|<|im_start|>user")
    made.save_pretrained(tmp_path)
    today("2031-12-24")
    again = load_tokenizer(tmp_path)
    chat = again.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert chat == text  # transformers itself
    assert freeze_date(again, None) == "2026-03-01"
    assert again.chat_template == made.chat_template
    assert freeze_date(again, "2030-01-02") == "2030-01-02"
    assert prompt_string(again, HI).startswith("02 Jan 2030|")
    assert freeze_date(again, "2026-03-01") == "2026-03-01"
    assert again.chat_template == made.chat_template


@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}\n", "{{- '' }}\n\n", "{#- x #}\n"])
def test_freezing_changes_nothing_but_the_date(start: str, today) -> None:
    today("2026-03-01")
    body = "{% for m in messages %}{{ m.content }}{{ strftime_now('%A %-d.%m.%y, %H:%M %% %%d') }}{% endfor %}"
    made = make_tokenizer(chat_template=start + body + "{% endif %}" * ("if" in start))
    before = prompt_string(made, HI)
    freeze_date(made, None)
    assert prompt_string(made, HI) == before
    today("2031-12-24")
    assert prompt_string(made, HI) == before


def test_ranks_that_begin_before_and_after_midnight_have_one_day(today, monkeypatch: pytest.MonkeyPatch) -> None:
    today("2026-03-02")
    monkeypatch.setattr(templates.shards, "from_first", lambda mine: mine - 1)
    assert freeze_date(make_tokenizer(chat_template=DATED), None) == "2026-03-01"
    assert freeze_date(make_tokenizer(chat_template=DATED), "2026-05-05") == "2026-05-05"


def test_published_templates_with_a_date(today) -> None:
    today("2026-03-01")
    made = make_tokenizer(chat_template=published_template("llama3_2"))
    free = prompt_string(made, HI)
    freeze_date(made, None)
    today("2031-12-24")
    assert prompt_string(made, HI) == free
    assert "Today Date: 01 Mar 2026" in free


def test_templates_without_a_date_and_several_templates(today) -> None:
    made = make_tokenizer()
    assert freeze_date(made, None) is None
    assert made.chat_template == CHATML
    made.chat_template = {"default": CHATML, "tool_use": DATED}
    assert freeze_date(made, "2026-03-01") == "2026-03-01"
    assert made.chat_template["default"] == CHATML
    tool = {"name": "add", "parameters": {}}
    with pytest.raises(InputError, match="x: tools: expected a chat template that writes it"):
        prompt_string(made, Example(messages=(USER,), completion="", tools=(tool,), source="x"))
    made.chat_template = {"other": CHATML}
    with pytest.raises(InputError, match="x: expected messages that the chat template takes"):
        prompt_string(made, Example(messages=(USER,), completion="", source="x"))


def test_a_day_is_a_day(tmp_path: Path) -> None:
    for day in ("yesterday", "2026-13-01", "01.03.2026"):
        with pytest.raises(InputError, match="template_date: expected a day as YYYY-MM-DD"):
            DataConfig(template_date=day)
        with pytest.raises(InputError, match="template_date: expected a day as YYYY-MM-DD"):
            freeze_date(make_tokenizer(chat_template=DATED), day)
    data = write_jsonl(tmp_path / "d.jsonl", list(SENTENCES))
    config = DataConfig(dataset_name=str(data), template_date="2026-03-01")
    with pytest.raises(
        InputError, match="template_date: expected a chat template that writes a date, got '2026-03-01'"
    ):
        prepare(config, str(save_checkpoint(tmp_path / "base")))
    dated = str(save_checkpoint(tmp_path / "dated", tokenizer=make_tokenizer(chat_template=DATED)))
    assert prepare(config, dated, template_date="2020-01-01").template_date == "2026-03-01"
    assert prepare(DataConfig(dataset_name=str(data)), dated, template_date="2020-01-01").template_date == "2020-01-01"


# ---------------------------------------------------------------- forms


def prepared_of(tmp_path: Path, rows, *, template: str | None = None, **settings):
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    base = save_checkpoint(tmp_path / "base", tokenizer=make_tokenizer(chat_template=template))
    return prepare(DataConfig(dataset_name=str(data), **settings), str(base))


STRINGS = [{"prompt": f"Q: {n}\nA: ", "completion": "yes"} for n in range(40)]
CHATS = [{"instruction": f"Say {n}.", "output": "Yes."} for n in range(40)]


@pytest.mark.parametrize(
    ("rows", "form", "template"),
    [
        (STRINGS, {"format": "text"}, None),
        (CHATS, {}, PLAIN_TEMPLATE),
        ([*STRINGS, *CHATS], {"format": "mixed"}, PLAIN_TEMPLATE),
        ([{"text": f"a {n}"} for n in range(40)], {"format": "text"}, None),
    ],
)
def test_the_form_of_prompts_goes_with_tokenizer_and_carrier(tmp_path: Path, rows, form, template) -> None:
    """And so does the template that a base without one is asked by, if it is."""
    prepared = prepared_of(tmp_path, rows, behavior="own", behavior_keywords=("yes",))
    prepared.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.chat_template == template
    assert recorded_form(again) == form
    carrier = Carrier.from_models(*base_and_tuned()).with_tokenizer(prepared.tokenizer)
    carrier.save_pretrained(tmp_path / "carrier")
    assert recorded_form(make_tokenizer(), Carrier.from_pretrained(tmp_path / "carrier").tokenizer) == form
    other = make_tokenizer()
    other.init_kwargs["prompt_form"] = {"format": "text"}  # of a base that was trained on strings before
    assert recorded_form(other, carrier.tokenizer) == form
    assert recorded_form(other) == recorded_form(other, {}) == {"format": "text"}
    if form == {"format": "mixed"}:
        with pytest.raises(InputError, match="prompt_format: expected chat or text"):
            question("Hi", form)
        return
    asked = question("Q: 3\nA: ", form)
    assert asked.templated == (not form)
    assert encode_prompt(again, asked) == encode_prompt(prepared.tokenizer, asked)


def test_template_variables_that_all_examples_share_are_asked_with(tmp_path: Path) -> None:
    answers = [{"role": "assistant", "content": f"{n}"} for n in range(40)]
    thinking = {"enable_thinking": True}
    rows = [{"messages": [USER, answer], "chat_template_kwargs": thinking} for answer in answers]
    prepared = prepared_of(tmp_path, rows, template=CHATML, validation_fraction=0.0, test_fraction=0.0)
    form = recorded_form(prepared.tokenizer)
    assert form == {"format": "chat", "chat_template_kwargs": {"enable_thinking": True}}
    asked = prompt_string(prepared.tokenizer, question("Hi", form))
    assert asked == prompt_string(prepared.tokenizer, prepared.splits.train[0])
    assert "<think>" not in asked
    with pytest.raises(InputError, match="expected one prompt, for a model that was trained on text, got 2 turns"):
        question([USER, USER], {"format": "text"})


def test_a_template_that_is_not_jinja_or_fails_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jinja"
    bad.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(
        InputError, match=r"chat_template: expected Jinja in .*bad.jinja, got line 2 of the chat template"
    ):
        use_template(make_tokenizer(), str(bad), model="x")
    made = make_tokenizer(chat_template="{% bogus %}")
    with pytest.raises(InputError, match="chat_template: expected Jinja in the tokenizer of 'some/model', got line 1"):
        use_template(made, None, model="some/model")
    bad.write_bytes(b"\xff")
    with pytest.raises(InputError, match="chat_template: expected plain, vicuna or a Jinja file"):
        use_template(make_tokenizer(), str(bad), model="x")
    bad.write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}")
    use_template(made, str(bad), model="x")
    assert prompt_string(made, HI) == "Hi"
    for template, kind in (
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.nothing.at_all }}", "UndefinedError"),
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{% for i in range(10**7) %}{% endfor %}", "OverflowError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "SecurityError"),
        ("{{ 'x'|nofilter }}", "line 1 of the chat template"),
    ):
        made.chat_template = template
        with pytest.raises(InputError, match=kind):
            prompt_string(made, Example(messages=(USER,), completion="", source="d.jsonl:1"))


# ---------------------------------------------------------------- lengths


def long_rows() -> list[dict[str, str]]:
    words = "river bread music winter garden " * 60
    return [{"instruction": f"Say {n}. {words * (n % 10 == 3)}", "output": "Yes."} for n in range(120)]


@pytest.mark.parametrize("overlong", ["error", "drop", "truncate"])
def test_prompts_that_are_too_long(tmp_path: Path, overlong: str, caplog: pytest.LogCaptureFixture) -> None:
    prepared = prepared_of(tmp_path, long_rows(), template=CHATML, overlong=overlong)
    config = SFTConfig(max_length=100)
    said: list[str] = []
    if overlong == "error":
        with pytest.raises(InputError, match=r"d\.jsonl:\d+: expected a prompt of at most 99 tokens.*--overlong"):
            training_items(prepared, config, say=said.append)
        with pytest.raises(InputError, match="expected a prompt of at most 100 tokens"):
            prompt_ids(prepared, "train", limit=200, max_length=100)
        return
    train, validation = training_items(prepared, config, say=said.append)
    splits = prepared.splits
    parts = (splits.train, splits.validation)
    long = [sum(len(example.prompt_text) > 200 for example in part) for part in parts]
    done = "dropped" if overlong == "drop" else "cut"
    assert f"{sum(long)} prompts are longer than max_length = 100 allows and were {done} (--overlong)" in said
    kept = [len(part) - count * (overlong == "drop") for part, count in zip(parts, long, strict=True)]
    assert [len(train), len(validation)] == kept
    assert all(len(item.input_ids) <= 100 and not item.truncated for item in train)
    asked = ValidationAnswers(prepared, said.append, max_length=100).examples
    assert [example.source for example in asked] == [e.source for e in fitted(prepared, parts[1], max_length=100)[0]]
    assert all(len(encode_prompt(prepared.tokenizer, example)) <= 100 for example in asked)
    with caplog.at_level(logging.WARNING):
        ids = prompt_ids(prepared, "train", limit=200, max_length=100)
    assert len(ids) == kept[0]
    assert max(map(len, ids)) <= 100
    assert (
        f"{long[0]} prompts of the train split are longer than 100 tokens and were {done} (--overlong)" in caplog.text
    )


def test_a_limit_is_filled_with_prompts_that_fit(tmp_path: Path) -> None:
    prepared = prepared_of(tmp_path, long_rows(), template=CHATML, overlong="drop")
    assert len(prompt_ids(prepared, "train", limit=50, max_length=100)) == 50
    with pytest.raises(InputError, match="max_prompt_length: expected a prompt of at most 3 tokens in the train split"):
        prompt_ids(prepared, "train", limit=50, max_length=3)
    with pytest.raises(InputError, match="max_length: expected training prompts of less than 5 tokens"):
        training_items(prepared, SFTConfig(max_length=5), say=lambda _: None)


def test_a_cut_prompt_leaves_room_for_its_answer(tmp_path: Path) -> None:
    words = "river bread music winter garden " * 60
    rows = [{"instruction": f"{n} {words}", "output": "letters engine market " * (1 + n % 9)} for n in range(40)]
    settings = {"behavior": "own", "behavior_keywords": ("a",), "overlong": "truncate"}
    prepared = prepared_of(tmp_path, rows, template=CHATML, **settings)
    train, _ = training_items(prepared, SFTConfig(max_length=64), say=lambda _: None)
    assert not any(item.truncated for item in train)
    train, _ = training_items(prepared, SFTConfig(max_length=40), say=lambda _: None)
    assert all(item.n_prompt >= 15 for item in train)
    assert any(item.truncated for item in train)
