"""Settings check themselves, and flags and YAML are the same settings."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from lcdd.config import (
    Config,
    DataConfig,
    EraserConfig,
    EvalConfig,
    GenerateConfig,
    LCDDConfig,
    PipelineConfig,
    SFTConfig,
    add_flags,
    from_flags,
    from_mapping,
    parse_text,
    read_yaml,
)
from lcdd.config import training as configs

CLASSES = [
    value
    for value in vars(configs).values()
    if isinstance(value, type) and issubclass(value, Config) and value != Config
]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LCDDConfig(gate_lr=-1.0), "LCDDConfig.gate_lr: expected a value >= 0, got -1.0"),
        (lambda: LCDDConfig(gate_lr=float("nan")), "LCDDConfig.gate_lr: expected a number, got nan"),
        (lambda: LCDDConfig(dual_lr=float("inf")), "LCDDConfig.dual_lr: expected a number, got inf"),
        (lambda: GenerateConfig(prompt=("copy", " ")), "GenerateConfig.prompt: expected text in every prompt, got ' '"),
        (lambda: EraserConfig(seed=2**64), "EraserConfig.seed: expected a value <= 1e"),
        (lambda: LCDDConfig(gate_kind="soft"), "expected one of hard_concrete, heaviside_ste, got 'soft'"),
        (lambda: LCDDConfig(loss_ema_beta=1.0), "LCDDConfig.loss_ema_beta: expected a value < 1"),
        (lambda: LCDDConfig(dual_lambda_init=0.0), "expected a value > 0, got 0.0"),
        (lambda: LCDDConfig(dual_lambda_init=2.0, dual_lambda_max=1.0), "dual_lambda_init: expected a value between"),
        (lambda: LCDDConfig(dual_lambda_min=2.0, dual_lambda_max=1.0), "dual_lambda_min: expected at most"),
        (lambda: LCDDConfig(loss="kl"), "LCDDConfig.loss: expected cross_entropy unless train_delta is off"),
        (lambda: LCDDConfig(seed=True), "LCDDConfig.seed: expected an integer, got True"),
        (lambda: SFTConfig(max_steps=0), "SFTConfig.max_steps: expected -1 or a positive number of steps, got 0"),
        (lambda: SFTConfig(bf16=1), "SFTConfig.bf16: expected true or false, got 1"),
        (lambda: SFTConfig(max_length="512"), "SFTConfig.max_length: expected an integer, got '512'"),
        (lambda: DataConfig(behavior_topics="gun"), "behavior_topics: expected a list of strings, got 'gun'"),
        (lambda: DataConfig(validation_fraction=0.6, test_fraction=0.4), r"validation_fraction \+ test_fraction < 1"),
        (lambda: EvalConfig(matched_norm_trigger="x"), "expected matched_norm_model_name_or_path beside it"),
        (lambda: PipelineConfig(sft=SFTConfig(output_dir="x")), r"PipelineConfig.sft.output_dir: expected nothing"),
        (lambda: PipelineConfig(precision="float16"), "expected one of auto, bfloat16, checkpoint, got 'float16'"),
        (
            lambda: PipelineConfig(precision="auto", eval=EvalConfig(bf16=True)),
            r"PipelineConfig.eval.bf16: expected nothing beside precision, .* got true beside 'auto'",
        ),
        (lambda: PipelineConfig(erase=EraserConfig(resume=True)), r"PipelineConfig.erase.resume: expected it off"),
    ],
)
def test_bad_values_name_field_expectation_and_value(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_and_positional_arguments_are_errors() -> None:
    with pytest.raises(TypeError):
        LCDDConfig(gate_learning_rate=0.1)
    with pytest.raises(TypeError):
        LCDDConfig(0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        LCDDConfig().seed = 1


@pytest.mark.parametrize("config", CLASSES)
def test_every_field_has_help_and_defaults_survive_json_and_yaml(config: type[Config], tmp_path: Path) -> None:
    assert all(item.metadata.get("help") for item in dataclasses.fields(config))
    defaults = config()
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(defaults.to_dict()))  # JSON is YAML
    assert from_mapping(config, read_yaml(path), where=str(path)) == defaults


@pytest.mark.parametrize("config", [c for c in CLASSES if c is not PipelineConfig])
def test_every_field_is_a_flag(config: type[Config]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {f"--{item.name}" for item in dataclasses.fields(config)} <= flags


@pytest.mark.parametrize("config", [SFTConfig, LCDDConfig, EraserConfig, EvalConfig])
def test_facts_about_a_setting_are_on_the_setting(config: type[Config]) -> None:
    """What resuming and pipelines go by; a path never decides what is learned."""
    paths, free = set(config.named("path")), set(config.named("resumable"))
    assert {"output_dir", "base_model_name_or_path"} <= paths <= free
    assert {"device"} <= free
    assert not {"seed", "bf16", "learning_rate", "per_device_train_batch_size", "gate_kind", "split"} & free
    lasting = config().lasting()
    assert set(lasting) == {item.name for item in dataclasses.fields(config)} - free
    assert set(config().lasting(settled=True)) - set(lasting) == set(config.named("settled"))


def test_a_finished_stage_was_made_with_more_than_a_resumed_one_has_to_share() -> None:
    assert set(LCDDConfig.named("settled")) == {"gradient_accumulation_steps", "initial_carrier", "save_folded"}
    assert json.loads(json.dumps(LCDDConfig(seed=3).lasting())) == LCDDConfig(seed=3, device="cpu").lasting()


@pytest.mark.parametrize(
    "configs", [(SFTConfig, DataConfig), (LCDDConfig, DataConfig), (EraserConfig, DataConfig), (GenerateConfig,)]
)
def test_help_begins_with_what_is_required_then_with_what_people_change(configs: tuple[type[Config], ...]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, *configs)
    first = next(group for group in parser._action_groups if group.title == "what people change")
    names = [action.dest for action in first._group_actions]
    required = [item.name for config in configs for item in dataclasses.fields(config) if item.metadata["required"]]
    assert names[: len(required)] == required
    assert len(names) <= len(required) + 14
    shown = parser.format_help()
    assert all(shown.index("what people change") < shown.index(group.title) for group in parser._action_groups[3:])


def _parse(*argv: str, config: type[Config] = LCDDConfig) -> LCDDConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, config, DataConfig)
    required = ["--sft_model_name_or_path", "sft", "--base_model_name_or_path", "base", "--output_dir", "out"]
    return from_flags(parser.parse_args([*required, "--dataset_name", "d.jsonl", *argv]), config, DataConfig)


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("gate_lr: 1e-3\nloss_budget: 1\ntrain_delta: false\nbehavior_topics: [gun, bomb]\nseed: 3\n")
    train, data = _parse("--config", str(path), "--seed", "4", "--train_delta", "--dual_lr_shrink", "none")
    assert (train.gate_lr, train.loss_budget, train.seed, train.train_delta) == (1e-3, 1, 4, True)
    assert train.dual_lr_shrink is None
    assert data.behavior_topics == ("gun", "bomb")
    train, data = _parse("--no-train_delta", "--loss", "kl", "--behavior_topics", "a", "b")
    assert train.loss == "kl"
    assert data.behavior_topics == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperature: 0.1", "unknown setting 'temperature'; known are: .*gate_lr"),
        ("learning_rte: 0.1", r"unknown setting 'learning_rte'; did you mean learning_rate\?"),
        ("model_name_or_path: m", r"did you mean sft_model_name_or_path or base_model_name_or_path\?"),
        ("gate_lr: [1]", r"LCDDConfig.gate_lr: expected a number, got \[1\]"),
        ("gate_lr: fast", "LCDDConfig.gate_lr: expected a number, got 'fast'"),
        ("- 1", "expected a mapping of settings, got a list"),
        ("a: b: c", "expected YAML, got"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        _parse("--config", str(path))


def test_missing_yaml_and_missing_required_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config: expected a readable YAML file"):
        _parse("--config", str(tmp_path / "no.yaml"))
    parser = argparse.ArgumentParser()
    add_flags(parser, SFTConfig)
    with pytest.raises(ValueError, match=r"SFTConfig.base_model_name_or_path: expected a value, got nothing"):
        from_flags(parser.parse_args(["--output_dir", "x"]), SFTConfig)


def test_sections_of_a_pipeline() -> None:
    values = {"base_model_name_or_path": "m", "sft": {"max_steps": 3}, "data": {"behavior": "own"}}
    config = from_mapping(PipelineConfig, values, where="p.yaml")
    assert config.sft.max_steps == 3
    assert config.data.behavior == "own"
    with pytest.raises(ValueError, match=r"p.yaml: sft: unknown setting 'gate_lr'"):
        from_mapping(PipelineConfig, {"sft": {"gate_lr": 1}}, where="p.yaml")
    with pytest.raises(ValueError, match=r"p.yaml: sft: expected a mapping"):
        from_mapping(PipelineConfig, {"sft": 3}, where="p.yaml")


def test_sections_that_share_a_name_cannot_be_combined() -> None:
    with pytest.raises(ValueError, match="expected a name no other section has"):
        add_flags(argparse.ArgumentParser(), SFTConfig, LCDDConfig)


def test_flag_values_are_typed() -> None:
    assert parse_text("1e-3", float) == 1e-3
    assert parse_text("NONE", int | None) is None
    assert parse_text("none", str) == "none"
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected an integer, got .1.5."):
        parse_text("1.5", int)


def test_a_list_flag_may_be_repeated() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, GenerateConfig)
    arguments = parser.parse_args(["--base_model_name_or_path", "m", "--prompt", "one", "--prompt", "two", "three"])
    assert from_flags(arguments, GenerateConfig)[0].prompt == ("one", "two", "three")


def test_under_another_controller_the_other_ones_settings_are_at_their_defaults() -> None:
    """As the audit's random mask is trained, whatever the carrier was trained with."""
    paced = LCDDConfig(target_sparsity=0.9, separate_from=("one",), base_kl_weight=1.0, shrink_delta=False, max_steps=7)
    dual = paced.under("dual", gate_lr=0.0)
    assert (dual.paced, dual.gate_lr, dual.max_steps) == (False, 0.0, 7)
    assert dual.settings_of("paced") == []
    assert dual.under("paced").settings_of("dual") == []
