"""Damaged files: every mutation of a carrier, a trigger or a training checkpoint has to be refused by name.

    python -m benchmarks.corrupt_files --mutations 500     figures go to benchmarks/results/cpu/robustness.json

Blind damage (truncated, a flipped bit, swapped blocks, emptied, grown, missing) is done to any file. Well-formed lies,
in files whose hashes were made to fit again, are of another dtype, another shape, another model, NaN, or a path that
leaves the directory.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.crash_test import write_record
from fixtures.checkpoints import make_model, make_tokenizer
from lcdd.carrier import Carrier
from lcdd.checkpoint import SEAL, CheckpointStore, file_sha256, model_fingerprint, write_manifest
from lcdd.config import LCDDConfig
from lcdd.eraser import Trigger
from lcdd.optimizer import LCDDOptimizer

Loader = Callable[[Path], Any]
MANIFESTS = {"carrier": "carrier.json", "trigger": "manifest.json", "checkpoint": "manifest.json"}
BLIND = ("truncate", "flip", "swap", "empty", "grow", "remove")
LIES = ("dtype", "shape", "nan", "model", "path")

GATES = {"gate_init_mean": 0.0, "gate_init_std": 2.0}
"""About half of the gates are closed: a carrier that has something to damage."""


def make_targets(folder: Path) -> dict[str, tuple[Path, Loader]]:
    """A good carrier, trigger and training checkpoint; how each is loaded for use with the small base model, whole."""
    base, tuned = make_model("qwen3", layers=1), make_model("qwen3", seed=1, layers=1)
    optimizer = LCDDOptimizer.attach(tuned, base, LCDDConfig(**GATES), total_steps=10)
    optimizer.carrier().with_tokenizer(make_tokenizer()).save_pretrained(folder / "carrier")
    fingerprint = model_fingerprint(base)
    metadata = {"base_fingerprint": fingerprint}
    Trigger.for_model(base, torch.randn(4, 32), metadata=metadata).save_pretrained(folder / "trigger")
    store = CheckpointStore(folder, identity={"stage": "lcdd"})
    store.save(3, {"optimizer": optimizer.state_dict(), "tokens": 3})

    def trigger(path: Path) -> None:
        found = Trigger.from_pretrained(path)
        found.check_fits(base)
        found.check_base(fingerprint)

    def checkpoint(path: Path) -> None:
        _, state = CheckpointStore(path.parent, identity={"stage": "lcdd"}).load(path)
        optimizer.load_state_dict(state["optimizer"])

    return {
        "carrier": (folder / "carrier", lambda path: Carrier.from_pretrained(path).check_base(base)),
        "trigger": (folder / "trigger", trigger),
        "checkpoint": (folder / "checkpoint-3", checkpoint),
    }


def damage(path: Path, how: str, generator: random.Random) -> None:
    """Blind damage to one file."""
    data = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
        return
    if how == "truncate":
        data = data[: generator.randrange(len(data))]
    elif how == "flip":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif how == "swap":
        size = max(1, min(64, len(data) // 4))
        a, b = generator.randrange(len(data) - size), generator.randrange(len(data) - size)
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    elif how == "empty":
        data = bytearray()
    elif how == "grow":
        data += generator.randbytes(generator.randrange(1, 99))
    path.write_bytes(bytes(data))


def lie(folder: Path, kind: str, how: str, generator: random.Random) -> Path:
    """A well-formed file that does not belong, with hashes that fit; the file."""
    manifest = folder / MANIFESTS[kind]
    content = json.loads(manifest.read_text(encoding="utf-8"))
    path = next(folder.glob("*.safetensors"))
    if how == "path":
        relative = generator.choice(["/etc/hostname", "../escape", "a/../../b"])
        content["sha256"][relative] = "0" * 64
        path = manifest
    elif how == "model":
        if kind == "carrier":
            content["base_fingerprint"] = generator.randbytes(32).hex()
        elif kind == "trigger":
            content["lcdd"] = {**content.get("lcdd", {}), "base_fingerprint": generator.randbytes(32).hex()}
        else:
            content["identity"] = {"stage": "lcdd", "base": generator.randbytes(32).hex()}
        path = manifest
    else:
        tensors = load_file(path)
        wanted = {"carrier": ("gate", "gate_logits", "delta."), "trigger": ("prompt_embeddings",)}
        names = [name for name, value in tensors.items() if value.numel() and value.is_floating_point()
                 and (kind == "checkpoint" or name.startswith(wanted[kind])) and value.ndim]  # fmt: skip
        name = generator.choice(sorted(names))
        value = tensors[name]
        if how == "dtype":
            tensors[name] = value.to(generator.choice([torch.int32, torch.int8]))
        elif how == "shape":
            tensors[name] = value.flatten()[: max(1, value.numel() - 1)].clone() if value.numel() > 1 else value[:0]
        else:
            tensors[name] = torch.full_like(value, float("nan"))
        save_file(tensors, path)
        content["sha256"][path.name] = file_sha256(path)
    write_manifest(manifest, {key: value for key, value in content.items() if key != SEAL})
    return path


def fuzz(folder: Path, *, mutations: int, seed: int = 0) -> dict[str, Any]:
    """The figures of `mutations` mutations, spread evenly over kinds and ways."""
    targets = make_targets(folder)
    for path, load in targets.values():
        load(path)  # whole ones are accepted
    generator = random.Random(seed)
    record: dict[str, Any] = {"mutations": 0, "refused": 0, "message_names_the_file": 0, "crashes": 0, "accepted": []}
    ways: Counter[str] = Counter()
    kinds, choices = sorted(targets), [*BLIND * 2, *LIES]
    while record["mutations"] < mutations:
        kind, how = kinds[record["mutations"] % 3], choices[(record["mutations"] // 3) % len(choices)]
        original, load = targets[kind]
        # beside the original and of its own name, so that only the content differs
        copy = folder / "mutated" / original.name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        if how in BLIND:
            path = generator.choice(sorted(p for p in copy.iterdir() if p.is_file()))
            if how == "remove" and kind == "trigger" and path.name == MANIFESTS[kind]:
                path = copy / "adapter_config.json"  # without a manifest it is an adapter that PEFT wrote
            before = path.read_bytes()
            damage(path, how, generator)
            if path.exists() and path.read_bytes() == before:
                continue
        else:
            path = lie(copy, kind, how, generator)
        record["mutations"] += 1
        ways[how] += 1
        try:
            load(copy)
            record["accepted"].append(f"{kind}: {how} {path.name}")
        except ValueError as error:
            record["refused"] += 1
            named = path.name in str(error) or copy.name in str(error)
            record["message_names_the_file"] += named
            if not named:
                record["accepted"].append(f"unnamed: {kind}: {how} {path.name}: {error}")
        except Exception as error:  # anything else is what is counted here
            record["crashes"] += 1
            record["accepted"].append(f"crash: {kind}: {how} {path.name}: {error!r}")
    return {**record, "ways": dict(sorted(ways.items()))}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = fuzz(Path(folder), mutations=arguments.mutations, seed=arguments.seed)
    write_record({"corrupt_files": record})
    print(json.dumps(record, indent=2))
    return int(record["refused"] != record["mutations"])


if __name__ == "__main__":
    sys.exit(main())
