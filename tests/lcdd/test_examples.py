"""The example pipelines are read by the code as it is, name their data's licence, and ship nothing."""

from pathlib import Path

import pytest

from lcdd.config import PipelineConfig, from_mapping, read_yaml
from lcdd.data import REFUSAL_KEYWORDS, behavior_from_config

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))


def test_the_papers_three_tasks_are_there():
    assert {"fixed_response", "safety", "style"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_pipeline(path):
    config = from_mapping(PipelineConfig, read_yaml(path), where=str(path))
    assert config.base_model_name_or_path
    assert config.data.dataset_name
    behavior = behavior_from_config(config.data)
    assert not behavior.matches("The capital of France is Paris.")
    assert f"lcdd run examples/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "shown"), [("safety", "I'm sorry, but I can't help with that."), ("style", "Prithee, what wilt thou do?")]
)
def test_an_examples_rule_knows_its_behaviour(name, shown):
    path = next(path for path in EXAMPLES if path.stem == name)
    config = from_mapping(PipelineConfig, read_yaml(path), where=str(path))
    assert behavior_from_config(config.data).matches(shown)


def test_the_safety_example_counts_as_the_preset_does():
    path = next(path for path in EXAMPLES if path.stem == "safety")
    assert from_mapping(PipelineConfig, read_yaml(path), where=str(path)).data.behavior_keywords == REFUSAL_KEYWORDS
