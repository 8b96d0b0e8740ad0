"""The sites of a model: the views of its parameters that LCDD masks, found by structure; and where its other parts are.

What a decoder block may look like is in `lcdd.models.patterns`; which gates a site reads, in `lcdd.models.layout`.
"""

import inspect
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from lcdd.errors import InputError
from lcdd.models import roles, shards
from lcdd.models.layout import GateLayout, Matrix
from lcdd.models.patterns import FUSED_ORDERS, Block, match_block
from lcdd_kernels import GateMap

logger = logging.getLogger(__name__)

_ORDERS: "weakref.WeakKeyDictionary[PreTrainedModel, dict[str, str]]" = weakref.WeakKeyDictionary()
"""Of models with fused weights, the order of their rows once it was seen."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Site:
    """One masked matrix of a model.

    parameter: what is trained, of which the site is all, or one slice. linear: the layer whose weight it is, where that
    is an nn.Linear. gate_map: how it finds its gates in the layout's slots.
    """

    matrix: Matrix
    parameter: nn.Parameter
    linear: nn.Linear | None
    gate_map: GateMap

    @property
    def name(self) -> str:
        return self.matrix.name

    @property
    def kind(self) -> str:
        return self.matrix.kind

    @property
    def layer(self) -> int:
        return self.matrix.layer

    def view(self, tensor: Tensor) -> Tensor:
        """The site's part [rows, columns] of a tensor of its parameter's shape: a weight, gradient, delta, moment."""
        return tensor if self.matrix.part is None else tensor[self.matrix.part]

    @property
    def weight(self) -> Tensor:
        """The matrix, [rows, columns] as stored: the parameter itself where the site is all of it, else a view."""
        return self.view(self.parameter)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes that a model's config states. d_model: of the residual stream; head_dim: of queries' heads."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int


def shape_of(config: PretrainedConfig) -> ModelShape:
    """Read the sizes off a transformers config.

    Raises:
        InputError: it does not state them.
    """
    text: Any = config.get_text_config(decoder=True)
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if missing := [name for name in needed if getattr(text, name, None) is None]:
        raise InputError(f"model: expected a config with {', '.join(missing)}, got {config.model_type!r} without")
    width, heads = text.hidden_size, text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    return ModelShape(
        n_layers=text.num_hidden_layers,
        d_model=width,
        n_heads=heads,
        n_kv_heads=keys or heads,
        head_dim=getattr(text, "head_dim", None) or width // heads,
        d_ff=getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * width,
        vocab_size=text.vocab_size,
    )


def check_config(config: PretrainedConfig) -> None:
    """Raise InputError where a config alone says that its model cannot be masked."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"model: expected a decoder, got an encoder-decoder ({config.model_type})")
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise InputError(f"model: expected weights in floating point, got quantised ones ({method}); dequantise them")


# ---------------------------------------------------------------- sites


def sites_of(model: PreTrainedModel) -> list[Site]:
    """The masked matrices of `model`, layer by layer.

    The order of fused rows is found by running the model up to such a layer, once for each model (`lcdd.models.roles`),
    of a sharded model on every rank; a model on the meta device gets the usual one.

    Raises:
        InputError: a block's structure is not known; the message has what was found.
    """
    return structure_of(model)[1]


def layout_of(model: PreTrainedModel) -> GateLayout:
    """The gates of a model's sites."""
    return structure_of(model)[0]


def feed_forwards(model: PreTrainedModel) -> list[nn.Module | None]:
    """Each layer's feed-forward, where it has one that is a module of its own and takes one tensor."""
    found: list[nn.Module | None] = []
    for module, block in zip(decoder_layers(model), matched_blocks(model)[1], strict=True):
        inner = module.get_submodule(block.feed_forward) if block.feed_forward else None
        alone = inner is not None and len(inspect.signature(inner.forward).parameters) == 1
        found.append(inner if alone else None)
    return found


