"""Which matrices of a decoder block are masked, and by which gates: a table of patterns, matched by structure.

A pattern names the children of an attention or of a feed-forward module by the words in use for them; shapes are
checked, architectures are never asked for their name. What order the rows of a fused weight have cannot be seen in its
shape: `FUSED_ORDERS` has the known ones, and `lcdd.models.roles` tells by moving channels which it is.

Shapes: D residual width, Q rows of queries, K of keys, V of values, d a head's width, F feed-forward width, E experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lcdd.errors import InputError
from lcdd.models.layout import Matrix, Weave

Pattern = Mapping[str, tuple[str, ...]]
"""Role -> names that a module's child in that role may have."""

_OUT = ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo", "out_lin")
ATTENTION: tuple[Pattern, ...] = (
    {
        "q": ("q_proj", "query", "wq", "Wq", "q_lin"),
        "k": ("k_proj", "key", "wk", "Wk", "k_lin"),
        "v": ("v_proj", "value", "wv", "Wv", "v_lin"),
        "o": _OUT,
    },
    {"qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack", "qkv"), "o": _OUT},
)
OUTPUT_GATE = ("gate_proj", "g_proj")
"""Names of an attention's child that may be there: what multiplies o's input."""
_DOWN = ("down_proj", "w2", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "Wo", "proj_down", "output_linear")
FEED_FORWARD: tuple[Pattern, ...] = (
    {"gate": ("gate_proj", "w1", "proj_up_gate"), "up": ("up_proj", "w3", "proj_up"), "down": _DOWN},
    {"gate_up": ("gate_up_proj", "w12", "Wi", "input_linear"), "down": _DOWN},
    {"up": ("up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w1"), "down": _DOWN},
)
EXPERTS: tuple[Pattern, ...] = (
    {"gate_up": ("gate_up_proj",), "down": ("down_proj",)},
    {"up": ("up_proj",), "down": ("down_proj",)},
)
"""The same for parameters [E, ...] of one module, each expert's slice a matrix."""

