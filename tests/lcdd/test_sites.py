"""Sites of every kind: found by structure, gradients against autograd, and models that the probe has to refuse."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import (
    backbone,
    decoder_layers,
    head_of,
    packs,
    probe,
    sites_of,
    skeleton_of,
    structure_of,
    unmasked_parameters,
)
from lcdd.models.patterns import FUSED_ORDERS
from lcdd.models.roles import leaking_group
from lcdd.models.sites import _ORDERS, matched_blocks, output_of
from lcdd.optimizer import LCDDOptimizer
from lcdd_kernels import PackCrossover

SIZES = {
    "vocab_size": 23, "hidden_size": 16, "n_embd": 16, "intermediate_size": 12, "ffn_dim": 12, "num_hidden_layers": 2,
    "n_layer": 2, "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
    "max_position_embeddings": 32, "n_positions": 32, "initializer_range": 0.3, "rotary_dim": 4,
    "num_local_experts": 3, "num_experts": 3, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 6, "shared_expert_intermediate_size": 10,
}  # fmt: skip
KINDS = {
    "ordinary": ("llama", {}),
    "fused rows": ("phi3", {}),
    "interleaved heads": ("gpt_neox", {}),
    "interleaved groups of heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "interleaved quarters": ("codegen", {}),
    "transposed": ("gpt2", {}),
    "no gate_proj, linears of the layer itself": ("opt", {}),
    "experts": ("mixtral", {}),
    "experts, transposed, in pairs": ("gpt_oss", {}),
    "experts and a shared one": ("qwen2_moe", {}),
    "experts, transposed, and a shared one": ("llama4_text", {"intermediate_size_mlp": 12}),
    "a dense layer, then experts": ("glm4_moe", {}),
    "gated attention": ("beam", {}),
    "one head of keys": ("gpt_bigcode", {}),
}
ROUTES = {
    "whole": {"pack": "never", "gate_kind": "heaviside_ste"},
    "block": {"gate_kind": "hard_concrete"},
    "panels": {"gate_kind": "heaviside_ste"},
    "settled": {"gate_kind": "heaviside_ste", "freeze_fraction": 0.99},
}
"""How a gradient comes from `weight.grad`: all of it; open rows × open columns; open rows and open columns; and, of
gates that are fixed, into the open blocks of Δ, which are all that is kept."""
ALWAYS = PackCrossover(gather=0.0, crossover=10.0, min_elements=0, source="test")
TOKENS = torch.randint(1, 23, (2, 7), generator=torch.Generator().manual_seed(1))


def config_of(model_type: str, **settings):
    """The smallest sizes, as far as the architecture's config has them."""
    known = AutoConfig.for_model(model_type)
    left_out = {*known.attribute_map, *(n for n in SIZES if isinstance(getattr(type(known), n, None), property))}
    sizes = {name: size for name, size in SIZES.items() if name not in left_out and hasattr(known, name)}
    return AutoConfig.for_model(
        model_type, **{**sizes, **settings}, attn_implementation="eager", experts_implementation="eager"
    )


def base_and_tuned(model_type: str, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config_of(model_type, **settings)).to(dtype).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for site in sites_of(tuned):
            site.weight.add_(0.2 * torch.randn_like(site.weight))
    return base, tuned


def weights_by_definition(base, layout, deltas, gate):
    """Every masked parameter as W_base + (r ⊗ c) ∘ Δ, spelled out site by site (method, section 1)."""
    parameters = dict(base.named_parameters())
    found: dict[str, list] = {}
    for matrix in layout.matrices:
        rows, cols = layout.row_and_col_gates(gate, matrix)
        found.setdefault(matrix.parameter, []).append(rows[:, None] * cols * deltas[matrix.name])
    stacked = {name: torch.stack(parts) if parameters[name].ndim == 3 else parts[0] for name, parts in found.items()}
    return {name: parameters[name].detach() + change for name, change in stacked.items()}


def outcome(logits):
    """A loss in which every logit counts."""
    return logits.sin().sum()


def by_autograd(base, layout, deltas, gate):
    """dL/dz [n_gates] and, by site, dL/dΔ: autograd through the whole model with W_base + (r ⊗ c) ∘ Δ for weights."""
    z, leaves = gate.clone().requires_grad_(), {name: delta.clone().requires_grad_() for name, delta in deltas.items()}
    weights = weights_by_definition(base, layout, leaves, z)
    outcome(functional_call(base, weights, kwargs={"input_ids": TOKENS, "use_cache": False}).logits).backward()
    return z.grad, {name: leaf.grad for name, leaf in leaves.items()}


