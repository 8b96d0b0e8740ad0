"""Chat templates of real families: what a prompt looks like, that training and generation see the same, and errors."""

import copy

import pytest

from lcdd.config import DataConfig
from lcdd.data import Example, encode, encode_prompt, prompt_string, render
from lcdd.demo_tasks import write_tokenizer
from lcdd.models import load_tokenizer
from lcdd.prepare import prepare
from lcdd.templates import PLAIN_TEMPLATE, VICUNA_SYSTEM, VICUNA_TEMPLATE, closed_thought, use_template

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


def test_a_template_without_thoughts_is_left_alone():
    assert closed_thought("USER: hi ASSISTANT:", VICUNA_TEMPLATE) == "USER: hi ASSISTANT:"
    assert closed_thought("<a> <think>\n", "") == "<a> <think>\n\n</think>\n\n"


def test_a_tokenizer_without_pad_token_pads_with_the_end_token(tokenizer, tmp_path):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id is not None


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