FUSED_ORDERS = {"qkv": ("concatenated", "by head", "in quarters"), "gate_up": ("halves", "pairs")}
"""Kind of a fused weight -> orders that its rows are known to come in, the usual one first."""
BY_HEAD = ("query_key_value",)
"""Names of fused weights that usually come by head."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A decoder block's masked matrices, named as in the block.

    fused: kinds of fused weights in it. routers: parameters that choose experts and stay at the base's values.
    feed_forward: path of the block's only feed-forward, where that is a module of its own.
    """

    matrices: tuple[Matrix, ...]
    fused: tuple[str, ...]
    routers: tuple[str, ...]
    feed_forward: str | None


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A weight as it stands in a block: [outputs, inputs], or the other way round where `transposed`; E of them."""

    name: str
    parameter: str
    outputs: int
    inputs: int
    transposed: bool = False
    experts: int = 0


def match_block(block: nn.Module, *, layer: int, head_dim: int, orders: Mapping[str, str]) -> Block:
    """The matrices of a block, in the order q k v o gate up down, experts one after another.

    head_dim: of models whose attention modules do not say it. orders: kind of a fused weight -> one of its
    `FUSED_ORDERS`; where it is not in it, the usual one.

    Raises:
        InputError: the block is none that LCDD can mask; the message has the reason.
    """
    modules = dict(_stored_modules(block))
    attentions = list(_matched(modules, ATTENTION))
    dense = [found for found in _matched(modules, FEED_FORWARD) if found[0] not in dict(attentions)]
    if len(attentions) != 1:
        raise InputError(f"model: {refusal(block, layer)}")
    path, roles = attentions[0]
    module = block.get_submodule(path)
    for name in OUTPUT_GATE:
        if f"{path}.{name}" in modules:
            roles["g"] = modules[f"{path}.{name}"]
    head_dim = getattr(module, "v_head_dim", None) or getattr(module, "head_dim", None) or head_dim
    matrices = _Attention(roles, layer, head_dim, orders).matrices()
    experts = list(_stored_experts(block, width=roles["o"].outputs))
    for path, roles in dense:
        part = path.rpartition(".")[2] if experts or len(dense) > 1 else ""
        matrices += _FeedForward(roles, layer, orders, hidden=f"ffn_hidden.{part}" if part else "ffn_hidden").matrices()
    for roles in experts:
        for number in range(roles["down"].experts):
            matrices += _FeedForward(roles, layer, orders, hidden=f"ffn_hidden.{number}", part=number).matrices()
    routers, rest = _leftovers(block, {m.parameter for m in matrices}, experts=[r["down"].experts for r in experts])
    if rest or not (dense or experts):
        raise InputError(f"model: {refusal(block, layer, rest)}")
    return Block(
        matrices=tuple(matrices),
        fused=tuple(kind for kind in FUSED_ORDERS if any(m.kind == kind for m in matrices)),
        routers=tuple(routers),
        feed_forward=dense[0][0] or None if len(dense) == 1 and not experts else None,
    )


# ---------------------------------------------------------------- what is in a block


def _stored_modules(block: nn.Module) -> Iterator[tuple[str, Stored]]:
    """Path -> weight of every linear layer."""
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            rows, cols = module.weight.shape
            transposed = isinstance(module, Conv1D)
            outputs, inputs = (cols, rows) if transposed else (rows, cols)
            weight = f"{path}.weight"
            yield path, Stored(name=path, parameter=weight, outputs=outputs, inputs=inputs, transposed=transposed)


def _choose(names: Mapping[str, Stored], pattern: Pattern) -> dict[str, Stored] | None:
    """Role -> weight, or None where a role has no one."""
    chosen = {role: next((names[name] for name in known if name in names), None) for role, known in pattern.items()}
    return {role: weight for role, weight in chosen.items() if weight} if all(chosen.values()) else None


def _matched(modules: Mapping[str, Stored], table: tuple[Pattern, ...]) -> Iterator[tuple[str, dict[str, Stored]]]:
    """(path of the parent, role -> weight) of every module whose children fit a pattern, the first that fits."""
    children: dict[str, dict[str, Stored]] = {}
    for path, weight in modules.items():
        parent, _, name = path.rpartition(".")
        children.setdefault(parent, {})[name] = weight
    for parent, names in children.items():
        roles = next((roles for pattern in table if (roles := _choose(names, pattern))), None)
        if roles is not None:
            yield parent, roles


def _stored_experts(block: nn.Module, *, width: int) -> Iterator[dict[str, Stored]]:
    """Role -> weights of every module that holds experts as parameters [E, ...]; width: D."""
    for path, module in block.named_modules():
        names = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
        if not names:
            continue
        prefix = f"{path}." if path else ""
        down = names.get("down_proj")
        # [E, D, F], or transposed [E, F, D]; a square one says as little as its gate_up, twice as large, says all
        transposed = down is not None and _is_transposed(names, down, width)
        stored = {name: _expert_weight(f"{prefix}{name}", p, transposed=transposed) for name, p in names.items()}
        if roles := next((roles for pattern in EXPERTS if (roles := _choose(stored, pattern))), None):
            yield roles


def _is_transposed(names: Mapping[str, Tensor], down: Tensor, width: int) -> bool:
    if down.shape[1] != down.shape[2]:
        return down.shape[2] == width
    first = names.get("gate_up_proj", names.get("up_proj"))
    return first is not None and first.shape[1] == width


def _expert_weight(name: str, parameter: Tensor, *, transposed: bool) -> Stored:
    experts, rows, cols = parameter.shape
    outputs, inputs = (cols, rows) if transposed else (rows, cols)
    return Stored(name=name, parameter=name, outputs=outputs, inputs=inputs, transposed=transposed, experts=experts)


def _leftovers(block: nn.Module, covered: set[str], *, experts: list[int]) -> tuple[list[str], list[str]]:
    """(routers, matrices that nothing covers) among a block's other parameters of two dimensions and more."""
    routers: list[str] = []
    rest: list[str] = []
    for name, parameter in block.named_parameters():
        if name in covered or parameter.ndim < 2 or name.rpartition(".")[2].endswith("bias"):
            continue
        router = experts and parameter.ndim == 2 and parameter.shape[0] in (1, *experts)
        (routers if router else rest).append(name)
    return routers, rest


# ---------------------------------------------------------------- matrices and their gates


def _matrix(weight: Stored, kind: str, layer: int, *, outputs: Weave, inputs: Weave, part: int | None = None) -> Matrix:
    """A weight with the gates of its outputs and inputs, as rows and columns of how it is stored.

    Raises:
        InputError: they are not as many.
    """
    found = (weight.outputs, weight.inputs)
    if found != (outputs.size, inputs.size):
        raise InputError(
            f"model: expected {weight.name} in layer {layer} of shape {(outputs.size, inputs.size)}, got {found}"
        )
    rows, cols = (inputs, outputs) if weight.transposed else (outputs, inputs)
    name = weight.name if part is None else f"{weight.name}[{part}]"
    return Matrix(
        name=name, kind=kind, layer=layer, parameter=weight.parameter, part=part, shape=(rows.size, cols.size),
        rows=rows, cols=cols,
    )  # fmt: skip