def by_optimizer(optimizer):
    """The same, as a step has them from `weight.grad`; dL/dΔ is AdamW's first moment where nothing is averaged."""
    weights, gates = optimizer._masked, optimizer.gates
    loss = outcome(optimizer.model(input_ids=TOKENS, use_cache=False).logits)
    loss.backward()
    d_gate, sq_norm = weights.pass_a(weights.grads(gates), gates)
    optimizer.step(loss)
    weights.expand()
    d_delta = {site.name: site.view(weights.states[site.parameter]["exp_avg"]) for site in weights.sites}
    assert float(sq_norm) == pytest.approx(sum(float(grad.square().sum()) for grad in d_delta.values()), rel=1e-5)
    return d_gate, d_delta


@cache
def looked_at(kind):
    """`base_and_tuned`, with the order of fused rows seen."""
    models = base_and_tuned(KINDS[kind][0], **KINDS[kind][1])
    for model in models:
        sites_of(model)
    return models


def copied(model, dtype):
    found = copy.deepcopy(model).to(dtype)
    _ORDERS[found] = _ORDERS[model]
    return found


def in_training(kind, route, dtype):
    """A base and an optimizer whose next gradients take this route."""
    base, tuned = (copied(model, dtype) for model in looked_at(kind))
    config = LCDDConfig(
        gate_controller="dual", warmup_steps=1000, gate_init_mean=-0.5, gate_init_std=2.0, max_grad_norm=0.0,
        adam_beta1=0.0, **ROUTES[route],
    )  # fmt: skip
    optimizer = LCDDOptimizer.attach(tuned, base, config, total_steps=100)
    for child in tuned.children():
        child.eval()  # without dropout
    if route == "settled":
        loss = outcome(tuned(input_ids=TOKENS, use_cache=False).logits)
        loss.backward()
        optimizer.step(loss)
    assert optimizer._masked.settled is (route == "settled")
    assert set(optimizer._plan.layouts()) <= {{"whole": "dense", "settled": "block"}.get(route, route)}
    return base, optimizer


