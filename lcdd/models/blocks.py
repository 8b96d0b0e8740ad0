"""Sharding a model over ranks by FSDP2, and reading a checkpoint so that no rank ever holds all of it.

The model is made on the meta device. Its checkpoint is read a block at a time (a decoder layer, or what is outside of
them) by transformers itself, which finds the weights of a block in all files and has it whole to rename, join, split,
stack and transpose them: any checkpoint that one process reads gives the same bits. A layer is sharded as soon as all
of it is there, so that a rank holds its shards and one block. Embeddings and head, which losses and triggers read
outside of any forward of the model, are rows over the ranks too, and whole for as long as somebody reads them.
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcdd.errors import InputError
from lcdd.models import shards
from lcdd.models.sites import backbone, decoder_layers, input_embeddings, sites_of, unmasked_parameters

READS = ("model", "state_dict", "checkpoint_files", "load_config")
"""What transformers' function that reads weights into a model is called with."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a model is sharded over all ranks, by rows: its decoder by FSDP2, embeddings and head by `spread_rows`.

    trained: its sites get gradients (which FSDP2 has to know first); train_unmasked: norms and biases too. widen:
    weights of 16 bits become float32; `model.config.dtype` stays.
    """

    trained: bool = False
    train_unmasked: bool = False
    widen: bool = False

    def shard(self, model: PreTrainedModel) -> PreTrainedModel:
        """Shard a model that is whole on every rank, in place."""
        from torch.distributed.fsdp import fully_shard

        self.mark(model)
        self.widen_(model, model.dtype)
        for layer in decoder_layers(model):
            fully_shard(layer)
        return self.finish(model)

    def mark(self, model: PreTrainedModel) -> None:
        """Say of each parameter whether it gets gradients; the model may be on the meta device."""
        model.requires_grad_(False)
        sites = sites_of(model)  # before it is sharded, where the order of fused rows is seen without collectives
        if self.trained:
            for site in sites:
                site.parameter.requires_grad_(True)
        if self.train_unmasked:
            for parameter in unmasked_parameters(model).values():
                parameter.requires_grad_(True)

    def widen_(self, module: nn.Module, dtype: Any) -> None:
        """Weights of `dtype` as float32, if that is wanted; before FSDP2's first forward, which remembers types."""
        if self.widen and dtype in (torch.bfloat16, torch.float16):
            module.float()

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """Shard what is left in a model whose layers are sharded, in place.

        Raises:
            InputError: what is trained in a layer has several dtypes, which FSDP2 does not reduce together.
        """
        from torch.distributed.fsdp import fully_shard

        self.widen_(model, model.dtype)
        for number, layer in enumerate(decoder_layers(model)):
            dtypes = sorted({str(parameter.dtype) for parameter in layer.parameters() if parameter.requires_grad})
            if len(dtypes) > 1:
                raise InputError(
                    f"parallel: expected one dtype in what is trained of layer {number} under fsdp2, got "
                    f"{' and '.join(dtypes)}; take ddp"
                )
        ends = spread_rows([input_embeddings(model), model.get_output_embeddings()])
        fully_shard(backbone(model), ignored_params=ends)
        return model


def spread_rows(modules: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Keep the frozen weights of modules as rows over all ranks, each weight whole while its module runs; returns them.

    FSDP2's own unit is one module, and tied weights are in two, of which either runs without the other.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    spread: dict[Tensor, nn.Parameter] = {}
    for module in modules:
        weight = cast(Tensor, module.weight)
        if weight not in spread:
            mesh = init_device_mesh(weight.device.type, (shards.world_size(),))
            rows = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
            spread[weight] = nn.Parameter(rows.clone(), requires_grad=False)  # or it were a view of all of it
        module.weight = spread[weight]
        module.register_forward_pre_hook(_make_whole)
        module.register_forward_hook(_let_go, always_call=True)
    return set(spread.values())


def _make_whole(module: nn.Module, _args: Any) -> None:
    module.__dict__["weight"] = shards.full(cast(Tensor, module._parameters["weight"]))  # is found before the parameter


def _let_go(module: nn.Module, _args: Any, _output: Any) -> None:
    module.__dict__.pop("weight", None)


def block_of(name: str) -> int:
    """Which block of a model a weight is in, by its name here or in a file: the first number in it; -1 without one."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1


def in_blocks(names: Iterable[str]) -> list[list[str]]:
    """Names by block, in the order of blocks, and within one as given."""
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(block_of(name), []).append(name)
    return [found[block] for block in sorted(found)]


def can_read_blocks(kind: type[PreTrainedModel]) -> bool:
    """Whether this transformers reads weights by a function that can be asked for some of them."""
    read: Any = getattr(kind, "_load_pretrained_model", None)
    return read is not None and tuple(inspect.signature(read).parameters)[: len(READS)] == READS


def block_reader(kind: type[PreTrainedModel], sharding: Sharding) -> Any:
    """A model's class whose `from_pretrained` gives a model with sharded layers, for `Sharding.finish` to end."""

    def read(
        model: PreTrainedModel, _: Any, checkpoint_files: Sequence[str], load_config: Any, *_more: Any
    ) -> tuple[Any, None]:
        model.__class__ = kind
        sharding.mark(model)
        layers = _Layers(model, sharding, load_config.dtype)
        places: dict[str, str] = {}
        for path in checkpoint_files:
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
        found: Any = None
        for names in in_blocks(places):
            part = _read_block(kind, model, {name: places[name] for name in names}, load_config)
            found = part if found is None else _joined(found, part)
            layers.shard_complete()
        layers.mark_others()
        return found, None

    more = {"_load_pretrained_model": staticmethod(read), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), more)


def _read_block(kind: Any, model: PreTrainedModel, places: Mapping[str, str], load_config: Any) -> Any:
    """Read weights, by name with the files they are in, and give what transformers says of them.

    The files are mapped no longer than that: a mapping's pages are the process's memory for as long as it is there.
    """
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(places.values())}
        slices = {name: files[path].get_slice(name) for name, path in places.items()}
        return kind._load_pretrained_model(model, slices, None, load_config)[0]


class _Layers:
    """Decoder layers of a model that is being read."""

    def __init__(self, model: PreTrainedModel, sharding: Sharding, dtype: torch.dtype) -> None:
        self._model, self._sharding, self._dtype = model, sharding, dtype
        self._waiting = list(decoder_layers(model))
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        layers = {id(layer) for layer in self._waiting}
        self._names = {id(module): name for name, module in model.named_modules() if id(module) in layers}

    def shard_complete(self) -> None:
        """Shard each layer that has all its weights now."""
        here = [layer for layer in self._waiting if not any(p.is_meta for p in layer.parameters())]
        self._waiting = [layer for layer in self._waiting if layer not in here]
        for layer in here:
            self._shard(layer)

    def _shard(self, layer: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        self._sharding.widen_(layer, self._dtype)
        for name, parameter in layer.named_parameters():
            parameter.data = parameter.data.contiguous()  # a transposed weight is not
            parameter.requires_grad_(f"{self._names[id(layer)]}.{name}" in self._trained)
        fully_shard(layer)
        for parameter in layer.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers draws it anew

    def mark_others(self) -> None:
        """Weights outside of layers have been replaced, too, by ones that get gradients."""
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name in self._trained)


def _joined(found: Any, part: Any) -> Any:
    """What is said of the weights read so far, and of another block's."""
    found.missing_keys &= part.missing_keys
    for name in ("unexpected_keys", "mismatched_keys", "conversion_errors"):
        setattr(found, name, getattr(found, name) | getattr(part, name))
    found.error_msgs += part.error_msgs
    return found
