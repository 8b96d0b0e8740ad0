"""Chat templates of real families: what a prompt looks like, that training and generation see the same, and errors."""

import copy

import pytest

from fixtures.checkpoints import make_tokenizer, published_template
from lcdd.commands.demo.tasks import write_tokenizer
from lcdd.config import DataConfig
from lcdd.data import (
    IGNORE,
    PLAIN_TEMPLATE,
    VICUNA_SYSTEM,
    VICUNA_TEMPLATE,
    Example,
    closed_thought,
    collate,
    encode,
    encode_prompt,
    load_examples,
    prepare,
    prompt_string,
    render,
    use_template,
)
from lcdd.models import load_tokenizer

EXAMPLE = Example(messages=({"role": "user", "content": "red dog"},), completion="cat")
# The relevant lines of the families' templates, in words that the tests' tokenizer has.
QWEN3 = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
DEEPSEEK_OPEN = (  # later releases: the prompt opens the thought, a finished turn has none
    "{% for m in messages %}{{ '<' + m.role + '> ' }}"
    "{% if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> <think>\\n' }}{% endif %}"
)
DEEPSEEK_FIRST = DEEPSEEK_OPEN.replace("{{ '<assistant> <think>\\n' }}", "{{ '<assistant> ' }}")
CHAT = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Name two facts."},
)
# family -> (special tokens: start of text, end of a turn; the prompt made of CHAT; the text that is trained)
PUBLISHED = {
    "qwen3": (
        (None, "<|im_end|>"),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nName two facts.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "{}<|im_end|>",
    ),
    "deepseek_r1_distill": (
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello<｜end▁of▁sentence｜>"
        "<｜User｜>Name two facts.<｜Assistant｜><think>\n\n</think>\n\n",
        "{}<｜end▁of▁sentence｜>",
    ),
    "llama3": (
        ("<|begin_of_text|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nName two facts.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{}<|eot_id|>",
    ),
}
# What Mistral's instruction models make of a chat; their template itself is in no package that is used here.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
VICUNA_CHAT = f"<s>{VICUNA_SYSTEM} USER: Hi ASSISTANT: Hello</s>USER: Name two facts. ASSISTANT:"
MISTRAL_CHAT = "<s>[INST] Hi[/INST] Hello</s>[INST] Name two facts.[/INST]"


def tokenizer_of(template, start, end):
    made = make_tokenizer(chat_template=template)
    made.add_special_tokens({"eos_token": end} | ({"bos_token": start} if start else {}))
    return made


def check_training_sees_the_prompt(tokenizer, prompt, trained):
    """Prompt, and prompt and answer, are the texts that the family has; the loss is on the answer and its end alone."""
    # Words of the end marker itself, spaces around, a thought's own markers: the answer has to be found all the same.
    for answer in ("Two facts.", "sentence", "e", "im_end", "Hello", "A list:\n- one\n- two"):
        example = Example(messages=CHAT, completion=answer)
        assert prompt_string(tokenizer, example) == prompt
        ids = encode_prompt(tokenizer, example)
        assert tokenizer.decode(ids) == prompt
        item = encode(tokenizer, example, max_length=512)
        assert list(item.input_ids[: item.n_prompt]) == ids
        assert item.labels[: item.n_prompt] == (IGNORE,) * item.n_prompt
        assert item.labels[item.n_prompt :] == item.input_ids[item.n_prompt :]
        assert tokenizer.decode(item.labels[item.n_prompt :]) == trained.format(answer)
        assert item.labels[-1] == tokenizer.eos_token_id


@pytest.fixture
def fresh(tokenizer):
    return copy.deepcopy(tokenizer)


def test_vicunas_text_is_fastchats(fresh):
    fresh.chat_template = None
    use_template(fresh, None, model="lmsys/vicuna-7b-v1.5")
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    bos, eos = fresh.bos_token or "", fresh.eos_token
    expected = f"{bos}{VICUNA_SYSTEM} USER: Hi ASSISTANT: Hello{eos}USER: Bye ASSISTANT:"
    assert render(fresh, turns, add_generation_prompt=True) == expected
    own = [{"role": "system", "content": "Be brief."}, *turns[:1]]
    assert render(fresh, own, add_generation_prompt=True) == f"{bos}Be brief. USER: Hi ASSISTANT:"


def test_a_tokenizers_own_template_is_kept_unless_another_is_asked_for(fresh, tmp_path):
    own = fresh.chat_template = "{{ messages[0]['content'] }}"
    use_template(fresh, None, model="vicuna")
    assert fresh.chat_template == own
    use_template(fresh, "vicuna", model="x")
    assert fresh.chat_template == VICUNA_TEMPLATE
    use_template(fresh, "plain", model="x")
    assert fresh.chat_template == PLAIN_TEMPLATE
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}!")
    use_template(fresh, str(tmp_path / "mine.jinja"), model="x")
    assert prompt_string(fresh, EXAMPLE) == "red dog!"
    with pytest.raises(ValueError, match=r"chat_template: expected plain, vicuna or a Jinja file, got 'chatml'"):
        use_template(fresh, "chatml", model="x")


def test_another_family_without_a_template_gets_the_plain_one(fresh):
    fresh.chat_template = None
    use_template(fresh, None, model="some/llama")
    assert prompt_string(fresh, EXAMPLE) == "### User:\nred dog\n\n### Assistant:\n"


