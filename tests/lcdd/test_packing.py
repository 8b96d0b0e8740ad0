"""Training without padding: loss and gradients are those of one example at a time, whatever the lengths."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from fixtures.checkpoints import make_model
from lcdd.data import IGNORE, Encoded
from lcdd.models import (
    backbone,
    can_share_prefix,
    common_prefix,
    packed_attention_in,
    packed_rows,
    packs,
    why_not_packed,
)
from lcdd.trainer import loss_sum, padded_batch, response_tokens, to_batch

PAD = 0
PREFIX = tuple(range(20, 32))


def example(length: int, answer: int, *, prefix: tuple[int, ...] = PREFIX, whole_text: bool = False) -> Encoded:
    """`prefix`, then own tokens up to `length`; the loss is on the last `answer` tokens, or on all."""
    ids = (*prefix, *(50 + (7 * length + 3 * n) % 100 for n in range(length - len(prefix))))
    silent = 0 if whole_text else length - answer
    return Encoded(input_ids=ids, labels=(*[IGNORE] * silent, *ids[silent:]), n_prompt=length - answer)


BATCHES = {
    "mixed lengths behind a system prompt": [example(n, 2 + n % 3) for n in (40, 17, 17, 63, 15, 28)],
    "nothing in common": [example(n, 4, prefix=(n,)) for n in (9, 30, 12, 5)],
    "loss on the whole text": [example(n, 4, whole_text=True) for n in (40, 17, 28, 14)],
    "an answer that begins inside what all share": [example(n, n - 10) for n in (40, 14, 28)],
    "one example": [example(20, 3)],
    "the same example twice": [example(16, 3), example(16, 3)],
    "nothing but a label": [example(2, 1, prefix=(5,)), example(9, 2, prefix=(5,))],
}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model: nn.Module, items: list[Encoded]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss a label and its gradients, each example on its own through transformers' own attention and loss."""
    total = sum(
        model(input_ids=torch.tensor([item.input_ids]), labels=torch.tensor([item.labels])).loss
        * response_tokens([item])
        for item in items
    )
    loss = total / response_tokens(items)
    return loss.item(), gradients(model, loss)


def assert_as_alone(model: nn.Module, items: list[Encoded]) -> None:
    expected, theirs = alone(model, items)
    batch = to_batch(items, model, PAD)
    loss = loss_sum(model, batch) / response_tokens(items)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    ours = gradients(model, loss)
    assert set(ours) == set(theirs)
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    errors = {name: float((ours[name] - gradient).abs().max()) for name, gradient in theirs.items()}
    if max(errors.values()) <= 1e-6 * scale:
        return
    # Or what rounding does to a batch whoever computes it: at most twice the error of a padded one (experts' products).
    padded = gradients(model, loss_sum(model, padded_batch(items, PAD, torch.device("cpu"))) / response_tokens(items))
    for name, gradient in theirs.items():
        assert errors[name] <= max(1e-6 * scale, 2 * float((gradient - padded[name]).abs().max())), name


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model("llama", vocab_size=200)


@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_gradients_are_those_of_one_example_at_a_time(model: nn.Module, name: str) -> None:
    assert_as_alone(model, BATCHES[name])


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
@pytest.mark.parametrize("similar", [1, 16, 2**31], ids=["groups of a length", "similar lengths", "one padded group"])
def test_other_architectures_windows_and_the_grouping_of_gpus(
    kind: str, similar: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_rows, "_similar", lambda _: similar)
    model = make_model(kind, vocab_size=200)
    if kind == "mistral":
        model.config.sliding_window = 7
        for layer in backbone(model).layers:
            layer.self_attn.sliding_window = 7
    assert why_not_packed(model) is None
    assert_as_alone(model, BATCHES["mixed lengths behind a system prompt"])
    assert_as_alone(model, BATCHES["nothing in common"])


