"""LCDD in TRL's SFTTrainer:  python examples/trl_sft.py BASE SFT DATA.jsonl OUTPUT_DIR  (or: accelerate launch ...)"""

import sys

import torch
from datasets import load_dataset
from trl import SFTConfig

from lcdd import LCDDConfig
from lcdd.integrations.trl import LCDDSFTTrainer

base, sft, data, output = sys.argv[1:]
dataset = load_dataset(
    "json", data_files=data, split="train"
)  # messages, prompt + completion, text, or Alpaca's columns
gpu = torch.cuda.is_available()
args = SFTConfig(output, max_steps=100, save_strategy="no", report_to="none", bf16=gpu, use_cpu=not gpu)
trainer = LCDDSFTTrainer(sft, base, LCDDConfig(), args=args, train_dataset=dataset)
trainer.train()
trainer.save_carrier(f"{output}/carrier")