def structure_of(model: PreTrainedModel) -> tuple[GateLayout, list[Site]]:
    """`layout_of` and `sites_of`."""
    prefix, blocks = matched_blocks(model)
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    matrices = [
        replace(matrix, name=f"{prefix}.{layer}.{matrix.name}", parameter=f"{prefix}.{layer}.{matrix.parameter}")
        for layer, block in enumerate(blocks)
        for matrix in block.matrices
    ]
    layout = GateLayout.for_matrices(matrices)
    found, seen = [], set()
    for matrix in matrices:
        key = matrix.parameter, matrix.part
        if matrix.parameter not in parameters or key in seen:  # named_parameters leaves out what came already
            raise InputError(
                f"model: expected a weight of its own in every layer, got a shared one, {matrix.parameter}"
            )
        seen.add(key)
        module = modules.get(matrix.name)
        parameter, linear = parameters[matrix.parameter], module if isinstance(module, nn.Linear) else None
        found.append(Site(matrix=matrix, parameter=parameter, linear=linear, gate_map=layout.gate_map(matrix)))
    return layout, found


def matched_blocks(model: PreTrainedModel) -> tuple[str, list[Block]]:
    """(name of the list of decoder layers, what each of them is)."""
    check_config(model.config)
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for parameter in layers.parameters():
        if not parameter.is_floating_point():
            raise InputError(f"model: expected weights in floating point, got quantised ones ({parameter.dtype})")
    head_dim = _head_dim(model.config)
    orders = _ORDERS.get(model)
    if orders is None:
        orders = _seen_orders(model, head_dim)
        if not _is_empty(model):  # it may be filled later
            _ORDERS[model] = orders
    blocks = [match_block(b, layer=n, head_dim=head_dim, orders=orders) for n, b in enumerate(layers)]
    return prefix, blocks


def _is_empty(model: PreTrainedModel) -> bool:
    """Whether a model has no numbers to look at."""
    return any(p.is_meta for p in decoder_layers(model).parameters())


def _head_dim(config: PretrainedConfig) -> int:
    """A head's width, for attention modules that do not say it; 0 where the config does not either."""
    try:
        return shape_of(config).head_dim
    except (InputError, AttributeError):  # sizes that differ between layers are AttributeErrors when read
        return 0


def _seen_orders(model: PreTrainedModel, head_dim: int) -> dict[str, str]:
    """Kind of a fused weight -> the order of its rows: the first under which gates close what they should."""
    orders: dict[str, str] = {}
    layers = decoder_layers(model)
    weights_here = not _is_empty(model)
    for number, module in enumerate(layers):
        fused = match_block(module, layer=number, head_dim=head_dim, orders=orders).fused
        new = [kind for kind in fused if kind not in orders]
        if not (new and weights_here):
            continue
        for choice in itertools.product(*(FUSED_ORDERS[kind] for kind in new)):
            tried = orders | dict(zip(new, choice, strict=True))
            block = match_block(module, layer=number, head_dim=head_dim, orders=tried)
            if roles.leaking_group(module, block, partial(output_of, model, number)) is None:
                orders = tried
                break
        else:
            raise InputError(f"model: expected a known order of the rows of {new} in layer {number}, got another")
    return orders


_OWN_ATTENTION: "weakref.WeakKeyDictionary[PreTrainedModel, str]" = weakref.WeakKeyDictionary()
"""Of models that attend by another function now, what they attended by before."""


class _Reached(Exception):
    """A layer's output is there: the rest of the model need not run."""


