"""Bytes that must be held or moved and operations that must be done: one formula each, for predictions and roofs.

Sizes in elements, item sizes in bytes. A multiply-add is two FLOPs. Bytes moved are lower limits: every operand read
once, every result written once, caches ignored.

Shapes: T tokens of a forward, S of one sequence, D model width, F feed-forward width, Q = query heads · head_dim,
K = KV heads · head_dim, V vocabulary, L layers, e bytes of an element of the weights' dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcdd.models.sites import ModelShape

FLOAT32 = 4  # bytes; RMSNorm and softmax statistics are kept in float32 whatever the weights' dtype
PROJECTION_KINDS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model's sizes, and what else its parameters and saved activations depend on.

    tied: the head is the embedding. qk_norm: an RMSNorm on every query and key head (Qwen3). attention_bias, mlp_bias:
    those projections have biases.
    """

    shape: ModelShape
    tied: bool
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_settings(cls, shape: ModelShape, settings: Mapping[str, Any]) -> "Architecture":
        """From a config.json's entries (all of them: defaults filled in) beside the shape read from it."""
        return cls(
            shape=shape,
            tied=bool(settings["tie_word_embeddings"]),
            qk_norm=settings["model_type"] == "qwen3",
            attention_bias=bool(settings.get("attention_bias")),
            mlp_bias=bool(settings.get("mlp_bias")),
        )


def weight_shape(shape: ModelShape, kind: str) -> tuple[int, int]:
    """[out, in] of the projection `kind`."""
    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    return {
        "q": (queries, shape.d_model),
        "k": (keys, shape.d_model),
        "v": (keys, shape.d_model),
        "o": (shape.d_model, queries),
        "gate": (shape.d_ff, shape.d_model),
        "up": (shape.d_ff, shape.d_model),
        "down": (shape.d_model, shape.d_ff),
    }[kind]


# ---------------------------------------------------------------- parameters


def layer_parameters(shape: ModelShape) -> int:
    """Masked parameters of one layer."""
    return sum(rows * cols for rows, cols in (weight_shape(shape, kind) for kind in PROJECTION_KINDS))


def masked_parameters(shape: ModelShape) -> int:
    """Masked parameters of the whole model."""
    return shape.n_layers * layer_parameters(shape)


def largest_matrix(shape: ModelShape) -> int:
    """Parameters of the largest masked matrix."""
    return max(rows * cols for rows, cols in (weight_shape(shape, kind) for kind in PROJECTION_KINDS))


def total_parameters(model: Architecture) -> int:
    """Every parameter: masked linears, their biases, norms, embedding, head (once where tied)."""
    s = model.shape
    biased = (("q", "k", "v", "o") if model.attention_bias else ()) + (("gate", "up", "down") if model.mlp_bias else ())
    biases = sum(weight_shape(s, kind)[0] for kind in biased)
    norms = 2 * s.d_model + (2 * s.head_dim if model.qk_norm else 0)
    ends = (1 if model.tied else 2) * s.vocab_size * s.d_model + s.d_model
    return s.n_layers * (layer_parameters(s) + biases + norms) + ends


# ---------------------------------------------------------------- activations held for the backward, bytes


def layer_activation_terms(model: Architecture, tokens: int, *, item: int) -> dict[str, int]:
    """What one decoder layer of transformers (SDPA, no padding mask, norms frozen) saves for its backward, bytes.

    With T tokens and e = item, summed over the terms:

        T · [ e·(2D + 2Q + 2K + 4F) + 4·(2D + 2 + H) ]     H query heads
      + T · 4·(Q + K + H + H_kv)                           where there are q/k norms

    A norm keeps its input widened to float32 (for float32 weights: the residual itself) and 1/rms a row; projections
    after it keep one shared input. Attention keeps rotated q and k, v, its output (also o's input) and log-sum-exp; the
    MLP keeps gate's output, SiLU of it, up's output, and their product, which is down's input.
    """
    s = model.shape
    queries, keys = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim
    terms = {
        "norms: input in float32, 1/rms": 2 * FLOAT32 * (s.d_model + 1),
        "inputs of q k v and of gate up": 2 * item * s.d_model,
        "attention: q, k, v, output": item * (2 * queries + 2 * keys),
        "attention: log-sum-exp": FLOAT32 * s.n_heads,
        "MLP: gate, SiLU, up, product": 4 * item * s.d_ff,
    }
    if model.qk_norm:
        terms["q/k norms: input in float32, 1/rms"] = FLOAT32 * (queries + keys + s.n_heads + s.n_kv_heads)
    return {name: tokens * size for name, size in terms.items()}


def layer_activations(model: Architecture, tokens: int, *, item: int) -> int:
    """Sum of `layer_activation_terms`."""
    return sum(layer_activation_terms(model, tokens, item=item).values())


def stack_activations(model: Architecture, tokens: int, sequence: int, *, item: int, checkpointing: bool) -> int:
    """What all decoder layers hold when the forward is done, bytes.

    Checkpointing: each layer's input alone. The first layer's input needs no gradient (embeddings are frozen), so its
    first norm saves nothing; the rotary tables are shared by all layers.
    """
    s = model.shape
    tables = 2 * item * sequence * s.head_dim
    if checkpointing:
        return s.n_layers * tokens * item * s.d_model + tables
    first = tokens * FLOAT32 * (s.d_model + 1)
    return s.n_layers * layer_activations(model, tokens, item=item) - first + tables


