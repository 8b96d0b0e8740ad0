"""One truth about the weights: who else writes, copies, casts or wraps an attached model is served or refused."""

import copy
import gc
import io
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from loops import TOKENS, attach, loss_of, packable
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from lcdd.errors import InputError
from lcdd.models import sites_of
from lcdd.optimizer import LCDDOptimizer

WRITTEN = r"model: .*\.weight was written by somebody else"


def train(model: Any, optimizer: LCDDOptimizer, steps: int = 3) -> float:
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step(loss)
    return optimizer.last_loss


def attached(layout: str = "block", **changes: Any) -> tuple[Any, Any, Any]:
    base, tuned = packable()
    return base, tuned, attach(base, tuned, layout, **changes)


def weights_of(model: Any) -> list[torch.Tensor]:
    return [site.weight.detach().clone() for site in sites_of(model)]


def assert_weights(model: Any, expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), expected, strict=True))


# ---------------------------------------------------------------- weights that somebody else writes


def test_the_same_weights_written_again_are_no_news():
    _, tuned, optimizer = attached()
    train(tuned, optimizer)
    saved = weights_of(tuned)
    with torch.no_grad():
        for site, weight in zip(sites_of(tuned), saved, strict=True):
            site.weight.zero_()
            site.weight.copy_(weight)
            site.weight.data = weight.clone()  # and in other memory
    train(tuned, optimizer)
    assert optimizer.completed_steps == 6


def test_a_state_of_the_same_gates_is_taken_in_and_delta_follows(caplog):
    """Early in a run every deterministic gate is open, at its end they are frozen: what it saved then, fits."""
    base, tuned, optimizer = attached(freeze_fraction=0.9)
    train(tuned, optimizer, 2)  # of 20 steps; all that follow are frozen
    assert optimizer.gates_frozen
    optimizer.eval()
    best = {name: value.clone() for name, value in tuned.state_dict().items()}
    best_carrier = optimizer.carrier()
    optimizer.train()
    train(tuned, optimizer, 3)
    last = optimizer.carrier()
    assert any(not torch.equal(last.deltas[name], delta) for name, delta in best_carrier.deltas.items())
    tuned.load_state_dict(best)
    with caplog.at_level(logging.WARNING, "lcdd.optimizer"):
        found = optimizer.carrier()
    assert "taken in" in caplog.text
    for name, delta in best_carrier.deltas.items():
        torch.testing.assert_close(found.deltas[name], delta, rtol=1e-5, atol=1e-6)
    # training goes on from there, by itself
    tuned.load_state_dict(best)
    train(tuned, optimizer, 1)
    optimizer.eval()
    with found.applied(base, check=False):
        torch.testing.assert_close(weights_of(tuned), weights_of(base), rtol=0, atol=2.5e-3)  # a step of 1e-3


@pytest.mark.parametrize("through", ["copy_", "data"])
@pytest.mark.parametrize("ask", ["carrier", "fold", "eval", "state_dict", "step", "forward", "evaluating", "shipping"])
def test_weights_of_no_gates_of_this_run_are_refused_wherever_they_are_noticed(ask, through):
    _, tuned, optimizer = attached()
    train(tuned, optimizer)
    if ask in ("evaluating", "shipping"):
        optimizer.eval()
        ask = {"evaluating": "train", "shipping": "fold"}[ask]
    loss_of(tuned).backward()
    before, delta = optimizer.stats(), {n: d.clone() for n, (_, d, _) in optimizer.masked().items()}
    with torch.no_grad():
        for site in sites_of(tuned):
            weight = site.weight.data if through == "data" else site.weight
            weight.mul_(0.9)
    if ask == "forward" and through == "data":
        loss_of(tuned).backward()  # a counter does not show it: the step after it does
        ask = "step"
    asked = {"step": lambda: optimizer.step(1.0), "forward": lambda: loss_of(tuned)}
    with pytest.raises(InputError, match=WRITTEN):
        asked.get(ask, getattr(optimizer, ask, None))()
    assert optimizer.stats() == before
    assert all(torch.equal(d, delta[n]) for n, (_, d, _) in optimizer.masked().items())


def test_a_step_looks_at_the_values_of_another_weight_each_time():
    _, tuned, optimizer = attached()
    train(tuned, optimizer, 4)
    sites_of(tuned)[4].weight.data.add_(1e-3)
    with pytest.raises(InputError, match=r"mlp\.gate_proj\.weight was written"):
        train(tuned, optimizer, 1)


def test_load_state_dict_of_the_optimizer_puts_foreign_weights_right():
    _, tuned, optimizer = attached()
    train(tuned, optimizer)
    saved, expected = copy.deepcopy(optimizer.state_dict()), weights_of(tuned)
    loss_of(tuned).backward()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.data.mul_(0.5) if parameter.requires_grad else None
    optimizer.load_state_dict(saved)
    assert_weights(tuned, expected)
    assert all(parameter.grad is None for parameter in tuned.parameters())


