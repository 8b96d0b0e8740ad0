"""The forward route: gates applied inside the model's own linears, so that autograd reaches deltas and gate logits.

    gates = ForwardGates.attach(model, base, kind="hard_concrete", logits=theta)
    gates.draw(step=t)                    one draw; as often as wanted, per micro-batch if need be
    loss.backward()                       -> gates.logits.grad [n_gates], gates.deltas[name].grad [out, in]
    gates.fold()                          ordinary modules again, W_eff of the deterministic gates in the weights
    gates.restore()                       ordinary modules again, the weights as they were

`LCDDOptimizer` gets the same gradients from `weight.grad` alone and needs none of this. The forward route is for gates
that are drawn or given per call, for research on one block, and as the second, independent way to those gradients.

Modules are swapped in on instances: names, tensors and state_dict stay those of an ordinary model, and `weight` keeps
what it held, unused. Deltas and logits are not in the module tree, so DDP does not average their gradients.

    GatedLinear   one projection (o_proj with its columns' gates shared by the query heads of a KV head)
    GatedMLP      gate, up, SwiGLU and down in one op that saves its input only
    GatedQKV      q, k and v in one op: q_proj's call computes all three, k_proj's and v_proj's collect theirs

Shapes: [out, in] a projection, n_gates gates of the model (`GateLayout`).
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcdd.errors import InputError
from lcdd.models import (
    GateLayout,
    PreTrainedModel,
    Site,
    check_same_architecture,
    feed_forwards,
    sites_of,
    structure_of,
)
from lcdd.optimizer.swapped import Swapped
from lcdd_kernels import GateMap, GateSpec, gate_values, gated_linear, gated_mlp, gated_qkv, weight_eff_
from lcdd_kernels.reference.gates import KINDS

__all__ = ["ForwardGates", "GatedLinear", "GatedMLP", "GatedQKV"]

M = TypeVar("M", bound=nn.Module)


class ForwardGates:
    """The gates, bases and deltas that a model's swapped-in modules read in every forward.

    Attributes:
        logits: θ, a leaf [n_gates]; its gradient is the chained one of everything in the model that a gate serves.
        deltas: name of a projection -> Δ, a leaf [out, in].
        step: the noise counter of the draw in force.
        training: whether hard-concrete gates are sampled; None follows each module's own `training` flag.
    """

    def __init__(
        self,
        sites: list[Site],
        bases: list[Tensor],
        deltas: list[Tensor],
        *,
        layout: GateLayout,
        kind: str,
        seed: int,
        logits: Tensor,
    ) -> None:
        self._sites, self._bases = sites, bases
        self.layout, self.kind, self.seed, self.logits = layout, kind, seed, logits
        self.deltas = {site.name: delta for site, delta in zip(sites, deltas, strict=True)}
        self.step = 1
        self.training: bool | None = None
        self._swapped: list[tuple[nn.Module, type[nn.Module]]] = []
        self._weights_trained = [site.weight.requires_grad for site in sites]

    @classmethod
    def attach(
        cls,
        model: PreTrainedModel,
        base: PreTrainedModel,
        *,
        kind: str,
        logits: Tensor,
        seed: int = 0,
        deltas: Mapping[str, Tensor] | None = None,
        fuse: bool = True,
    ) -> "ForwardGates":
        """Put `model` on the forward route against `base`, whose weights are referenced, not copied.

        Args:
            model: swapped in place; its masked weights get no gradient while attached.
            base: same architecture, same device.
            kind: "hard_concrete" or "heaviside_ste".
            logits: θ, float32 [n_gates] (float64 beside float64 weights); a leaf that requires grad is used as it is,
                anything else becomes a new Parameter.
            seed: of the hard-concrete noise.
            deltas: name of each site (`lcdd.models.sites_of`) -> Δ [out, in], used as they are, so that
                frozen ones get no gradient work; None: Parameters that hold the difference of the two models.
            fuse: one op for an MLP and one for q, k and v, where they have no biases; else one op a projection.

        Raises:
            InputError: the models differ in architecture, the model is attached already, an argument is off, or the
                model has sites that are no ordinary linears of their own (fused, interleaved, transposed, experts).
        """
        check_same_architecture(base, model)
        if kind not in KINDS:
            raise InputError(f"kind: expected one of {KINDS}, got {kind!r}")
        (layout, sites), base_sites = structure_of(model), sites_of(base)
        if any(isinstance(site.linear, GatedLinear) for site in sites):
            raise InputError("model: expected ordinary linears, got a model that is on the forward route already")
        odd = [site.name for site in sites if type(site.linear) is not nn.Linear or not layout.is_direct(site.matrix)]
        if odd:
            raise InputError(f"gating: expected 'optimizer' for a model with other sites than linears, got {odd[:3]}")
        if tuple(logits.shape) != (layout.n_gates,):
            raise InputError(f"logits: expected shape ({layout.n_gates},), got {tuple(logits.shape)}")
        if not (logits.is_leaf and logits.requires_grad):
            logits = nn.Parameter(logits.detach().clone())
        bases = [site.weight.detach() for site in base_sites]
        if deltas is None:
            parts: list[Tensor] = [
                nn.Parameter((site.weight.detach() - fixed).contiguous())
                for site, fixed in zip(sites, bases, strict=True)
            ]
        else:
            if set(deltas) != {site.name for site in sites}:
                missing = {site.name for site in sites} ^ set(deltas)
                raise InputError(f"deltas: expected one for each site, got a difference in {sorted(missing)[:3]}")
            parts = [deltas[site.name] for site in sites]
        gates = cls(sites, bases, parts, layout=layout, kind=kind, seed=seed, logits=logits)
        gates._swap(model, fuse=fuse)
        return gates

    def draw(self, *, step: int, training: bool | None = None) -> None:
        """Use the gates of noise counter `step` from now on; `training` False takes the deterministic ones."""
        self.step, self.training = step, training

    def parameters(self) -> list[Tensor]:
        """θ and the deltas, for an optimizer."""
        return [self.logits, *self.deltas.values()]

    def expected_l0(self) -> Tensor:
        """E[L0] of θ, a scalar that is differentiable in θ."""
        return gate_values(self.logits, GateSpec(kind=self.kind, training=False))[1]

    def spec(self, module: nn.Module) -> GateSpec:
        """How `module` draws its gates now."""
        training = module.training if self.training is None else self.training
        return GateSpec(kind=self.kind, seed=self.seed, step=self.step, training=training)

    @torch.no_grad()
    def fold(self) -> None:
        """Write W_eff of the deterministic gates into the weights and restore the ordinary modules."""
        gate, _ = gate_values(self.logits.detach(), GateSpec(kind=self.kind, training=False))
        maps = [site.gate_map for site in self._sites]
        weights = [site.parameter.data for site in self._sites]
        weight_eff_(weights, self._bases, [delta.detach() for delta in self.deltas.values()], gate, maps)
        self.restore()

    def restore(self) -> None:
        """Ordinary modules again; the weights are as they were at `attach`."""
        for module, original in self._swapped:
            module.__class__ = original
            for name in ("_gated", "_fused"):
                module.__dict__.pop(name, None)
        self._swapped = []
        for site, trained in zip(self._sites, self._weights_trained, strict=True):
            site.parameter.requires_grad_(trained)

    def _swap(self, model: PreTrainedModel, *, fuse: bool) -> None:
        by_layer: dict[int, dict[str, GatedLinear]] = {}
        swiglus = [mlp if mlp is not None and _is_swiglu(mlp) else None for mlp in feed_forwards(model)]
        for site, base in zip(self._sites, self._bases, strict=True):
            site.parameter.requires_grad_(False)
            linear = self._become(site.linear, GatedLinear)  # type: ignore[arg-type]  # attach has seen to it
            linear._gated = _Gated(self, site, base)
            linear._fused = None
            by_layer.setdefault(site.layer, {})[site.kind] = linear
        if not fuse:
            return
        for index, parts in by_layer.items():
            mlp = swiglus[index]
            if mlp is not None:
                original: Any = type(mlp)  # mypy takes a class of modules for unhashable
                self._become(mlp, _gated_mlp_class(original))._gated = self
            if all(parts[kind].bias is None for kind in "qkv"):
                fused = GatedQKV(self, parts["q"], parts["k"], parts["v"])
                for kind in "qkv":
                    parts[kind]._fused = fused

    def _become(self, module: nn.Module, swapped: type[M]) -> M:
        """The instance's class changes; nothing else of it does."""
        self._swapped.append((module, type(module)))
        module.__class__ = swapped
        return cast(M, module)