def final_norm_activations(shape: ModelShape, tokens: int, *, item: int) -> int:
    """Input in float32 and 1/rms of the last norm, and its output, which the head reads."""
    return tokens * (FLOAT32 * (shape.d_model + 1) + item * shape.d_model)


def layer_backward_buffers(model: Architecture, tokens: int, *, item: int) -> int:
    """What a layer's backward holds at its fullest beyond what its forward saved, bytes.

    In the MLP: gradients of the layer's output, of down's input, of SiLU's and up's outputs: T·e·(D + 3F), less the
    product that down's backward has let go; or in a norm: float32 gradients of its input, T·(e·2D + 4·3D).
    """
    s = model.shape
    mlp = item * (s.d_model + 2 * s.d_ff)
    norm = 2 * item * s.d_model + 3 * FLOAT32 * s.d_model
    return tokens * max(mlp, norm)


def loss_bytes(shape: ModelShape, tokens: int, *, item: int, chunk_rows: int | None) -> int:
    """Logits, probabilities and their gradients at the fullest moment of the loss, bytes.

    chunk_rows: rows of logits at a time, float32, and their gradient (over them where it is float32 too), beside the
    gradient of all hidden states; None: whole, as transformers' own loss has them: logits, and in float32
    log-probabilities and two gradients.
    """
    if chunk_rows is None:
        return tokens * shape.vocab_size * (item + 3 * FLOAT32)
    logits = FLOAT32 if item == FLOAT32 else FLOAT32 + item
    return min(chunk_rows, tokens) * shape.vocab_size * logits + tokens * item * shape.d_model


# ---------------------------------------------------------------- operations


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Matrix products of a forward and backward, by what they are for. Attention is causal and never stored; its
    backward makes the scores again (five products against two)."""

    forward: float
    input_grads: float
    weight_grads: float


def step_flops_by_part(shape: ModelShape, tokens: int, *, sequence: int, weight_grads: float = 1.0) -> StepFlops:
    """weight_grads: share of the dense weight gradients' work that is done. The head is frozen."""
    layers = 2.0 * masked_parameters(shape) * tokens
    head = 2.0 * shape.vocab_size * shape.d_model * tokens
    attention = 2.0 * shape.n_layers * tokens * sequence * shape.n_heads * shape.head_dim
    return StepFlops(
        forward=layers + head + attention,
        input_grads=layers + head + 2.5 * attention,
        weight_grads=layers * weight_grads,
    )


# ---------------------------------------------------------------- bytes moved by what is not a matrix product


def clip_bytes(n: int, *, grad: int) -> float:
    """Norm of n gradients, then scaling them in place: two reads and a write."""
    return 3.0 * n * grad


def plain_adamw_bytes(n: int, *, weight: int, moment: int, grad: int) -> float:
    """Fused AdamW: gradient read, weight and both moments read and written."""
    return float(n * (grad + 2 * weight + 4 * moment))


def grad_stats_bytes(n: int, *, grad: int, delta: int, share: float = 1.0) -> float:
    """Pass A over n parameters: G and Δ read; `share` of them where gradients are packed."""
    return share * n * (grad + delta)


def adamw_bytes(n: int, *, weight: int, delta: int, moment: int, grad: int, share: float = 1.0) -> float:
    """Pass B: G and base read, Δ and both moments read and written, W_eff written."""
    return n * (share * grad + 2 * weight + 2 * delta + 4 * moment)


def refresh_bytes(n: int, *, weight: int, delta: int) -> float:
    """W_eff alone: base and Δ read, W_eff written."""
    return n * (2 * weight + delta)


@dataclass(frozen=True, kw_only=True)
class Parametrization:
    """What a parametrization W_eff = base + (r ⊗ c) ∘ Δ in every forward costs a parameter, in bytes.

    held: saved from forward to backward (mask, W_eff, and Δ where it is formed anew). buffers: at the fullest moment of
    one matrix's backward, beyond the gradient that stays. forward, backward: moved, in each micro-batch.
    """

    held: int
    buffers: int
    forward: int
    backward: int

    @classmethod
    def as_published(cls, weight: int) -> "Parametrization":
        """Δ = W_ft − W_base at each access, masks in float32. bfloat16: 36 bytes moved forward, 58 backward.

        forward: Δ (2 read, 1 written), mask (written), product (mask, Δ read; written), sum (product, base read;
        written), cast back. backward: cast; gradients of Δ and of the mask (two reads, a write each), the former cast;
        two reductions of the mask's gradient, each a product (read, written) and a read.
        """
        e, w = weight, FLOAT32
        cast = 0 if e == w else e + w
        return cls(
            held=w + e + e,
            buffers=3 * w + e,
            forward=3 * e + w + (2 * w + e) + (2 * w + e) + cast,
            backward=cast + 3 * w + cast + (2 * w + e) + 2 * 3 * w,
        )

    @classmethod
    def on_delta(cls, weight: int) -> "Parametrization":
        """The leaner form in which Δ is the parameter and the mask has the weight's dtype (`benchmarks/unfused.py`)."""
        e = weight
        return cls(held=2 * e, buffers=3 * e, forward=7 * e, backward=12 * e)


def collective_bytes(n: int, *, item: int, gpus: int) -> float:
    """Bytes a rank sends in one all-gather, or one reduce-scatter, of n elements in all."""
    return n * item * (gpus - 1) / gpus
