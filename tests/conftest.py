"""Shared by every test: Hypothesis profiles, Triton's interpreter where there is no GPU, poisoned memory."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before anything imports triton: without a GPU its kernels run through the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("ci", max_examples=15, deadline=None, derandomize=True, suppress_health_check=_QUIET)
settings.register_profile("nightly", max_examples=1000, deadline=None, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Tables and lines are as wide as in a pipe, whatever terminal the suite is run from.
os.environ.pop("COLUMNS", None)

# Small tensors: threads cost more than they give, and xdist's workers share the cores.
torch.set_num_threads(1)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` and its relatives return NaN, so that an entry that a kernel does not write is seen."""
    from lcdd_kernels.testing import poisoned_memory

    with poisoned_memory():
        yield


@pytest.fixture
def device_of() -> Callable[..., str]:
    """`device_of(op, backend, dtype)`: where that backend runs here; skips, with the reason, where it cannot run at
    all.
    """
    from lcdd_kernels import available
    from lcdd_kernels.testing import truncates_bfloat16

    def find(op: str, backend: str, dtype: torch.dtype = torch.float32) -> str:
        device = "cuda" if torch.cuda.is_available() and backend != "native" else "cpu"
        if truncates_bfloat16(backend, device, dtype):
            pytest.skip("Triton's interpreter truncates bfloat16 stores: bfloat16 is tested on a GPU")
        reason = available(op, device, dtype)[backend]
        if reason is not None and "self-test failed" in reason:
            pytest.fail(f"{op} on {backend}: {reason}")  # a broken kernel disables itself; it must not skip its tests
        if reason is not None:
            pytest.skip(f"{op} on {backend}: {reason}")
        return device

    return find