@torch.no_grad()
def output_of(model: PreTrainedModel, layer: int) -> Tensor:
    """What decoder layer `layer` gives for a few tokens, [1, S, D]; the model runs as far as that.

    Of a sharded model a collective, in which all of it runs: FSDP2 does not expect a forward to end half-way.
    """
    found: list[Tensor] = []
    sharded = shards.holds_shards(model)

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])
        if not sharded:
            raise _Reached

    handle = decoder_layers(model)[layer].register_forward_hook(stop)
    was_training = model.training
    model.eval()
    try:
        backbone(model)(input_ids=probe_ids(model), use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
        model.train(was_training)
    return found[0]


def probe_ids(model: PreTrainedModel, length: int = 12) -> Tensor:
    """Token ids [1, length], spread over the vocabulary."""
    table = input_embeddings(model)
    generator = torch.Generator().manual_seed(length)
    return torch.randint(table.num_embeddings, (1, length), generator=generator).to(table.weight.device)


# ---------------------------------------------------------------- other parts of a model


def unmasked_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters that LCDD does not gate but the authors train: the decoder's norms and biases.

    Not embeddings, head, routers and what lies outside the decoder, which stay at the base's values.
    """
    masked = {id(site.parameter) for site in sites_of(model)}
    ends = {
        id(p) for module in (model.get_input_embeddings(), model.get_output_embeddings()) for p in module.parameters()
    }
    ends |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    candidates = {id(p) for p in backbone(model).parameters()} - masked - ends
    return {
        name: p
        for name, p in model.named_parameters()
        if id(p) in candidates and (p.ndim < 2 or name.rpartition(".")[2].endswith("bias"))
    }


def check_same_architecture(base: PreTrainedModel, other: PreTrainedModel, *, names: tuple[str, str] = ("base", "sft")):
    """Raise InputError, naming the first difference, unless both models have the same parameters and shapes."""
    ours, theirs = dict(base.named_parameters()), dict(other.named_parameters())
    if base.config.model_type != other.config.model_type:
        raise InputError(
            f"{names[1]}: expected architecture {base.config.model_type!r} as {names[0]} has, "
            f"got {other.config.model_type!r}"
        )
    for name, parameter in ours.items():
        if name not in theirs:
            raise InputError(f"{names[1]}: expected a parameter {name!r} as {names[0]} has, got none")
        if parameter.shape != theirs[name].shape:
            raise InputError(
                f"{names[1]}: expected {name!r} of shape {tuple(parameter.shape)} as {names[0]} has, "
                f"got {tuple(theirs[name].shape)}"
            )
    if extra := sorted(set(theirs) - set(ours)):
        raise InputError(f"{names[1]}: got a parameter {extra[0]!r} that {names[0]} does not have")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks; the output of block l is the residual stream h_l.

    Raises:
        InputError: there is no list of layers.
    """
    return _layers_of(backbone(model))  # type: ignore[return-value]  # backbone has seen to it


def backbone(model: PreTrainedModel) -> nn.Module:
    """The transformer without its head: called, it gives `.last_hidden_state` [B, S, D] after the final norm.

    Raises:
        InputError: no part of the model has a list of layers.
    """
    for module in (model.get_decoder(), *model.modules()):
        if module is not model and _layers_of(module) is not None:
            return module
    raise InputError(f"model: expected a decoder with a list of layers, found none in {type(model).__name__}")


def _layers_of(module: nn.Module) -> nn.ModuleList | None:
    """The longest list of modules among a module's children."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child)]
    return max(lists, key=len, default=None)


@contextmanager
def attention_by(model: PreTrainedModel, function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Inside, the model's attention is `function`, and its masks are left to it.

    It is called as transformers' `AttentionInterface` has it: (module, query, key, value, attention_mask, ...), with
    what keyword arguments the model hands on.
    """
    name, config = f"lcdd_{function.__name__}", cast(PretrainedConfig, backbone(model).config)
    AttentionInterface.register(name, function)
    before = config._attn_implementation
    outermost = _OWN_ATTENTION.setdefault(model, before) is before
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        if outermost:
            _OWN_ATTENTION.pop(model, None)


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's attention is its own again, also inside `attention_by`."""
    config = cast(PretrainedConfig, backbone(model).config)
    before = config._attn_implementation
    config._attn_implementation = _OWN_ATTENTION.get(model, before)
    try:
        yield
    finally:
        config._attn_implementation = before


def head_weight(model: PreTrainedModel) -> Tensor:
    """The head's weight [V, D]."""
    return model.get_output_embeddings().weight


def input_embeddings(model: PreTrainedModel) -> nn.Embedding:
    """The token embedding module, weight [V, D]."""
    return cast(nn.Embedding, model.get_input_embeddings())
