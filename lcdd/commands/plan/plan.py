"""`lcdd plan`: step time and peak memory by formula, before anything is bought or run.

Three ways to train the same weights, side by side: plain fine-tuning (no gates: the floor), the unfused parametrization
as it is published (masks and W_eff formed in every forward, by autograd), and lcdd. Every figure is a prediction from
the formulas of `lcdd.costs`, from data sheets and from what `lcdd.devices` assumes, and is labelled so.
Left out: the allocator's fragmentation and the CUDA context, padding masks, Adam's state of θ, data.

    plan = predict(PlanConfig(model_name_or_path="llama-3-8b", max_length=4096, per_device_train_batch_size=1))
    plan.memory["lcdd"].peak          bytes on each GPU
    plan.seconds["lcdd"]              what a step's time is made of
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lcdd.commands.plan.devices import (
    BANDWIDTH_EFFICIENCY,
    DEVICES,
    LAUNCH_SECONDS,
    LAYER_LAUNCHES,
    MASK_LAUNCHES,
    MATRIX_EFFICIENCY,
    Device,
    measured_cpu,
)
from lcdd.commands.plan.tables import render
from lcdd.config import PLAN_MODELS, PlanConfig
from lcdd.models import Architecture, ModelShape, Parametrization, costs, load_settings, shape_of, skeleton
from lcdd_kernels import default_crossover, pack_layout
from lcdd_kernels.functional.linear_loss import default_chunk
from lcdd_kernels.functional.packed_grad import pack_cost

PROVIDERS = ("plain", "unfused", "lcdd")
# ---------------------------------------------------------------- what is planned for


def _sizes(layers: int, width: int, heads: int, kv_heads: int, ff: int, vocab: int) -> ModelShape:
    return ModelShape(
        n_layers=layers, d_model=width, n_heads=heads, n_kv_heads=kv_heads, head_dim=128, d_ff=ff, vocab_size=vocab
    )  # fmt: skip


MODELS = {
    "qwen3-0.6b": Architecture(shape=_sizes(28, 1024, 16, 8, 3072, 151936), tied=True, qk_norm=True),
    "llama-3-8b": Architecture(shape=_sizes(32, 4096, 32, 8, 14336, 128256), tied=False),
    "mistral-7b": Architecture(shape=_sizes(32, 4096, 32, 8, 14336, 32768), tied=False),
    "vicuna-7b": Architecture(shape=_sizes(32, 4096, 32, 32, 11008, 32000), tied=False),
    "llama-3-70b": Architecture(shape=_sizes(80, 8192, 64, 8, 28672, 128256), tied=False),
}
assert tuple(MODELS) == PLAN_MODELS


def read_architecture(name: str) -> Architecture:
    """A named model's, or that of the checkpoint in a directory."""
    if name in MODELS:
        return MODELS[name]
    return Architecture.from_settings(shape_of(skeleton(name).config), load_settings(name))


