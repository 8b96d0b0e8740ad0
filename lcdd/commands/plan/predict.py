"""Step time and peak memory by formula.

Three ways to train the same weights, side by side: plain fine-tuning (no gates: the floor), the unfused parametrization
as it is published (masks and W_eff formed in every forward, by autograd), and lcdd. Every figure is a prediction from
the formulas of `lcdd.models.costs`, from data sheets and from what `devices` assumes, and is labelled so.
Left out: the allocator's fragmentation and the CUDA context, padding masks, Adam's state of θ, data.

    plan = predict(PlanConfig(model_name_or_path="llama-3-8b", max_length=4096, per_device_train_batch_size=1))
    plan.memory["lcdd"].peak          bytes on each GPU
    plan.seconds["lcdd"]              what a step's time is made of
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lcdd.commands.plan.architectures import read_architecture
from lcdd.commands.plan.cluster import Work, gradient_entries, link_of, told, traffic_of, waiting
from lcdd.commands.plan.devices import (
    BANDWIDTH_EFFICIENCY,
    LAUNCH_SECONDS,
    LAYER_LAUNCHES,
    MASK_LAUNCHES,
    MATRIX_EFFICIENCY,
    USABLE,
    Device,
    find_device,
    measured_cpu,
)
from lcdd.config import PlanConfig
from lcdd.models import Architecture, Layer, Masked, Parametrization, costs
from lcdd_kernels import PackCrossover, default_crossover, pack_layout
from lcdd_kernels.functional.linear_loss import default_chunk
from lcdd_kernels.functional.packed_grad import pack_cost

PROVIDERS = ("plain", "unfused", "lcdd")

# ---------------------------------------------------------------- packed gradients


def sharded(config: PlanConfig) -> bool:
    """Whether each GPU holds a share of weights and state."""
    return config.num_gpus > 1 and config.parallel == "fsdp2"


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Over the dense ones, all masked weights together: work of the weight gradients, and their bytes."""

    work: float
    size: float
    layouts: dict[str, str]


def packing(model: Architecture, config: PlanConfig, *, cuda: bool) -> Packing:
    """Which weights' gradients are packed at this density, by the rule that training uses (`pack_layout`).

    Sharded gradients (FSDP2), and those of weights that no nn.Linear holds, stay dense.
    """
    crossover = default_crossover("cuda" if cuda else "cpu", getattr(torch, config.dtype))
    packs = config.pack == "auto" and not sharded(config)
    work = size = 0.0
    layouts = {}
    for weight, count in model.weights.items():
        layout, cost, held = _packed(weight, config, crossover) if packs and weight.linear else ("dense", 1.0, 1.0)
        layouts[weight.kind] = layout
        work, size = work + cost * count * weight.active, size + held * count * weight.parameters
    return Packing(work=work / model.active_parameters, size=size / model.masked_parameters, layouts=layouts)


def _packed(weight: Masked, config: PlanConfig, crossover: PackCrossover) -> tuple[str, float, float]:
    """(layout, work, bytes) of one weight's gradient, over the dense one's."""
    sizes: dict[str, Any] = {"out_features": weight.rows, "in_features": weight.cols}
    open_: dict[str, Any] = {
        "n_rows": round(config.density * weight.rows),
        "n_cols": round(config.density * weight.cols),
    }
    layout = pack_layout(gate_kind=config.gate_kind, crossover=crossover, **sizes, **open_)
    if layout == "dense":
        return layout, 1.0, 1.0
    costs_of = [pack_cost(layout, gather=gather, **sizes, **open_) for gather in (crossover.gather, 0.0)]
    return layout, costs_of[0], costs_of[1]


