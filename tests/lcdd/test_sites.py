"""Sites of every kind: found by structure, gradients against autograd, and models that the probe has to refuse."""

import copy

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
from lcdd.optimizer import Gates, LCDDOptimizer
from lcdd.optimizer.weights import MaskedWeights
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
    "a dense layer, then experts": ("glm4_moe", {}),
    "gated attention": ("beam", {}),
}


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


def weights_by_definition(layout, base, deltas, gate):
    """Every masked parameter as W_base + (r ⊗ c) ∘ Δ, spelled out site by site (method, section 1)."""
    parameters = dict(base.named_parameters())
    masks: dict[str, list] = {}
    for matrix in layout.matrices:
        rows, cols = layout.row_and_col_gates(gate, matrix)
        masks.setdefault(matrix.parameter, []).append(rows[:, None] * cols)
    whole = {name: found[0] if parameters[name].ndim == 2 else torch.stack(found) for name, found in masks.items()}
    return {name: parameters[name].detach() + mask * deltas[name] for name, mask in whole.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind_of_site_match_autograd(kind):
    """Through W_eff to every gate and every entry of Δ, in float64; the weights that training writes are W_eff."""
    model_type, settings = KINDS[kind]
    base, tuned = base_and_tuned(model_type, **settings)
    tokens = torch.randint(1, 23, (2, 7), generator=torch.Generator().manual_seed(1))
    weights = MaskedWeights(tuned, base, LCDDConfig())
    layout = weights.layout
    logits = 2 * torch.randn(layout.n_gates, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gates = Gates(layout, kind="hard_concrete", seed=0, logits=logits)
    gates.draw(step=1, training=True)
    assert 0 < int((gates.values == 0).sum()) < layout.n_gates

    names = {site.parameter: site.matrix.parameter for site in sites_of(tuned)}
    deltas = {names[p]: state["delta"].clone().requires_grad_() for p, state in weights.states.items()}
    z = gates.values.clone().requires_grad_()
    replaced = weights_by_definition(layout, base, deltas, z)
    functional_call(base, replaced, kwargs={"input_ids": tokens, "use_cache": False}).logits.sin().sum().backward()

    weights.write(gates)
    for parameter, name in names.items():
        torch.testing.assert_close(parameter.detach(), replaced[name].detach(), rtol=1e-14, atol=1e-14)
    tuned(input_ids=tokens, use_cache=False).logits.sin().sum().backward()
    d_gate, sq_norm = weights.pass_a(weights.grads(gates), gates)
    torch.testing.assert_close(d_gate, z.grad, rtol=1e-9, atol=1e-11)
    assert torch.count_nonzero(d_gate) > layout.n_gates // 4
    squares = torch.zeros((), dtype=torch.float64)
    for site in sites_of(tuned):
        rows, cols = layout.row_and_col_gates(gates.values, site.matrix)
        d_delta = rows[:, None] * cols * site.view(site.parameter.grad)
        torch.testing.assert_close(d_delta, site.view(deltas[site.matrix.parameter].grad), rtol=1e-9, atol=1e-11)
        squares = squares + d_delta.square().sum()
    torch.testing.assert_close(sq_norm, squares)


@pytest.mark.parametrize("kind", ["hard_concrete", "heaviside_ste"])
@pytest.mark.parametrize("sites", ["fused rows", "interleaved heads", "experts and a shared one"])
def test_packed_gradients_train_as_dense_ones_do(sites, kind, monkeypatch):
    always = PackCrossover(gather=0.0, crossover=1.1, min_elements=0, source="test")
    monkeypatch.setattr("lcdd.optimizer.packed.default_crossover", lambda *_: always)
    tokens = torch.randint(1, 23, (2, 7), generator=torch.Generator().manual_seed(1))
    weights, layouts = [], []
    for pack in ("never", "auto"):
        base, tuned = base_and_tuned(KINDS[sites][0], **KINDS[sites][1])
        config = LCDDConfig(pack=pack, gate_kind=kind, gate_init_mean=-0.5, gate_init_std=1.0, learning_rate=1e-2)
        optimizer = LCDDOptimizer.attach(tuned.train(), base, config, total_steps=4)
        for _ in range(3):
            loss = tuned(input_ids=tokens, labels=tokens, use_cache=False).loss
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
