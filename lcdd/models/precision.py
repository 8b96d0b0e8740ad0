"""Whether a device computes in bfloat16, or emulates it: a processor without AVX-512 is then 10 to 30 times slower."""

import functools
import logging
import time

import torch

EMULATED = 3.0
"""A matrix product in bfloat16 that takes this many times float32's is emulated: hardware is near 1 or below."""
PROBE = (64, 512, 512)
ROUNDS = 3

logger = logging.getLogger(__name__)


@functools.cache
def bf16_slowdown(device_type: str) -> float:
    """Time of a small matrix product in bfloat16 over that in float32, on this machine; measured once, in
    milliseconds. Of a GPU it is 1 where the driver says that it has bfloat16, else infinite."""
    if device_type == "cuda":
        return 1.0 if torch.cuda.is_bf16_supported(including_emulation=False) else float("inf")
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


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


def computes_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is worth its name on `device`."""
    return bf16_slowdown(device.type) < EMULATED


@functools.cache
def warn_of_emulation(device: torch.device, *, asked: bool) -> None:
    """Say, once, that bfloat16 is slow on `device` if it is; `asked`: by a setting, not by the checkpoint's dtype."""
    if computes_bf16(device):
        return
    times = (
        f"{bf16_slowdown(device.type):.0f} times slower than float32 in a small product"
        if device.type == "cpu"
        else "slow"
    )
    instead = "leave bf16 out" if asked else "save the checkpoint in float32 first (`model.float().save_pretrained`)"
    logger.warning("bfloat16 is emulated on this %s, %s: %s, or expect to wait", device.type.upper(), times, instead)
