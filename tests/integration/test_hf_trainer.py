"""`lcdd.integrations`: transformers' Trainer and TRL's SFTTrainer with LCDD's optimizer, against our own loop."""

import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from integration import trainer_ranks
from integration.test_ranks import torchrun
from loops import LAYOUTS, assert_same_run, attach, layouts_of, packable
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

from fixtures.checkpoints import base_and_tuned, make_tokenizer, save_checkpoint, write_jsonl
from lcdd.carrier import Carrier
from lcdd.config import LCDDConfig
from lcdd.data import encode, parse_row
from lcdd.errors import InputError, TrainingStopped
from lcdd.integrations.transformers import LCDDCallback, LCDDTrainer
from lcdd.integrations.trl import LCDDSFTTrainer
from lcdd.optimizer import LCDDOptimizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = LCDDConfig(warmup_steps=3, gate_lr=0.2, learning_rate=1e-3, gate_init_mean=0.5, gate_init_std=1.0)
ROWS = [{"input_ids": [3, 4, 5 + n, 6, 7, 9], "labels": [-100, -100, 5 + n, 6, 7, 9]} for n in range(32)]
QUIET: dict[str, Any] = {
    "report_to": "none", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant", "logging_steps": 1,
}  # fmt: skip


def arguments(folder: Path, cls: Any = TrainingArguments, **changes: Any) -> Any:
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no", **QUIET, **changes}
    if cls is TrainingArguments:
        settings.setdefault("train_sampling_strategy", "sequential")
    return cls(output_dir=str(folder), **settings)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trainer_takes_the_steps_of_our_own_loop(tmp_path: Path, accumulation: int) -> None:
    base, tuned = base_and_tuned()
    args = arguments(tmp_path, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation)
    trainer = LCDDTrainer(tuned, base, CONFIG, args=args, train_dataset=ROWS)
    trainer.train()
    ours_base, ours = base_and_tuned()
    optimizer = LCDDOptimizer.attach(ours, ours_base, CONFIG, total_steps=6)
    for step in range(6):
        rows = ROWS[4 * step : 4 * step + 4]
        loss = ours(**{key: torch.tensor([row[key] for row in rows]) for key in rows[0]}).loss
        loss.backward()
        optimizer.step(loss)
    assert trainer.lcdd.completed_steps == 6
    assert trainer.lcdd.dual.ema == pytest.approx(optimizer.dual.ema, rel=1e-5)
    assert torch.allclose(trainer.lcdd.gates.logits, optimizer.gates.logits, atol=1e-3)
    assert 0 < trainer.carrier().n_open < optimizer.gates.layout.n_gates
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in logged] == pytest.approx([line["loss"] for line in logged])
    assert logged[-1]["sparsity"] > 0
    assert args.max_grad_norm == 1.0  # the caller's own are left alone


def at_the_end(layout: str) -> str:
    """A gradient's layout once gates are fixed: no closed gate's gradient is asked for, so that panels are blocks."""
    return "block" if layout == "panels" else layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_gradients_train_as_dense_ones_do_with_a_bad_loss_on_the_way(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is NaN in one step of 6: one step is skipped, whatever the gradient's layout."""
    runs = {}
    for pack in ("never", "auto"):
        base, tuned = packable()
        like = attach(*packable(), layout, pack=pack)
        start = {"config": like.config, "initial_logits": like.gates.initial_logits}
        trainer = LCDDTrainer(tuned, base, args=arguments(tmp_path), train_dataset=ROWS, **start)
        count, compute_loss = [0], trainer.compute_loss

        def spoiled(*args: Any, count: Any = count, compute_loss: Any = compute_loss, **more: Any) -> Any:
            count[0] += 1
            return compute_loss(*args, **more) * (math.nan if count[0] == 3 else 1.0)

        monkeypatch.setattr(trainer, "compute_loss", spoiled)
        trainer.train()
        assert layouts_of(tuned) == {at_the_end(layout) if pack == "auto" else "dense"}
        assert (trainer.lcdd.completed_steps, trainer.lcdd.skipped_steps) == (5, 1)
        runs[pack] = trainer.lcdd
    assert_same_run(runs["auto"], runs["never"], tolerance=1e-5)


def test_losses_that_stay_nan_end_the_run_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = base_and_tuned()
    trainer = LCDDTrainer(tuned, base, CONFIG, args=arguments(tmp_path), train_dataset=ROWS)
    loss = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *a, **k: loss(*a, **k) * math.nan)
    with pytest.raises(TrainingStopped, match=r"not finite in 5 steps in a row.*smaller LCDDConfig\.learning_rate"):
        trainer.train()


