"""Saving a model's weights as an ordinary checkpoint, without a whole copy of them in any process.

Tensors are made whole one after another, on all ranks; the first keeps them until a file is full, and writes it. A file
holds whole blocks, one at least.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lcdd.models import shards
from lcdd.models.blocks import in_blocks

FILE_BYTES = 5 * 10**9
"""Of a file of weights, about."""
INDEX = "model.safetensors.index.json"


@torch.no_grad()
def save_weights(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    at_most: int = FILE_BYTES,
) -> None:
    """Write config and weights, as transformers' `save_pretrained` does; a collective.

    model: which the weights are of. weights: its state dict; tensors whole or sharded. folder: the first rank's, which
    alone writes there. dtype: of the weights in the files. at_most: bytes of a file, about.

    Raises:
        OSError, SafetensorError: the system refused a write; on the first rank, after the others have done their part.
    """
    failed: OSError | SafetensorError | None = None
    sizes: list[dict[str, int]] = []
    for tensors in _files(weights, dtype, at_most):
        if shards.rank() > 0 or failed is not None:
            continue
        try:
            found = {n: t.contiguous() for n, t in revert_weight_conversion(model, tensors).items()}
            save_file(found, folder / _part(len(sizes)), metadata={"format": "pt"})
            sizes.append({name: tensor.nbytes for name, tensor in found.items()})
        except (OSError, SafetensorError) as error:
            failed = error
    if failed is not None:
        raise failed
    if shards.rank() == 0:
        _finish(model, sizes, folder, dtype)


def _files(weights: Mapping[str, Tensor], dtype: torch.dtype, at_most: int) -> Iterator[dict[str, Tensor]]:
    """Whole tensors on the CPU, a file's at a time, each once where it is tied; only the first rank keeps them.

    A block is in one file: transformers splits and joins its weights again.
    """
    first, size = shards.rank() == 0, 0
    held: dict[str, Tensor] = {}
    for names in in_blocks(_untied(weights)):
        of_block = sum(weights[name].numel() for name in names) * dtype.itemsize
        if size and size + of_block > at_most:
            yield held
            held, size = {}, 0
        size += of_block
        for name in names:
            whole = shards.full(weights[name].detach())
            if first:
                held[name] = whole.to("cpu", dtype if whole.is_floating_point() else whole.dtype)
            del whole
    yield held


def _untied(weights: Mapping[str, Tensor]) -> list[str]:
    """Names, but the first alone of those that stand for one tensor."""
    found: dict[int, str] = {}
    for name, tensor in weights.items():
        found.setdefault(shards.local(tensor).data_ptr() or id(tensor), name)
    return list(found.values())


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _finish(model: PreTrainedModel, sizes: list[dict[str, int]], folder: Path, dtype: torch.dtype) -> None:
    """Names of files, as everybody has them; their index; configs."""
    if len(sizes) == 1:
        (folder / _part(0)).rename(folder / "model.safetensors")
    else:
        places: dict[str, str] = {}
        for number, tensors in enumerate(sizes):
            file = f"model-{number + 1:05}-of-{len(sizes):05}.safetensors"
            (folder / _part(number)).rename(folder / file)
            places |= dict.fromkeys(tensors, file)
        total = sum(size for tensors in sizes for size in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = str(dtype).removeprefix("torch."), [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
