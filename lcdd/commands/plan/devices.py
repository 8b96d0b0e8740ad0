"""What `lcdd plan` takes devices to be able to do: data sheets, assumptions, and this CPU measured on the spot.

No figure here but `measured_cpu`'s was measured.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lcdd.config import did_you_mean
from lcdd.errors import InputError

MATRIX_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.7, 0.85
"""Shares of a data sheet's peak that large operations are assumed to reach; --flops and --bandwidth replace them."""
LAUNCH_SECONDS = 6e-6
"""Assumed for an operation that PyTorch starts eagerly: a phase takes at least that for each of its operations."""
LAYER_LAUNCHES = (45, 80)
"""Operations of a decoder layer that are no views, forward and backward (34 to 54 and 62 to 94, by architecture)."""
MASK_LAUNCHES = (15, 25)
"""Of one parametrized weight: its gates, mask, product and sum."""


USABLE = 0.95
"""Share of a device's memory taken to be there for tensors; the rest is the driver's, the context's, and fragments."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """tflops: matrix rate by dtype, dense; bandwidth and link: GB/s, link each way to another GPU; memory: GiB.

    source: "data sheet" (peaks), "measured here" or "given" (rates that are reached).
    """

    name: str
    tflops: dict[str, float]
    bandwidth: float
    link: float
    memory: float
    source: str

    def rate(self, dtype: str) -> float:
        """FLOP/s assumed to be reached.

        Raises:
            InputError: it multiplies no matrices of this dtype.
        """
        if dtype not in self.tflops:
            raise InputError(
                f"dtype: expected one that {self.name} multiplies matrices of ({', '.join(sorted(self.tflops))}), "
                f"got {dtype!r}"
            )
        return self.tflops[dtype] * 1e12 * (MATRIX_EFFICIENCY if self.source == "data sheet" else 1.0)

    def bytes_per_second(self) -> float:
        """Assumed to be reached."""
        return self.bandwidth * 1e9 * (BANDWIDTH_EFFICIENCY if self.source == "data sheet" else 1.0)

    @property
    def usable(self) -> float:
        """Bytes for tensors."""
        return USABLE * self.memory * 2**30


def _sheet(
    name: str, half: float, float32: float, bandwidth: float, link: float, mebibytes: int, *, bfloat16: bool = True
) -> Device:
    rates = {"float16": half, "float32": float32} | ({"bfloat16": half} if bfloat16 else {})
    return Device(name=name, tflops=rates, bandwidth=bandwidth, link=link, memory=mebibytes / 1024, source="data sheet")


# Makers' data sheets, without sparsity: 16-bit products with float32 sums, float32 ones without TF32; memory in MiB as
# nvidia-smi and rocm-smi show it: a GB of a GPU's name is 2^30 bytes, less where some of them hold error correction.
DEVICES = {
    "gb200": _sheet("GB200 (one of its GPUs)", 2500, 80, 8000, 900, 189471),
    "b300": _sheet("B300 SXM", 2250, 75, 8000, 900, 275040),
    "b200": _sheet("B200 SXM", 2250, 75, 7700, 900, 183359),
    "h200": _sheet("H200 SXM", 989, 67, 4800, 450, 143771),
    "h200-nvl": _sheet("H200 NVL", 835, 60, 4800, 450, 143771),
    "gh200": _sheet("GH200 96GB", 990, 67, 4000, 450, 97871),
    "h100": _sheet("H100 SXM", 989, 67, 3350, 450, 81559),
    "h100-nvl": _sheet("H100 NVL", 835, 60, 3900, 300, 95830),
    "h100-pcie": _sheet("H100 PCIe", 756, 51, 2000, 300, 81559),
    "h800": _sheet("H800 SXM", 989, 67, 3350, 200, 81559),
    "h20": _sheet("H20", 148, 44, 4000, 450, 97871),
    "a100-80gb": _sheet("A100 SXM 80GB", 312, 19.5, 2039, 300, 81920),
    "a100-40gb": _sheet("A100 SXM 40GB", 312, 19.5, 1555, 300, 40960),
    "a100-pcie-80gb": _sheet("A100 PCIe 80GB", 312, 19.5, 1935, 300, 81920),
    "a100-pcie-40gb": _sheet("A100 PCIe 40GB", 312, 19.5, 1555, 300, 40960),
    "a800": _sheet("A800 SXM 80GB", 312, 19.5, 2039, 200, 81920),
    "a40": _sheet("A40", 149.7, 37.4, 696, 56.25, 46068),
    "a30": _sheet("A30", 165, 10.3, 933, 100, 24576),
    "a10": _sheet("A10", 125, 31.2, 600, 32, 23028),
    "a10g": _sheet("A10G", 70, 35, 600, 32, 23028),
    "l40s": _sheet("L40S", 362, 91.6, 864, 32, 46068),
    "l40": _sheet("L40", 181, 90.5, 864, 32, 46068),
    "l4": _sheet("L4", 121, 30.3, 300, 32, 23034),
    "t4": _sheet("T4", 65, 8.1, 300, 16, 15360, bfloat16=False),
    "v100-32gb": _sheet("V100 SXM2 32GB", 125, 15.7, 900, 150, 32768, bfloat16=False),
    "v100-16gb": _sheet("V100 SXM2 16GB", 125, 15.7, 900, 150, 16384, bfloat16=False),
    "rtx-pro-6000": _sheet("RTX PRO 6000 Blackwell", 503.8, 126, 1792, 64, 97887),
    "rtx-6000-ada": _sheet("RTX 6000 Ada", 364, 91.1, 960, 32, 49140),
    "rtx-a6000": _sheet("RTX A6000", 154.8, 38.7, 768, 56.25, 49140),
    "rtx-5090": _sheet("GeForce RTX 5090", 209.5, 104.8, 1792, 64, 32607),
    "rtx-5080": _sheet("GeForce RTX 5080", 112.6, 56.3, 960, 64, 16303),
    "rtx-4090": _sheet("GeForce RTX 4090", 165, 82.6, 1008, 32, 24564),
    "rtx-4080": _sheet("GeForce RTX 4080", 97.5, 48.7, 717, 32, 16376),
    "rtx-3090": _sheet("GeForce RTX 3090", 71, 35.6, 936, 32, 24576),
    "mi355x": _sheet("Instinct MI355X", 2516, 157.3, 8000, 538, 294896),
    "mi350x": _sheet("Instinct MI350X", 2306, 144.2, 8000, 538, 294896),
    "mi325x": _sheet("Instinct MI325X", 1307, 163.4, 6000, 448, 262128),
    "mi300x": _sheet("Instinct MI300X", 1307, 163.4, 5300, 448, 196592),
    "mi250x": _sheet("Instinct MI250X (one of its two dies, as PyTorch sees it)", 191.5, 47.9, 1638, 50, 65520),
    "mi210": _sheet("Instinct MI210", 181, 45.3, 1638, 50, 65520),
}
WORDS_ASIDE = ("nvidia", "amd", "geforce", "tesla", "instinct", "quadro", "blackwell", "generation", "server",
          "workstation", "edition", "ac")  # fmt: skip
"""Words of a full name that say nothing more; nor do the connector and the kind of memory, where a GPU has one."""
ONE_CHOICE = re.compile(r"sxm\d?|hbm\de?")


def find_device(name: str) -> Device:
    """The device that a name stands for, however it is written: rtx4090, A100, a100-40gb, "NVIDIA H100 80GB HBM3".

    Raises:
        InputError: none is called so; with names that are written nearly so.
    """
    called: dict[str, list[Device]] = {}
    for key, device in DEVICES.items():
        spelling, _ = _spelling(key)
        for short in {spelling, spelling.removeprefix("rtx")}:
            called.setdefault(short, []).append(device)
    spelling, memory = _spelling(name)
    found = called.get(spelling)
    if found is None:
        hint = did_you_mean(spelling, called) or f"; known are: {', '.join([*DEVICES, 'cpu'])}"
        raise InputError(f"device: expected a GPU that plan has a data sheet of, or cpu, got {name!r}{hint}")
    fitting = [device for device in found if memory is None or 0.9 < memory / device.memory < 1.1]
    if not fitting:
        sizes = " or ".join(f"{device.memory:.0f} GiB" for device in found)
        raise InputError(f"device: expected {found[0].name} with {sizes}, got {name!r}")
    return fitting[0]


def _spelling(name: str) -> tuple[str, float | None]:
    """A name's letters and digits without maker and memory, and the memory where it says it."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word not in WORDS_ASIDE]
    sizes = [float(size[1]) for word in words if (size := re.fullmatch(r"(\d+)gb?", word))]
    rest = "".join(word for word in words if not re.fullmatch(r"\d+gb?", word))
    return ONE_CHOICE.sub("", rest), sizes[0] if sizes else None


def measured_cpu(dtype: str) -> Device:
    """This machine with the threads torch uses now: a product and a copy, about a second. `link` is of no use here."""
    kind = getattr(torch, dtype)
    a, b = torch.randn(512, 512).to(kind), torch.randn(512, 512).to(kind)
    source, target = torch.ones(1 << 24), torch.empty(1 << 24)
    product = _fastest(lambda: torch.mm(a, b))
    copy = _fastest(lambda: target.copy_(source))
    rate = 2 * 512**3 / product / 1e12
    bandwidth = 2 * source.numel() * source.element_size() / copy / 1e9
    name = f"this CPU, {torch.get_num_threads()} threads"
    return Device(name=name, tflops={dtype: rate}, bandwidth=bandwidth, link=bandwidth, memory=_host_memory(),
                  source="measured here")  # fmt: skip


def _fastest(run: Callable[[], object], budget: float = 0.2) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + budget
    while True:  # once at least, however busy the machine is
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best


def _host_memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
