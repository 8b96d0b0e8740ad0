"""What the two-rank tests run in each rank's process; started by tests/integration/test_ranks.py under torchrun."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import make_model, make_tokenizer, train_lcdd

from lcdd.config import LCDDConfig
from lcdd.data import Encoded
from lcdd.models import projections, shard_model, shards
from lcdd.optimizer import LCDDOptimizer

STEPS = 50
PAD = make_tokenizer().pad_token_id


def items() -> list[Encoded]:
    """Examples of 3 to 9 response tokens, so that ranks differ in theirs; 13 of them, so that steps do too."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for row in range(13):
        prompt, answer = 4 + row % 3, 3 + row % 7
        ids = torch.randint(3, 200, (prompt + answer,), generator=generator).tolist()
        found.append(Encoded(input_ids=tuple(ids), labels=(*[-100] * prompt, *ids[prompt:]), n_prompt=prompt))
    return found


def models() -> tuple[Any, Any]:
    base = make_model("qwen3", vocab_size=200, layers=1)
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in projections(tuned):
            site.linear.weight += 0.05 * torch.randn(site.linear.weight.shape, generator=generator)
    return base, tuned


def config(groups: int, **changes: Any) -> LCDDConfig:
    settings: dict[str, Any] = {
        "learning_rate": 1e-4, "max_steps": STEPS, "warmup_steps": 5, "gate_lr": 0.05, "dual_lambda_init": 0.005,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": groups, "gate_init_mean": 1.0,
        "gate_init_std": 1.5, "device": "cpu",
    }  # fmt: skip
    return LCDDConfig(**{**settings, **changes})


def summary_of(optimizer: LCDDOptimizer) -> dict[str, torch.Tensor]:
    """What runs are compared by, whole on every rank."""
    found = {f"delta.{name}": shards.full(delta).detach().clone() for name, (_, delta, _) in optimizer.masked().items()}
    return {
        **found,
        **{f"unmasked.{n}": shards.full(p.detach()).clone() for n, p in enumerate(optimizer._unmasked.parameters)},
        "theta": optimizer.gates.logits.detach().clone(),
        "moment": optimizer.state_dict()["lcdd"]["gate_optimizer"]["state"][0]["exp_avg"].clone(),
        "gate": optimizer.gates.evaluation_values(),
        "lambda": torch.tensor(optimizer.dual.dual_lambda, dtype=torch.float64),
    }


def fit(kind: str, groups: int, **changes: Any) -> LCDDOptimizer:
    base, tuned = models()
    if kind == "fsdp2":
        base = shard_model(base, trained=False)
        tuned = shard_model(tuned, trained=True, train_unmasked=changes.get("train_unmasked", False))
    optimizer, _ = train_lcdd(tuned, base, items(), [], config(groups, **changes), pad_token_id=PAD)
    return optimizer


def attached(kind: str, total_steps: int = STEPS) -> LCDDOptimizer:
    base, tuned = models()
    if kind == "fsdp2":
        base, tuned = shard_model(base, trained=False), shard_model(tuned, trained=True)
    return LCDDOptimizer.attach(tuned.train(), base, config(1), total_steps=total_steps)


OTHERWISE = {"gradient_checkpointing": True, "train_unmasked": True, "max_steps": 6}
"""Changes of a second run."""


def main(kind: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    for name, changes in {"plain": {}, "otherwise": OTHERWISE}.items():
        for groups in (1, 2) if name == "plain" else (2,):
            optimizer = fit(kind, groups, **changes)
            found = summary_of(optimizer)
            same = [torch.empty_like(found["theta"]) for _ in range(dist.get_world_size())]
            dist.all_gather(same, found["theta"])
            assert all(torch.equal(other, found["theta"]) for other in same), "theta differs between the ranks"
            if dist.get_rank() == 0:
                torch.save(found, folder / f"{kind}-{name}-{groups}.pt")
            if kind == "fsdp2" and (name, groups) == ("plain", 1):
                dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=str(folder / "dcp-2"))
    if kind == "fsdp2":
        local = shards.local(optimizer.masked()[optimizer.names[0]][1])
        assert local.shape[0] * 2 == projections(optimizer.model)[0].linear.out_features
        # written by one rank, read by two
        again = attached(kind)
        state = {"optimizer": again.state_dict()}
        dcp.load(state, checkpoint_id=str(folder / "dcp-1"))
        again.load_state_dict(state["optimizer"])
        found = summary_of(again)
        if dist.get_rank() == 0:
            torch.save(found, folder / "read-by-two.pt")
    if kind == "ddp":  # nobody averaged these gradients: refused on both ranks
        optimizer = attached(kind)
        for site in projections(optimizer.model):
            site.linear.weight.grad = torch.full_like(site.linear.weight, 1.0 + dist.get_rank())
        try:
            optimizer.step(1.0)
        except ValueError as error:
            (folder / f"refused-{dist.get_rank()}.json").write_text(json.dumps(str(error)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
