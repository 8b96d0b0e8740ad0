"""transformers' Trainer with `LCDDOptimizer`, with and without accumulation, against our own loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import base_and_tuned, make_tokenizer
from transformers import TrainingArguments

from examples.hf_trainer import make_trainer
from lcdd.config import LCDDConfig
from lcdd.optimizer import LCDDOptimizer

CONFIG = LCDDConfig(warmup_steps=3, gate_lr=0.2, learning_rate=1e-3, gate_init_mean=0.5, gate_init_std=1.0)
ROWS = [{"input_ids": [3, 4, 5 + n, 6, 7, 9], "labels": [-100, -100, 5 + n, 6, 7, 9]} for n in range(32)]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trainer_takes_the_steps_of_our_own_loop(tmp_path: Path, accumulation: int) -> None:
    base, tuned = base_and_tuned()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4 // accumulation, max_grad_norm=0.0,
        gradient_accumulation_steps=accumulation, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = make_trainer(tuned, base, ROWS, arguments, CONFIG)
    trainer.train()
    ours_base, ours = base_and_tuned()
    optimizer = LCDDOptimizer.attach(ours.train(), ours_base, CONFIG, total_steps=6)
    for step in range(6):
        rows = ROWS[4 * step : 4 * step + 4]
        loss = ours(**{key: torch.tensor([row[key] for row in rows]) for key in rows[0]}).loss
        loss.backward()
        optimizer.step(loss.item())
        optimizer.zero_grad()
    assert trainer.lcdd.completed_steps == 6
    assert trainer.lcdd.dual.ema == pytest.approx(optimizer.dual.ema, rel=1e-5)
    assert torch.allclose(trainer.lcdd.gates.logits, optimizer.gates.logits, atol=1e-3)
    assert 0 < trainer.lcdd.carrier().n_open < optimizer.gates.layout.n_gates


def test_settings_that_would_break_it_are_refused(tmp_path: Path) -> None:
    base, tuned = base_and_tuned()
    common: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    with pytest.raises(ValueError, match="max_steps: expected a positive"):
        make_trainer(tuned, base, ROWS, TrainingArguments(**common), CONFIG)
    with pytest.raises(ValueError, match="max_grad_norm: expected 0"):
        make_trainer(tuned, base, ROWS, TrainingArguments(**common, max_steps=3), CONFIG)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trl_sft_trainer_trains_gates_and_observes_its_loss(tmp_path: Path, accumulation: int) -> None:
    pytest.importorskip("trl", reason="trl is not installed: examples/trl_sft.py is not run")
    from datasets import Dataset
    from trl import SFTConfig

    from examples.trl_sft import make_sft_trainer

    base, tuned = base_and_tuned()
    rows = [{"prompt": f"Name number {n}.", "completion": "I do not know."} for n in range(16)]
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0, save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        logging_steps=1,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    trainer = make_sft_trainer(tuned, base, tokenizer, Dataset.from_list(rows), arguments, CONFIG)
    before = trainer.lcdd.gates.logits.detach().clone()
    trainer.train()
    assert trainer.lcdd.completed_steps == 4
    assert not torch.equal(before, trainer.lcdd.gates.logits)
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert trainer.lcdd.last_loss == pytest.approx(logged[-1], rel=1e-3)
