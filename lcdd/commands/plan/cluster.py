"""What several GPUs send each other in an optimizer step, and how long that takes: a calculation.

    traffic_of(model, config)      bytes that a rank sends, dense or packed, and in how many collectives
    waiting(traffic, link, …)      seconds of it that no work hides

Collectives are rings. Gradients go out behind the last backward (`ddp`), or behind each (`fsdp2`, whose weights are
gathered before every layer's forward and backward). Open gates are taken to be scattered at random, as many in every
group. `tests/benchmarks/test_several_gpus.py` holds the bytes against those that were counted.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lcdd.commands.plan.devices import Device
from lcdd.config import PlanConfig
from lcdd.models import Architecture, Masked, costs
from lcdd_kernels.functional.packed_grad import PACKED_LAYOUT

LINK_EFFICIENCY = 0.8
"""Share of a link's rate that large collectives are assumed to reach."""
BUCKET_BYTES = 25 << 20
"""Of gradients that travel together under ddp."""
FLOAT64 = 8


@dataclass(frozen=True, kw_only=True)
class Link:
    """bandwidth: GB/s each way, by standard or data sheet; latency: seconds, assumed, of one hop of a ring."""

    name: str
    bandwidth: float
    latency: float

    def seconds(self, sent: float, hops: float) -> float:
        """Of collectives in which a rank sends so many bytes, in so many hops."""
        return sent / (self.bandwidth * 1e9 * LINK_EFFICIENCY) + hops * self.latency


LINKS = {
    "nvlink": Link(name="NVLink 4", bandwidth=450, latency=2e-6),
    "pcie": Link(name="PCIe 5.0 x16", bandwidth=63, latency=4e-6),
    "400gbe": Link(name="400 Gb/s a GPU", bandwidth=50, latency=8e-6),
    "100gbe": Link(name="100 Gb/s a GPU", bandwidth=12.5, latency=8e-6),
}


def link_of(config: PlanConfig, device: Device) -> Link:
    """The link that a plan names, or the device's own."""
    return LINKS[config.link] if config.link else Link(name=device.name, bandwidth=device.link, latency=2e-6)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Of one rank in an optimizer step. Bytes: of gradients, of layers' weights gathered for forward or backward, of
    embeddings and head (gathered for a forward and a loss), and of gates (the optimizer's own all-reduce). Hops: of the
    rings that they go through."""

    gradients: float = 0.0
    gradient_hops: int = 0
    weights: float = 0.0
    weight_hops: int = 0
    ends: float = 0.0
    end_hops: int = 0
    gates: float = 0.0
    gate_hops: int = 0

    @property
    def sent(self) -> float:
        """All of it: layers' weights are gathered twice."""
        return self.gradients + 2 * self.weights + self.ends + self.gates

    def seconds(self, link: Link) -> float:
        """Over a link, one after the other."""
        return link.seconds(self.sent, self.gradient_hops + 2 * self.weight_hops + self.end_hops + self.gate_hops)


def traffic_of(model: Architecture, config: PlanConfig, *, packed: bool) -> Traffic:
    """packed: what is open of the gradients, as lcdd sends them; else all of them."""
    gpus = config.num_gpus
    if gpus == 1:
        return Traffic()
    sharded = config.parallel == "fsdp2"
    size = gradient_entries(model, config, packed=packed) * _item(config)
    gates = costs.step_numbers(model.n_gates, sharded=sharded) if packed else 1
    ring, both = gpus - 1, 2 * (gpus - 1)
    own = Traffic(gates=costs.all_reduce_bytes(gates, item=FLOAT64, gpus=gpus), gate_hops=both)
    if not sharded:
        sent = costs.all_reduce_bytes(size, item=1, gpus=gpus)
        return replace(own, gradients=sent, gradient_hops=both * max(1, round(size / BUCKET_BYTES)))
    times = config.gradient_accumulation_steps * len(model.layers)
    layers = sum(count * layer.parameters for layer, count in model.kinds.items())
    ends, micro, item = 2 * model.vocab_size * model.width, config.gradient_accumulation_steps, _item(config)
    return replace(
        own,
        gradients=micro * costs.collective_bytes(size, item=1, gpus=gpus),
        weights=micro * costs.collective_bytes(layers, item=item, gpus=gpus),
        ends=micro * costs.collective_bytes(ends, item=item, gpus=gpus),
        gradient_hops=ring * times,
        weight_hops=ring * times,
        end_hops=2 * ring * micro,
    )


def gradient_entries(model: Architecture, config: PlanConfig, *, packed: bool) -> float:
    """Entries of all masked gradients that a rank hands to its collectives after a backward."""
    return sum(count * _entries(weight, config, packed=packed) for weight, count in model.weights.items())


def _entries(weight: Masked, config: PlanConfig, *, packed: bool) -> float:
    shape, gpus, density = (weight.rows, weight.cols), config.num_gpus, config.density
    layout = PACKED_LAYOUT[config.gate_kind] if packed and config.pack == "auto" else "dense"
    rows, cols = density * weight.rows, density * weight.cols
    if config.parallel == "ddp":
        return weight.experts * costs.averaged_entries(shape, rows, cols, layout=layout)
    if weight.experts > 1:  # FSDP2 gives ranks whole experts, whose gradients stay dense
        return gpus * -(-weight.experts // gpus) * weight.rows * weight.cols
    most = costs.most_in_a_chunk(weight.rows, density, gpus)
    return costs.scattered_entries(shape, rows, cols, most_rows=most, gpus=gpus, layout=layout)


def _item(config: PlanConfig) -> int:
    return getattr(torch, config.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Work:
    """Seconds of a step behind which ranks talk: all forwards, all backwards with what is made again in them."""

    forward: float
    backward: float


def waiting(traffic: Traffic, link: Link, work: Work, config: PlanConfig) -> float:
    """Seconds of a step in which a rank waits for others."""
    gates = link.seconds(traffic.gates, traffic.gate_hops)
    gradients = link.seconds(traffic.gradients, traffic.gradient_hops)
    if config.parallel == "ddp":
        last = work.backward / config.gradient_accumulation_steps
        return gates + max(0.0, gradients - last)
    weights = link.seconds(traffic.weights, traffic.weight_hops)
    gates += link.seconds(traffic.ends, traffic.end_hops)  # nothing runs beside them
    return gates + max(0.0, weights - work.forward) + max(0.0, weights + gradients - work.backward)


CLOSED = (0.5, 0.8, 0.95)
"""Shares of closed gates that are told beside the one that a plan is for."""


def told(model: Architecture, config: PlanConfig, device: Device) -> dict[str, Any]:
    """For a plan's tables: bytes that a rank sends in a step, dense and packed, and seconds over every link."""
    links = {config.link or "its own": link_of(config, device)} | LINKS
    shares = sorted({*CLOSED, round(1 - config.density, 4)})
    kinds = {"dense": (config, False)} | {
        f"packed, {share:.0%} closed": (replace(config, density=1 - share), True) for share in shares
    }
    found = {name: traffic_of(model, asked, packed=packed) for name, (asked, packed) in kinds.items()}
    return {
        "links": {name: {**asdict(link), "efficiency": LINK_EFFICIENCY} for name, link in links.items()},
        "traffic": {
            name: {**asdict(traffic), "sent": traffic.sent}
            | {"seconds": {key: traffic.seconds(link) for key, link in links.items()}}
            for name, traffic in found.items()
        },
    }
