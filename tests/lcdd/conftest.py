"""Small models, patches and a tokenizer for the tests of what happens after training."""

import copy

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lcdd.carrier import Carrier
from lcdd.commands.demo.tasks import VOCABULARY, write_tokenizer
from lcdd.models import sites_of

ARCHITECTURES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The demo's tokenizer: one token a word."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def make_models():
    """base, tuned = make_models(...): two models that differ in their masked linears only."""

    def make(architecture="qwen3", dtype=torch.float32, *, tied=False, spread=0.3, seed=0):
        torch.manual_seed(seed)
        config_class, model_class = ARCHITECTURES[architecture]
        config = config_class(
            vocab_size=len(VOCABULARY),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
            initializer_range=0.3,
        )
        base = model_class(config).to(dtype).eval()
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for site in sites_of(tuned):
                site.weight.add_(spread * torch.randn_like(site.weight))
        return base, tuned

    return make


@pytest.fixture(scope="session")
def make_carrier():
    """make_carrier(base, tuned, density): a patch with random gates, some of them fractional."""

    def make(base, tuned, density=0.4, *, seed=0):
        dense = Carrier.from_models(base, tuned)
        generator = torch.Generator().manual_seed(seed)
        n = dense.layout.n_gates
        is_open = torch.rand(n, generator=generator) < density
        gate = torch.rand(n, generator=generator).add(0.5).clamp(max=1.0) * is_open
        gate = gate.to(dense.gate.dtype)
        deltas = {}
        for site in sites_of(tuned):
            rows, cols = dense_gates(gate, dense.layout, site)
            delta = dense.deltas[site.name].to(site.weight.dtype)
            deltas[site.name] = delta[rows != 0][:, cols != 0]
        return Carrier(
            layout=dense.layout,
            gate_kind="hard_concrete",
            gate_logits=torch.where(is_open, 1.0, -3.0),
            gate=gate,
            deltas=deltas,
            base_fingerprint=dense.base_fingerprint,
            initial_logits=torch.randn(n, generator=generator),
        )

    return make


def dense_gates(gate, layout, site):
    """Row and column gates of a projection, spelled out by group (method, section 1)."""
    groups = {
        "q": ("attn_q", "attn_read"),
        "k": ("attn_k", "attn_read"),
        "v": ("attn_v", "attn_read"),
        "o": ("attn_write", "attn_v"),
        "gate": ("ffn_hidden", "ffn_read"),
        "up": ("ffn_hidden", "ffn_read"),
        "down": ("ffn_write", "ffn_hidden"),
    }
    rows, cols = (gate[layout.slice(site.layer, group)] for group in groups[site.kind])
    if site.kind == "o":
        cols = cols.view(2, 8).repeat_interleave(2, dim=0).flatten()  # 2 KV heads of 8 serve 2 query heads each
    return rows, cols


@pytest.fixture(scope="session")
def site_gates():
    """`dense_gates` for the tests."""
    return dense_gates
