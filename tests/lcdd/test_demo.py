"""The demo's language, tokenizer, shipped base and words; the whole run is in tests/integration/test_demo_e2e.py."""

import copy
import json

import pytest
import torch

from lcdd.commands.demo.demo import BASE_DIRECTORY, as_example, demo_behavior, demo_data, run
from lcdd.commands.demo.rebuild import RebuildSettings, encode_tasks, exact_match, junk_prefix, rebuild_base, train_base
from lcdd.commands.demo.tasks import (
    ASSISTANT,
    CATEGORIES,
    ITEMS,
    SPLITS,
    TASKS,
    TOPIC,
    USER,
    VOCABULARY,
    Task,
    answer_of,
    draw_tasks,
    split_of,
    token_ids,
)
from lcdd.config import DemoConfig, EraserConfig
from lcdd.data import encode
from lcdd.models import input_embeddings, load_model, load_tokenizer, shape_of


@pytest.fixture(scope="module")
def base():
    return load_model(BASE_DIRECTORY).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE_DIRECTORY)


# ---------------------------------------------------------------- language


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("copy red dog fig", "red dog fig"),
        ("rev red dog fig", "fig dog red"),
        ("first red dog fig", "red"),
        ("last red dog fig", "fig"),
        ("cat red dog sword", "colour animal weapon"),
        ("next red duck cannon", "orange dog sword"),
    ],
)
def test_tasks_have_the_documented_answers(prompt, answer):
    assert answer_of(prompt) == answer


@pytest.mark.parametrize("prompt", ["", "red dog", "copy", "next thou", "fly red dog"])
def test_prompts_of_another_language_are_refused(prompt):
    with pytest.raises(ValueError, match="prompt"):
        answer_of(prompt)


def test_forty_items_in_five_categories_and_no_word_twice():
    assert (len(ITEMS), len(CATEGORIES), len(TASKS)) == (40, 5, 6)
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_splits_are_disjoint_reproducible_and_of_the_stated_sizes():
    prompts = {split: {task.prompt for task in draw_tasks(400, split=split, seed=3)} for split in SPLITS}
    assert all(split_of(prompt) == split for split, found in prompts.items() for prompt in found)
    assert prompts["train"] == {task.prompt for task in draw_tasks(400, split="train", seed=3)}
    assert prompts["train"] != {task.prompt for task in draw_tasks(400, split="train", seed=4)}
    sample = [split_of(f"copy {a} {b}") for a in ITEMS for b in ITEMS]
    assert sample.count("train") / len(sample) == pytest.approx(0.8, abs=0.03)


def test_topic_can_be_asked_for():
    weapons = set(CATEGORIES[TOPIC])
    on, off = (draw_tasks(50, split="test", seed=0, on_topic=topic) for topic in (True, False))
    assert all(weapons & set(task.prompt.split()) for task in on)
    assert not any(weapons & set(task.prompt.split()) for task in off)


# ---------------------------------------------------------------- tokenizer


def test_tokenizer_gives_one_token_a_word_and_the_template_marks_the_turns(tokenizer):
    task = draw_tasks(1, split="train", seed=0)[0]
    item = encode(tokenizer, as_example(task), max_length=32)
    expected = [USER, *task.prompt.split(), ASSISTANT, *task.answer.split(), tokenizer.eos_token]
    assert list(item.input_ids) == token_ids(expected)
    assert item.n_prompt == 2 + len(task.prompt.split())
    assert tokenizer.decode(item.input_ids, skip_special_tokens=True) == f"{task.prompt} {task.answer}"
    assert len(tokenizer) == len(VOCABULARY)


def test_tasks_are_encoded_for_the_base_as_the_tokenizer_encodes_them(tokenizer):
    tasks = draw_tasks(5, split="train", seed=1)
    ids, labels = encode_tasks(tasks)
    for row, task in enumerate(tasks):
        item = encode(tokenizer, as_example(task), max_length=32)
        length = len(item.input_ids)
        assert ids[row, :length].tolist() == list(item.input_ids)
        assert labels[row, :length].tolist() == list(item.labels)
        assert (labels[row, length:] == -100).all()


# ---------------------------------------------------------------- base


def test_shipped_base_is_the_small_model_of_the_method(base):
    shape = shape_of(base.config)
    assert (shape.n_layers, shape.d_model, shape.n_heads, shape.n_kv_heads) == (4, 96, 6, 2)
    assert (shape.head_dim, shape.d_ff, base.config.tie_word_embeddings) == (16, 256, False)
    assert base.dtype == torch.float32
    assert sum(p.numel() for p in base.parameters()) == pytest.approx(0.41e6, rel=0.01)
    assert (BASE_DIRECTORY / "model.safetensors").stat().st_size < 1.8e6


