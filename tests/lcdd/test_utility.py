"""Perplexity against whole softmaxes; utility with a stub in the harness's place; its adapter against one row alone."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lcdd.eraser import Trigger, generate_ids, prompt_embeds
from lcdd.evaluate import Harness, TriggeredModel, parse_tasks, perplexity, read_texts, utility, windows
from lcdd.models import input_embeddings

TEXTS = ["copy red dog fig", "rev hen", "first cow plum spear goat lemon"]


@pytest.fixture
def setting(make_models, tokenizer):
    base, _ = make_models()
    return base, Trigger.random_tokens(base, 3, seed=1), [tokenizer(text)["input_ids"] for text in TEXTS]


def alone(model, ids, trigger):
    """Logits [len(ids), V] of one sequence behind the trigger."""
    logits = model(inputs_embeds=prompt_embeds(model, ids, trigger)[None]).logits[0]
    return logits if trigger is None else logits[trigger.embeds.shape[0] :]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_the_whole_softmaxs(setting, behind, batch_size):
    model, trigger, ids = setting
    trigger = trigger if behind else None
    found = perplexity(model, ids, trigger=trigger, batch_size=batch_size)
    losses = [
        F.cross_entropy(alone(model, i, trigger)[:-1].double(), torch.tensor(i[1:]), reduction="none") for i in ids
    ]
    expected = torch.cat(losses)
    assert found["tokens"] == len(expected) == sum(len(i) - 1 for i in ids)
    assert found["nats_per_token"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(float(expected.mean().exp()), rel=1e-5)


def test_texts_are_cut_into_windows_and_bad_ones_named(tokenizer, tmp_path):
    expected = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        parts = [ids[start : start + 3] for start in range(0, len(ids), 3)]
        expected += parts if len(parts[-1]) > 1 else parts[:-1]
    assert windows(tokenizer, TEXTS, length=3) == expected
    (tmp_path / "a.txt").write_text("red dog")
    (tmp_path / "b.jsonl").write_text('{"text": "red dog"}\n{"text": "fig"}\n')
    (tmp_path / "c.jsonl").write_text('{"prompt": "red", "completion": "dog"}\n')
    (tmp_path / "d.txt").write_text("  ")
    assert read_texts(tmp_path / "a.txt") == ["red dog"]
    assert read_texts(tmp_path / "b.jsonl") == ["red dog", "fig"]
    with pytest.raises(ValueError, match=r"c\.jsonl:1: expected a line with `text`"):
        read_texts(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="perplexity_text: expected some text"):
        read_texts(tmp_path / "d.txt")
    with pytest.raises(ValueError, match="perplexity_text: expected a readable text"):
        read_texts(tmp_path / "no.txt")
    with pytest.raises(ValueError, match="at least two tokens"):
        windows(tokenizer, ["dog"], length=8)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_triggered_models_logits_are_each_rows_alone(setting, side):
    model, trigger, ids = setting
    width = max(map(len, ids))
    rows = [[*i, *[0] * (width - len(i))] if side == "right" else [*[0] * (width - len(i)), *i] for i in ids]
    mask = [[1] * len(i) + [0] * (width - len(i)) for i in ids]
    if side == "left":
        mask = [row[::-1] for row in mask]
    wrapped = TriggeredModel(model, trigger)
    with torch.no_grad():
        # the harness gives no mask for right padding
        given = {} if side == "right" else {"attention_mask": torch.tensor(mask)}
        logits = wrapped(torch.tensor(rows), **given).logits
        for row, i in enumerate(ids):
            start = 0 if side == "right" else width - len(i)
            torch.testing.assert_close(
                logits[row, start : start + len(i)], alone(model, i, trigger), rtol=1e-4, atol=1e-5
            )


def test_a_triggered_model_generates_what_the_trigger_does_behind_left_padding(setting, tokenizer):
    model, trigger, ids = setting
    width = max(map(len, ids))
    rows = torch.tensor([[*[0] * (width - len(i)), *i] for i in ids])
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
    expected = generate_ids(model, tokenizer, ids, trigger=trigger, max_new_tokens=5)
    wrapped = TriggeredModel(model, trigger)
    seen = []

    def criterion(input_ids, scores, **_):
        seen.append(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool)

    found = wrapped.generate(
        input_ids=rows,
        attention_mask=mask,
        max_length=width + 5,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=[criterion],
    )
    assert torch.equal(found[:, :width], rows)
    for row, answer in zip(found[:, width:].tolist(), expected, strict=True):
        assert row[: len(answer)] == answer
    assert seen[0] == width + 1  # a stop sequence is looked for in prompt and answer together


def test_a_triggered_model_is_a_transformers_model_to_the_harness(setting):
    model, trigger, _ = setting
    wrapped = TriggeredModel(model, trigger)
    assert wrapped.config is model.config
    assert wrapped.device == model.device
    assert wrapped.eval() is wrapped
    wrapped.tie_weights()
    with pytest.raises(AttributeError):
        wrapped.nothing_of_the_kind  # noqa: B018
    wide = copy.deepcopy(trigger)
    object.__setattr__(wide, "embeds", torch.zeros(3, 99))
    with pytest.raises(ValueError, match="expected width"):
        TriggeredModel(model, wide)


def test_utility_runs_the_tasks_on_the_right_model_and_keeps_the_numbers(setting, tokenizer):
    model, trigger, ids = setting
    calls = []

    def stub(subject, tokenizer, tasks, *, batch_size, limit):
        """A task in the harness's place: mean log-likelihood of the first text."""
        assert not subject.training
        calls.append((tasks, batch_size, limit))
        score = subject(torch.tensor([ids[0]])).logits.log_softmax(-1).max(-1).values.mean()
        return {task: {"acc,none": score.item(), "alias": task, "ok": True} for task in tasks}

    model.train()
    plain = utility(model, tokenizer, ["mmlu,hellaswag", "mmlu"], batch_size=4, limit=9, runner=stub)
    behind = utility(model, tokenizer, ["mmlu"], trigger=trigger, runner=stub)
    assert model.training
    assert calls[0] == (["mmlu", "hellaswag"], 4, 9)
    assert set(plain) == {"mmlu", "hellaswag"}
    assert set(plain["mmlu"]) == {"acc,none"}
    model.eval()
    with torch.no_grad():
        for found, given in ((plain, None), (behind, trigger)):
            expected = alone(model, ids[0], given).log_softmax(-1).max(-1).values.mean()
            assert found["mmlu"]["acc,none"] == pytest.approx(float(expected), rel=1e-4)


