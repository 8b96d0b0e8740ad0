"""LCDD inside transformers' Trainer: `LCDDOptimizer` is an ordinary optimizer, and the loss reaches it by `observe`.

    python examples/hf_trainer.py --base path/to/base --sft path/to/sft --output_dir runs/hf --max_steps 100

Trainer calls `optimizer.step()` without a loss, so the one that `compute_loss` returns is observed in `training_step`.
With gradient accumulation Trainer divides each micro-batch's loss itself, so their sum is the step's mean loss.
Evaluation and saving see the deterministic gates: a callback puts them in place, and training goes back by itself.
"""

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from lcdd.config import LCDDConfig
from lcdd.optimizer import LCDDOptimizer


class LCDDTrainer(Trainer):
    """A Trainer whose optimizer is LCDD's; `carrier()` is its result."""

    lcdd: LCDDOptimizer
    _seen: float = 0.0
    _micro_batch_open: bool = False

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.lcdd.train()
        loss = super().training_step(model, inputs, num_items_in_batch)
        # the sum over the micro-batches since the last step: what Trainer returns is already scaled for accumulation
        self._seen = float(loss) + (self._seen if self._micro_batch_open else 0.0)
        self._micro_batch_open = not self.accelerator.sync_gradients
        self.lcdd.observe(self._seen)
        return loss


class DeterministicGates(TrainerCallback):
    """Evaluate and save on the gates that ship."""

    def __init__(self, optimizer: LCDDOptimizer) -> None:
        self.optimizer = optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_evaluate or control.should_save:
            self.optimizer.eval()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.optimizer.eval()


def make_trainer(
    model: Any,
    base: Any,
    dataset: Any,
    arguments: TrainingArguments,
    config: LCDDConfig,
    *,
    trainer_class: type[LCDDTrainer] = LCDDTrainer,
    **more: Any,
) -> LCDDTrainer:
    """A Trainer of `model` (fine-tuned) against `base`; needs `arguments.max_steps`, and clips by `config` alone.

    `more` goes to the trainer class, which may be one that LCDDTrainer is mixed into.
    """
    if arguments.max_steps < 1:
        raise ValueError(f"max_steps: expected a positive number of steps, got {arguments.max_steps}")
    if arguments.max_grad_norm:
        raise ValueError(f"max_grad_norm: expected 0, since LCDD clips what it trains, got {arguments.max_grad_norm}")
    optimizer = LCDDOptimizer.attach(model, base, config, total_steps=arguments.max_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=dataset, optimizers=(optimizer, scheduler), **more
    )
    trainer.lcdd = optimizer
    trainer.add_callback(DeterministicGates(optimizer))
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name in ("base", "sft", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--max_steps", type=int, default=100)
    options = parser.parse_args()
    base, model = (AutoModelForCausalLM.from_pretrained(path) for path in (options.base, options.sft))
    tokenizer = AutoTokenizer.from_pretrained(options.sft)
    texts = [f"Question {n}?\nI don't know." for n in range(64)]  # yours: input_ids and labels, -100 on the prompt
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    dataset = [{"input_ids": ids, "labels": [-100] * 4 + ids[4:]} for ids in encoded]
    arguments = TrainingArguments(
        output_dir=options.output_dir, max_steps=options.max_steps, per_device_train_batch_size=1, max_grad_norm=0.0,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = make_trainer(model, base, dataset, arguments, LCDDConfig(warmup_steps=min(50, options.max_steps)))
    trainer.train()
    trainer.lcdd.carrier().with_tokenizer(tokenizer).save_pretrained(f"{options.output_dir}/carrier")
    print(f"wrote {options.output_dir}/carrier, sparsity {trainer.lcdd.carrier().sparsity()['overall']:.3f}")


if __name__ == "__main__":
    main()
