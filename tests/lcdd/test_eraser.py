"""SFT-Eraser: its batched loss against the definition, and what optimising it does and leaves alone."""

import copy
import shutil

import pytest
import torch
from torch.nn import functional as F

from lcdd.carrier import Carrier
from lcdd.checkpoint import RunLog
from lcdd.config import EraserConfig
from lcdd.eraser import SFTEraser, Trigger, generate_ids, prompt_embeds, shared_tokens
from lcdd.models import decoder_layers, head_weight, input_embeddings, sites_of

TEXTS = [
    "<user> copy red dog <assistant>",
    "<user> rev red dog fig saw <assistant>",
    "<user> first fig <assistant>",
    "<user> cat plum cow lemon <assistant>",
    "<user> last blue hen spear goat <assistant>",
    "<user> <assistant>",
]


def config(**changes) -> EraserConfig:
    quick = {"num_virtual_tokens": 4, "per_device_train_batch_size": 6, "max_answer_tokens": 5, "kl_tail_tokens": 3}
    return EraserConfig(**quick | {"activation_weight": 0.7, "l2_weight": 0.01} | changes)


@pytest.fixture
def ids(tokenizer):
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def residuals_and_logits(model, embeds):
    """[L, D] residuals of the last position and [S, V] logits of one sequence, alone, without hooks or padding."""
    kept = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, out: kept.append(out[0, :])) for layer in decoder_layers(model)
    ]
    logits = model(inputs_embeds=embeds[None]).logits[0]
    for handle in handles:
        handle.remove()
    return kept, logits