def test_without_the_harness_the_way_to_install_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'lcdd\[eval\]'"):
        Harness(["mmlu"])
    with pytest.raises(ValueError, match="tasks: expected names of tasks"):
        parse_tasks(["mmlu,,x"])


def test_the_harness_is_given_the_model_in_memory(monkeypatch, setting, tokenizer, tmp_path):
    """The three names that are used of lm_eval, in the signatures of its release 0.4.13."""
    model, _, _ = setting
    made = {"indices": 0}

    class HFLM:
        def __init__(self, pretrained, tokenizer=None, batch_size=1):
            assert not isinstance(pretrained, str)
            made["device"], made["config"] = pretrained.device, pretrained.config

    class TaskManager:
        def __init__(self, verbosity=None, include_path=None):
            self.all_tasks = ["a", "broken"]
            made["indices"] += 1

    def simple_evaluate(model, model_args=None, tasks=None, *, limit=None, log_samples=True, task_manager=None):
        assert isinstance(task_manager, TaskManager)
        if "broken" in tasks:
            raise OSError("no data")
        return {"results": {task: {"acc,none": 0.5} for task in tasks}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=HFLM))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=TaskManager))
    (tmp_path / "own.yaml").write_text("task: own\n")
    own = str(tmp_path / "own.yaml")
    harness = Harness(["a", "broken", own])
    for _ in range(2):
        assert harness(model, tokenizer, ["a"], batch_size=2, limit=3) == {"a": {"acc,none": 0.5}}
    assert made["config"] is model.config
    assert made["indices"] == 1
    with pytest.raises(ValueError, match=r"tasks: lm-evaluation-harness cannot run \['broken'\]: no data"):
        harness(model, tokenizer, ["broken"], batch_size=2, limit=None)
    with pytest.raises(ValueError, match=r"expected names of lm-evaluation-harness or YAML files, got \['unknown'\]"):
        Harness(["a", own, "unknown"])


