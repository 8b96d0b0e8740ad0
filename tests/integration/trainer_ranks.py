"""LCDDTrainer in each rank's process; started by tests/integration/test_hf_trainer.py, alone and under torchrun."""

import os
import sys
from typing import Any

import torch
from transformers import TrainingArguments

from fixtures.checkpoints import base_and_tuned
from lcdd.config import LCDDConfig
from lcdd.integrations.transformers import LCDDTrainer

ROWS = [
    {"input_ids": [3, 4, 5 + n, 6, 7, 9] + [8] * (n % 2), "labels": [-100, -100, 5 + n, 6, 7, 9] + [8] * (n % 2)}
    for n in range(32)
]
"""Of two lengths, so that ranks differ in their tokens."""


def pad(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    fill = {"input_ids": 0, "labels": -100}
    return {key: torch.tensor([row[key] + [fill[key]] * (7 - len(row[key])) for row in batch]) for key in fill}


def run(folder: str, *, ranks: int = 1) -> dict[str, Any]:
    """Six steps of eight rows, the best model loaded at the end."""
    base, tuned = base_and_tuned()
    args = TrainingArguments(
        output_dir=f"{folder}/{ranks}", max_steps=6, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
        gradient_accumulation_steps=4 // ranks, ddp_backend="gloo" if ranks > 1 else None, report_to="none",
        save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    config = LCDDConfig(warmup_steps=3, gate_lr=0.2, learning_rate=1e-3, gate_init_mean=0.5, gate_init_std=1.0)
    trainer = LCDDTrainer(tuned, base, config, args=args, train_dataset=ROWS, eval_dataset=ROWS[:8], data_collator=pad)
    trainer.train()
    trainer.save_carrier(f"{folder}/carrier-{ranks}")
    return {"theta": trainer.lcdd.gates.logits.detach(), "lambda": trainer.lcdd.dual.dual_lambda}


if __name__ == "__main__":
    found = run(sys.argv[1], ranks=int(os.environ["WORLD_SIZE"]))
    torch.save(found, f"{sys.argv[1]}/rank-{os.environ['RANK']}.pt")
