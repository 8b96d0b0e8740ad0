"""How small a carrier of a real model gets: LCDD alone on SmolLM2-135M-Instruct, its default settings, real data.

    make real                                                          the base, the data, and SFT of one behaviour
    python -m benchmarks.smollm2 --directory runs/smollm2 --output benchmarks/results/smollm2/small.json

For each behaviour of examples/smollm2 its SFT model is taken from the pipeline's directory, or made, and LCDD runs for
150 steps of 16 examples; of the first behaviour with several seeds, whose open gates are compared. Finished runs are
not repeated. Every figure is the stage's own (summary.json): held-out loss and answers are of the validation split.
"""

import argparse
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.demos import BEHAVIORS, command
from benchmarks.records import ROOT, cpu_environment, read_json, write_json
from lcdd.carrier import Carrier
from lcdd.commands.sft import sft
from lcdd.commands.stage import settle_precision
from lcdd.commands.train import train
from lcdd.config import LCDDConfig, PipelineConfig
from lcdd.config.fields import from_mapping, read_yaml
from lcdd.evaluate import gate_overlap
from lcdd.optimizer.pacing import Pace

EXAMPLES = ROOT / "examples" / "smollm2"
# How long, and in which precision, beside the example's bf16; everything else is LCDD's default, as in the demo.
SETTINGS = LCDDConfig(max_steps=150, per_device_train_batch_size=16, max_length=128, delta_dtype="float32")
# Fixed before the runs: the least share of closed gates, of SFT's rate of behaviour, and the most seconds.
SPARSITY = {"fixed_response": 0.995, "refusal": 0.98, "style": 0.95}
OF_SFT, SECONDS = 0.95, 360.0


def pipeline(behavior: str, directory: Path) -> PipelineConfig:
    """The example's settings, on what `directory` holds."""
    path = EXAMPLES / f"{behavior}.yaml"
    config: PipelineConfig = from_mapping(PipelineConfig, read_yaml(path), where=path.name)
    data = replace(config.data, dataset_name=str(directory / Path(str(config.data.dataset_name)).name))
    base, output = str(directory / "base"), str(directory / behavior)
    return settle_precision(replace(config, base_model_name_or_path=base, output_dir=output, data=data))


def sft_model(config: PipelineConfig) -> Path:
    """The stage's directory, run if it has not been."""
    folder = Path(str(config.output_dir)) / "sft"
    if not (folder / "summary.json").is_file():
        settings = replace(config.sft, base_model_name_or_path=config.base_model_name_or_path, output_dir=str(folder))
        sft(settings, config.data)
    return folder


def compress(config: PipelineConfig, folder: Path, seed: int, tuned: Path) -> float:
    """LCDD alone, unless it has been run; returns the wall seconds of the whole stage, loading and answers included."""
    clock = folder / "seconds.json"
    if not clock.is_file():
        settings = replace(
            SETTINGS, seed=seed, bf16=config.train.bf16, base_model_name_or_path=config.base_model_name_or_path,
            sft_model_name_or_path=str(tuned / "model"), output_dir=str(folder),
        )  # fmt: skip
        start = time.perf_counter()
        train(settings, config.data)
        write_json(clock, {"stage": time.perf_counter() - start})
    seconds: float = read_json(clock)["stage"]
    return seconds


def row(behavior: str, seed: int, folder: Path, tuned: Path, seconds: float) -> dict[str, Any]:
    """One run: the carrier, what it kept, where its open gates sit, and which bounds were met."""
    carrier = Carrier.from_pretrained(folder / "carrier")
    found, before = (read_json(stage / "summary.json") for stage in (folder, tuned))
    result, sft_rate = found["result"], before["validation_behavior"]["rate"]
    pace = Pace(warmup_steps=1, loss_budget=SETTINGS.loss_budget, loss_floor=SETTINGS.loss_floor)
    pace.baseline, pace.base_loss = result["loss_start"], result["loss_base"]
    sparsity, rate = found["carrier"]["sparsity"]["overall"], found["validation_behavior"]["rate"]
    bounds = {
        f"sparsity >= {SPARSITY[behavior]}": sparsity >= SPARSITY[behavior],
        "held-out loss <= epsilon": result["loss_end"] <= pace.epsilon,
        f"behaviour >= {OF_SFT} of SFT's": rate >= OF_SFT * sft_rate,
        f"training seconds <= {SECONDS:g}": result["seconds"] <= SECONDS,
    }
    return {
        "behavior": behavior, "seed": seed, "sparsity": sparsity, "open_gates": carrier.n_open,
        "n_gates": carrier.layout.n_gates, "entries": sum(block.numel() for block in carrier.deltas.values()),
        "matrices": sum(block.numel() > 0 for block in carrier.deltas.values()),
        "delta_norm": found["carrier"]["delta_norm"],
        "held_out_loss": {"base": result["loss_base"], "sft": result["loss_start"], "carrier": result["loss_end"]},
        "epsilon": pace.epsilon, "sft_behavior": before["validation_behavior"],
        "carrier_behavior": found["validation_behavior"], "seconds": result["seconds"], "stage_seconds": seconds,
        "findings": result["findings"], "open_by_layer": by_layer(carrier), "bounds": bounds,
    }  # fmt: skip


def by_layer(carrier: Carrier) -> dict[str, int]:
    """Open gates of each layer and group that has any."""
    return dict(Counter(f"{channel['layer']}.{channel['group']}" for channel in carrier.channels_table()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/smollm2"), help="what `make real` prepared")
    parser.add_argument("--behaviors", nargs="+", choices=BEHAVIORS, default=list(BEHAVIORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the first behaviour")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    if not (options.directory / "base" / "config.json").is_file():
        raise SystemExit(f"--directory: expected what `make real` prepares, got {options.directory} without base/")
    first = options.behaviors[0]
    todo = [(behavior, options.seeds[0]) for behavior in options.behaviors]
    todo += [(first, seed) for seed in options.seeds[1:]]
    rows: list[dict[str, Any]] = []
    of_seeds: list[Carrier] = []
    for behavior, seed in todo:
        config = pipeline(behavior, options.directory)
        tuned, folder = sft_model(config), options.directory / "small" / f"{behavior}-{seed}"
        seconds = compress(config, folder, seed, tuned)
        rows.append(row(behavior, seed, folder, tuned, seconds))
        if behavior == first:
            of_seeds.append(Carrier.from_pretrained(folder / "carrier"))
        write_json(options.output, {  # after each, so that what was cut is of use
            "what": "LCDD alone on SmolLM2-135M-Instruct, default settings; figures of the validation split",
            "command": command("smollm2", sys.argv[1:] if argv is None else argv),
            "environment": cpu_environment(),
            "settings": SETTINGS.lasting() | {"bf16": config.train.bf16},
            "runs": rows,
            "open_gates_across_seeds": gate_overlap(of_seeds) if len(of_seeds) > 1 else None,
        })  # fmt: skip
    missed = [f"{r['behavior']}-{r['seed']}: {bound}" for r in rows for bound, met in r["bounds"].items() if not met]
    print("\n".join(["missed:", *missed]) if missed else "every bound met in every run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