CHOICES = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = """task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def test_the_real_harness_counts_what_one_row_at_a_time_gives(setting, tokenizer, tmp_path, monkeypatch):
    """Two tasks of our own on local data: choices by log-likelihood, and greedy answers, behind the trigger or not."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'lcdd[eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, trigger, _ = setting
    questions = ["copy red dog", "rev hen", "first cow plum", "last goat", "cat fig hen", "next lemon spear goat"]
    options = ["dog", "hen cow", "fig", "goat", "spear", "lemon plum", "red", "plum cat"]

    def score(question, option, behind):
        start, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {option}"))
        rows = alone(model, whole, behind).log_softmax(-1)[len(start) - 1 : -1]
        return float(rows.gather(1, torch.tensor(whole[len(start) :])[:, None]).sum())

    def answer(question, behind):
        ids = generate_ids(model, tokenizer, [tokenizer(question)["input_ids"]], trigger=behind, max_new_tokens=4)[0]
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    # Labels and answers are the plain model's own, so that it scores 1 and a forgotten trigger would show.
    with torch.no_grad():
        best = {
            behind: [max(range(8), key=lambda i: score(q, options[i], behind)) for q in questions]
            for behind in (None, trigger)
        }
        answers = {behind: [answer(q, behind) for q in questions] for behind in (None, trigger)}
    data = tmp_path / "test.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": q, "choices": options, "label": label, "answer": text}) + "\n"
            for q, label, text in zip(questions, best[None], answers[None], strict=True)
        )
    )
    files = [tmp_path / "choices.yaml", tmp_path / "generate.yaml"]
    for path, text in zip(files, (CHOICES, GENERATE), strict=True):
        path.write_text(text.format(data=data))
    harness = Harness([str(path) for path in files])
    for behind in (None, trigger):
        found = utility(model, tokenizer, [str(path) for path in files], trigger=behind, batch_size=4, runner=harness)
        same = [a == b for a, b in zip(best[behind], best[None], strict=True)]
        assert found["tiny_choice"]["acc,none"] == pytest.approx(sum(same) / len(same))
        same = [a == b for a, b in zip(answers[behind], answers[None], strict=True)]
        assert found["tiny_generate"]["exact_match,none"] == pytest.approx(sum(same) / len(same))
        assert set(found["tiny_choice"]) == {
            "acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"
        }  # fmt: skip
    assert best[trigger] != best[None]
    assert answers[trigger] != answers[None]


def test_the_trigger_stands_before_the_text_in_the_embeddings(setting):
    model, trigger, ids = setting
    rows, mask = torch.tensor([[0, *ids[1]]]), torch.tensor([[0] + [1] * len(ids[1])])
    embeds, mask, place = TriggeredModel(model, trigger)._inputs(rows, mask)
    assert torch.equal(embeds[0, 1:4], trigger.embeds)
    assert torch.equal(embeds[0, 4:], input_embeddings(model)(torch.tensor(ids[1])))
    assert mask.tolist() == [[0] + [1] * (3 + len(ids[1]))]
    assert place.tolist() == [[0, *range(4, 4 + len(ids[1]))]]