@torch.no_grad()
def _is_swiglu(mlp: nn.Module) -> bool:
    """Whether a module computes down_proj(silu(gate_proj(x)) · up_proj(x)) without biases: seen by running it."""
    linears = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(linear, nn.Linear) and linear.bias is None for linear in linears):
        return False
    gate, up, down = (cast(nn.Linear, linear).weight for linear in linears)
    x = torch.linspace(-2, 2, 2 * gate.shape[1], dtype=gate.dtype, device=gate.device).view(2, -1)
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return torch.allclose(mlp(x), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


class _Gated:
    """What one projection reads in its forward. A plain object, so that nothing of it enters the module tree."""

    def __init__(self, gates: ForwardGates, site: Site, weight_base: Tensor) -> None:
        self.gates, self.kind, self.weight_base = gates, site.kind, weight_base
        self.delta = gates.deltas[site.name]
        self.map: GateMap = site.gate_map
        self._rows, self._cols = (run.slots for run in gates.layout.runs(site.matrix))

    @property
    def row_logits(self) -> Tensor:
        return self.gates.logits[self._rows]

    @property
    def col_logits(self) -> Tensor:
        return self.gates.logits[self._cols]


class GatedLinear(Swapped, nn.Linear):
    """An nn.Linear whose forward multiplies by W_base + (r ⊗ c) ∘ Δ. Made by `ForwardGates.attach`."""

    _original, _ours = nn.Linear, ("_gated", "_fused")
    _gated: _Gated
    _fused: "GatedQKV | None"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self._fused is not None:
            return self._fused.project(self, x)
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        """This projection alone."""
        mine = self._gated
        return gated_linear(
            x,
            mine.weight_base,
            mine.delta,
            mine.row_logits,
            mine.col_logits,
            mine.gates.spec(self),
            where=mine.map,
            bias=self.bias,
        )


class GatedMLP(Swapped, nn.Module):
    """A SwiGLU MLP as one op. `ForwardGates.attach` mixes it into the class of the model's own MLP, whose projections
    stay where they are; hooks on those do not fire.
    """

    _gated: ForwardGates
    gate_proj: GatedLinear
    up_proj: GatedLinear
    down_proj: GatedLinear

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]."""
        parts = [linear._gated for linear in (self.gate_proj, self.up_proj, self.down_proj)]
        gate, _, down = parts
        return gated_mlp(
            x,
            [part.weight_base for part in parts],
            [part.delta for part in parts],
            gate.col_logits,
            gate.row_logits,
            down.row_logits,
            self._gated.spec(self),
            offsets=(gate.map.col_start, gate.map.row_start, down.map.row_start),
        )


@cache
def _gated_mlp_class(original: type[nn.Module]) -> type[GatedMLP]:
    """`original` with GatedMLP's forward; its instances stay instances of `original`."""
    return type(f"Gated{original.__name__}", (GatedMLP, original), {"_original": original, "_ours": ("_gated",)})