def test_a_trainer_of_ones_own_takes_the_optimizer_and_the_callback(tmp_path: Path) -> None:
    base, tuned = base_and_tuned()
    optimizer = LCDDOptimizer.attach(tuned, base, CONFIG, total_steps=6)

    class Mine(Trainer):
        def training_step(self, *given: Any) -> Any:
            loss = super().training_step(*given)
            optimizer.observe(loss)
            return loss

    args = arguments(tmp_path, save_strategy="steps", save_steps=4, max_grad_norm=0.0)
    callbacks = [LCDDCallback(optimizer)]
    Mine(tuned, args=args, train_dataset=ROWS, optimizers=(optimizer, None), callbacks=callbacks).train()
    trainer = LCDDTrainer(*base_and_tuned()[::-1], CONFIG, args=arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    assert_same_run(optimizer, trainer.lcdd, tolerance=0.0)


# ---------------------------------------------------------------- checkpoints


def test_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    found = []
    for interrupted in (False, True):
        base, tuned = base_and_tuned()
        args = arguments(tmp_path / str(interrupted), save_strategy="steps", save_steps=3, lr_scheduler_type="linear")
        trainer = LCDDTrainer(tuned, base, CONFIG, args=args, train_dataset=ROWS)
        trainer.train()
        if interrupted:  # another process goes on from the third step
            base, tuned = base_and_tuned()
            trainer = LCDDTrainer(tuned, base, CONFIG, args=args, train_dataset=ROWS)
            trainer.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-3"))
        found.append(trainer)
    whole, resumed = (trainer.lcdd for trainer in found)
    assert torch.equal(resumed.gates.logits, whole.gates.logits)
    assert_same_run(resumed, whole, tolerance=0.0)
    (tmp_path / "True" / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"resume_from_checkpoint: expected .*optimizer\.pt, which holds θ and Δ"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-3"))


def test_the_carrier_is_of_the_best_model_where_that_is_loaded(tmp_path: Path) -> None:
    base, tuned = base_and_tuned()
    steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args = arguments(
        tmp_path, **steps, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    trainer = LCDDTrainer(tuned, base, CONFIG, args=args, train_dataset=ROWS, eval_dataset=ROWS[:8])
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = max(losses, key=lambda step: losses[step])  # the worst, so that it is not the last
    assert best < 6, losses
    assert trainer.lcdd.completed_steps == best
    with trainer.carrier().applied(base):
        patched = [parameter.detach().clone() for parameter in base.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(patched, tuned.parameters(), strict=True))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    trainer.save_model(str(tmp_path / "model"))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({}, {"learning_rate": 3e-4}, r"learning_rate: expected it in LCDDConfig, .*0\.001 in LCDDConfig and 0\.0003"),
        ({}, {"max_grad_norm": 0.3}, "max_grad_norm: expected it in LCDDConfig"),
        ({"max_steps": 9}, {}, "max_steps: expected it in TrainingArguments.*leave LCDDConfig's at its default"),
        ({"gradient_accumulation_steps": 2}, {}, "gradient_accumulation_steps: expected it in TrainingArguments"),
        ({"loss": "kl", "train_delta": False}, {}, "loss: expected LCDDConfig's default, since lcdd train alone reads"),
        ({}, {"load_best_model_at_end": True, "save_only_model": True}, "save_only_model: expected False"),
    ],
)
def test_a_setting_in_the_wrong_place_is_refused(tmp_path: Path, ours: Any, theirs: Any, message: str) -> None:
    base, tuned = base_and_tuned()
    if "load_best_model_at_end" in theirs:
        theirs = {**theirs, "save_strategy": "steps", "eval_strategy": "steps"}
    config = LCDDConfig(**{"learning_rate": 1e-3, **ours})
    with pytest.raises(InputError, match=message):
        LCDDTrainer(tuned, base, config, args=arguments(tmp_path, **theirs), train_dataset=ROWS, eval_dataset=ROWS)
    args = arguments(tmp_path, learning_rate=config.learning_rate, max_grad_norm=0.0)  # the same, or off
    LCDDTrainer(tuned, base, LCDDConfig(learning_rate=1e-3), args=args, train_dataset=ROWS)


def test_an_optimizer_from_outside_is_refused(tmp_path: Path) -> None:
    base, tuned = base_and_tuned()
    with pytest.raises(InputError, match="optimizers: expected none"):
        LCDDTrainer(tuned, base, CONFIG, args=arguments(tmp_path), train_dataset=ROWS, optimizers=(None, None))


# ---------------------------------------------------------------- TRL


def _turns(n: int) -> tuple[dict[str, str], dict[str, str]]:
    return {"role": "user", "content": f"Name number {n}."}, {"role": "assistant", "content": "I do not know."}


FORMATS = {
    "prompt and completion": lambda n: {"prompt": f"Name number {n}.", "completion": "I do not know."},
    "chats of both": lambda n: {"prompt": [_turns(n)[0]], "completion": [_turns(n)[1]]},
    "messages": lambda n: {"messages": list(_turns(n))},
    "text": lambda n: {"text": f"Name number {n}. I do not know."},
    "alpaca": lambda n: {"instruction": f"Name number {n}.", "input": "", "output": "I do not know."},
}


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        *[(form, {}) for form in FORMATS],
        ("prompt and completion", {"gradient_accumulation_steps": 2}),
        ("alpaca", {"packing": True, "max_length": 64}),
        ("messages", {"packing": True, "max_length": 64}),
    ],
)
def test_trl_trains_on_its_formats_and_on_alpacas(tmp_path: Path, form: str, changes: Any) -> None:
    base, tuned = base_and_tuned()
    args = arguments(tmp_path, SFTConfig, max_steps=3, per_device_train_batch_size=2, bf16=False, **changes)
    rows = Dataset.from_list([FORMATS[form](n) for n in range(24)])
    tokenizer = make_tokenizer()
    trainer = LCDDSFTTrainer(tuned, base, CONFIG, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.lcdd.completed_steps == 3
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert trainer.lcdd.last_loss == pytest.approx(logged[-1], rel=1e-3)
    assert trainer.carrier().tokenizer
    if form == "alpaca" and not changes:
        ours = encode(tokenizer, parse_row(FORMATS[form](5), where="row"), max_length=args.max_length)
        assert {"input_ids": list(ours.input_ids), "labels": list(ours.labels)} in list(trainer.train_dataset)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_gradients_train_in_trl_as_dense_ones_do(tmp_path: Path, layout: str) -> None:
    runs = {}
    for pack in ("never", "auto"):
        base, tuned = packable()
        like = attach(*packable(), layout, pack=pack)
        start = {"config": like.config, "initial_logits": like.gates.initial_logits}
        args = arguments(tmp_path, SFTConfig, max_steps=4, gradient_accumulation_steps=2, bf16=False)
        rows = Dataset.from_list(ROWS)
        trainer = LCDDSFTTrainer(tuned, base, args=args, train_dataset=rows, processing_class=make_tokenizer(), **start)
        trainer.train()
        assert layouts_of(tuned) == {at_the_end(layout) if pack == "auto" else "dense"}
        runs[pack] = trainer.lcdd
    assert_same_run(runs["auto"], runs["never"], tolerance=1e-5)


@pytest.mark.parametrize("example", ["hf_trainer", "trl_sft"])
def test_the_examples_run_from_anywhere(tmp_path: Path, example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    for seed, name in enumerate(("base", "sft")):
        save_checkpoint(tmp_path / name, seed=seed, tokenizer=tokenizer)
    write_jsonl(tmp_path / "data.jsonl", [FORMATS["alpaca"](n) for n in range(12)])
    data = ["data.jsonl"] if example == "trl_sft" else []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{example}.py", "base", "sft", *data, "runs"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
    carrier = Carrier.from_pretrained(tmp_path / "runs" / "carrier")
    assert 0 < carrier.n_open < carrier.layout.n_gates


def test_two_ranks_train_as_one_does(tmp_path: Path) -> None:
    """What `accelerate launch` and torchrun start: DDP, each rank with its own share of the batches."""
    alone = trainer_ranks.run(str(tmp_path))
    torchrun(str(ROOT / "tests" / "integration" / "trainer_ranks.py"), str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["theta"], alone["theta"], rtol=0, atol=1e-4)
        assert found["lambda"] == pytest.approx(alone["lambda"], rel=1e-6)
    one, two = (Carrier.from_pretrained(tmp_path / f"carrier-{ranks}") for ranks in (1, 2))
    assert torch.equal(one.gate != 0, two.gate != 0)
