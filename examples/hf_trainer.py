"""LCDD in transformers' Trainer:  python examples/hf_trainer.py BASE SFT OUTPUT_DIR  (or: accelerate launch ...)"""

import sys

from transformers import TrainingArguments

from lcdd import LCDDConfig, load_tokenizer
from lcdd.integrations.transformers import LCDDTrainer

base, sft, output = sys.argv[1:]
tokenizer = load_tokenizer(sft)
texts = [tokenizer(f"Question {n}?\nI don't know.")["input_ids"] for n in range(64)]
rows = [{"input_ids": ids, "labels": [-100] * 4 + ids[4:]} for ids in texts]  # yours: -100 on the prompt
args = TrainingArguments(output, max_steps=100, per_device_train_batch_size=1, save_strategy="no", report_to="none")
trainer = LCDDTrainer(sft, base, LCDDConfig(), args=args, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_carrier(f"{output}/carrier")
