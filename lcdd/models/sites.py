"""Everything the project knows about transformers models; the only module that imports transformers.

Qwen3, Llama and Mistral share one block: attention (q, k, v, o) and a gated MLP (gate, up, down), both
reading from and writing to the residual stream. That block is all that LCDD masks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    PretrainedConfig,
    PreTrainedModel,
)

from lcdd.errors import InputError

ARCHITECTURES = ("qwen3", "llama", "mistral")

# kind of projection -> where it sits inside a decoder layer
PROJECTION_PATHS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model that the gates and the cost formulas need."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int

    def weight_shape(self, kind: str) -> tuple[int, int]:
        """[out, in] of the projection `kind`."""
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "q": (queries, self.d_model),
            "k": (keys, self.d_model),
            "v": (keys, self.d_model),
            "o": (self.d_model, queries),
            "gate": (self.d_ff, self.d_model),
            "up": (self.d_ff, self.d_model),
            "down": (self.d_model, self.d_ff),
        }[kind]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One masked linear of the model."""

    name: str
    kind: str
    layer: int
    linear: nn.Linear


def shape_of(config: PretrainedConfig) -> ModelShape:
    """Read the sizes off a transformers config.

    Raises:
        InputError: the architecture is not one of `ARCHITECTURES`.
    """
    if config.model_type not in ARCHITECTURES:
        raise InputError(f"model: expected one of the architectures {ARCHITECTURES}, got {config.model_type!r}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        d_ff=config.intermediate_size,
        vocab_size=config.vocab_size,
    )


def projections(model: PreTrainedModel) -> list[Projection]:
    """The masked linears of `model`, layer by layer in the order q k v o gate up down.

    Raises:
        InputError: the architecture is not supported, or a projection is not an nn.Linear of the expected shape.
    """
    shape = shape_of(model.config)
    found = []
    for layer, prefix, block in _named_layers(model):
        for kind, path in PROJECTION_PATHS.items():
            linear = block.get_submodule(path)
            name = f"{prefix}.{path}"
            if not isinstance(linear, nn.Linear):
                raise InputError(f"{name}: expected nn.Linear, got {type(linear).__name__}")
            if tuple(linear.weight.shape) != shape.weight_shape(kind):
                expected = shape.weight_shape(kind)
                raise InputError(f"{name}.weight: expected shape {expected}, got {tuple(linear.weight.shape)}")
            found.append(Projection(name=name, kind=kind, layer=layer, linear=linear))
    return found


def unmasked_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters that LCDD does not gate but the authors train: norms and biases (not embeddings, not the head)."""
    masked = {id(p.linear.weight) for p in projections(model)}
    fixed = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return {n: p for n, p in model.named_parameters() if id(p) not in masked and id(p) not in fixed}


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
    """The decoder blocks; the output of block l is the residual stream h_l."""
    return cast(nn.ModuleList, backbone(model).layers)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The transformer without its head: called, it gives `.last_hidden_state` [B, S, D] after the final norm."""
    return model.get_decoder()


@contextmanager
def attention_by(model: PreTrainedModel, function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Inside, the model's attention is `function`, and its masks are left to it.

    It is called as transformers' `AttentionInterface` has it: (module, query, key, value, attention_mask, ...), with
    the keyword arguments that were given to the model.
    """
    name, config = f"lcdd_{function.__name__}", cast(PretrainedConfig, backbone(model).config)
    AttentionInterface.register(name, function)
    before = config._attn_implementation
    config._attn_implementation = name
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


def _named_layers(model: PreTrainedModel) -> Iterator[tuple[int, str, nn.Module]]:
    prefix = next(name for name, module in model.named_modules() if module is decoder_layers(model))
    for index, block in enumerate(decoder_layers(model)):
        yield index, f"{prefix}.{index}", block
