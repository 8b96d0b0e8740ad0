"""LCDD as its authors describe it, in ordinary PyTorch: the reference that the optimizer is checked and timed against.

Written from the paper's equations (arXiv 2605.06632) and from nothing in `lcdd` or `lcdd_kernels`, so that agreement
means something. Every linear weight is a `torch.nn.utils.parametrize` parametrization whose parameter is Δ:

    weight = W_base + (r ⊗ c) ∘ Δ          gates r, c sliced from one θ, evaluated anew at each access

Autograd goes through the gates (straight-through for Heaviside; hard-concrete with the noise of the step), AdamW trains
Δ, SGD or Adam trains θ, and one loss is minimised: CE + λ·min(1, t/warm-up)·E[L0], the second term once an optimizer
step.

Everything is materialised: a mask and a product of the weight's size in every forward, and G, dΔ, d(mask) in every
backward.

    lcdd = UnfusedLCDD(model, base, settings, logits=theta_0, noise=noise_of_step)
    loss = lcdd.step([batch, batch])                        # one optimizer step over micro-batches
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
IGNORED = -100
GROUPS = ("attn_read", "attn_q", "attn_k", "attn_v", "attn_write", "ffn_read", "ffn_hidden", "ffn_write")
# projection -> module path in a layer, group of its row gates, group of its column gates
PROJECTIONS = {
    "q": ("self_attn.q_proj", "attn_q", "attn_read"),
    "k": ("self_attn.k_proj", "attn_k", "attn_read"),
    "v": ("self_attn.v_proj", "attn_v", "attn_read"),
    "o": ("self_attn.o_proj", "attn_write", "attn_v"),
    "gate": ("mlp.gate_proj", "ffn_hidden", "ffn_read"),
    "up": ("mlp.up_proj", "ffn_hidden", "ffn_read"),
    "down": ("mlp.down_proj", "ffn_write", "ffn_hidden"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The run's settings, by the names of the method; `max_grad_norm` 0 is no clipping."""

    total_steps: int
    gate_kind: str = "hard_concrete"
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon_adam: float = 1e-8
    max_grad_norm: float = 1.0
    gate_optimizer: str = "adam"
    gate_lr: float = 0.1
    gate_momentum: float = 0.0
    lambda_init: float = 1e-3
    lambda_min: float = 1e-8
    lambda_max: float = 1e4
    dual_lr: float = 0.05
    dual_lr_shrink: float | None = None
    violation_clip: float = 1.0
    ema_beta: float = 0.95
    warmup_steps: int = 50
    loss_budget: float = 0.2
    loss_floor: float = 0.02
    freeze_fraction: float = 0.2
    penalty_every_micro_batch: bool = False  # as the authors' code has it; else once an optimizer step


class UnfusedGates:
    """θ for a whole model; a gate is computed from its logit whenever somebody asks for it."""

    def __init__(self, logits: Tensor, kind: str) -> None:
        self.logits = nn.Parameter(logits.detach().clone())
        self.kind = kind
        self.noise: Tensor | None = None  # u in (0, 1), [N]: the step's noise; None: evaluation gates

    def __call__(self, where: Tensor | slice) -> Tensor:
        """Gates at positions `where` of the flat vector, differentiable in θ."""
        theta = self.logits[where]
        if self.kind == "heaviside_ste":
            soft = torch.sigmoid(theta)
            return (theta > 0).to(theta.dtype) + (soft - soft.detach())
        if self.noise is None:
            stretched = torch.sigmoid(theta) * (ZETA - GAMMA) + GAMMA
        else:
            u = self.noise[where]
            stretched = torch.sigmoid((torch.log(u) - torch.log(1 - u) + theta) / BETA) * (ZETA - GAMMA) + GAMMA
        return stretched.clamp(0, 1)

    def expected_l0(self) -> Tensor:
        """The expected number of open gates, a scalar."""
        shift = BETA * math.log(-GAMMA / ZETA) if self.kind == "hard_concrete" else 0.0
        return torch.sigmoid(self.logits - shift).sum()


