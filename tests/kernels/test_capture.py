"""What a CUDA graph forbids, found without a GPU: kernels' launchers run on tensors without values, in a mode that
refuses every wait for the device, every copy of pageable memory to it, and every shape that depends on values."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from itertools import count
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lcdd_kernels as k
from lcdd_kernels import AdamWStep, DeltaStepPlan, GateSpec, backends, cases, checks, registry, testing
from lcdd_kernels.cases.delta_step import Layer

pytest.importorskip("triton", reason="Triton is not installed")

from lcdd_kernels import triton_kernels
from lcdd_kernels.triton_kernels import tables

TRITON_OPS = [op.name for op in registry.OPS.values() if "triton" in op.backends]
ON_HOST = ("offsets",)  # by contract
_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten._unique2, _aten.is_nonzero}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_OF_HOST_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


class Forbidden(RuntimeError):
    """A call that a capture does not survive."""


class Capture(TorchDispatchMode):
    """The meta device stands for a GPU: its tensors have no values that anybody could read."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
        there = any(t.is_meta for t in given)
        by_mask = func.overloadpacket in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (func.overloadpacket in _READS or by_mask) and there:
            raise Forbidden(f"{func}: the host would wait for a value")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_meta and any(not t.is_meta and t.dim() for t in given):
            raise Forbidden(f"{func}: a copy of pageable memory")
        return result


class NoHostData(TorchFunctionMode):
    """Sees what does not come by dispatch: tensors made of lists and numbers."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _OF_HOST_DATA and result.is_meta and not isinstance(args[-1], Tensor):
            raise Forbidden(f"{func}: a tensor of host data, by a copy of pageable memory")
        return result


@contextmanager
def capture() -> Iterator[list[str]]:
    """Inside: launches are noted and do nothing, tables are sent from pinned memory, the meta device has kernels."""
    launched: list[str] = []

    def launch(kernel: Any, _grid: Any, _config: Any, /, **arguments: Any) -> None:
        assert all(value.is_meta for value in arguments.values() if isinstance(value, Tensor))
        launched.append(kernel.fn.__name__)

    addresses = count(1 << 40, 1 << 30)
    modules = [registry.importlib.import_module(f"{triton_kernels.__name__}.{stem}") for stem in triton_kernels.MODULES]
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", launch))
        for target, name, value in (
            (tables, "_copy", lambda table, device: torch.empty(table.shape, dtype=table.dtype, device=device)),
            (checks, "_range", lambda tensor: (start := next(addresses), start + tensor.nbytes)),
            (backends, "_DEFAULT", {"meta": ("triton",)}),
            (backends, "_mismatch", lambda *_: None),
            (backends, "_self_test", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        backends.reset()
        with Capture(), NoHostData():
            yield launched
    backends.reset()


def there(value: Any) -> Any:
    """Inputs on the meta device."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta", memory_format=torch.preserve_format)
    if isinstance(value, list | tuple):
        return type(value)(map(there, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: there(getattr(value, f.name)) for f in fields(value) if f.init})
    return value


def inputs_of(op: str) -> Mapping[str, Any]:
    made = testing.make_inputs(op, torch.float32)
    return {name: value if name in ON_HOST else there(value) for name, value in made.items()}


@pytest.mark.parametrize("op", TRITON_OPS)
def test_a_kernel_can_be_captured(op: str) -> None:
    assert torch.float32 in cases.case_of(op).dtypes
    inputs = inputs_of(op)
    with capture() as launched:
        registry.implementation(op, "triton")(**inputs)
    assert launched


def test_the_device_part_of_an_optimizer_step_can_be_captured() -> None:
    """All that a step queues before the host looks: gates, passes A and B, the probe, with a scale on the device."""
    layer = Layer(1)
    lists = ("weights", "bases", "deltas", "exp_avgs", "exp_avg_sqs")
    made = {name: [torch.empty(shape, device="meta") for shape in layer.shapes] for name in lists}
    grads = [torch.empty(shape, device="meta") for shape in layer.shapes]
    logits, norm = torch.empty(layer.n_gates, device="meta"), torch.empty((), device="meta")
    with capture() as launched:
        plan = DeltaStepPlan(layer.maps, n_gates=layer.n_gates, **made)
        gate, _ = k.gate_values(logits, GateSpec(kind="hard_concrete"))
        taken = plan.take(grads, gate)
        d_gate, _ = plan.grad_stats(taken, gate)
        k.gate_logits_grad(logits, d_gate, GateSpec(kind="hard_concrete"), l0_weight=0.1)
        k.open_indices(gate, layer.offsets)
        plan.differing(3, gate)
        plan.step(taken, gate, gate, AdamWStep(lr=1e-3, step=2, grad_scale=(1 / norm).clamp(max=1)))
        plan.refresh(gate)
    assert launched.count("delta_adamw_kernel") == launched.count("weight_eff_fwd_kernel") - 1 == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.sum().item(), "would wait"),
        (lambda x: x[x > 0], "would wait"),
        (lambda x: torch.tensor([1.0, 2.0], device="meta"), "host data"),
        (lambda x: torch.ones(3).to("meta", non_blocking=True), "pageable"),
        (lambda x: x.copy_(torch.ones(4)), "pageable"),
    ],
)
def test_what_a_capture_forbids_is_found(call: Callable[[Tensor], Any], message: str) -> None:
    x = torch.empty(4, device="meta")
    with capture(), pytest.raises(Forbidden, match=message):
        call(x)