@dataclass(frozen=True)
class _Attention:
    roles: Mapping[str, Stored]
    layer: int
    head_dim: int
    orders: Mapping[str, str]

    def matrices(self) -> list[Matrix]:
        """q k v o, or qkv o; g before o, where the output has a gate of its own."""
        out = self.roles["o"]
        if "qkv" in self.roles:
            fused = self.roles["qkv"]
            rest = fused.outputs - out.inputs  # queries are as wide as what o reads
            if rest <= 0 or rest % 2:
                raise self._misfit(fused)
            first = {"qkv": self._fused(fused, queries=out.inputs, keys=rest // 2)}
            values, reads = rest // 2, fused.inputs
        else:
            first = {kind: Weave.of(f"attn_{kind}", self.roles[kind].outputs) for kind in "qkv"}
            values, reads = self.roles["v"].outputs, self.roles["q"].inputs
        if "g" in self.roles:
            first["g"] = Weave.of("attn_q.gate", self.roles["g"].outputs)
        read = Weave.of("attn_read", reads)
        return [
            *(self._matrix(kind, outputs=rows, inputs=read) for kind, rows in first.items()),
            self._matrix("o", outputs=Weave.of("attn_write", out.outputs), inputs=self._columns(out, values)),
        ]

    def _matrix(self, kind: str, *, outputs: Weave, inputs: Weave) -> Matrix:
        return _matrix(self.roles[kind], kind, self.layer, outputs=outputs, inputs=inputs)

    def _columns(self, out: Stored, values: int) -> Weave:
        """o's columns: value channels, each head's repeated for the query heads that it serves."""
        repeat, d = out.inputs // values, self.head_dim
        if out.inputs % values or (repeat > 1 and values % d):
            raise self._misfit(out)
        return Weave.of("attn_v", values) if repeat == 1 else Weave(values // d, (("attn_v", d),) * repeat)

    def _fused(self, fused: Stored, *, queries: int, keys: int) -> Weave:
        """The rows of a fused weight of `queries` + 2 · `keys` rows."""
        d, quarter, pieces = self.head_dim, 4, (("attn_q", queries), ("attn_k", keys), ("attn_v", keys))
        order = self.orders.get("qkv") or FUSED_ORDERS["qkv"][fused.name.rpartition(".")[2] in BY_HEAD]
        if order == "by head" and keys % d == 0 and queries % keys == 0:
            return Weave(keys // d, tuple((group, size * d // keys) for group, size in pieces))
        if order == "in quarters" and queries == keys and keys % quarter == 0:  # CodeGen's: q, v, k of four devices
            return Weave(quarter, tuple((group, keys // quarter) for group in ("attn_q", "attn_v", "attn_k")))
        return Weave(1, pieces)

    def _misfit(self, weight: Stored) -> InputError:
        sizes = {role: (w.outputs, w.inputs) for role, w in self.roles.items()}
        return InputError(
            f"model: expected {weight.name} in layer {self.layer} to fit heads of {self.head_dim}, got shapes {sizes}"
        )


@dataclass(frozen=True)
class _FeedForward:
    roles: Mapping[str, Stored]
    layer: int
    orders: Mapping[str, str]
    hidden: str
    part: int | None = None

    def matrices(self) -> list[Matrix]:
        """gate up down, gate_up down, or up down."""
        down = self.roles["down"]
        hidden, write = Weave.of(self.hidden, down.inputs), Weave.of("ffn_write", down.outputs)
        found = []
        for kind in ("gate", "up", "gate_up"):
            if kind in self.roles:
                read = Weave.of("ffn_read", self.roles[kind].inputs)
                rows = self._twice(down.inputs) if kind == "gate_up" else hidden
                found.append(_matrix(self.roles[kind], kind, self.layer, outputs=rows, inputs=read, part=self.part))
        return [*found, _matrix(down, "down", self.layer, outputs=write, inputs=hidden, part=self.part)]

    def _twice(self, size: int) -> Weave:
        """The rows of a fused gate and up: every hidden channel's gate twice."""
        count, unit = (size, 1) if self.orders.get("gate_up") == "pairs" else (1, size)
        return Weave(count, ((self.hidden, unit),) * 2)


# ---------------------------------------------------------------- refusals


def refusal(block: nn.Module, layer: int, rest: list[str] | None = None) -> str:
    """Why a block cannot be masked, in words. rest: its matrices that no pattern covers, where that is the reason."""
    names = [name for name, _ in block.named_modules()] + [name for name, _ in block.named_parameters()]

    def first(*words: str) -> str | None:
        return next((name for name in names if any(word in name.rpartition(".")[2] for word in words)), None)

    recurrent = next((name for name, m in block.named_modules() if isinstance(m, nn.Conv1d)), None)
    if name := recurrent or first("A_log", "mixer", "rg_lru", "time_mix", "mlstm"):
        return f"state-space, convolutional and recurrent layers cannot be masked, got {name} in layer {layer}"
    if name := first("kv_a_proj", "kv_b_proj", "q_a_proj"):
        return f"multi-latent attention cannot be masked (compressed keys and values), got {name} in layer {layer}"
    if name := first("encoder_attn", "crossattention", "EncDecAttention"):
        return f"decoders that attend to an encoder cannot be masked, got {name} in layer {layer}"
    if rest:
        shown = ", ".join(rest[:4]) + (", …" if len(rest) > 4 else "")
        return f"expected a pattern for every matrix of a block, got none for {shown} in layer {layer}"
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return f"expected one attention and a feed-forward of known patterns in layer {layer}, got linears {linears[:8]}"