def deltas_of(optimizer):
    """Δ of every site, whole, as it is now."""
    return {name: delta.clone() for name, (_, delta, _) in optimizer.masked().items()}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind_of_site_are_autograds(kind, route, monkeypatch):
    """Of every gate that the route asks about and every entry of Δ, in float64, to 1e-10 of each group's and site's
    norm; and the weights in training are W_eff."""
    monkeypatch.setattr("lcdd.optimizer.packed.default_crossover", lambda *_: ALWAYS)
    base, optimizer = in_training(kind, route, torch.float64)
    layout, gate, deltas = optimizer.gates.layout, optimizer.gates.values.clone(), deltas_of(optimizer)
    assert 0 < int((gate == 0).sum()) < layout.n_gates
    trained = dict(optimizer.model.named_parameters())
    for name, weight in weights_by_definition(base, layout, deltas, gate).items():
        torch.testing.assert_close(trained[name].detach(), weight, rtol=1e-14, atol=1e-14)

    expected_gate, expected_delta = by_autograd(base, layout, deltas, gate)
    d_gate, d_delta = by_optimizer(optimizer)
    if route in ("block", "settled"):
        expected_gate *= gate != 0  # nothing asks for a closed gate's
        d_gate *= gate != 0
    sizes = [size for _, _, size in layout.groups]
    found = [*zip(d_gate.split(sizes), expected_gate.split(sizes), strict=True)]
    found += [(d_delta[name], expected) for name, expected in expected_delta.items()]
    for number, (ours, theirs) in enumerate(found):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm(), [*layout.groups, *expected_delta][number]
    assert torch.count_nonzero(expected_gate) > layout.n_gates // 8


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_float32_are_as_exact_as_pytorchs(kind, monkeypatch):
    """Twice as far from float64's at most."""
    monkeypatch.setattr("lcdd.optimizer.packed.default_crossover", lambda *_: ALWAYS)
    base, optimizer = in_training(kind, "panels", torch.float32)
    layout, gate, deltas = optimizer.gates.layout, optimizer.gates.values.clone(), deltas_of(optimizer)
    wide = {name: delta.double() for name, delta in deltas.items()}
    exact = by_autograd(copy.deepcopy(base).double(), layout, wide, gate.double())
    errors = []
    for d_gate, d_delta in (by_optimizer(optimizer), by_autograd(base, layout, deltas, gate)):
        apart = torch.cat([(d_delta[name] - expected).flatten() for name, expected in exact[1].items()])
        errors.append([float((d_gate - exact[0]).norm()), float(apart.norm())])
    assert all(ours <= 2 * theirs for ours, theirs in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("kind", ["hard_concrete", "heaviside_ste"])
@pytest.mark.parametrize("sites", ["fused rows", "interleaved heads", "experts and a shared one"])
def test_packed_gradients_train_as_dense_ones_do(sites, kind, monkeypatch):
    monkeypatch.setattr("lcdd.optimizer.packed.default_crossover", lambda *_: ALWAYS)
    weights, layouts = [], []
    for pack in ("never", "auto"):
        base, tuned = base_and_tuned(KINDS[sites][0], **KINDS[sites][1])
        config = LCDDConfig(pack=pack, gate_kind=kind, gate_init_mean=-0.5, gate_init_std=1.0, learning_rate=1e-2)
        optimizer = LCDDOptimizer.attach(tuned.train(), base, config, total_steps=4)
        for _ in range(3):
            loss = tuned(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
            loss.backward()
            optimizer.step(loss)
            optimizer.zero_grad()
        layouts.append(optimizer._plan.layouts() if optimizer._plan else [])
        weights.append(torch.cat([site.weight.detach().flatten() for site in sites_of(tuned)]))
    assert {"block", "panels"} & set(layouts[1])
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-7, atol=1e-9)


def test_all_gates_closed_is_the_base_and_norms_biases_routers_stay():
    base, tuned = base_and_tuned("gpt_oss", torch.float32)
    with torch.no_grad():
        tuned.model.layers[0].mlp.router.weight.add_(1.0)
        tuned.model.layers[0].mlp.experts.down_proj_bias.add_(1.0)
        tuned.model.norm.weight.add_(1.0)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    n_gates = structure_of(base)[0].n_gates
    config = LCDDConfig(gate_kind="heaviside_ste")
    optimizer = LCDDOptimizer.attach(tuned, base, config, total_steps=4, initial_logits=torch.full((n_gates,), -9.0))
    optimizer.eval()
    for name, parameter in tuned.named_parameters():
        assert torch.equal(parameter, before[name]), name
    trained = unmasked_parameters(base)
    assert not any("router.weight" in name or "embed" in name or "lm_head" in name for name in trained)
    assert {"model.norm.weight", "model.layers.0.mlp.experts.down_proj_bias"} <= set(trained)


# ---------------------------------------------------------------- found by structure


@pytest.mark.parametrize(
    ("model_type", "settings", "order"),
    [
        ("phi3", {}, {"qkv": "concatenated", "gate_up": "halves"}),
        ("gpt_neox", {}, {"qkv": "by head"}),
        ("bloom", {}, {"qkv": "by head"}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, {"qkv": "by head"}),
        ("falcon", {"multi_query": True}, {"qkv": "concatenated"}),
        ("codegen", {}, {"qkv": "in quarters"}),
        ("gpt_oss", {}, {"gate_up": "pairs"}),
        ("mixtral", {}, {"gate_up": "halves"}),
    ],
)
def test_the_order_of_fused_rows_is_seen_and_any_other_leaks(model_type, settings, order):
    base, _ = base_and_tuned(model_type, torch.float32, **settings)
    before = [p.detach().clone() for p in base.parameters()]
    sites_of(base)
    assert _ORDERS[base] == order
    block = matched_blocks(base)[1][0]
    assert leaking_group(decoder_layers(base)[0], block, lambda: output_of(base, 0)) is None
    for kind in order:
        for other in FUSED_ORDERS[kind]:
            _ORDERS[base] = order | {kind: other}
            wrong = matched_blocks(base)[1][0]
            group = leaking_group(decoder_layers(base)[0], wrong, lambda: output_of(base, 0))
            # one head of keys comes out the same in two orders
            assert group == (None if wrong == block else "attn_v" if kind == "qkv" else "ffn_hidden")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before, strict=True))


