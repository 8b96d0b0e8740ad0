"""What a model costs: bytes that must be held or moved, and operations that must be done, by one formula each.

For predictions (`lcdd plan`), for what a run says when memory is short, and for the benchmarks' roofs. Everything is
counted from a model's structure (`Architecture`). Sizes in elements, item sizes in bytes. A multiply-add is two FLOPs.
Bytes moved are lower limits: every operand read once, every result written once, caches ignored.

Shapes: T tokens of a forward, S of one sequence, D model width, F feed-forward width, Q, K and V widths of all queries,
keys and values, H query heads, e bytes of an element of the weights' dtype.
"""

import math
from dataclasses import dataclass
from functools import cache

from lcdd.models.architecture import FLOAT32, Architecture, FeedForward, Layer

# ---------------------------------------------------------------- activations held for the backward, bytes


def layer_activation_terms(layer: Layer, tokens: int, *, item: int) -> dict[str, int]:
    """What a decoder layer of transformers (SDPA, no padding mask, norms frozen) saves for its backward, bytes.

    In an ordinary block, with T tokens and e = item, summed over the terms:

        T · [ e·(2D + 2Q + K + V + 4F) + 4·(2D + 2 + H) ]
      + T · 4·(Q + K + H + H_kv)                           where there are q/k norms

    A norm keeps its input widened to float32 (for float32 weights: the residual itself; PyTorch's LayerNorm: as it is)
    and 1/rms a row; projections after it keep one shared input. Attention keeps rotated q and k, v (all of a fused
    projection), its output (also o's input) and log-sum-exp; a gated MLP keeps gate's output, SiLU of it, up's output
    and their product, which is down's input; another keeps two of them; each chosen expert also its gathered input and
    its output.
    """
    fused = layer.queries + layer.keys if layer.fused_attention else 0
    terms = {
        "norms: input, statistics": sum(norm.saved(item) for norm in layer.norms),
        "inputs of attention and MLP": min(2, max(1, len(layer.norms))) * item * layer.width,
        "attention: q, k, v, output": item * (2 * layer.queries + layer.keys + layer.values + fused),
        "attention: log-sum-exp": FLOAT32 * layer.heads,
        "MLP": item * sum(_feed_forward_values(part, layer.width) for part in layer.feed_forwards),
        "q/k norms: input, statistics": sum(norm.saved(item) for norm in layer.head_norms),
    }
    return {name: tokens * size for name, size in terms.items() if size}


def _feed_forward_values(part: FeedForward, width: int) -> int:
    inner = (4 if part.gated else 2) * part.width
    return part.experts * (inner + 2 * width) if part.experts else inner


def layer_activations(layer: Layer, tokens: int, *, item: int) -> int:
    """Sum of `layer_activation_terms`."""
    return sum(layer_activation_terms(layer, tokens, item=item).values())


def stack_activations(model: Architecture, tokens: int, sequence: int, *, item: int, checkpointing: bool) -> int:
    """What all decoder layers hold when the forward is done, bytes.

    Checkpointing: each layer's input alone. The first layer's input needs no gradient (embeddings are frozen), so a
    norm there saves nothing; the rotary tables are shared by all layers.
    """
    tables = 2 * item * sequence * model.head_dim if model.rotary else 0
    if checkpointing:
        return len(model.layers) * tokens * item * model.width + tables
    entry = model.layers[0]
    first = tokens * entry.norms[0].saved(item) if entry.norm_first else 0
    kept = sum(count * layer_activations(layer, tokens, item=item) for layer, count in model.kinds.items())
    return kept - first + tables


def final_norm_activations(model: Architecture, tokens: int, *, item: int) -> int:
    """What the last norm keeps, and its output, which the head reads."""
    return tokens * (model.last_norm.saved(item) + item * model.width)


def layer_backward_buffers(layer: Layer, tokens: int, *, item: int) -> int:
    """What a layer's backward holds at its fullest beyond what its forward saved, bytes.

    In the MLP: gradients of the layer's output, of down's input, of SiLU's and up's outputs: T·e·(D + 3F), less the
    product that down's backward has let go; or in a norm: float32 gradients of its input, T·(e·2D + 4·3D).
    """
    widest = max(max(1, part.experts) * part.width for part in layer.feed_forwards)
    mlp = item * (layer.width + 2 * widest)
    norm = 2 * item * layer.width + 3 * FLOAT32 * layer.width
    return tokens * max(mlp, norm)