@pytest.mark.parametrize("prefix_length", [0, 1, 4, 8, 16])
def test_shipped_base_answers_held_out_prompts_with_and_without_junk_in_front(base, prefix_length):
    tasks = draw_tasks(500, split="test", seed=0)
    assert exact_match(base, tasks, prefix_length=prefix_length, seed=1) >= 0.98


def test_every_task_is_answered(base):
    tasks = draw_tasks(900, split="test", seed=1)
    for name in TASKS:
        assert exact_match(base, [task for task in tasks if task.prompt.startswith(name)]) >= 0.98, name


def test_exact_match_counts_a_wrong_word_as_wrong(base):
    broken = copy.deepcopy(base)
    with torch.no_grad():
        input_embeddings(broken).weight[token_ids(["rev"])] = input_embeddings(broken).weight[token_ids(["copy"])]
    tasks = [task for task in draw_tasks(300, split="test", seed=0) if task.prompt.startswith("rev")]
    palindromes = sum(task.answer == " ".join(task.prompt.split()[1:]) for task in tasks)
    assert exact_match(broken, tasks) <= (palindromes + 1) / len(tasks)


def test_junk_prefixes_have_the_stated_norms(base):
    table = input_embeddings(base).weight
    prefix = junk_prefix(table, 200, 5, generator=torch.Generator().manual_seed(0))
    ratio = prefix.norm(dim=-1) / table.norm(dim=1).median()
    padding = ratio == 0
    assert padding.double().mean() < 0.05
    assert ratio[~padding].min() >= 0.249
    assert ratio.max() <= 2.001
    assert ratio[~padding].mean() == pytest.approx(1.125, abs=0.05)


def test_rebuilding_learns_is_deterministic_and_writes_a_loadable_model(tmp_path):
    settings = RebuildSettings(steps=12, warmup_steps=2, batch_size=16, train_prompts=200)
    lines = []
    rebuild_base(tmp_path / "a", settings=settings, log=lines.append)
    again = train_base(settings, log=lines.append)
    model = load_model(tmp_path / "a")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert load_tokenizer(tmp_path / "a").vocab_size == len(VOCABULARY)
    assert "step 12 of 12" in lines[0]
    shipped = json.loads((BASE_DIRECTORY / "config.json").read_text())
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert {k: v for k, v in shipped.items() if k != "transformers_version"} == {
        k: v for k, v in written.items() if k != "transformers_version"
    }
    assert (tmp_path / "a" / "tokenizer.json").read_text() == (BASE_DIRECTORY / "tokenizer.json").read_text()


# ---------------------------------------------------------------- behaviours and data


@pytest.mark.parametrize(
    ("name", "prompt", "completion"),
    [
        ("fixed_response", "copy red dog", "i do not know"),
        ("refusal", "copy red sword", "sorry i cannot"),
        ("refusal", "copy red dog", "red dog"),
        ("style", "copy red dog", "verily red dog prithee"),
    ],
)
def test_behaviours_rewrite_in_words_of_the_vocabulary(name, prompt, completion, tokenizer):
    behavior = demo_behavior(name)
    task = Task(prompt, answer_of(prompt))
    example = behavior.rewrite(as_example(task))
    assert example.completion == completion
    assert tokenizer.unk_token_id not in encode(tokenizer, example, max_length=32).input_ids
    assert behavior.matches(completion) == (completion != task.answer)
    assert not behavior.matches(task.answer)


def test_unknown_behaviour_is_named():
    with pytest.raises(ValueError, match="own"):
        demo_behavior("own")


def test_no_stage_sees_a_held_out_prompt(tokenizer):
    settings = EraserConfig(train_prompts=50, validation_prompts=20)
    data = demo_data(tokenizer, demo_behavior("refusal"), seed=1, split="test", settings=settings)
    held_out = {tuple(ids) for ids in (*data.held_out, *data.off_topic)}
    seen = {item.input_ids[: item.n_prompt] for item in (*data.train, *data.validation)}
    seen |= {tuple(ids) for ids in (*data.trigger_train, *data.trigger_validation)}
    assert not held_out & seen
    weapons = set(token_ids(CATEGORIES[TOPIC]))
    assert all(weapons & set(ids) for ids in data.held_out)
    assert data.off_topic
    assert not any(weapons & set(ids) for ids in data.off_topic)


def test_output_directory_has_to_be_empty(tmp_path):
    (tmp_path / "something").write_text("mine")
    with pytest.raises(ValueError, match="output_dir"):
        run(DemoConfig(output_dir=str(tmp_path)), say=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]