class FusedAttention(LlamaAttention):
    """Llama's attention with weights under names of their own, rows fused and interleaved by groups of heads."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            del self._modules[name]
        self.groups, self.each = config.num_key_value_heads, self.num_key_value_groups
        self.wqkv = nn.Linear(config.hidden_size, self.groups * (self.each + 2) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def part(self, x, heads: slice):
        return self.wqkv(x).unflatten(-1, (self.groups, -1, self.head_dim))[..., heads, :].flatten(-3)

    def q_proj(self, x):
        return self.part(x, slice(0, self.each))

    def k_proj(self, x):
        return self.part(x, slice(self.each, self.each + 1))

    def v_proj(self, x):
        values = self.part(x, slice(self.each + 1, None))
        return values.roll(1, dims=-1) if self.config.mixes_values else values

    def o_proj(self, x):
        return self.wo(x)


class RenamedMLP(nn.Module):
    def __init__(self, inner: LlamaMLP) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = inner.gate_proj, inner.up_proj, inner.down_proj

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class UnheardOfConfig(LlamaConfig):
    model_type = "unheard_of"
    mixes_values = False
    logits = "plain"


class UnheardOf(LlamaForCausalLM):
    """A model that nobody knows by name: other names, fused rows, logits capped by a number in its code."""

    config_class = UnheardOfConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn = FusedAttention(config, layer.self_attn.layer_idx)
            layer.mlp = RenamedMLP(layer.mlp)
        self.post_init()

    def forward(self, *args, **given):
        output = super().forward(*args, **given)
        if self.config.logits == "capped":
            output.logits = 7.5 * torch.tanh(output.logits * 0.3 / 7.5)
        if self.config.logits == "squared":
            output.logits = output.logits.square()
        if self.config.logits == "of another state":
            output.logits = self.lm_head(self.model.embed_tokens(given["input_ids"]))
        return output


def unheard_of(**settings) -> UnheardOf:
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.3}
    return UnheardOf(UnheardOfConfig(**sizes, **heads, max_position_embeddings=32, **settings)).eval()


def test_an_architecture_that_nobody_knows_works_by_its_structure():
    model = unheard_of(logits="capped")
    before = [p.detach().clone() for p in model.parameters()]
    probe(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert [(site.kind, tuple(site.weight.shape)) for site in sites_of(model)[:5]] == [
        ("qkv", (32, 16)), ("o", (16, 16)), ("gate", (12, 16)), ("up", (12, 16)), ("down", (16, 12)),
    ]  # fmt: skip
    assert _ORDERS[model] == {"qkv": "by head"}
    head = head_of(model)
    assert (head.scale, head.softcap) == (pytest.approx(0.3, rel=1e-5), pytest.approx(7.5, rel=1e-5))
    assert packs(model)
    hidden = backbone(model)(input_ids=torch.arange(1, 9)[None]).last_hidden_state
    torch.testing.assert_close(head.logits(hidden), model(input_ids=torch.arange(1, 9)[None]).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits": "squared"}, "expected logits that are the head's product, scaled or soft-capped, got others"),
        ({"logits": "of another state"}, "expected a head that reads the decoder's last hidden state"),
        ({"mixes_values": True}, "expected a known order of the rows of"),
    ],
)
def test_a_model_that_is_not_what_it_seems_is_refused_with_what_differs(settings, message):
    with pytest.raises(InputError, match=message):
        probe(unheard_of(**settings))


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("deepseek_v3", {}, "multi-latent attention cannot be masked"),
        ("falcon_h1", {}, "state-space, convolutional and recurrent layers cannot be masked, got mamba.conv1d"),
        ("mamba", {}, "state-space, convolutional and recurrent layers"),
        ("t5", {}, "expected a decoder, got an encoder-decoder"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised ones \(gptq\)"),
        ("doge", {}, "expected a pattern for every matrix of a block, got none for self_attn.dt_proj.weight"),
        ("vit", {}, "expected a causal language model's config, got 'vit'"),
        ("qwen2_vl", {}, "got 'qwen2_vl', whose language model 'qwen2_vl_text' has no class of its own"),
        ("openai-gpt", {}, "one that generates from embeddings, got OpenAIGPTLMHeadModel"),
    ],
)
def test_what_cannot_be_masked_is_refused_from_the_config_with_the_reason(model_type, settings, message):
    with pytest.raises(InputError, match=message):
        skeleton_of(AutoConfig.for_model(model_type, **settings))


def test_quantised_weights_and_shared_layers_are_refused():
    base, _ = base_and_tuned("llama", torch.float32)
    layer = decoder_layers(base)[1]
    layer.mlp.up_proj.weight = decoder_layers(base)[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"expected a weight of its own in every layer.*layers\.1\.mlp\.up_proj"):
        sites_of(base)
    layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(12, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"quantised ones \(torch.int8\)"):
        sites_of(base)