def test_a_base_that_is_written_is_noticed_and_a_patch_put_on_and_off_it_is_none():
    base, tuned, optimizer = attached()
    train(tuned, optimizer)
    with optimizer.carrier().applied(base, check=False):
        pass
    train(tuned, optimizer)
    with torch.no_grad():
        sites_of(base)[0].weight.add_(1e-3)
    with pytest.raises(InputError, match=r"written by somebody else \(or its base was\)"):
        train(tuned, optimizer)
    base, tuned, optimizer = attached()
    with torch.no_grad():
        tuned.model.norm.weight.mul_(2)
    with pytest.raises(InputError, match=r"expected model\.norm\.weight at the base's value"):
        train(tuned, optimizer)


def test_an_average_of_the_weights_can_be_kept_and_looked_at_and_put_away():
    """EMA: copied in for an evaluation, the run's own weights back for training; kept, it is taken in."""
    base, tuned, optimizer = attached("panels")
    average = AveragedModel(tuned)
    for _ in range(3):
        train(tuned, optimizer, 1)
        average.update_parameters(tuned)
    mine = [parameter.detach().clone() for parameter in tuned.parameters()]

    def put(values: Any) -> None:
        for parameter, value in zip(tuned.parameters(), values, strict=True):
            parameter.data.copy_(value.data)

    put(average.module.parameters())
    tuned.eval()
    with torch.no_grad():
        assert torch.equal(tuned(TOKENS).logits, average.module.eval()(TOKENS).logits)
    tuned.train()
    put(mine)
    train(tuned, optimizer)
    put(average.module.parameters())  # the open gates have not changed meanwhile
    with optimizer.carrier().applied(base, check=False):
        torch.testing.assert_close(weights_of(base), weights_of(average.module), rtol=0, atol=1e-7)
    put(average.module.parameters())
    with torch.no_grad():
        optimizer.gates.logits[:50] *= -1  # other gates
    with pytest.raises(InputError, match=WRITTEN):
        optimizer.train()
    optimizer.detach()
    assert_weights(tuned, weights_of(average.module))


def test_a_cast_a_move_and_another_parameter_are_refused_by_name():
    _, tuned, optimizer = attached()
    tuned.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"expected .*q_proj\.weight as its base is, torch\.float32.*bfloat16.*attach"):
        train(tuned, optimizer)
    _, tuned, optimizer = attached()
    linear = sites_of(tuned)[0].linear
    linear.weight = nn.Parameter(linear.weight.detach().clone())
    with pytest.raises(InputError, match=r"q_proj\.weight is another parameter now"):
        optimizer.carrier()


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("gating", ["optimizer", "forward"])
def test_a_copy_is_an_ordinary_model_and_none_is_made_of_sampled_gates(gating):
    _, tuned, optimizer = attached(gating=gating)
    train(tuned, optimizer)
    for make in (copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(RuntimeError, match=r"sampled gates of training; call optimizer\.eval\(\) before"):
            make(tuned)
    optimizer.eval()
    buffer = io.BytesIO()
    torch.save(tuned, buffer)
    buffer.seek(0)
    for clone in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned)), torch.load(buffer, weights_only=False)):
        assert_weights(clone, weights_of(tuned))
        assert all(type(site.linear) is nn.Linear for site in sites_of(clone))
        assert type(clone.model.layers[0].mlp) is LlamaMLP
        clone.requires_grad_(True)
        loss_of(clone).backward()
        grads = [site.weight.grad for site in sites_of(clone)]
        assert all(type(grad) is torch.Tensor for grad in grads)
        clone.eval().state_dict()
        clone.load_state_dict({k: v * 2 for k, v in clone.state_dict().items()})
        assert clone(TOKENS).logits.isfinite().all()
    optimizer.train()
    train(tuned, optimizer)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled; save optimizer\.state_dict\(\)"):
        copy.deepcopy(optimizer)


# ---------------------------------------------------------------- attach, detach, delete


def test_a_second_attach_is_refused_until_the_first_has_ended():
    base, tuned, optimizer = attached()
    with pytest.raises(InputError, match=r"attached already; call the other's fold\(\) or detach\(\) first"):
        attach(base, tuned, "block")
    optimizer.fold()
    state = optimizer.state_dict()
    expected = weights_of(tuned)
    for call in (
        lambda: optimizer.step(1.0),
        optimizer.train,
        lambda: optimizer.load_state_dict(state),
        optimizer.fold,
    ):
        with pytest.raises(RuntimeError, match="detached from its model"):
            call()
    assert_weights(tuned, expected)
    again = attach(base, tuned, "block")
    train(tuned, again)
    with pytest.raises(InputError, match="base: expected its own copy"):
        attach(base, base, "block")


def test_a_failed_attach_leaves_nothing_behind():
    base, tuned = packable()

    class Mine(nn.Linear):
        pass

    sites_of(tuned)[3].linear.__class__ = Mine
    with pytest.raises(InputError, match=r"gating: expected 'optimizer' for a model with other sites .*o_proj"):
        attach(base, tuned, "block", gating="forward")
    assert not tuned._forward_pre_hooks
    sites_of(tuned)[3].linear.__class__ = nn.Linear
    assert all(type(site.linear) is nn.Linear for site in sites_of(tuned))
    train(tuned, attach(base, tuned, "block"))


