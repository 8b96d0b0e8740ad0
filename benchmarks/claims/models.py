"""Every model that is compared: the carrier, and the dense, low-rank and sparse deltas of its margin, norm or size."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from benchmarks.claims.cell import Cell, Values, log_of
from lcdd.carrier import Carrier, random_channels
from lcdd.commands.anchors import base_anchors
from lcdd.models import sites_of
from lcdd.optimizer import SFTOptimizer

SAME_LOSS = 0.1
"""Natural logarithm of a held-out loss over the carrier's, within which they count as the same."""
BALLS, HALVINGS, GLANCES = 5, 14, 100
FIXED_LOGIT = 20.0
LORA_RATE = 10.0
"""LoRA's learning rate over full fine-tuning's."""


# ---------------------------------------------------------------- margin


class _Reached(Exception):
    """The loss that training was to stop at."""


def scaled(cell: Cell) -> Carrier:
    """SFT's delta times the factor in (0, 1] at which its held-out loss is the carrier's, by bisection."""
    sft, target = cell.patch("sft"), cell.loss(cell.patch("carrier"))
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if cell.loss(sft.scaled(middle)) <= target else (middle, high)
    return sft.scaled(high)


def stopped(cell: Cell) -> Carrier:
    """SFT that ends at the first measured held-out loss that is no more than the carrier's."""
    return train_to(cell, cell.load_base(), cell.loss(cell.patch("carrier")))[1]


def train_to(cell: Cell, model: Any, target: float) -> tuple[int, Carrier]:
    """SFT of `model`, in place, until its held-out loss is at most `target`; steps taken, and the model as a patch."""
    settings = cell.sft_settings()
    every = max(1, settings.max_steps // GLANCES)
    settings = cell.sft_settings(eval_steps=every, lr_scheduler_type="constant")
    steps = settings.max_steps

    def look(loop: Any, loss: float) -> None:
        nonlocal steps
        if loss <= target:
            steps = loop.step
            raise _Reached

    try:
        cell.train(SFTOptimizer(model, settings), on_validation=(look,))
    except _Reached:
        model.eval()
    return steps, Carrier.from_models(cell.base, model)


def smallest(cell: Cell) -> Carrier:
    """Dense SFT in the smallest ball around the base in which its held-out loss is the carrier's: a secant search.

    The logarithm of the loss is taken to fall linearly in that of the radius, between the two radii next to the target.
    """
    carrier = cell.patch("carrier")
    target = log_of(cell.loss(carrier))
    start = cell.patch("matched_norm")
    tried = [(math.log(max(start.delta_norm(), 1e-9)), log_of(cell.loss(start)), start)]
    for _ in range(BALLS):
        radius = _next_radius([(r, loss) for r, loss, _ in tried], target)
        patch = cell.dense(max_delta_norm=math.exp(radius))
        tried.append((radius, log_of(cell.loss(patch)), patch))
        if abs(tried[-1][1] - target) < SAME_LOSS:
            break
    return min(tried, key=lambda found: abs(found[1] - target))[2]


def _next_radius(tried: Sequence[tuple[float, float]], target: float) -> float:
    """Logarithm of the next radius: between the two next to the target, or a factor of 1.5 beyond the last."""
    above = [(r, loss) for r, loss in tried if loss > target]
    below = [(r, loss) for r, loss in tried if loss <= target]
    if not above:
        return min(r for r, _ in below) - math.log(1.5)
    if not below:
        return max(r for r, _ in above) + math.log(1.5)
    (r1, loss1), (r2, loss2) = max(above), min(below)
    share = (loss1 - target) / (loss1 - loss2)
    return r1 + (r2 - r1) * min(0.8, max(0.2, share))


def within_norm(cell: Cell) -> Carrier:
    """Dense SFT in a ball of the carrier's norm."""
    return cell.dense(max_delta_norm=cell.patch("carrier").delta_norm())


def with_term(cell: Cell) -> Carrier:
    """Dense SFT that holds on to the base's answers as LCDD may."""
    settings = cell.lcdd_settings(base_kl_weight=cell.settings.lcdd.base_kl_weight or 1.0)
    anchors = base_anchors(cell.base, cell.tokenizer, cell.anchor_prompts(settings), settings)
    model = cell.load_base()
    cell.train(SFTOptimizer(model, cell.sft_settings()), anchors=anchors)
    return Carrier.from_models(cell.base, model)


# ---------------------------------------------------------------- structure


def low_rank(cell: Cell) -> Carrier:
    """LoRA of rank 1 on every masked matrix, at ten times the learning rate."""
    model = cell.load_base()
    names = [site.matrix.parameter.removesuffix(".weight") for site in sites_of(model)]
    torch.manual_seed(cell.seed)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=names)
    adapted = inject_adapter_in_model(config, model)
    weights = [p for name, p in adapted.named_parameters() if ".lora_" in name]
    settings = cell.sft_settings(learning_rate=LORA_RATE * cell.settings.sft.learning_rate)
    cell.train(SFTOptimizer(adapted, settings, weights=weights))
    plain = cell.load_base()
    with torch.no_grad():
        for name in names:
            plain.get_parameter(f"{name}.weight").add_(adapted.get_submodule(name).get_delta_weight("default"))
    return Carrier.from_models(cell.base, plain)


def fixed_gates(cell: Cell, chosen: Tensor) -> Carrier:
    """LCDD on the gates of bool [n_gates], as many as the carrier's, which stay as they are."""
    settings = cell.lcdd_settings(gate_controller="paced", target_sparsity=cell.patch("carrier").sparsity()["overall"])
    return cell.lcdd(settings, initial_logits=(chosen.float() * 2 - 1) * FIXED_LOGIT)


