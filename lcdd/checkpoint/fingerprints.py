"""What a model, a tokenizer and a chat template are known by: SHA-256 of their content."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from lcdd.checkpoint.directory import CHUNK_BYTES, json_sha256
from lcdd.models import shards


def _update_with_tensor(digest: Any, tensor: Tensor) -> None:
    data = shards.full(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, data.numel(), CHUNK_BYTES):
        digest.update(data[start : start + CHUNK_BYTES].numpy())


def model_fingerprint(model: nn.Module) -> str:
    """Hex SHA-256 over the names, dtypes, shapes and bytes of all parameters.

    Two models have the same fingerprint exactly if they have the same parameters bit for bit; device does not
    matter, dtype does. Of a sharded model it is a collective, to be called on every rank.
    """
    shards.reshard(model)  # what is gathered now is FSDP2's to free, and memory that NumPy has seen cannot be
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}|{parameter.dtype}|{tuple(parameter.shape)}|".encode())
        _update_with_tensor(digest, parameter)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex SHA-256 over a tokenizer's vocabulary and special tokens, and a probe of how it splits text."""
    probe = "The 3 quick brown foxes' café, naïve — 東京!\n\tdef f(x): return x**2"
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return json_sha256([tokenizer.get_vocab(), special, tokenizer(probe)["input_ids"]])


def template_fingerprint(tokenizer: Any) -> str:
    """Hex SHA-256 of the chat template's text ("" where the tokenizer has none)."""
    return json_sha256(getattr(tokenizer, "chat_template", None) or "")