@pytest.mark.parametrize("gating", ["optimizer", "forward"])
def test_a_deleted_optimizer_is_freed_and_leaves_the_folded_model(gating):
    base, tuned, optimizer = attached(gating=gating)
    train(tuned, optimizer)
    expected, freed = optimizer.carrier(), weakref.ref(optimizer)
    delta = weakref.ref(optimizer.masked()[optimizer.names[0]][1])
    del optimizer
    gc.collect()
    assert freed() is None
    assert delta() is None
    assert not tuned._forward_pre_hooks
    assert all(type(site.linear) is nn.Linear for site in sites_of(tuned))
    with expected.applied(base, check=False):
        assert_weights(tuned, weights_of(base))
    tuned.eval().state_dict()
    loss_of(tuned).backward()
    assert all(type(site.weight.grad) is torch.Tensor for site in sites_of(tuned))


def test_an_optimizer_may_be_deleted_while_another_model_is_traced():
    base, tuned, optimizer = attached()
    train(tuned, optimizer)
    expected = optimizer.carrier()
    with FakeTensorMode():
        del optimizer
        gc.collect()
    with expected.applied(base, check=False):
        assert_weights(tuned, weights_of(base))


def test_a_deleted_optimizer_leaves_weights_alone_that_somebody_else_wrote():
    _, tuned, optimizer = attached()
    with torch.no_grad():
        for site in sites_of(tuned):
            site.weight.data.fill_(0.25)
    expected = weights_of(tuned)
    del optimizer
    gc.collect()
    assert_weights(tuned, expected)


def test_attach_takes_a_compiled_model_and_refuses_one_wrapped_for_several_ranks():
    base, tuned = packable()
    optimizer = attach(base, torch.compile(tuned, backend="eager"), "block")
    assert optimizer.model is tuned
    train(tuned, optimizer)
    with pytest.raises(InputError, match="model: expected the model itself, got DataParallel around it; attach, then"):
        LCDDOptimizer.attach(nn.DataParallel(packable()[1]), base, optimizer.config, total_steps=3)


def test_no_parameters_join_later():
    _, _, optimizer = attached()
    with pytest.raises(InputError, match="add_param_group: expected no further parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 2


# ---------------------------------------------------------------- modes


def test_attach_begins_training_and_every_message_names_the_call_that_helps():
    base, tuned = packable()
    tuned.eval()
    optimizer = attach(base, tuned, "block")
    assert tuned.training
    tuned.eval()
    with pytest.raises(RuntimeError, match=r"to evaluate, call optimizer\.eval\(\) first; to train, call model\.train"):
        tuned(TOKENS)
    optimizer.eval()
    tuned(TOKENS)
    with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\) first"):
        optimizer.step(1.0)
    optimizer.train()
    tuned.train()
    train(tuned, optimizer)


def test_float16_weights_are_warned_of(caplog):
    base, tuned = (model.half() for model in packable())
    with caplog.at_level(logging.WARNING, "lcdd.optimizer"):
        attach(base, tuned, "block")
    assert "bfloat16" in caplog.text
    assert "GradScaler" in caplog.text


# ---------------------------------------------------------------- schedulers


SCHEDULERS = {
    "none": lambda optimizer: None,
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.0),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, base_lr=1e-5, max_lr=1e-3),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.ConstantLR(optimizer)], milestones=[2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_the_rate_of_delta_and_never_that_of_theta(name):
    """θ is moved by the penalty alone here, so that its way does not depend on Δ's."""
    _, tuned, optimizer = attached(dual_lambda_init=1.0)
    scheduler = SCHEDULERS[name](optimizer)
    start, rates = optimizer.gates.logits.detach().clone(), []
    for _ in range(3):
        for site in sites_of(tuned):
            site.weight.grad = torch.zeros_like(site.weight)
        optimizer.step(1.0)
        assert optimizer.param_groups[1]["lr"] == optimizer.config.gate_lr
        if scheduler is not None:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    # SGD at rate 1 by λ·(1/3 + 2/3 + 3/3)·σ′, hand-worked from the same start
    logits, shift = start.double(), 2 / 3 * torch.log(torch.tensor(0.1 / 1.1, dtype=torch.float64))
    for share in (1 / 3, 2 / 3, 1.0):
        chance = torch.sigmoid(logits - shift)
        logits = logits - share * chance * (1 - chance)
    torch.testing.assert_close(optimizer.gates.logits.double(), logits, rtol=1e-5, atol=1e-5)
    assert (len(set(rates)) == 1) == (name in ("none", "LambdaLR"))


def test_adams_settings_are_those_of_the_group():
    moments = []
    for betas in ((0.9, 0.999), (0.5, 0.999)):
        _, tuned, optimizer = attached()
        optimizer.param_groups[0]["betas"] = betas
        train(tuned, optimizer, 1)
        moments.append(optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].clone())
    torch.testing.assert_close(moments[1], 5 * moments[0])