def test_what_runs_is_the_tokens_and_no_more(model: nn.Module) -> None:
    """One copy of the shared prefix, no padding, and no last token, which predicts nothing."""
    items = BATCHES["mixed lengths behind a system prompt"]
    widths = []
    loss_sum(model, to_batch(items, model, PAD))  # what is measured of a model at its first loss is known then
    handle = backbone(model).layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[:2]))
    loss_sum(model, to_batch(items, model, PAD))
    handle.remove()
    assert widths == [(1, len(PREFIX) + sum(len(item.input_ids) - 1 - len(PREFIX) for item in items))]
    assert common_prefix([(1, 2, 3), (1, 2, 4, 5)], at_most=9) == 2
    assert common_prefix([(1, 2, 3), (1, 2, 3)], at_most=2) == 2


def test_recomputed_activations_attend_as_the_forward_did(model: nn.Module) -> None:
    items = BATCHES["mixed lengths behind a system prompt"]
    _, expected = alone(model, items)
    again = copy.deepcopy(model).train()
    batch = to_batch(items, again, PAD)
    again.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="have to run inside packed_attention_in"):
        loss_sum(again, batch)
    with packed_attention_in(again):
        found = gradients(again, loss_sum(again, batch) / response_tokens(items))
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6 * scale) for name in expected)


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 200, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "settings", "packed"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5, "sliding_window": 9}, True),
        ("granite", {"logits_scaling": 3.0, "attention_multiplier": 0.3}, True),
        ("cohere2", {"logit_scale": 0.25, "sliding_window": 9}, True),
        (
            "gpt_oss",
            {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 9, "initializer_range": 0.1},
            True,
        ),
        ("stablelm", {}, False),
    ],
)
def test_caps_scales_sinks_and_windows_of_other_families(model_type, settings, packed) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | settings))
    assert packs(model) == packed
    assert_as_alone(model, BATCHES["mixed lengths behind a system prompt"])


def biased() -> nn.Module:
    """An attention that is told something that packed attention does not know."""
    model = make_model("llama", vocab_size=200)
    for layer in backbone(model).layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _m, args, given: (args, given | {"position_bias": torch.zeros(1)}), with_kwargs=True
        )
    return model


def chunked() -> nn.Module:
    model = make_model("llama", vocab_size=200)
    model.config.layer_types, model.config.attention_chunk_size = ["full_attention", "chunked_attention"], 64
    return model


def absolute() -> nn.Module:
    """Positions counted from the row's start, whatever `position_ids` say."""
    model = make_model("llama", vocab_size=200)
    inner = backbone(model)
    rotary = inner.rotary_emb.forward
    inner.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (biased, "no position_bias"),
        (chunked, "layers of kind chunked_attention"),
        (absolute, "differ from the same texts"),
    ],
)
def test_what_cannot_be_packed_exactly_is_padded_and_said(make, reason, caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    assert reason in str(why_not_packed(model))
    items = BATCHES["mixed lengths behind a system prompt"]
    with caplog.at_level(logging.WARNING):
        assert_as_alone(model, items)
        to_batch(items, model, PAD)
    said = [record.getMessage() for record in caplog.records if "runs padded" in record.getMessage()]
    assert len(said) == 1
    assert reason in said[0]


def test_dropout_is_never_drawn_once_for_all() -> None:
    model = make_model("llama", vocab_size=200)
    assert can_share_prefix(model)
    model.config.attention_dropout = 0.1
    assert not can_share_prefix(model)
    assert to_batch(BATCHES["one example"] * 2, model, PAD).rows.shared == 0


def test_a_model_with_flash_attention_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own varlen form by `cu_seq_lens`, here written out, gets every example whole."""
    lengths: list[list[int]] = []

    def flash(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q=None, cu_seq_lens_k=None, **more):
        assert attention_mask is None
        if cu_seq_lens_q is None:
            sizes = [query.shape[2]]
        else:
            sizes = cu_seq_lens_q.diff().tolist()
            assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
            assert more["max_length_q"] == more["max_length_k"] == max(sizes)
            lengths.append(sizes)
        groups = query.shape[1] // key.shape[1]
        states = (query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1))
        rows = [
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
            for q, k, v in zip(*(x.split(sizes, dim=2) for x in states), strict=True)
        ]
        return torch.cat(rows, dim=2).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    model, items = make_model("llama", vocab_size=200), BATCHES["mixed lengths behind a system prompt"]
    model.config._attn_implementation = "flash_attention_2"
    assert_as_alone(model, items)
    assert lengths[-1] == [len(item.input_ids) - 1 for item in items]
