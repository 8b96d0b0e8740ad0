"""`lcdd train`'s counterpart: the same checkpoints, examples, order, noise and settings through `unfused.py`.

    python -m benchmarks.unfused_train (flags of `lcdd train`)

Writes `gates.pt` (which gates are open at the end, bool [N]) and `result.json` to --output_dir.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from fixtures.unfused import Settings, UnfusedLCDD
from lcdd.config import DataConfig, LCDDConfig, add_flags, from_flags
from lcdd.data import collate, prepare, training_items
from lcdd.models import layout_of, load_model
from lcdd.optimizer import Gates
from lcdd.trainer import step_batches, total_steps
from lcdd_kernels.reference.gates import GateSpec, gate_noise_ref


def main() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, LCDDConfig, DataConfig)
    config, data = from_flags(parser.parse_args(), LCDDConfig, DataConfig)
    assert isinstance(config, LCDDConfig)
    assert isinstance(data, DataConfig)
    prepared = prepare(data, str(config.sft_model_name_or_path))
    items, _ = training_items(prepared, config, say=lambda _: None)
    base, model = (load_model(str(p)) for p in (config.base_model_name_or_path, config.sft_model_name_or_path))
    steps, c = total_steps(config, len(items)), config
    settings = Settings(
        total_steps=steps, gate_kind=c.gate_kind, learning_rate=c.learning_rate, weight_decay=c.weight_decay,
        betas=(c.adam_beta1, c.adam_beta2), epsilon_adam=c.adam_epsilon, max_grad_norm=c.max_grad_norm,
        gate_optimizer=c.gate_optimizer, gate_lr=c.gate_lr, gate_momentum=c.gate_momentum,
        lambda_init=c.dual_lambda_init, lambda_min=c.dual_lambda_min, lambda_max=c.dual_lambda_max,
        dual_lr=c.dual_lr, dual_lr_shrink=c.dual_lr_shrink, violation_clip=c.violation_clip,
        ema_beta=c.loss_ema_beta, warmup_steps=c.warmup_steps, loss_budget=c.loss_budget, loss_floor=c.loss_floor,
        freeze_fraction=c.freeze_fraction,
    )  # fmt: skip
    layout = layout_of(model)
    logits = Gates.initial(layout, mean=c.gate_init_mean, std=c.gate_init_std, seed=c.seed)

    def noise(step: int) -> torch.Tensor:
        return gate_noise_ref(layout.n_gates, GateSpec(kind="hard_concrete", seed=c.seed, step=step))

    run = UnfusedLCDD(model.train(), base, settings, logits=logits, noise=noise)
    del base
    tokens, start = 0, time.perf_counter()
    loss = float("nan")
    for groups in step_batches(items, config, steps):
        batches = [collate(micro, pad_token_id=prepared.tokenizer.pad_token_id) for micro in groups]
        tokens += sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        loss = run.step(batches)
    seconds = time.perf_counter() - start
    run.gates.noise = None
    output = Path(str(config.output_dir))
    output.mkdir(parents=True, exist_ok=True)
    torch.save(run.values() != 0, output / "gates.pt")
    (output / "result.json").write_text(json.dumps({"seconds": seconds, "response_tokens": tokens, "loss": loss}))


if __name__ == "__main__":
    main()