def gates_within(cell: Cell, part: Callable[[int, str, int], bool]) -> Carrier:
    """`fixed_gates`, drawn at random from the groups that `part` takes of (layer, group, layers)."""
    carrier = cell.patch("carrier")
    layout = carrier.layout
    taken = [part(layer, name, layout.n_layers) for layer, name, _ in layout.groups]
    places = torch.tensor(taken).repeat_interleave(layout.offsets.diff()).nonzero().flatten()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(cell.seed))
    chosen = torch.zeros(layout.n_gates, dtype=torch.bool)
    chosen[places[order[: carrier.n_open]]] = True
    return fixed_gates(cell, chosen)


def entries(cell: Cell, *, largest: bool) -> Carrier:
    """SFT's delta on as many entries as the carrier's: its largest, or random ones over their share (DARE)."""
    sft, density = cell.patch("sft"), cell.patch("carrier").entry_density()
    names = [matrix.name for matrix in sft.layout.matrices]  # a patch that was loaded has its deltas in another order
    sizes = torch.cat([sft.deltas[name].flatten().abs() for name in names])
    if not largest:
        sizes = torch.rand(sizes.shape, generator=torch.Generator().manual_seed(cell.seed))
    least = sizes.topk(max(1, round(density * sizes.numel()))).values[-1]
    kept = (sizes >= least).split([sft.deltas[name].numel() for name in names])
    plain, rescale = cell.load_base(), 1.0 if largest else 1 / density
    with torch.no_grad():
        for site, mask in zip(sites_of(plain), kept, strict=True):
            delta = sft.deltas[site.name]
            site.weight.add_((delta * mask.view_as(delta) * rescale).to(site.weight.dtype))
    return Carrier.from_models(cell.base, plain)


WHERE: dict[str, Callable[[int, str, int], bool]] = {
    "early": lambda layer, _, layers: 2 * layer < layers,
    "late": lambda layer, _, layers: 2 * layer >= layers,
    "attention": lambda _, group, __: group.startswith("attn"),
    "mlp": lambda _, group, __: group.startswith("ffn"),
}
"""Where open gates may sit: halves of the layers, kinds of blocks."""


# ---------------------------------------------------------------- all of them


MODELS: dict[str, Callable[[Cell], Carrier]] = {
    "sft": lambda cell: cell.dense(),
    "carrier": lambda cell: cell.lcdd(cell.lcdd_settings()),
    "matched_norm": within_norm,
    "sft_scaled": scaled,
    "smallest": smallest,
    "dense_alike": lambda cell: cell.lcdd(cell.lcdd_settings(target_sparsity=0.0)),
    "sft_stopped": stopped,
    "dense_with_term": with_term,
    "other_term": lambda cell: cell.lcdd(
        cell.lcdd_settings(base_kl_weight=0.0 if cell.settings.lcdd.base_kl_weight else 1.0)
    ),
    "lora_1": low_rank,
    "random_gates": lambda cell: fixed_gates(cell, random_channels(cell.patch("carrier"), seed=cell.seed)),
    "dare": lambda cell: entries(cell, largest=False),
    "largest_entries": lambda cell: entries(cell, largest=True),
    "carrier_90": lambda cell: cell.lcdd(cell.lcdd_settings(target_sparsity=0.9)),
    "carrier_80": lambda cell: cell.lcdd(cell.lcdd_settings(target_sparsity=0.8)),
    "carrier_50": lambda cell: cell.lcdd(cell.lcdd_settings(target_sparsity=0.5)),
    **{name: partial(gates_within, part=part) for name, part in WHERE.items()},
}
"""name -> how its patch is made, of other ones where it needs them."""


def state_names(cell: Cell, model: str) -> list[str]:
    """A model's names in the claims: the carrier and its twin also go by whether they hold on to the base's answers."""
    holds = bool(cell.settings.lcdd.base_kl_weight) == (model == "carrier")
    twin = ["carrier_with_term" if holds else "carrier_without_term"]
    return ([] if model == "other_term" else [model]) + (twin if model in ("carrier", "other_term") else [])


def compared(cell: Cell, name: str) -> Values:
    """A model, made and read: as it is, behind a trigger that is learned on it, and behind the base's prefix."""
    patch = cell.patch(name)
    own = {**cell.read(patch), **described(cell, patch)}
    states = {"": own, "+trigger": cell.read(patch, cell.trigger(name)), "+prefix": cell.read_behind_prefix(patch)}
    return {f"{alias}{suffix}": found for alias in state_names(cell, name) for suffix, found in states.items()}


def described(cell: Cell, patch: Carrier) -> dict[str, float]:
    """Size and margin of a patch, and how far they are from the carrier's."""
    carrier = cell.patch("carrier")
    loss, norm = log_of(cell.loss(patch)), log_of(patch.delta_norm())
    return {
        "gate_sparsity": patch.sparsity()["overall"],
        "entry_sparsity": 1 - nonzero(patch) / sum(math.prod(matrix.shape) for matrix in patch.layout.matrices),
        "log_norm": norm,
        "log_loss": loss,
        "norm_gap": norm - log_of(carrier.delta_norm()),
        "loss_gap": loss - log_of(cell.loss(carrier)),
    }


def nonzero(patch: Carrier) -> int:
    """Entries of the weights that a patch changes."""
    found: list[Tensor] = [delta.count_nonzero() for delta in patch.deltas.values()]
    return int(torch.stack(found).sum())