# ---------------------------------------------------------------- memory


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a GPU holds at the step's fullest moment, by part, bytes."""

    moment: str
    parts: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything the formulas need, worked out from a `PlanConfig` once. e, d, m: bytes of a weight, Δ, moment."""

    model: Architecture
    config: PlanConfig
    device: Device
    packing: Packing
    parametrization: Parametrization

    @classmethod
    def of(
        cls, model: Architecture, config: PlanConfig, device: Device, parametrization: Parametrization | None = None
    ) -> "Case":
        """parametrization: what the unfused form costs; None: as published."""
        return cls(
            model=model,
            config=config,
            device=device,
            packing=packing(model, config, cuda=config.device != "cpu"),
            parametrization=parametrization or Parametrization.as_published(getattr(torch, config.dtype).itemsize),
        )

    @property
    def e(self) -> int:
        return getattr(torch, self.config.dtype).itemsize

    @property
    def d(self) -> int:
        return getattr(torch, self.config.delta_dtype or self.config.dtype).itemsize

    @property
    def m(self) -> int:
        return getattr(torch, self.config.moment_dtype).itemsize

    @property
    def shards(self) -> int:
        """GPUs that share weights and state."""
        return self.config.num_gpus if sharded(self.config) else 1

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one GPU."""
        return self.config.per_device_train_batch_size * self.config.max_length

    @property
    def masked(self) -> int:
        return self.model.masked_parameters

    @property
    def chunk_rows(self) -> int | None:
        """Rows of logits at a time, as `linear_cross_entropy` chooses them; None: all."""
        if self.config.logits == "whole":
            return None
        memory = None if self.config.device == "cpu" else int(self.device.memory * 2**30)
        return default_chunk(self.model.vocab_size, self.model.width, memory)

    def activations(self, *, checkpointing: bool) -> int:
        sequence = self.config.max_length
        return costs.stack_activations(self.model, self.tokens, sequence, item=self.e, checkpointing=checkpointing)

    def layer_activations(self, layer: Layer) -> int:
        return costs.layer_activations(layer, self.tokens, item=self.e)

    def gradients(self, provider: str) -> float:
        """Bytes of all weight gradients on a GPU."""
        share = self.packing.size if provider == "lcdd" else 1.0
        return share * self.masked * self.e / self.shards

    def buckets(self, provider: str) -> float:
        """Bytes of the copies in which gradients travel where every GPU has all of them."""
        if self.config.num_gpus == 1 or self.shards > 1:
            return 0.0
        return self.e * gradient_entries(self.model, self.config, packed=provider == "lcdd")


def memory_of(case: Case, provider: str) -> Memory:
    """The fullest of four moments: the loss, the first and the last layer of the backward, the optimizer's step."""
    model, c, e = case.model, case.config, case.e
    held = _state(case, provider)
    masks = case.parametrization.held if provider == "unfused" else 0
    buffers = e if provider != "unfused" else case.parametrization.buffers
    again = c.gradient_accumulation_steps > 1  # then the fullest micro-batch starts with all gradients there
    grads = case.gradients(provider)
    layer, deepest = model.largest_layer, max(model.kinds, key=lambda kind: case.layer_activations(kind))
    layer_saved = case.layer_activations(deepest)
    saved = case.activations(checkpointing=c.gradient_checkpointing)
    recomputed = layer_saved if c.gradient_checkpointing else 0
    one_layer = recomputed or layer_saved
    working = costs.layer_backward_buffers(deepest, case.tokens, item=e)
    working += buffers * model.largest_weight if again or provider == "unfused" else 0
    all_masks = masks * (layer if c.gradient_checkpointing else case.masked)
    if c.gradient_checkpointing:
        at_loss, at_backward = 0, all_masks
    else:
        at_loss = at_backward = all_masks
    loss = costs.loss_bytes(model, case.tokens, item=e, chunk_rows=case.chunk_rows)
    loss += costs.final_norm_activations(model, case.tokens, item=e)
    loss += e * model.vocab_size * model.width if case.shards > 1 else 0  # the head, gathered
    before = grads if again else 0.0
    moments = {
        "the loss": {"gradients": before, "masks": at_loss, "activations": saved, "loss": loss},
        "the last layer's backward": {
            "gradients": before, "masks": at_backward, "activations": saved + recomputed, "working": working,
        },
        "the first layer's backward": {
            "gradients": grads, "buckets": case.buckets(provider), "masks": masks * layer, "activations": one_layer,
            "working": working,
        },
        "the optimizer's step": {"gradients": grads},
    }  # fmt: skip
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    return Memory(moment=name, parts={k: float(v) for k, v in (held | moments[name]).items() if v})