def definition(base, model, embeds, prompts, answers, channels, c):
    """The method's section 4, one prompt at a time: L as a function of embeds, with `model` the patched one."""
    n_layers, n = len(channels), len(prompts)
    goal = [torch.zeros(len(ch), dtype=torch.float64) for ch in channels]
    mean = [torch.zeros(len(ch), dtype=torch.float64) for ch in channels]
    tail, answer, weights, seen = [], [], [], [[] for _ in channels]
    for ids, reply in zip(prompts, answers, strict=True):
        whole = torch.tensor([*ids, *reply])
        with torch.no_grad():
            base_layers, base_logits = residuals_and_logits(base, input_embeddings(base)(whole))
        tokens = input_embeddings(model)(whole)
        layers, logits = residuals_and_logits(model, torch.cat([embeds.to(tokens), tokens]))
        logits = logits[len(embeds) :]
        end = len(ids)
        for layer in range(n_layers):
            goal[layer] = goal[layer] + base_layers[layer][end - 1, channels[layer]].double() / n
            seen[layer].append(base_layers[layer][end - 1].double())
            mean[layer] = mean[layer] + layers[layer][len(embeds) + end - 1, channels[layer]].double() / n
        row_kl = F.kl_div(
            logits.double().log_softmax(-1), base_logits.double().log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        tail.append(row_kl[max(0, end - c.kl_tail_tokens) : end])
        answer.append(row_kl[end - 1 : end - 1 + len(reply)])
        weights += [c.first_token_weight, *[1.0] * (len(reply) - 1)]
    spread = [torch.ones_like(rows[0]) for rows in seen]
    if c.match_scale == "variance":
        spread = [torch.stack(rows).std(0, correction=0) for rows in seen]
    scales = [values[chosen] for values, chosen in zip(spread, channels, strict=True)]
    terms = [F.mse_loss(a / s, b / s) for a, b, s in zip(mean, goal, scales, strict=True) if len(a)]
    match = torch.stack(terms).mean() if terms else torch.zeros(())
    l2 = embeds.double().square().sum(1).mean()
    return (
        c.activation_weight * match
        + c.kl_weight * torch.cat(tail).mean()
        + c.answer_kl_weight * (torch.cat(answer) * torch.tensor(weights)).sum() / sum(weights)
        + c.l2_weight * l2
    )


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
@pytest.mark.parametrize("terms", ["all", "match", "tail", "answers"])
def test_a_batched_step_equals_one_prompt_at_a_time(make_models, make_carrier, tokenizer, ids, architecture, terms):
    base, tuned = make_models(architecture)
    carrier, model = make_carrier(base, tuned), copy.deepcopy(base)
    only = {"match": "activation_weight", "tail": "kl_weight", "answers": "answer_kl_weight"}
    forms = {"all": {"match_scale": "variance", "first_token_weight": 4.0}, "match": {"match_scale": "none"}}
    c = config(**{key: 0.0 for name, key in only.items() if terms not in ("all", name)}, **forms.get(terms, {}))
    eraser = SFTEraser(model, carrier, tokenizer, c)
    embeds = Trigger.random_tokens(base, 4, seed=2).embeds.clone().requires_grad_(True)
    targets = eraser.targets(ids)
    answers = generate_ids(base, tokenizer, ids, max_new_tokens=5)
    assert [p.answer for p in targets.prompts] == answers
    with carrier.applied(model):
        found = eraser.loss(embeds, targets.prompts, targets.match)
        (gradient,) = torch.autograd.grad(found.total, embeds)
        expected = definition(base, model, embeds, ids, answers, carrier.channels("write"), c)
        (reference,) = torch.autograd.grad(expected, embeds)
    assert found.total.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)
    assert (gradient - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("rows", [64, 2])
def test_prompts_of_any_length_run_without_padding(make_models, make_carrier, tokenizer, ids, window, rows):
    """Also with fewer rows in a forward than prompts, and where a token sees its last `window` alone (Mistral)."""
    base, tuned = make_models("mistral")
    base.config.sliding_window = tuned.config.sliding_window = window
    carrier, model, c = make_carrier(base, tuned), copy.deepcopy(base), config(max_rows_per_forward=rows)
    prompts = [ids[0], [3, *range(5, 40), 4], ids[2], [3, *range(10, 35), 4]]
    eraser = SFTEraser(model, carrier, tokenizer, c)
    embeds = Trigger.random_tokens(base, 4, seed=2).embeds.clone().requires_grad_(True)
    targets = eraser.targets(prompts)
    forwards = []
    handle = model.model.register_forward_pre_hook(
        lambda _m, _a, given: forwards.append(given["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    with carrier.applied(model):
        found = eraser.loss(embeds, targets.prompts, targets.match)
        handle.remove()
        (gradient,) = torch.autograd.grad(found.total, embeds)
        answers = [p.answer for p in targets.prompts]
        expected = definition(base, model, embeds, prompts, answers, carrier.channels("write"), c)
        (reference,) = torch.autograd.grad(expected, embeds)
    texts = [len(prompt) + len(answer[:-1]) for prompt, answer in zip(prompts, answers, strict=True)]
    if rows == 64:  # the trigger and the one token that all begin with once, then what is left of each text
        assert forwards == [(1, 4 + 1 + sum(texts) - len(texts))]
    else:
        assert len(forwards) == 2
    assert found.total.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)
    assert (gradient - reference).norm() <= 1e-5 * reference.norm()
    assert model.config._attn_implementation == base.config._attn_implementation


@pytest.mark.parametrize("common", [0, 4, 9])
def test_what_prompts_begin_with_runs_once_and_changes_nothing(make_models, make_carrier, tokenizer, common):
    base, tuned = make_models("mistral")
    carrier, model, c = make_carrier(base, tuned), copy.deepcopy(base), config(kl_tail_tokens=2)
    prompts = [[*range(5, 5 + common), *rest] for rest in ([40, 41, 42], [50, 51, 52, 53], [60, 41])]
    if common == 9:
        prompts.append(list(range(5, 14)))  # nothing of its own: its read positions are not shared
    eraser = SFTEraser(model, carrier, tokenizer, c)
    embeds = Trigger.random_tokens(base, 4, seed=2).embeds.clone().requires_grad_(True)
    targets = eraser.targets(prompts)
    assert shared_tokens(targets.prompts) == (7 if common == 9 else common)
    answers = [p.answer for p in targets.prompts]
    with carrier.applied(model):
        found = eraser.loss(embeds, targets.prompts, targets.match)
        (gradient,) = torch.autograd.grad(found.total, embeds)
        expected = definition(base, model, embeds, prompts, answers, carrier.channels("write"), c)
        (reference,) = torch.autograd.grad(expected, embeds)
    assert found.total.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)
    assert (gradient - reference).norm() <= 1e-5 * reference.norm()


def test_a_layer_without_channels_is_left_out_of_the_mean(make_models, make_carrier, tokenizer, ids):
    base, tuned = make_models()
    carrier, model = make_carrier(base, tuned), copy.deepcopy(base)
    c = config(kl_weight=0.0, answer_kl_weight=0.0)
    channels = [torch.tensor([3, 7, 11]), torch.tensor([], dtype=torch.int64)]
    eraser = SFTEraser(model, carrier, tokenizer, c, channels)
    embeds = Trigger.random_tokens(base, 4, seed=2).embeds
    targets = eraser.targets(ids)
    with carrier.applied(model), torch.no_grad():
        found = eraser.loss(embeds, targets.prompts, targets.match)
        expected = definition(base, model, embeds, ids, [p.answer for p in targets.prompts], channels, c)
    assert float(found.total) == pytest.approx(float(expected), abs=1e-6, rel=1e-6)
    assert float(found.match) > 0


def test_fit_lowers_the_held_out_loss_and_leaves_the_model_as_it_was(make_models, make_carrier, tokenizer, ids):
    base, tuned = make_models(spread=0.05)
    carrier = make_carrier(base, tuned)
    base.train()
    frozen = next(base.parameters()).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    log = RunLog(None, stage="eraser")
    eraser = SFTEraser(base, carrier, tokenizer, config(max_steps=40, eval_steps=10, learning_rate=0.03))
    trigger = eraser.fit(ids[:4], ids[4:], log=log)
    held_out = [line["loss"] for line in eraser.history.validation]
    assert trigger.metadata["validation_loss"] == min(held_out)
    assert min(held_out) < 0.9 * held_out[0]
    assert [line["step"] for line in log.lines] == list(range(1, 41))
    assert {"loss", "match", "tail_kl", "answer_kl", "l2"} <= set(log.lines[0])
    assert trigger.embeds.norm(dim=1).max() <= eraser.max_norm() * (1 + 1e-6)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert all(p.grad is None for p in base.parameters())
    assert base.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in base.parameters() if p is not frozen)


def test_the_best_trigger_is_kept_not_the_last(make_models, make_carrier, tokenizer, ids):
    base, tuned = make_models(spread=0.05)
    carrier = make_carrier(base, tuned)
    eraser = SFTEraser(base, carrier, tokenizer, config(max_steps=12, eval_steps=1, learning_rate=2.0))
    trigger = eraser.fit(ids[:4], ids[4:])
    losses = [line["loss"] for line in eraser.history.validation]
    assert losses[-1] > min(losses)  # steps of this size overshoot
    validation = eraser.targets(ids[4:]).prompts
    match = eraser.targets(ids[:4]).match
    with carrier.applied(base), torch.no_grad():
        again = eraser.loss(trigger.embeds, validation, match).total
    assert float(again) == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize(("kind", "last"), [("cosine", 0.0), ("constant", 0.01)])
def test_the_learning_rate_follows_its_schedule(make_models, make_carrier, tokenizer, ids, kind, last):
    base, tuned = make_models()
    eraser = SFTEraser(base, make_carrier(base, tuned), tokenizer, config(max_steps=20, lr_scheduler_type=kind))
    eraser.fit(ids[:4], ids[4:])
    rates = [line["learning_rate"] for line in eraser.history.steps]
    assert rates[0] == 0.01
    assert rates[-1] == pytest.approx(last, abs=1e-4)


def test_a_trigger_that_leaves_no_positions_for_an_answer_is_warned_of(make_models, make_carrier, tokenizer, ids):
    base, tuned = make_models()
    eraser = SFTEraser(base, make_carrier(base, tuned), tokenizer, config(max_steps=1, num_virtual_tokens=60))
    with pytest.warns(UserWarning, match="60 trigger tokens, a prompt of .* more than .*max_position_embeddings = 64"):
        eraser.fit(ids[:4], ids[4:])


def test_the_same_seed_gives_the_same_trigger(make_models, make_carrier, tokenizer, ids):
    base, tuned = make_models()
    carrier = make_carrier(base, tuned)

    def fit(seed):
        return SFTEraser(base, carrier, tokenizer, config(max_steps=3, seed=seed)).fit(ids[:4], ids[4:]).embeds

    assert torch.equal(fit(0), fit(0))
    assert not torch.equal(fit(0), fit(1))


def test_a_trigger_can_undo_a_patch_that_a_token_can_undo(make_models, tokenizer, ids):
    """With a dense patch of one column, KL alone brings the base's distributions closer, by more than noise."""
    base, tuned = make_models(spread=0.02)
    patch = Carrier.from_models(base, tuned)
    eraser = SFTEraser(base, patch, tokenizer, config(max_steps=150, channel_kind="none", learning_rate=0.05))
    eraser.fit(ids, ids)
    first, *_, last = (line["answer_kl"] for line in eraser.history.steps)
    assert last < 0.5 * first
    assert all(line["match"] == 0 for line in eraser.history.steps)


def test_a_patched_head_is_compared_with_the_bases_own_head(make_models, tokenizer, ids):
    base, tuned = make_models(spread=0.0)
    with torch.no_grad():
        head_weight(tuned).mul_(1.7)
    patch = Carrier.from_models(base, tuned)
    eraser = SFTEraser(base, patch, tokenizer, config(activation_weight=0.0, l2_weight=0.0))
    targets = eraser.targets(ids)
    embeds = Trigger.random_tokens(base, 4, seed=0).embeds
    model = copy.deepcopy(base)
    with patch.applied(base), torch.no_grad():
        found = eraser.loss(embeds, targets.prompts, targets.match).total
        expected = definition(
            model, base, embeds, ids, [p.answer for p in targets.prompts], patch.channels("none"), eraser.config
        )
    assert float(found) == pytest.approx(float(expected), abs=1e-6, rel=1e-6)


def test_targets_hold_widths_not_vocabularies(make_models, make_carrier, tokenizer, ids):
    base, tuned = make_models()
    targets = SFTEraser(base, make_carrier(base, tuned), tokenizer, config()).targets(ids)
    for prompt in targets.prompts:
        assert prompt.tail.shape == (min(3, len(prompt.prompt)), 24)
        assert prompt.responses.shape == (len(prompt.answer), 24)
        assert prompt.tail.untyped_storage().nbytes() == prompt.tail.numel() * 4  # not a view of the whole batch


def test_bf16_models_are_erased_with_float32_triggers(make_models, make_carrier, tokenizer, ids):
    base, tuned = make_models(dtype=torch.bfloat16)
    carrier = make_carrier(base, tuned)
    trigger = SFTEraser(base, carrier, tokenizer, config(max_steps=2)).fit(ids[:4], ids[4:])
    assert trigger.embeds.dtype == torch.float32
    with carrier.applied(base):
        assert prompt_embeds(base, ids[0], trigger).dtype == torch.bfloat16


def test_bad_input_is_named_and_leaves_the_base(make_models, make_carrier, tokenizer, ids):
    base, tuned = make_models()
    carrier = make_carrier(base, tuned)
    before = sites_of(base)[0].weight.detach().clone()
    with pytest.raises(ValueError, match="channels: expected one index list for each of 2 layers, got 1"):
        SFTEraser(base, carrier, tokenizer, config(), [torch.tensor([0])])
    with pytest.raises(ValueError, match=r"channels\[1\]: expected indices from 0 to 23"):
        SFTEraser(base, carrier, tokenizer, config(), [torch.tensor([0]), torch.tensor([24])])
    eraser = SFTEraser(base, carrier, tokenizer, config(max_prompt_length=5))
    with pytest.raises(ValueError, match="validation_prompts: expected at least one prompt, got none"):
        eraser.fit(ids[2:3], [])
    with pytest.raises(ValueError, match=r"train_prompts\[1\]: expected at most max_prompt_length = 5 tokens, got 7"):
        eraser.fit([ids[2], ids[1]], ids[2:3])
    with pytest.raises(ValueError, match="expected the carrier's base"):
        SFTEraser(tuned, carrier, tokenizer, config(max_steps=1)).fit(ids, ids)
    with torch.no_grad():
        input_embeddings(base).weight[ids[0][1]] = torch.nan
    broken = make_carrier(base, tuned)
    with pytest.raises((RuntimeError, ValueError), match=r"NaN|nan"):
        SFTEraser(base, broken, tokenizer, config(max_steps=2)).fit(ids, ids)
    assert torch.equal(sites_of(base)[0].weight, before)


# ---------------------------------------------------------------- several starts, and resuming


@pytest.mark.parametrize("rows", [64, 4, 1])
def test_several_starts_at_once_have_the_losses_and_gradients_of_each_alone(
    make_models, make_carrier, tokenizer, ids, rows
):
    base, tuned = make_models()
    carrier, model = make_carrier(base, tuned), copy.deepcopy(base)
    eraser = SFTEraser(model, carrier, tokenizer, config(max_rows_per_forward=rows))
    starts = torch.stack([Trigger.random_tokens(base, 4, seed=n).embeds for n in range(3)]).requires_grad_(True)
    targets = eraser.targets(ids)
    alone = SFTEraser(model, carrier, tokenizer, config())
    with carrier.applied(model):
        together = eraser.loss(starts, targets.prompts, targets.match)
        (gradient,) = torch.autograd.grad(together.total.sum(), starts)
        for n in range(3):
            embeds = starts[n].detach().clone().requires_grad_(True)
            one = alone.loss(embeds, targets.prompts, targets.match)
            (expected,) = torch.autograd.grad(one.total, embeds)
            assert together.total[n].item() == pytest.approx(one.total.item(), rel=1e-5)
            assert together.match[n].item() == pytest.approx(one.match.item(), rel=1e-5)
            assert (gradient[n] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("rows", [64, 6])
def test_the_best_of_several_starts_is_kept_and_the_first_is_what_one_start_is(
    make_models, make_carrier, tokenizer, ids, rows
):
    base, tuned = make_models(spread=0.05)
    carrier = make_carrier(base, tuned)
    quick = {"max_steps": 12, "eval_steps": 4, "learning_rate": 0.03}
    alone = SFTEraser(base, carrier, tokenizer, config(**quick))
    one = alone.fit(ids[:4], ids[4:])
    log = RunLog(None, stage="eraser")
    eraser = SFTEraser(base, carrier, tokenizer, config(**quick, num_starts=3, max_rows_per_forward=rows))
    trigger = eraser.fit(ids[:4], ids[4:], log=log)
    losses = trigger.metadata["validation_loss_of_starts"]
    assert len(losses) == len(log.lines[0]["starts"]) == 3
    assert trigger.metadata["validation_loss"] == min(losses)
    assert losses[0] == pytest.approx(one.metadata["validation_loss"], rel=1e-4)
    assert len(set(losses)) == 3
    validation, match = eraser.targets(ids[4:]).prompts, eraser.targets(ids[:4]).match
    with carrier.applied(base), torch.no_grad():
        again = eraser.loss(trigger.embeds, validation, match).total
    assert float(again) == pytest.approx(min(losses), rel=1e-5)


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(make_models, make_carrier, tokenizer, ids, tmp_path):
    base, tuned = make_models(spread=0.05)
    carrier = make_carrier(base, tuned)
    quick = {"max_steps": 11, "eval_steps": 3, "num_starts": 2, "save_steps": 4, "per_device_train_batch_size": 3}

    def fit(directory, **changes):
        eraser = SFTEraser(base, carrier, tokenizer, config(**quick | changes))
        return eraser, eraser.fit(ids[:4], ids[4:], checkpoints=directory)

    whole, trigger = fit(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["checkpoint-4", "checkpoint-8"]
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "b" / "checkpoint-4")
    for directory in (tmp_path / "a", tmp_path / "b", tmp_path / "none"):  # the last starts anew
        resumed, again = fit(directory, resume=True)
        assert torch.equal(again.embeds, trigger.embeds)
        assert again.metadata["validation_loss_of_starts"] == trigger.metadata["validation_loss_of_starts"]
        assert resumed.history.steps == whole.history.steps
        assert resumed.history.validation == whole.history.validation


def test_resuming_another_run_or_a_damaged_one_is_refused(make_models, make_carrier, tokenizer, ids, tmp_path):
    base, tuned = make_models(spread=0.05)
    carrier = make_carrier(base, tuned)
    quick = {"max_steps": 3, "save_steps": 2}
    SFTEraser(base, carrier, tokenizer, config(**quick)).fit(ids[:4], ids[4:], checkpoints=tmp_path)

    def resume(patch=carrier, prompts=ids[:4], **changes):
        settings = config(**quick | changes, resume=True)
        SFTEraser(base, patch, tokenizer, settings).fit(prompts, ids[4:], checkpoints=tmp_path)

    resume(max_rows_per_forward=2)
    for name, arguments in {
        "learning_rate": {"learning_rate": 0.5},
        "seed": {"seed": 1},
        "patch": {"patch": make_carrier(base, tuned, seed=5)},
        "prompts": {"prompts": ids[:3]},
    }.items():
        with pytest.raises(ValueError, match=f"resume.*{name}"):
            resume(**arguments)
    state = tmp_path / "checkpoint-2" / "training_state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"resume.*state\.safetensors.*damaged"):
        resume()
