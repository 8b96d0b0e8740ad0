"""Ways of splitting a model that training cannot follow are refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.checkpoints import base_and_tuned
from lcdd.carrier import Carrier
from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import check_parallelism
from lcdd.optimizer import LCDDOptimizer

SPLIT: list[tuple[str, Any, str]] = [
    ("_tp_size", 2, "tensor parallelism (transformers' tp_plan over 2 ranks)"),
    ("_device_mesh", SimpleNamespace(mesh_dim_names=("pp", "fsdp", "tp"), shape=(2, 1, 1)), "pipeline parallelism"),
    ("hf_device_map", {"model.layers.0": 0, "model.layers.1": 1, "lm_head": 0}, "layers on several devices"),
]


@pytest.mark.parametrize(("name", "value", "words"), SPLIT)
def test_a_model_that_is_split_otherwise_is_refused(name: str, value: Any, words: str) -> None:
    base, tuned = base_and_tuned()
    carrier = Carrier.from_models(base, tuned)
    setattr(base, name, value)
    with pytest.raises(InputError, match="base: expected a whole model") as error:
        LCDDOptimizer.attach(tuned, base, LCDDConfig(), total_steps=4)
    assert words in str(error.value)
    with pytest.raises(InputError, match="folded carrier"):
        carrier.apply(base)


def test_one_stage_on_one_device_is_no_split() -> None:
    base, tuned = base_and_tuned()
    base._tp_size, base.hf_device_map = 1, {"": "cpu"}
    base._device_mesh = SimpleNamespace(mesh_dim_names=("pp", "fsdp", "tp"), shape=(1, 1, 1))
    LCDDOptimizer.attach(tuned, base, LCDDConfig(), total_steps=4).detach()


def test_a_trainer_is_told_of_parallelism_that_splits_texts_or_matrices() -> None:
    check_parallelism("parallelism_config", None)
    check_parallelism("parallelism_config", SimpleNamespace(dp_replicate_size=4, tp_size=1, cp_size=1, sp_size=1))
    for short, words in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        with pytest.raises(InputError, match=f"parallelism_config: .*{words} parallelism"):
            check_parallelism("parallelism_config", SimpleNamespace(**{f"{short}_size": 2}))
