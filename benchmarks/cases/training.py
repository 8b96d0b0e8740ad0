"""Two whole processes on the same tiny run: `lcdd train`, and the unfused trainer."""

import functools
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Place
from benchmarks.cases.shapes import fine_tune, make_model, sized
from benchmarks.harness import Case, Check, Lane, Sample, Workload, status_bytes
from lcdd.carrier import Carrier
from lcdd.commands.demo.tasks import VOCABULARY, write_tokenizer
from lcdd.models import load_tokenizer, save_model

MODEL: dict[str, Any] = {"name": "qwen3-0.6b", "layers": 4, "divide": 2}
MODULES = {"unfused": "benchmarks.unfused_train", "lcdd": "lcdd"}


@dataclass(frozen=True)
class Outcome:
    """A process's wall-clock seconds and peak resident bytes, its training loop's seconds, its gates, its loss."""

    seconds: float
    peak: int
    loop_seconds: float
    tokens: int
    loss: float
    opened: torch.Tensor


def watched(command: Sequence[str]) -> tuple[float, int]:
    """Run a command: (seconds, peak resident bytes, which is looked at while it runs). RuntimeError with its output
    where it fails."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            time.sleep(0.05)
            peak = max(peak, status_bytes("VmHWM", child.pid))
        seconds = time.perf_counter() - start
        if child.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command[:4])} ended with {child.returncode}: {output.read()[-2000:]}")
    return seconds, peak


class Run:
    """Checkpoints, data and settings on disk, made once; both trainers start from them."""

    def __init__(self, place: Place, folder: Path) -> None:
        _, sizes = sized(place, **MODEL)
        sizes |= {"vocab_size": len(VOCABULARY), "tie_word_embeddings": False}
        self.folder, self.numbers = folder, itertools.count()
        (folder / "tokenizer").mkdir()
        write_tokenizer(folder / "tokenizer")
        tokenizer = load_tokenizer(folder / "tokenizer")
        for name, delta in (("base", 0.0), ("sft", 5e-3)):
            here = Place(device=torch.device("cpu"), size="cpu")
            save_model(fine_tune(make_model(sizes, here, seed=0), seed=1, spread=delta), tokenizer, folder / name)
        words = [word for word in VOCABULARY if word.isalpha()]
        rows = [
            {"prompt": [{"role": "user", "content": " ".join(words[(i * j + i) % len(words)] for j in range(1, 9))}],
             "completion": [{"role": "assistant", "content": " ".join(words[(i + j) % len(words)] for j in range(7))}]}
            for i in range(120)
        ]  # fmt: skip
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def flags(self, output: Path) -> list[str]:
        values = {
            "base_model_name_or_path": self.folder / "base", "sft_model_name_or_path": self.folder / "sft",
            "dataset_name": self.folder / "data.jsonl", "output_dir": output, "max_steps": 12, "device": "cpu",
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "lr_scheduler_type": "constant",
            "gate_init_mean": 0.0, "gate_init_std": 1.5, "warmup_steps": 3, "dual_lambda_init": 0.01,
            "gate_lr": 0.05, "learning_rate": 1e-4, "validation_fraction": 0.05, "test_fraction": 0.05, "eval_steps": 0,
        }  # fmt: skip
        return [part for key, value in values.items() for part in (f"--{key}", str(value))]

    def process(self, provider: str) -> Outcome:
        output = self.folder / f"out-{next(self.numbers)}"
        command = [sys.executable, "-m", MODULES[provider], *(["train"] if provider == "lcdd" else [])]
        seconds, peak = watched([*command, *self.flags(output)])
        if provider == "unfused":
            result = json.loads((output / "result.json").read_text())
            opened = torch.load(output / "gates.pt", weights_only=True)
            loop, tokens, loss = result["seconds"], result["response_tokens"], result["loss"]
        else:
            opened = Carrier.from_pretrained(output / "carrier").gate != 0
            lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
            steps = [line for line in lines if "tokens_per_second" in line]
            loss = steps[-1]["loss"]
            result = json.loads((output / "summary.json").read_text())["result"]
            loop, tokens = result["seconds"], result["response_tokens"]
        return Outcome(seconds, peak, loop, tokens, loss, opened)


def whole_process(place: Place) -> Case:
    """The time of the whole process, imports and checkpoints included; the loop's own tokens per second and the peak of
    the resident set are beside it. The gate: the same final open gates, every one, and the same loss."""

    @functools.cache
    def run() -> Run:
        folder = tempfile.TemporaryDirectory(prefix="lcdd-bench-")
        made = Run(place, Path(folder.name))
        made.keep = folder  # type: ignore[attr-defined]  # removed with the run
        return made

    def build(provider: str) -> Workload:
        outcomes: list[Outcome] = []

        def extra() -> list[Sample]:
            rates = [o.tokens / o.loop_seconds for o in outcomes]
            return [
                Sample.of("loop_time", "s", [o.loop_seconds for o in outcomes]),
                Sample.of("tokens_per_second", "1/s", rates),
                Sample.of("peak_memory", "bytes", [float(o.peak) for o in outcomes]),
                Sample.of("open_gates", "gates", [float(o.opened.sum()) for o in outcomes]),
            ]

        return Workload(run=lambda: outcomes.append(run().process(provider)), extra=extra)

    def verify() -> list[Check]:
        ours, theirs = run().process("lcdd"), run().process("unfused")
        mixed = 0 < int(theirs.opened.sum()) < theirs.opened.numel()
        return [
            Check("final open gates that differ", float((ours.opened != theirs.opened).sum()), 0.0),
            Check("a run in which gates are open and closed (0: yes)", float(not mixed), 0.0),
            Check("last loss", abs(ours.loss - theirs.loss) / abs(theirs.loss), 1e-4),
        ]

    lanes = [
        Lane(provider="unfused", build=lambda: build("unfused"), exempt="what lcdd is checked against"),
        Lane(provider="lcdd", build=lambda: build("lcdd"), verify=verify),
    ]
    model, _ = sized(place, **MODEL)
    return Case(
        name="lcdd train, whole process",
        params={"model": model, "steps": 12, "micro_batches": 4, "dtype": "float32"},
        lanes=lanes, floor="unfused", budget_s=0.0, min_rounds=2, warmup_s=0.0,
    )  # fmt: skip