def loss_bytes(model: Architecture, tokens: int, *, item: int, chunk_rows: int | None) -> int:
    """Logits, probabilities and their gradients at the fullest moment of the loss, bytes.

    chunk_rows: rows of logits at a time, float32, and their gradient (over them where it is float32 too), beside the
    gradient of all hidden states; None: whole, as transformers' own loss has them: logits, and in float32
    log-probabilities and two gradients.
    """
    if chunk_rows is None:
        return tokens * model.vocab_size * (item + 3 * FLOAT32)
    logits = FLOAT32 if item == FLOAT32 else FLOAT32 + item
    return min(chunk_rows, tokens) * model.vocab_size * logits + tokens * item * model.width


# ---------------------------------------------------------------- operations


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Matrix products of a forward and backward, by what they are for. Attention is causal and never stored; its
    backward makes the scores again (five products against two)."""

    forward: float
    input_grads: float
    weight_grads: float

    @property
    def total(self) -> float:
        return self.forward + self.input_grads + self.weight_grads


def step_flops(model: Architecture, tokens: int, *, sequence: int, weight_grads: float = 1.0) -> StepFlops:
    """weight_grads: share of the dense weight gradients' work that is done. The head is frozen."""
    layers = 2.0 * model.active_parameters * tokens
    head = head_flops(model, tokens)
    attention = sum(
        count * 4.0 * tokens * layer.keys_seen(sequence) * layer.queries for layer, count in model.kinds.items()
    )
    return StepFlops(
        forward=layers + head + attention,
        input_grads=layers + head + 2.5 * attention,
        weight_grads=layers * weight_grads,
    )


def head_flops(model: Architecture, tokens: int) -> float:
    """The product with the head, forward."""
    return 2.0 * model.vocab_size * model.width * tokens


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


# ---------------------------------------------------------------- bytes over the wire


def collective_bytes(n: float, *, item: int, gpus: int) -> float:
    """Bytes a rank sends in one all-gather, or one reduce-scatter, of n elements in all."""
    return n * item * (gpus - 1) / gpus


def all_reduce_bytes(n: float, *, item: int, gpus: int) -> float:
    """Bytes a rank sends in one all-reduce of n elements: a reduce-scatter and an all-gather."""
    return 2 * collective_bytes(n, item=item, gpus=gpus)


def averaged_entries(shape: tuple[int, int], rows: float, cols: float, *, layout: str) -> float:
    """Entries of a matrix's gradient that ranks with the whole matrix average (`lcdd.optimizer.averaging`).

    rows, cols: how many are open. layout: "block", "panels", or "dense". Never more than the matrix has.
    """
    whole = shape[0] * shape[1]
    open_entries = {"block": rows * cols, "panels": rows * shape[1] + shape[0] * cols, "dense": whole}[layout]
    return min(open_entries, whole)


def scattered_entries(
    shape: tuple[int, int], rows: float, cols: float, *, most_rows: float, gpus: int, layout: str
) -> float:
    """Entries that a rank puts into the reduce-scatter of a matrix's gradient, for all ranks together.

    Each rank has room for as many open rows as the rank with the most has, `most_rows` of its ceil(rows / gpus).
    """
    chunk = -(-shape[0] // gpus)
    if layout == "dense" or averaged_entries(shape, rows, cols, layout=layout) >= shape[0] * shape[1]:
        return gpus * chunk * shape[1]
    return gpus * (most_rows * cols if layout == "block" else most_rows * shape[1] + chunk * cols)


@cache
def most_in_a_chunk(size: int, density: float, chunks: int) -> float:
    """Expected most open of `size` places in any of `chunks` equal parts, each place open by itself with `density`."""
    places, below, most = -(-size // chunks), 0.0, 0.0
    if density in (0.0, 1.0):
        return places * density
    logs = math.log(density), math.log1p(-density)
    for n in range(places):  # E[max] = the sum of P(max > n)
        ways = math.lgamma(places + 1) - math.lgamma(n + 1) - math.lgamma(places - n + 1)
        below += math.exp(ways + n * logs[0] + (places - n) * logs[1])
        if below > 1 - 1e-12:
            break
        most += 1 - below**chunks
    return most


def step_numbers(n_gates: int, *, sharded: bool) -> int:
    """Float64 numbers in the one all-reduce of an optimizer step: loss, tokens, norm; and of shards the gates'."""
    return 4 + (n_gates if sharded else 0)
