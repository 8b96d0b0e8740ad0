"""Training without padding against padded training: the same steps, step by step side by side, and their losses.

    python -m benchmarks.padding --model DIR --data FILE.jsonl --output benchmarks/results/cpu/padding.json

Two copies of the model take the same SFT steps on the same micro-batches of real answers: one padded to the longest
example of each, one packed as `lcdd sft` and `lcdd train` do it (`lcdd.trainer.to_batch`). Which goes first alternates.
A ratio is padded time over packed time of one step: batch, forward, backward and optimizer together.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import cpu_environment, timestamp, write_json
from lcdd.config import DataConfig, SFTConfig
from lcdd.data import Encoded, encode_all, load_examples
from lcdd.models import PreTrainedModel, head_weight, load_model, load_tokenizer
from lcdd.optimizer import SFTOptimizer
from lcdd.trainer import Batch, loss_sum, padded_batch, response_tokens, step_batches, to_batch

MakeBatch = Callable[[Sequence[Encoded], PreTrainedModel, int], Batch]


def padded(items: Sequence[Encoded], model: PreTrainedModel, pad_token_id: int) -> Batch:
    return padded_batch(items, pad_token_id, head_weight(model).device)


class Lane:
    """One copy of the model in training, and what its steps took."""

    def __init__(self, model: PreTrainedModel, config: SFTConfig, make: MakeBatch) -> None:
        self.model, self.make = model.train(), make
        self.optimizer = SFTOptimizer(model, config)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self.tokens: list[int] = []

    def step(self, items: Sequence[Encoded], pad_token_id: int) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        batch = self.make(items, self.model, pad_token_id)
        loss = loss_sum(self.model, batch) / response_tokens(items)
        loss.backward()
        self.optimizer.step(loss.item())
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - wall)
        self.processor_seconds.append(time.process_time() - processor)
        self.losses.append(loss.item())
        self.tokens.append(batch.input_ids.numel())


def quantiles(values: Sequence[float]) -> dict[str, float]:
    p20, p50, p80 = (statistics.quantiles(values, n=10)[cut - 1] for cut in (2, 5, 8))
    return {"p20": round(p20, 4), "p50": round(p50, 4), "p80": round(p80, 4)}


def compare(model: PreTrainedModel, items: Sequence[Encoded], config: SFTConfig, pad_token_id: int) -> dict[str, Any]:
    """Losses, tokens and times of both lanes."""
    lanes = {"padded": Lane(copy.deepcopy(model), config, padded), "packed": Lane(model, config, to_batch)}
    lengths = []
    for number, (micro,) in enumerate(step_batches(items, config, config.max_steps)):
        lengths.append([len(item.input_ids) for item in micro])
        for name in sorted(lanes, reverse=bool(number % 2)):
            lanes[name].step(micro, pad_token_id)
        print(*(f"{name} {lane.losses[-1]:.7f} {lane.seconds[-1]:.2f} s" for name, lane in lanes.items()), flush=True)
    ours, theirs = lanes["packed"], lanes["padded"]
    apart = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]

    def ratio(name: str) -> dict[str, float]:
        return quantiles([a / b for a, b in zip(getattr(theirs, name), getattr(ours, name), strict=True)])

    return {
        "steps": len(apart),
        "padded_over_packed": ratio("seconds"),
        "padded_over_packed_processor": ratio("processor_seconds"),
        "largest_loss_difference": max(apart),
        "losses": {name: lane.losses for name, lane in lanes.items()},
        "tokens_run": {name: sum(lane.tokens) for name, lane in lanes.items()},
        "tokens_of_examples": sum(map(sum, lengths)),
        "lengths": {"shortest": min(map(min, lengths)), "longest": max(map(max, lengths))},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--data", required=True, help="instructions and answers, as --dataset_name takes them")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    options = parser.parse_args(arguments)
    tokenizer, model = load_tokenizer(options.model), load_model(options.model, dtype=torch.float32)
    items = encode_all(tokenizer, load_examples(DataConfig(dataset_name=options.data)), max_length=options.max_length)
    config = SFTConfig(
        learning_rate=options.learning_rate, max_steps=options.steps, per_device_train_batch_size=options.batch_size
    )
    found = {
        "model": {"parameters": model.num_parameters(), "type": model.config.model_type},
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        **compare(model, items, config, tokenizer.pad_token_id),
        "environment": cpu_environment(),
        "date": timestamp(),
    }
    if options.output is not None:
        write_json(options.output, found)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
