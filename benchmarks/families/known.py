"""The families that transformers has and LCDD can mask, as two-layer models of random weights; and what is refused."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, PAD, BOS, EOS = 61, 0, 1, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 40, "n_inner": 40,
    "ffn_dim": 40, "ffn_hidden_size": 40, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "pad_token_id": PAD, "bos_token_id": BOS,
    "eos_token_id": EOS, "initializer_range": 0.2, "sliding_window": 6,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
}  # fmt: skip
"""Of every family, as far as its config has them: two layers, grouped queries, windows that prompts are longer than."""


@dataclass(frozen=True, eq=False)
class Family:
    """label: what people call it. model_type: transformers' name. sites: what is special. settings: beside `SIZES`."""

    label: str
    model_type: str
    sites: str
    settings: dict[str, Any]

    def config(self) -> Any:
        """A config of the smallest sizes, of those that the family's has."""
        known = AutoConfig.for_model(self.model_type)
        mapped = set(getattr(known, "attribute_map", {}))
        computed = {name for name in SIZES if isinstance(getattr(type(known), name, None), property)}
        sizes = {name: value for name, value in SIZES.items() if name not in mapped | computed and hasattr(known, name)}
        return AutoConfig.for_model(self.model_type, **{**sizes, **self.settings})

    def model(self) -> PreTrainedModel:
        """With random weights in float32."""
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32).eval()


def family(label: str, model_type: str, sites: str = "ordinary", **settings: Any) -> Family:
    return Family(label, model_type, sites, settings)


FUSED, BY_HEAD, TRANSPOSED, PLAIN, MOE = "fused rows", "fused, by head", "transposed", "no gate_proj", "experts"
SOFTCAP, SCALED = "capped logits", "scaled logits"
FAMILIES = [
    family("Qwen2, Qwen2.5", "qwen2"),
    family("Qwen3", "qwen3"),
    family("Llama 1-3.x, SmolLM 1-2, Vicuna, DeepSeek-R1-Distill", "llama"),
    family("Mistral", "mistral"),
    family("Ministral", "ministral"),
    family("Ministral 3", "ministral3"),
    family("SmolLM3", "smollm3"),
    family("OLMo", "olmo"),
    family("OLMo 2", "olmo2"),
    family("OLMo 3", "olmo3"),
    family("Gemma", "gemma"),
    family("Gemma 2", "gemma2", SOFTCAP, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
    family("Gemma 3 (text)", "gemma3_text"),
    family("VaultGemma", "vaultgemma", SOFTCAP, final_logit_softcapping=3.0),
    family("Granite 3", "granite", SCALED, logits_scaling=8.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    family("Cohere (Command R)", "cohere", SCALED),
    family("Cohere 2 (Command R7B)", "cohere2", SCALED),
    family("EXAONE 4", "exaone4"),
    family("ERNIE 4.5", "ernie4_5"),
    family("Seed-OSS", "seed_oss"),
    family("HunYuan dense", "hunyuan_v1_dense"),
    family("StableLM", "stablelm"),
    family("InternLM 3", "internlm3"),
    family("Helium", "helium"),
    family("HyperCLOVA X", "hyperclovax"),
    family("Phi-3, Phi-4", "phi3", FUSED),
    family("GLM-4 (9B)", "glm", FUSED),
    family("GLM-4-0414", "glm4", FUSED),
    family("GPT-NeoX, Pythia", "gpt_neox", BY_HEAD),
    family("Falcon", "falcon", FUSED, alibi=False),
    family("Falcon 40B, 180B", "falcon", BY_HEAD, new_decoder_architecture=True, num_kv_heads=2),
    family("BLOOM", "bloom", BY_HEAD),
    family("MPT", "mpt", FUSED),
    family("Persimmon", "persimmon", BY_HEAD),
    family("CodeGen", "codegen", "fused, in quarters", rotary_dim=4),
    family("StarCoder2", "starcoder2", PLAIN),
    family("StarCoder (GPT-BigCode)", "gpt_bigcode", FUSED),
    family("Phi-1, Phi-2", "phi", PLAIN),
    family("OPT", "opt", PLAIN),
    family("XGLM", "xglm", PLAIN),
    family("GPT-J", "gptj", PLAIN, rotary_dim=4),
    family("GPT-2", "gpt2", TRANSPOSED),
    family("Nemotron", "nemotron", PLAIN),
    family("Apertus", "apertus", PLAIN),
    family("Arcee", "arcee", PLAIN),
    family("nanochat", "nanochat", PLAIN),
    family("Qwen3-MoE", "qwen3_moe", MOE),
    family("Qwen2-MoE", "qwen2_moe", "experts, a shared one"),
    family("Mixtral", "mixtral", MOE),
    family("OLMoE", "olmoe", MOE),
    family("gpt-oss", "gpt_oss", "experts, transposed, in pairs"),
    family("Granite MoE", "granitemoe", MOE, logits_scaling=8.0),
    family("Phi-3.5-MoE", "phimoe", MOE),
    family("GLM-4.5 (MoE)", "glm4_moe", "dense, then experts"),
    family("ERNIE 4.5 (MoE)", "ernie4_5_moe", "dense, then experts"),
    family("HunYuan (MoE)", "hunyuan_v1_moe", "experts, a shared one"),
    family("EXAONE MoE", "exaone_moe", "dense, then experts"),
    family("Cohere 2 MoE", "cohere2_moe", MOE),
    family("MiniMax M2", "minimax_m2", MOE),
    family("Llama 4 (text)", "llama4_text", "experts, transposed, a shared one", intermediate_size_mlp=40),
    family("AFMoE", "afmoe", "experts, gated attention"),
]

REFUSED = [
    ("DeepSeek V2", "deepseek_v2", {}),
    ("DeepSeek V3", "deepseek_v3", {}),
    ("MiniCPM 3", "minicpm3", {}),
    ("Kimi Linear", "kimi_linear", {}),
    ("Mamba", "mamba", {}),
    ("Jamba", "jamba", {}),
    ("Falcon H1", "falcon_h1", {}),
    ("Qwen3-Next", "qwen3_next", {}),
    ("RecurrentGemma", "recurrent_gemma", {}),
    ("RWKV", "rwkv", {}),
    ("T5", "t5", {}),
    ("BART", "bart", {}),
    ("a quantised Llama", "llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
]
"""What is refused from the config alone, before a weight is read."""