@pytest.mark.parametrize("template", [QWEN3, DEEPSEEK_OPEN, DEEPSEEK_FIRST])
def test_a_reasoning_models_thought_is_closed_in_training_as_in_generation(fresh, template):
    fresh.chat_template = template
    prompt = prompt_string(fresh, EXAMPLE)
    assert prompt == "<user> red dog <assistant> <think>\n\n</think>\n\n"
    ids = encode_prompt(fresh, EXAMPLE)
    item = encode(fresh, EXAMPLE, max_length=64)
    assert list(item.input_ids[: item.n_prompt]) == ids
    assert fresh.decode(list(item.input_ids[item.n_prompt :]), skip_special_tokens=True).split() == ["cat"]


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_template_gives_its_familys_text_without_thought(family):
    (start, end), prompt, trained = PUBLISHED[family]
    check_training_sees_the_prompt(tokenizer_of(published_template(family), start, end), prompt, trained)


def test_deepseeks_first_template_did_not_open_the_thought():
    (start, end), prompt, trained = PUBLISHED["deepseek_r1_distill"]
    template = published_template("deepseek_r1_distill")
    assert template.count("<｜Assistant｜><think>\\n") == 1
    first = template.replace("<｜Assistant｜><think>\\n", "<｜Assistant｜>")
    check_training_sees_the_prompt(tokenizer_of(first, start, end), prompt, trained)


def test_a_thought_that_the_template_closes_itself_is_left_as_it_is():
    """As the paper's code rewrites DeepSeek's template."""
    (start, end), prompt, trained = PUBLISHED["deepseek_r1_distill"]
    template = published_template("deepseek_r1_distill").replace("<think>\\n", "<think>\\n</think>\\n")
    prompt = prompt.replace("<think>\n\n</think>\n\n", "<think>\n</think>\n")
    check_training_sees_the_prompt(tokenizer_of(template, start, end), prompt, trained)


@pytest.mark.parametrize(
    ("template", "prompt"), [(VICUNA_TEMPLATE, VICUNA_CHAT), (MISTRAL, MISTRAL_CHAT)], ids=["vicuna", "mistral"]
)
def test_a_family_that_puts_a_space_before_the_answer(template, prompt):
    check_training_sees_the_prompt(tokenizer_of(template, "<s>", "</s>"), prompt, " {}</s>")


def test_a_template_without_thoughts_is_left_alone():
    assert closed_thought("USER: hi ASSISTANT:", VICUNA_TEMPLATE) == "USER: hi ASSISTANT:"
    assert closed_thought("<a> <think>\n", "") == "<a> <think>\n\n</think>\n\n"


def test_a_tokenizer_without_pad_token_pads_with_the_end_token(tokenizer, tmp_path):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id is not None
    # The end of an answer is learned although it is the same token as padding: what is padding, the mask says.
    short, long = (
        encode(loaded, Example(messages=EXAMPLE.messages, completion=c), max_length=64) for c in ("cat", "cat hen")
    )
    batch = collate([short, long], pad_token_id=loaded.pad_token_id)
    assert batch["attention_mask"].tolist()[0] == [1] * len(short.input_ids) + [0]
    assert batch["labels"].tolist()[0] == [*short.labels, IGNORE]
    assert short.labels[-1] == loaded.eos_token_id


def test_the_chosen_template_reaches_the_prepared_data(tmp_path):
    (tmp_path / "vicuna-tiny").mkdir()
    write_tokenizer(tmp_path / "vicuna-tiny")
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(f'{{"q": "copy red {w}", "a": "red {w}"}}' for w in ("dog", "fig", "hen", "cow")))
    config = DataConfig(
        dataset_name=str(data), prompt_column="q", completion_column="a", chat_template="vicuna", test_fraction=0.0,
        validation_fraction=0.0,
    )  # fmt: skip
    prepared = prepare(config, str(tmp_path / "vicuna-tiny"))
    text = prompt_string(prepared.tokenizer, prepared.splits.train[0])
    assert text.startswith(VICUNA_SYSTEM)
    assert prepared.splits.train[0].messages[0]["content"].startswith("copy red")


def test_columns_are_both_named_and_there(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"q": "copy red dog"}\n')
    (tmp_path / "t").mkdir()
    write_tokenizer(tmp_path / "t")
    with pytest.raises(ValueError, match="prompt_column: expected completion_column beside it"):
        DataConfig(prompt_column="q")
    config = DataConfig(dataset_name=str(data), prompt_column="q", completion_column="a")
    with pytest.raises(ValueError, match=r"d\.jsonl:1: expected a column 'a', got \['q'\]"):
        prepare(config, str(tmp_path / "t"))


def test_rows_with_nothing_in_a_named_column_are_left_out_and_counted(tmp_path):
    """The published dialogues of the style example have such rows."""
    data = tmp_path / "d.jsonl"
    data.write_text(
        '{"q": "red", "a": "dog"}\n{"q": null, "a": "x"}\n{"q": "fig", "a": ""}\n{"q": "hen", "a": "cow"}\n'
    )
    config = DataConfig(dataset_name=str(data), prompt_column="q", completion_column="a")
    with pytest.warns(UserWarning, match="2 of 4 rows have nothing in 'q' or 'a'; they are left out"):
        found = load_examples(config)
    assert [(e.prompt_text, e.completion) for e in found] == [("red", "dog"), ("hen", "cow")]
    data.write_text('{"q": null, "a": "x"}\n')
    with pytest.warns(UserWarning, match="1 of 1 rows"), pytest.raises(ValueError, match="at least one example"):
        load_examples(config)
    data.write_text("null\n")
    with pytest.raises(ValueError, match=r"d\.jsonl:1: expected an object, got NoneType"):
        load_examples(config)