# ---------------------------------------------------------------- packed gradients


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Over the dense ones, all masked weights together: work of the weight gradients, and their bytes."""

    work: float
    size: float
    layouts: dict[str, str]


def packing(shape: ModelShape, config: PlanConfig, *, cuda: bool) -> Packing:
    """Which projections are packed at this density, by the rule that training uses (`pack_layout`).

    Sharded gradients (FSDP2) stay dense.
    """
    crossover = default_crossover("cuda" if cuda else "cpu", getattr(torch, config.dtype))
    work = size = 0.0
    layouts = {}
    for kind in costs.PROJECTION_KINDS:
        out, columns = costs.weight_shape(shape, kind)
        sizes: dict[str, Any] = {"out_features": out, "in_features": columns}
        open_: dict[str, Any] = {"n_rows": round(config.density * out), "n_cols": round(config.density * columns)}
        layout = "dense"
        if config.pack == "auto" and config.num_gpus == 1:
            layout = pack_layout(gate_kind=config.gate_kind, crossover=crossover, **sizes, **open_)
        layouts[kind] = layout
        if layout == "dense":
            cost = held = 1.0
        else:
            cost = pack_cost(layout, gather=crossover.gather, **sizes, **open_)
            held = pack_cost(layout, gather=0.0, **sizes, **open_)
        work, size = work + cost * out * columns, size + held * out * columns
    whole = costs.layer_parameters(shape)
    return Packing(work=work / whole, size=size / whole, layouts=layouts)


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
    packing: Packing
    parametrization: Parametrization

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
    def tokens(self) -> int:
        """Of a micro-batch on one GPU."""
        return self.config.per_device_train_batch_size * self.config.max_length

    @property
    def masked(self) -> int:
        return costs.masked_parameters(self.model.shape)

    @property
    def chunk_rows(self) -> int | None:
        """Rows of logits at a time, as `linear_cross_entropy` chooses them; None: all."""
        if self.config.logits == "whole":
            return None
        shape, device = self.model.shape, self.config.device
        memory = None if device == "cpu" else int(DEVICES[device].memory * 1e9)
        return default_chunk(shape.vocab_size, shape.d_model, memory)

    def activations(self, *, checkpointing: bool) -> int:
        sequence = self.config.max_length
        return costs.stack_activations(self.model, self.tokens, sequence, item=self.e, checkpointing=checkpointing)

    def gradients(self, provider: str) -> float:
        """Bytes of all weight gradients on a GPU."""
        share = self.packing.size if provider == "lcdd" else 1.0
        return share * self.masked * self.e / self.config.num_gpus


def memory_of(case: Case, provider: str) -> Memory:
    """The fullest of four moments: the loss, the first and the last layer of the backward, the optimizer's step."""
    s, c, e, gpus = case.model.shape, case.config, case.e, case.config.num_gpus
    held: dict[str, float] = {"weights": costs.total_parameters(case.model) * e / gpus}
    if provider == "lcdd":
        held["base"], held["delta"] = held["weights"], case.masked * case.d / gpus
    if provider == "unfused":  # its base is a buffer, and FSDP2 shards parameters alone
        held["base"] = case.masked * e
    held["moments"] = 2 * case.masked * case.m / gpus
    layer = costs.layer_parameters(s)
    if gpus > 1:  # two layers' weights and a layer's gradients whole, and the ends, which stay gathered
        ends = costs.total_parameters(case.model) - case.masked
        held["gathered by FSDP2"] = e * (3 * layer + ends)
    masks = case.parametrization.held if provider == "unfused" else 0
    buffers = e if provider != "unfused" else case.parametrization.buffers
    again = c.gradient_accumulation_steps > 1  # then the fullest micro-batch starts with all gradients there
    grads = case.gradients(provider)
    layer_saved = costs.layer_activations(case.model, case.tokens, item=e)
    saved = case.activations(checkpointing=c.gradient_checkpointing)
    recomputed = layer_saved if c.gradient_checkpointing else 0
    one_layer = recomputed or layer_saved
    working = costs.layer_backward_buffers(case.model, case.tokens, item=e)
    working += buffers * costs.largest_matrix(s) if again or provider == "unfused" else 0
    all_masks = masks * (layer if c.gradient_checkpointing else case.masked)
    if c.gradient_checkpointing:
        at_loss, at_backward = 0, all_masks
    else:
        at_loss = at_backward = all_masks
    loss = costs.loss_bytes(s, case.tokens, item=e, chunk_rows=case.chunk_rows)
    loss += costs.final_norm_activations(s, case.tokens, item=e)
    before = grads if again else 0.0
    moments = {
        "the loss": {"gradients": before, "masks": at_loss, "activations": saved, "loss": loss},
        "the last layer's backward": {
            "gradients": before, "masks": at_backward, "activations": saved + recomputed, "working": working,
        },
        "the first layer's backward": {
            "gradients": grads, "masks": masks * layer, "activations": one_layer, "working": working,
        },
        "the optimizer's step": {"gradients": grads},
    }  # fmt: skip
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    return Memory(moment=name, parts={k: float(v) for k, v in (held | moments[name]).items() if v})


# ---------------------------------------------------------------- time


def seconds_of(case: Case, provider: str, device: Device) -> dict[str, float]:
    """What one optimizer step's time is made of, all its micro-batches together, seconds."""
    s, c, e, n = case.model.shape, case.config, case.e, case.masked
    rate, bandwidth, micro = device.rate(c.dtype), device.bytes_per_second(), c.gradient_accumulation_steps
    share = case.packing.work if provider == "lcdd" else 1.0
    size = case.packing.size if provider == "lcdd" else 1.0
    flops = costs.step_flops_by_part(s, case.tokens, sequence=c.max_length, weight_grads=share)
    saved = case.activations(checkpointing=False)
    logits = case.tokens * s.vocab_size * (4 * e + (7 * costs.FLOAT32 if c.logits == "whole" else 0))

    def phase(operations: float, moved: float) -> float:
        """Products, no faster than the weights can be read, then what is not a product."""
        return micro * (max(operations / rate, n * e / bandwidth) + moved / bandwidth)

    # A saved byte is written and read once in the forward; in the backward it is read, and its gradient written and
    # read.
    parts = {"forward": phase(flops.forward, 2 * saved + logits)}
    if c.gradient_checkpointing:
        parts["forward again (checkpointing)"] = phase(
            flops.forward - 2.0 * s.vocab_size * s.d_model * case.tokens, 2 * saved
        )
    parts["backward dX"] = phase(flops.input_grads, 3 * saved)
    added = (micro - 1) * 3 * e * n * size / bandwidth
    parts["backward dW"] = micro * flops.weight_grads / rate + added
    masks, passes = [0.0, 0.0], 2 if c.gradient_checkpointing else 1
    if provider == "unfused":
        formed = (passes * case.parametrization.forward, case.parametrization.backward)
        masks = [micro * n * part / bandwidth for part in formed]
        parts["masks in every forward and backward"] = sum(masks)
    again = parts.get("forward again (checkpointing)", 0.0)
    per_layer = [base + len(costs.PROJECTION_KINDS) * mask * (provider == "unfused")
                 for base, mask in zip(LAYER_LAUNCHES, MASK_LAUNCHES, strict=True)]  # fmt: skip
    starts = [micro * s.n_layers * LAUNCH_SECONDS * count for count in (passes * per_layer[0], per_layer[1])]
    busy = [parts["forward"] + again + masks[0], parts["backward dX"] + parts["backward dW"] + masks[1]]
    parts["waiting for launches"] = sum(max(0.0, start - work) for start, work in zip(starts, busy, strict=True))
    if c.num_gpus > 1:
        sent = costs.collective_bytes(n, item=e, gpus=c.num_gpus)
        exposed = micro * (2 + 1) * sent / (device.link * 1e9) - sum(parts.values())
        parts["communication not hidden"] = max(0.0, exposed)
    local = n // c.num_gpus
    if provider == "lcdd":
        parts["pass A / norm and clip"] = costs.grad_stats_bytes(local, grad=e, delta=case.d, share=size) / bandwidth
        moved = costs.adamw_bytes(local, weight=e, delta=case.d, moment=case.m, grad=e, share=size)
    else:
        parts["pass A / norm and clip"] = costs.clip_bytes(local, grad=e) / bandwidth
        moved = costs.plain_adamw_bytes(local, weight=e, moment=case.m, grad=e)
    parts["pass B / AdamW"] = moved / bandwidth
    return parts


