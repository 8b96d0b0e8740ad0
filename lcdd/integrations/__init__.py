"""Other people's training loops: `transformers` (Trainer) and `trl` (SFTTrainer), each imported where it is used."""
