"""What generic training code does to gradients: it has the same effect on packed ones as on dense ones."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from loops import LAYOUTS, TOKENS, assert_same_run, attach, layouts_of, loss_of, packable
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lcdd.models import Sharding

STEPS = 5


def plain(model: Any, optimizer: Any, between: Callable[[int], None], *, parts: int = 1) -> None:
    """The ordinary loop; `between` comes between backward and step."""
    for step in range(STEPS):
        total = 0.0
        for tokens in TOKENS.chunk(parts):
            loss = loss_of(model, tokens) / parts
            loss.backward()
            total += loss.item()
        between(step)
        optimizer.step(total)
        optimizer.zero_grad()


def clip_by_norm(model: Any, optimizer: Any) -> None:
    def clip(_: int) -> None:
        clip_grad_norm_(model.parameters(), 1e-3)

    plain(model, optimizer, clip)
    assert optimizer.grad_norm <= 1e-3 * (1 + 1e-5)


def clip_by_value(model: Any, optimizer: Any) -> None:
    def clip(_: int) -> None:
        clip_grad_value_(model.parameters(), 1e-4)
        assert all(p.grad.abs().max() <= 1e-4 for p in model.parameters() if p.grad is not None)

    plain(model, optimizer, clip)


def division(model: Any, optimizer: Any) -> None:
    def divide(_: int) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 3
                parameter.grad.mul_(torch.tensor(0.5))

    plain(model, optimizer, divide)


def one_bad_gradient(value: float) -> Callable[[Any, Any], None]:
    def run(model: Any, optimizer: Any) -> None:
        def spoil(step: int) -> None:
            if step == 2:
                grad = model.model.layers[0].mlp.down_proj.weight.grad
                assert bool(torch.isfinite(grad).all())
                grad.mul_(value)
                assert not bool(torch.isfinite(grad).all())

        plain(model, optimizer, spoil)
        assert (optimizer.completed_steps, optimizer.skipped_steps) == (STEPS - 1, 1)

    return run


def one_bad_loss(model: Any, optimizer: Any) -> None:
    for step in range(STEPS):
        loss = loss_of(model) * (math.nan if step == 2 else 1.0)
        loss.backward()
        optimizer.step(loss)  # which drops the gradients: nobody clears them here
    assert (optimizer.completed_steps, optimizer.skipped_steps) == (STEPS - 1, 1)


def accumulate(parts: int) -> Callable[[Any, Any], None]:
    return lambda model, optimizer: plain(model, optimizer, lambda _: None, parts=parts)


def zero_in_place(model: Any, optimizer: Any) -> None:
    """Gradients that are cleared by zeroing, by everything that clears, at every point where one might."""
    for _ in range(STEPS):
        loss_of(model, TOKENS[:3]).backward()
        model.zero_grad(set_to_none=False)
        loss_of(model, TOKENS[3:]).backward()
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model)
        loss.backward()
        optimizer.step(loss)
        model.zero_grad(set_to_none=False)


def scaler(model: Any, optimizer: Any) -> None:
    """GradScaler: unscaled for clipping; one step overflows and is skipped by the scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        loss = loss_of(model)
        scaler.scale(loss * (math.inf if step == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer, loss.item())
        scaler.update()
        model.zero_grad(set_to_none=step % 2 == 0)
    assert (optimizer.completed_steps, optimizer.skipped_steps) == (STEPS - 1, 0)


def checkpointing(reentrant: bool) -> Callable[[Any, Any], None]:
    def run(model: Any, optimizer: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        plain(model, optimizer, lambda _: None, parts=2)

    return run


def accelerate(model: Any, optimizer: Any) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, stepper = accelerator.prepare(model, optimizer)
    for _ in range(STEPS):
        total = 0.0
        for tokens in TOKENS.chunk(2):
            with accelerator.accumulate(prepared):
                loss = loss_of(prepared, tokens)
                accelerator.backward(loss)
                total += loss.item() / 2
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
                optimizer.observe(total)
                stepper.step()
                stepper.zero_grad()
    assert optimizer.completed_steps == STEPS


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, as torchrun makes it on a machine with one GPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def ddp(as_views: bool) -> Callable[[Any, Any], None]:
    def run(model: Any, optimizer: Any) -> None:
        with one_rank():
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=as_views)
            plain(wrapped, optimizer, lambda _: None, parts=2)

    return run


def closure(model: Any, optimizer: Any) -> None:
    """As Lightning steps."""
    for _ in range(STEPS):

        def once() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        optimizer.step(closure=once)


def anomaly_detection(model: Any, optimizer: Any) -> None:
    with torch.autograd.set_detect_anomaly(True):
        plain(model, optimizer, lambda _: None)


def compiled(backend: str) -> Callable[[Any, Any], None]:
    def run(model: Any, optimizer: Any) -> None:
        torch._dynamo.reset()
        whole = torch.compile(model, backend=backend, fullgraph=True)
        plain(whole, optimizer, lambda _: None, parts=2)

    return run


TREATMENTS = {
    "clip by norm": clip_by_norm,
    "clip by value": clip_by_value,
    "division": division,
    "NaN gradient": one_bad_gradient(math.nan),
    "Inf gradient": one_bad_gradient(math.inf),
    "NaN loss": one_bad_loss,
    **{f"accumulate {parts}": accumulate(parts) for parts in (1, 2, 4, 8)},
    "zero in place": zero_in_place,
    "GradScaler": scaler,
    "checkpoint": checkpointing(reentrant=False),
    "reentrant checkpoint": checkpointing(reentrant=True),
    "accelerate": accelerate,
    "DDP": ddp(as_views=False),
    "DDP, views": ddp(as_views=True),
    "closure": closure,
    "anomaly detection": anomaly_detection,
    "compile eager": compiled("eager"),
    "compile aot_eager": compiled("aot_eager"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_packed_gradients_are_treated_as_dense_ones_are(layout: str, treatment: str) -> None:
    runs = {}
    for pack in ("never", "auto"):
        base, tuned = packable()
        optimizer = attach(base, tuned, layout, pack=pack)
        assert layouts_of(tuned) == {layout if pack == "auto" else "dense"}
        compiles = treatment.startswith("compile")  # against the same loop, not compiled
        TREATMENTS["accumulate 2" if compiles and pack == "never" else treatment](tuned, optimizer)
        assert layouts_of(tuned) == {layout if pack == "auto" else "dense"}
        assert all(parameter.grad is None for parameter in tuned.parameters())
        runs[pack] = optimizer
    assert_same_run(runs["auto"], runs["never"], tolerance=1e-5)


@pytest.mark.parametrize("gating", ["optimizer", "forward"])
@pytest.mark.parametrize("loss", [math.nan, 1.0])
def test_a_step_drops_the_gradients_whether_it_is_taken_or_skipped(gating: str, loss: float) -> None:
    base, tuned = packable()
    optimizer = attach(base, tuned, "block", gating=gating, train_unmasked=True)
    loss_of(tuned).backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sum(parameter.grad is not None for parameter in parameters) >= len(parameters) - 1  # θ: on one route alone
    optimizer.step(loss)
    deltas = [delta for _, delta, _ in optimizer.masked().values()]
    assert all(tensor.grad is None for tensor in [*parameters, *deltas])
    assert optimizer.skipped_steps == (1 if math.isnan(loss) else 0)


def test_gradients_that_are_made_and_summed_by_hand_decide_the_same() -> None:
    """torch.autograd.grad fires no hook: a dense gradient keeps what the gates close, and no step reads it."""
    runs = []
    for pack in ("never", "auto"):
        base, tuned = packable()
        optimizer = attach(base, tuned, "block", pack=pack)
        weights = optimizer.param_groups[0]["params"]
        for _ in range(STEPS):
            loss = loss_of(tuned)
            for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = torch.zeros_like(weight) + grad
            optimizer.step(loss)
        runs.append(optimizer)
    assert_same_run(*runs, tolerance=1e-5)


def test_on_the_forward_route_gradients_are_cleared_and_scaled_where_those_of_others_are() -> None:
    """One step overflows: the scaler skips it, the loop clears the model's gradients and knows of no θ."""
    runs = []
    for scaled in (False, True):
        base, tuned = packable()
        optimizer = attach(base, tuned, "block", gating="forward")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        norms = []
        for step in range(STEPS):
            if scaled and step == 2:
                scaler.scale(loss_of(tuned) * math.inf).backward()
                scaler.step(optimizer, 1.0)
                scaler.update()
                tuned.zero_grad()
            loss = loss_of(tuned)
            scaler.scale(loss).backward()
            scaler.step(optimizer, loss.item())
            scaler.update()
            tuned.zero_grad()
            norms.append(optimizer.grad_norm)
        runs.append((optimizer, norms))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)
    assert max(runs[0][1]) < 1.5 * min(runs[0][1])  # not the sum over all steps
    assert_same_run(runs[1][0], runs[0][0], tolerance=1e-4)


def test_a_model_sharded_over_one_rank_trains_on_dense_gradients() -> None:
    with one_rank():
        losses = []
        for sharded in (False, True):
            base, tuned = packable()
            if sharded:
                base, tuned = Sharding().shard(base), Sharding(trained=True).shard(tuned)
            optimizer = attach(base, tuned, "block")
            plain(tuned, optimizer, lambda _: None, parts=2)
            losses.append(optimizer.last_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
