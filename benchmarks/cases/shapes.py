"""Models by their published sizes, whole, cut to a few layers, or scaled down with the same proportions."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.cases import Place
from lcdd.models import PreTrainedModel, sites_of

MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768,
        "tie_word_embeddings": False, "sliding_window": None,
    },
    "vicuna-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def sizes_of(name: str, *, layers: int | None = None, divide: int = 1) -> dict[str, Any]:
    """config.json entries of a model of `MODELS`.

    layers: fewer of them. divide: width, heads and feed-forward divided by this; head_dim stays. Where either makes
    the layers smaller, the vocabulary shrinks too, so that the head keeps its share of the work.
    """
    sizes = dict(MODELS[name])
    whole = sizes["num_hidden_layers"]
    sizes["num_hidden_layers"] = layers or whole
    if divide > 1:
        for key in ("hidden_size", "intermediate_size"):
            sizes[key] //= divide
        for key in ("num_attention_heads", "num_key_value_heads"):
            sizes[key] = max(1, sizes[key] // divide)
        sizes["vocab_size"] = max(256, round(sizes["vocab_size"] * sizes["num_hidden_layers"] / whole / divide))
    return sizes


def title(name: str, *, layers: int | None, divide: int) -> str:
    """How a record names the model: what it is, not what it stands for."""
    parts = [name]
    if divide > 1:
        parts.append(f"÷{divide}")
    if layers is not None:
        parts.append(f"{layers} layers" if layers > 1 else "1 layer")
    return ", ".join(parts)


def tiny_sizes(name: str) -> dict[str, Any]:
    """The architecture at sizes of no interest, for tests."""
    sizes = dict(MODELS[name])
    sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 97}
    return sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}


def sized(place: Place, name: str, *, layers: int | None, divide: int) -> tuple[str, dict[str, Any]]:
    """How records name a model here, and its sizes."""
    if place.tiny:
        return f"tiny {name}", tiny_sizes(name)
    return title(name, layers=layers, divide=divide), sizes_of(name, layers=layers, divide=divide)


def make_model(sizes: dict[str, Any], place: Place, *, seed: int, checkpointing: bool = False) -> PreTrainedModel:
    """A model with random weights, made on the device in its dtype, in training mode."""
    torch.manual_seed(seed)
    with place.device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=place.dtype)
    if checkpointing:
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    return model.train()


def fine_tune(model: PreTrainedModel, *, seed: int, spread: float = 1e-3) -> PreTrainedModel:
    """Add a random delta to the masked linears, in place: a stand-in for fine-tuning."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with torch.no_grad():
        for site in sites_of(model):
            weight = site.weight
            noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=torch.float32)
            weight.add_((spread * noise).to(weight.dtype))
    return model