def _state(case: Case, provider: str) -> dict[str, float]:
    """What a GPU holds between steps, and what FSDP2 has gathered on it within one, bytes."""
    model, e, gpus = case.model, case.e, case.shards
    held: dict[str, float] = {"weights": model.parameters * e / gpus}
    if provider == "lcdd":
        held["base"], held["delta"] = held["weights"], case.masked * case.d / gpus
    if provider == "unfused":  # its base is a buffer, and FSDP2 shards parameters alone
        held["base"] = case.masked * e
    held["moments"] = 2 * case.masked * case.m / gpus
    if gpus > 1:  # two layers' weights and a layer's gradients whole
        held["gathered by FSDP2"] = e * 3 * model.largest_layer
    return held


# ---------------------------------------------------------------- time


def seconds_of(case: Case, provider: str) -> dict[str, float]:
    """What one optimizer step's time is made of, all its micro-batches together, seconds."""
    model, c, e, n = case.model, case.config, case.e, case.masked
    device, micro = case.device, c.gradient_accumulation_steps
    rate, bandwidth = device.rate(c.dtype), device.bytes_per_second()
    share = case.packing.work if provider == "lcdd" else 1.0
    size = case.packing.size if provider == "lcdd" else 1.0
    flops = costs.step_flops(model, case.tokens, sequence=c.max_length, weight_grads=share)
    saved = case.activations(checkpointing=False)
    logits = case.tokens * model.vocab_size * (4 * e + (7 * costs.FLOAT32 if c.logits == "whole" else 0))

    def phase(products: float, moved: float) -> float:
        """Products, no faster than the weights can be read, then what is not a product."""
        return micro * (max(products / rate, n * e / bandwidth) + moved / bandwidth)

    # A saved byte is written and read once in the forward; in the backward it is read, and its gradient written and
    # read.
    parts = {"forward": phase(flops.forward, 2 * saved + logits)}
    if c.gradient_checkpointing:
        head = costs.head_flops(model, case.tokens)
        parts["forward again (checkpointing)"] = phase(flops.forward - head, 2 * saved)
    parts["backward dX"] = phase(flops.input_grads, 3 * saved)
    added = (micro - 1) * 3 * e * n * size / bandwidth
    parts["backward dW"] = micro * flops.weight_grads / rate + added
    masks, passes = [0.0, 0.0], 2 if c.gradient_checkpointing else 1
    if provider == "unfused":
        formed = (passes * case.parametrization.forward, case.parametrization.backward)
        masks = [micro * n * part / bandwidth for part in formed]
        parts["masks in every forward and backward"] = sum(masks)
    again = parts.get("forward again (checkpointing)", 0.0)
    weights = sum(len(layer.masked) for layer in model.layers) if provider == "unfused" else 0
    operations = [len(model.layers) * base + weights * mask
                  for base, mask in zip(LAYER_LAUNCHES, MASK_LAUNCHES, strict=True)]  # fmt: skip
    starts = [micro * LAUNCH_SECONDS * count for count in (passes * operations[0], operations[1])]
    busy = [parts["forward"] + again + masks[0], parts["backward dX"] + parts["backward dW"] + masks[1]]
    parts["waiting for launches"] = sum(max(0.0, start - work) for start, work in zip(starts, busy, strict=True))
    if c.num_gpus > 1:
        traffic = traffic_of(model, c, packed=provider == "lcdd")
        parts["communication not hidden"] = waiting(traffic, link_of(c, device), _work(parts), c)
    local = n // case.shards
    if provider == "lcdd":
        parts["pass A / norm and clip"] = costs.grad_stats_bytes(local, grad=e, delta=case.d, share=size) / bandwidth
        moved = costs.adamw_bytes(local, weight=e, delta=case.d, moment=case.m, grad=e, share=size)
    else:
        parts["pass A / norm and clip"] = costs.clip_bytes(local, grad=e) / bandwidth
        moved = costs.plain_adamw_bytes(local, weight=e, moment=case.m, grad=e)
    parts["pass B / AdamW"] = moved / bandwidth
    return parts


def _work(parts: Mapping[str, float]) -> Work:
    """What ranks talk behind, of a step's parts that are there before they talk."""
    return Work(forward=parts["forward"], backward=sum(parts.values()) - parts["forward"])


