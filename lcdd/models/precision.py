"""Whether a device computes in 16 bits, or emulates it: a processor without AVX-512 is then 10 to 30 times slower."""

import functools
import logging
import time

import torch

EMULATED = 3.0
"""A matrix product in 16 bits that takes this many times float32's is emulated: hardware is near 1 or below."""
PROBE = (64, 512, 512)
ROUNDS = 3

logger = logging.getLogger(__name__)


@functools.cache
def slowdown(device_type: str, dtype: torch.dtype) -> float:
    """Time of a small matrix product in `dtype` over that in float32 on this machine's processor, measured once, in
    tenths of a second. Of a GPU it is 1, or infinite where it has no bfloat16 of its own."""
    if device_type == "cuda":
        emulated = dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False)
        return float("inf") if emulated else 1.0
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """Of one product, the fastest of a few: the first one prepares what the library keeps."""
    rows, inner, columns = PROBE
    x, weight = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        found.append(time.perf_counter() - start)
    return min(found)


def computes_in(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `dtype` is worth its name on `device`."""
    return dtype == torch.float32 or slowdown(device.type, dtype) < EMULATED


@functools.cache
def warn_of_emulation(device: torch.device, dtype: torch.dtype, *, asked: bool) -> None:
    """Say, once, that `dtype` is slow on `device` if it is; `asked`: by `bf16`, not by the checkpoint's own dtype."""
    if computes_in(device, dtype):
        return
    name, times = str(dtype).removeprefix("torch."), slowdown(device.type, dtype)
    slow = f"{times:.0f} times slower than float32 in a small product" if device.type == "cpu" else "slow"
    instead = "leave bf16 out" if asked else "save the checkpoint in float32 first (`model.float().save_pretrained`)"
    logger.warning("%s is emulated on this %s, %s: %s, or expect to wait", name, device.type.upper(), slow, instead)