class GatedQKV:
    """q, k and v of one attention block in one op.

    Attention calls q_proj, k_proj and v_proj one after the other on the same tensor. The first call computes all three
    and keeps k and v for the calls that follow; a call with another input, or in another order, is computed by itself.
    """

    def __init__(self, gates: ForwardGates, q: GatedLinear, k: GatedLinear, v: GatedLinear) -> None:
        self._gates, self._linears = gates, (q, k, v)
        self._input: Tensor | None = None
        self._waiting: dict[str, Tensor] = {}

    def project(self, linear: GatedLinear, x: Tensor) -> Tensor:
        """The output of `linear`, one of the three, for x [..., d_model]."""
        kind = linear._gated.kind
        if kind == "q":
            q, k, v = self(x)
            self._input, self._waiting = x, {"k": k, "v": v}
            return q
        result = self._waiting.pop(kind, None) if x is self._input else None
        if not self._waiting:
            self._input = None
        return linear.project(x) if result is None else result

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [linear._gated for linear in self._linears]
        q, k, v = parts
        return gated_qkv(
            x,
            [part.weight_base for part in parts],
            [part.delta for part in parts],
            q.col_logits,
            q.row_logits,
            k.row_logits,
            v.row_logits,
            self._gates.spec(self._linears[0]),
            offsets=(q.map.col_start, q.map.row_start, k.map.row_start, v.map.row_start),
        )