class DeltaMask(nn.Module):
    """The parametrization: Δ -> W_base + (r ⊗ c) ∘ Δ. rows, cols: positions of this weight's gates in the flat
    vector."""

    def __init__(self, base: Tensor, gates: UnfusedGates, rows: Tensor, cols: Tensor) -> None:
        super().__init__()
        self.base: Tensor
        self.register_buffer("base", base.detach().clone(), persistent=False)
        self.gates, self.rows, self.cols = gates, rows, cols

    def forward(self, delta: Tensor) -> Tensor:
        mask = self.gates(self.rows)[:, None] * self.gates(self.cols)[None, :]  # θ's dtype: float32 as the authors'
        return (self.base + mask * delta).to(delta.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight - self.base

    @staticmethod
    def compile_all(model: nn.Module, *, backend: str = "inductor") -> None:
        """Put every parametrization of a model under torch.compile; shapes that repeat are compiled once."""
        for module in model.modules():
            if isinstance(module, DeltaMask):
                module.compile(backend=backend, dynamic=False)


def gate_positions(model: nn.Module) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Module name -> positions (rows, columns) of its gates in the flat vector; and how many gates there are."""
    c: Any = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kv = c.num_key_value_heads * head_dim
    sizes = (c.hidden_size, c.num_attention_heads * head_dim, kv, kv, c.hidden_size, c.hidden_size)
    size_of = dict(zip(GROUPS, (*sizes, c.intermediate_size, c.hidden_size), strict=True))
    positions, n_gates = {}, 0
    for layer in range(c.num_hidden_layers):
        group = {}
        for name in GROUPS:
            group[name] = torch.arange(n_gates, n_gates + size_of[name])
            n_gates += size_of[name]
        for kind, (path, row_group, col_group) in PROJECTIONS.items():
            cols = group[col_group]
            if kind == "o":  # each KV head's value gates serve all its query heads
                heads = cols.view(c.num_key_value_heads, head_dim)
                cols = heads.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, dim=0).reshape(-1)
            positions[f"model.layers.{layer}.{path}"] = (group[row_group], cols)
    return positions, n_gates


def _labels(batch: Tensor | dict[str, Tensor]) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch["labels"]


class UnfusedLCDD:
    """A training run: `model` (fine-tuned weights; becomes parametrized in place) against `base`.

    logits: initial θ [N]. noise(t): the uniform noise [N] of step t (hard-concrete; 1-based).
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        settings: Settings,
        *,
        logits: Tensor,
        noise: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.model, self.settings, self.noise = model, settings, noise
        self.gates = UnfusedGates(logits, settings.gate_kind)
        positions, n_gates = gate_positions(model)
        if logits.shape != (n_gates,):
            raise ValueError(f"logits: expected shape ({n_gates},), got {tuple(logits.shape)}")
        for parameter, fixed in zip(model.parameters(), base.parameters(), strict=True):
            parameter.requires_grad_(False)
            if parameter.dim() == 1:  # norms and biases go back to the base
                parameter.data.copy_(fixed)
        self.deltas: list[Tensor] = []
        for name, (rows, cols) in positions.items():
            linear: Any = model.get_submodule(name)
            fixed_linear: Any = base.get_submodule(name)
            # positions on θ's device, or every access to a weight would wait for a copy of them
            mask = DeltaMask(fixed_linear.weight, self.gates, rows.to(logits.device), cols.to(logits.device))
            with torch.no_grad():
                parametrize.register_parametrization(linear, "weight", mask)
            delta = linear.parametrizations.weight.original
            self.deltas.append(delta.requires_grad_(True))
        s = settings
        self.delta_optimizer = torch.optim.AdamW(
            self.deltas, lr=s.learning_rate, betas=s.betas, eps=s.epsilon_adam, weight_decay=s.weight_decay
        )
        self.gate_optimizer: torch.optim.Optimizer = (
            torch.optim.Adam([self.gates.logits], lr=s.gate_lr)
            if s.gate_optimizer == "adam"
            else torch.optim.SGD([self.gates.logits], lr=s.gate_lr, momentum=s.gate_momentum)
        )
        self.completed = 0
        self.dual_lambda, self.average = s.lambda_init, 0.0
        self.loss_limit = math.inf
        self._choose_noise()

    def step(self, micro_batches: Sequence[Tensor | dict[str, Tensor]]) -> float:
        """One optimizer step. micro_batches: token tensors [B, S], each token predicted from those before it; or the
        model's arguments input_ids and attention_mask with labels [B, S], where -100 is not predicted.

        Returns the mean cross-entropy in nats over all predicted tokens of all micro-batches, before the step.
        """
        s, t = self.settings, self.completed + 1
        n_tokens = sum(int((_labels(batch)[:, 1:] != IGNORED).sum()) for batch in micro_batches)
        loss = 0.0
        for batch in micro_batches:
            inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
            logits = self.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1]
            labels = _labels(batch)[:, 1:]
            part = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            part = part / n_tokens
            part.backward()
            loss += part.item()
        frozen = self._frozen(t)
        if not frozen:
            penalty = self.dual_lambda * min(1.0, t / s.warmup_steps)
            for _ in micro_batches if s.penalty_every_micro_batch else micro_batches[:1]:
                (penalty * self.gates.expected_l0()).backward()
        if s.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.deltas, s.max_grad_norm)
        if not frozen:
            self.gate_optimizer.step()
            self._dual_step(loss, t)
        self.delta_optimizer.step()
        self.gate_optimizer.zero_grad()
        self.delta_optimizer.zero_grad()
        self.completed = t
        self._choose_noise()
        return loss

    def values(self) -> Tensor:
        """The gates in force, [N]."""
        with torch.no_grad():
            return self.gates(slice(None))

    def _dual_step(self, loss: float, t: int) -> None:
        s = self.settings
        self.average = s.ema_beta * self.average + (1 - s.ema_beta) * loss
        corrected = self.average / (1 - s.ema_beta**t)
        if t == s.warmup_steps:
            self.loss_limit = max(corrected * (1 + s.loss_budget), corrected + s.loss_floor)
        elif t > s.warmup_steps:
            violation = (corrected - self.loss_limit) / self.loss_limit
            violation = min(max(violation, -s.violation_clip), s.violation_clip)
            shrink = s.dual_lr if s.dual_lr_shrink is None else s.dual_lr_shrink
            rate = s.dual_lr if violation < 0 else shrink
            self.dual_lambda = min(max(self.dual_lambda * math.exp(-rate * violation), s.lambda_min), s.lambda_max)

    def _frozen(self, t: int) -> bool:
        return t > self.settings.total_steps * (1 - self.settings.freeze_fraction)

    def _choose_noise(self) -> None:
        """For the coming step: its noise, or none once the gates are frozen."""
        t = self.completed + 1
        sampled = self.settings.gate_kind == "hard_concrete" and not self._frozen(t)
        if sampled and self.noise is None:
            raise ValueError("noise: expected a function of the step for hard-concrete gates, got None")
        self.gates.noise = self.noise(t).to(self.gates.logits.dtype) if sampled and self.noise else None