def eraser_seconds(case: Case) -> dict[str, float]:
    """One step of SFT-Eraser: forward and dX, frozen weights. One prompt at a time with whole logits, or a batch."""
    model, c, e, device = case.model, case.config, case.e, case.device
    rate, bandwidth, length = device.rate(c.dtype), device.bytes_per_second(), c.eraser_length

    def step(prompts: int, *, whole_logits: bool) -> float:
        tokens = prompts * length
        flops = costs.step_flops(model, tokens, sequence=length)
        saved = costs.stack_activations(model, tokens, length, item=e, checkpointing=False)
        reads = (case.masked + model.vocab_size * model.width) * e
        less = 0.0 if whole_logits else costs.head_flops(model, tokens)
        starts = [len(model.layers) * LAUNCH_SECONDS * count for count in LAYER_LAUNCHES]
        work = (
            max((part - less) / rate, reads / bandwidth) + moved / bandwidth
            for part, moved in ((flops.forward, 2 * saved), (flops.input_grads, 3 * saved))
        )
        return sum(map(max, starts, work))

    one_at_a_time = c.eraser_batch_size * step(1, whole_logits=True)
    return {"prompts one at a time": one_at_a_time, "lcdd": step(c.eraser_batch_size, whole_logits=False)}


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predictions. memory and seconds by provider; `alternatives`: bytes of each choice, taken or not."""

    config: PlanConfig
    device: Device
    case: Case
    memory: dict[str, Memory]
    seconds: dict[str, dict[str, float]]
    eraser: dict[str, float]
    alternatives: dict[str, float]

    def ratio(self, provider: str) -> float:
        """Step time over plain fine-tuning's."""
        return sum(self.seconds[provider].values()) / sum(self.seconds["plain"].values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values: bytes and seconds."""
        return {
            "note": "predictions by formula, not measurements",
            "config": self.config.to_dict(),
            "device": asdict(self.device)
            | {"matrix_efficiency": MATRIX_EFFICIENCY, "bandwidth_efficiency": BANDWIDTH_EFFICIENCY}
            | {"launch_seconds": LAUNCH_SECONDS, "usable": USABLE},
            "parameters": self.case.model.parameters,
            "masked_parameters": self.case.masked,
            "packing": asdict(self.case.packing),
            "memory": {k: {"moment": v.moment, "peak": v.peak, "parts": v.parts} for k, v in self.memory.items()},
            "alternatives": self.alternatives,
            "activation_terms": [
                costs.layer_activation_terms(kind, self.case.tokens, item=self.case.e) | {"layers": count}
                for kind, count in self.case.model.kinds.items()
            ],
            "seconds": {k: v | {"total": sum(v.values()), "ratio": self.ratio(k)} for k, v in self.seconds.items()},
            "eraser_seconds": self.eraser,
        } | ({"wire": told(self.case.model, self.config, self.device)} if self.config.num_gpus > 1 else {})


def predict(
    config: PlanConfig, *, model: Architecture | None = None, parametrization: Parametrization | None = None
) -> Plan:
    """The plan of a configuration.

    model: instead of the one that the configuration names. parametrization: what the unfused form costs, instead of the
    published one.
    """
    model = model or read_architecture(config.model_name_or_path or "")
    device = planned_device(config)
    case = Case.of(model, config, device, parametrization)
    e, tokens = case.e, case.tokens
    chunked = replace(case, config=replace(config, logits="chunked")).chunk_rows
    return Plan(
        config=config,
        device=device,
        case=case,
        memory={provider: memory_of(case, provider) for provider in PROVIDERS},
        seconds={provider: seconds_of(case, provider) for provider in PROVIDERS},
        eraser=eraser_seconds(case),
        alternatives={
            "gradients, dense": case.gradients("plain"),
            "gradients, as packed here": case.gradients("lcdd"),
            "activations, kept": float(case.activations(checkpointing=False)),
            "activations, checkpointed": float(case.activations(checkpointing=True)),
            "loss, whole logits": float(costs.loss_bytes(model, tokens, item=e, chunk_rows=None)),
            "loss, chunked": float(costs.loss_bytes(model, tokens, item=e, chunk_rows=chunked)),
        },
    )


def planned_device(config: PlanConfig) -> Device:
    """The device that a configuration names, with the rates that it gives.

    Raises:
        InputError: no data sheet of it is known.
    """
    device = measured_cpu(config.dtype) if config.device == "cpu" else find_device(config.device)
    if config.bandwidth is None and config.flops is None:
        return device
    return replace(
        device,
        bandwidth=config.bandwidth or device.bytes_per_second() / 1e9,
        tflops={config.dtype: config.flops or device.rate(config.dtype) / 1e12},
        source="given",
    )
