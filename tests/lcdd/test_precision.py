"""16 bits where they are emulated: said once, and left alone where a pipeline goes by the machine."""

import logging
import re

import pytest
import torch

from lcdd.commands import stage
from lcdd.config import SECTIONS, EvalConfig, PipelineConfig, SFTConfig
from lcdd.models import precision

CPU = torch.device("cpu")


@pytest.fixture
def slowdown(monkeypatch):
    """Sets what a product in bfloat16 costs on this processor, in float32's time."""
    precision.warn_of_emulation.cache_clear()

    def set_to(times: float) -> None:
        monkeypatch.setattr(precision, "slowdown", lambda device_type, dtype: times)

    yield set_to
    precision.warn_of_emulation.cache_clear()


def test_a_processor_is_measured() -> None:
    assert 0 < precision.slowdown("cpu", torch.bfloat16) < 1000


@pytest.mark.parametrize(
    ("asked", "times", "bf16"),
    [("auto", 25.0, False), ("auto", 0.6, True), ("bfloat16", 25.0, True), ("checkpoint", 0.6, False)],
)
def test_one_precision_is_every_sections(slowdown, asked: str, times: float, bf16: bool) -> None:
    slowdown(times)
    settled = stage.settle_precision(PipelineConfig(precision=asked))
    assert [getattr(settled, section).bf16 for section in SECTIONS] == [bf16] * 5
    assert settled.precision is None


def test_without_precision_every_section_keeps_its_own() -> None:
    config = PipelineConfig(sft=SFTConfig(bf16=True))
    assert stage.settle_precision(config) is config


@pytest.mark.parametrize(
    ("dtype", "config", "said"),
    [
        (torch.float32, EvalConfig(bf16=True), "bfloat16 is emulated on this CPU, 25 times .*: leave bf16 out"),
        (torch.bfloat16, EvalConfig(), "bfloat16 is emulated .*: save the checkpoint in float32 first"),
        (torch.float16, EvalConfig(), "float16 is emulated .*: save the checkpoint in float32 first"),
        (torch.float32, EvalConfig(), None),
    ],
)
def test_emulation_is_said_once(slowdown, make_models, tmp_path, caplog, dtype, config, said: str | None) -> None:
    slowdown(25.4)
    make_models()[0].to(dtype).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            stage.load_weights(str(tmp_path), config)
    found = [record.getMessage() for record in caplog.records if "emulated" in record.getMessage()]
    assert len(found) == (said is not None)
    assert said is None or re.search(said, found[0])


def test_nothing_is_said_of_a_processor_that_computes_in_bfloat16(slowdown, caplog) -> None:
    slowdown(1.2)
    precision.warn_of_emulation(CPU, torch.bfloat16, asked=True)
    assert caplog.records == []
