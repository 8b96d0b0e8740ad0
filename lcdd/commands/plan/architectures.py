"""The model that a plan is for: sizes of some published ones, and whatever has a config."""

from functools import cache
from pathlib import Path
from typing import Any

from lcdd.config import did_you_mean
from lcdd.errors import InputError
from lcdd.models import Architecture, skeleton, skeleton_of


def _sizes(kind: str, layers: int, width: int, heads: int, kv_heads: int, ff: int, vocab: int, **more: Any) -> Any:
    return {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": ff, "vocab_size": vocab, "head_dim": 128,
        "tie_word_embeddings": False, "pad_token_id": None,
    } | more  # fmt: skip


PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm2-135m": _sizes("llama", 30, 576, 9, 3, 1536, 49152, head_dim=64, tie_word_embeddings=True),
    "qwen3-0.6b": _sizes("qwen3", 28, 1024, 16, 8, 3072, 151936, tie_word_embeddings=True),
    "qwen3-8b": _sizes("qwen3", 36, 4096, 32, 8, 12288, 151936),
    "qwen3-30b-a3b": _sizes(
        "qwen3_moe", 48, 2048, 32, 4, 6144, 151936, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8
    ),
    "llama-3.2-1b": _sizes("llama", 16, 2048, 32, 8, 8192, 128256, head_dim=64, tie_word_embeddings=True),
    "llama-3-8b": _sizes("llama", 32, 4096, 32, 8, 14336, 128256),
    "llama-3-70b": _sizes("llama", 80, 8192, 64, 8, 28672, 128256),
    "mistral-7b": _sizes("mistral", 32, 4096, 32, 8, 14336, 32768, sliding_window=None),
    "mixtral-8x7b": _sizes("mixtral", 32, 4096, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2),
    "vicuna-7b": _sizes("llama", 32, 4096, 32, 32, 11008, 32000),
    "gemma-2-9b": _sizes("gemma2", 42, 3584, 16, 8, 14336, 256000, head_dim=256, tie_word_embeddings=True),
    "phi-4": _sizes("phi3", 40, 5120, 40, 10, 17920, 100352),
}
"""Entries of the config.json of models that people plan for, so that neither a network nor a download is needed."""


@cache
def _published(name: str) -> Architecture:
    return Architecture.of(skeleton_of(PUBLISHED[name]))


def read_architecture(name: str) -> Architecture:
    """A published model's; else that of a checkpoint directory, of a config.json, or of a hub name's config.

    Raises:
        InputError: there is no such model, or its layers cannot be masked.
    """
    if name.lower() in PUBLISHED:
        return _published(name.lower())
    if "/" not in name and not Path(name).exists():
        hint = did_you_mean(name.lower(), PUBLISHED) or f"; plan has the sizes of: {', '.join(PUBLISHED)}"
        raise InputError(
            "model_name_or_path: expected a checkpoint directory, a config.json, a hub name (owner/name) or a name "
            f"that plan knows, got {name!r}{hint}"
        )
    return Architecture.of(skeleton(name))