def eraser_seconds(case: Case, device: Device) -> dict[str, float]:
    """One step of SFT-Eraser: forward and dX, frozen weights. One prompt at a time with whole logits, or a batch."""
    s, c, e = case.model.shape, case.config, case.e
    rate, bandwidth = device.rate(c.dtype), device.bytes_per_second()

    def step(prompts: int, *, whole_logits: bool) -> float:
        tokens = prompts * c.eraser_length
        flops = costs.step_flops_by_part(s, tokens, sequence=c.eraser_length)
        head = 2.0 * s.vocab_size * s.d_model * tokens
        saved = s.n_layers * costs.layer_activations(case.model, tokens, item=e)
        reads = (case.masked + s.vocab_size * s.d_model) * e
        less = 0.0 if whole_logits else head
        starts = [s.n_layers * LAUNCH_SECONDS * count for count in LAYER_LAUNCHES]
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
            | {"launch_seconds": LAUNCH_SECONDS},
            "parameters": costs.total_parameters(self.case.model),
            "masked_parameters": self.case.masked,
            "packing": asdict(self.case.packing),
            "memory": {k: {"moment": v.moment, "peak": v.peak, "parts": v.parts} for k, v in self.memory.items()},
            "alternatives": self.alternatives,
            "activation_terms": costs.layer_activation_terms(self.case.model, self.case.tokens, item=self.case.e),
            "seconds": {k: v | {"total": sum(v.values()), "ratio": self.ratio(k)} for k, v in self.seconds.items()},
            "eraser_seconds": self.eraser,
        }


def predict(
    config: PlanConfig, *, model: Architecture | None = None, parametrization: Parametrization | None = None
) -> Plan:
    """The plan of a configuration.

    model: instead of the one that the configuration names. parametrization: what the unfused form costs, instead of the
    published one.
    """
    model = model or read_architecture(config.model_name_or_path or "")
    cuda = config.device != "cpu"
    e = getattr(torch, config.dtype).itemsize
    case = Case(
        model=model,
        config=config,
        packing=packing(model.shape, config, cuda=cuda),
        parametrization=parametrization or Parametrization.as_published(e),
    )
    device = DEVICES[config.device] if cuda else measured_cpu(config.dtype)
    if config.bandwidth is not None or config.flops is not None:
        device = replace(
            device,
            bandwidth=config.bandwidth or device.bytes_per_second() / 1e9,
            tflops={config.dtype: config.flops or device.rate(config.dtype) / 1e12},
            source="given",
        )
    s, tokens = model.shape, case.tokens
    chunked = replace(case, config=replace(config, logits="chunked")).chunk_rows
    return Plan(
        config=config,
        device=device,
        case=case,
        memory={provider: memory_of(case, provider) for provider in PROVIDERS},
        seconds={provider: seconds_of(case, provider, device) for provider in PROVIDERS},
        eraser=eraser_seconds(case, device),
        alternatives={
            "gradients, dense": case.gradients("plain"),
            "gradients, as packed here": case.gradients("lcdd"),
            "activations, kept": float(case.activations(checkpointing=False)),
            "activations, checkpointed": float(case.activations(checkpointing=True)),
            "loss, whole logits": float(costs.loss_bytes(s, tokens, item=e, chunk_rows=None)),
            "loss, chunked": float(costs.loss_bytes(s, tokens, item=e, chunk_rows=chunked)),
        },
    )


def run(config: PlanConfig) -> int:
    """`lcdd plan`: print the tables, or JSON."""
    plan = predict(config).to_dict()
    print(json.dumps(plan, indent=2) if config.json else render(plan))
    return 0
