"""LCDD inside TRL's SFTTrainer: it is a transformers Trainer, so LCDDTrainer's step mixes into it.

    python -m examples.trl_sft --base path/to/base --sft path/to/sft --dataset data.jsonl --output_dir runs/trl

The data set is anything that TRL reads (messages, prompt + completion, ...), templated and masked by TRL.
"""

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from examples.hf_trainer import LCDDTrainer, make_trainer
from lcdd.config import LCDDConfig


class LCDDSFTTrainer(LCDDTrainer, SFTTrainer):
    """TRL's data handling and loss, LCDD's optimizer."""


def make_sft_trainer(
    model: Any, base: Any, tokenizer: Any, dataset: Any, arguments: SFTConfig, config: LCDDConfig
) -> LCDDTrainer:
    """An SFTTrainer of `model` (fine-tuned) against `base`; `arguments` as for `make_trainer`."""
    return make_trainer(
        model, base, dataset, arguments, config, trainer_class=LCDDSFTTrainer, processing_class=tokenizer
    )


def main() -> None:
    from datasets import load_dataset

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name in ("base", "sft", "dataset", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--max_steps", type=int, default=100)
    options = parser.parse_args()
    base, model = (AutoModelForCausalLM.from_pretrained(path) for path in (options.base, options.sft))
    tokenizer = AutoTokenizer.from_pretrained(options.sft)
    dataset = load_dataset("json", data_files=options.dataset, split="train")
    arguments = SFTConfig(
        output_dir=options.output_dir, max_steps=options.max_steps, max_grad_norm=0.0, save_strategy="no",
        report_to="none", bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    config = LCDDConfig(warmup_steps=min(50, options.max_steps))
    trainer = make_sft_trainer(model, base, tokenizer, dataset, arguments, config)
    trainer.train()
    trainer.lcdd.carrier().with_tokenizer(tokenizer).save_pretrained(f"{options.output_dir}/carrier")
    print(f"wrote {options.output_dir}/carrier, sparsity {trainer.lcdd.carrier().sparsity()['overall']:.3f}")


if __name__ == "__main__":
    main()
