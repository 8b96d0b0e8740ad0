"""What an optimizer step asks of the host: milliseconds of its thread, and how often it waits for the device.

    python -m benchmarks.host                    one JSON line, and the record in results/cpu/host.json
    python -m benchmarks.host --base REV         the same of another commit beside it, in turns

Every launch of a kernel is stubbed, matrices are small, and the seconds that sorting all gates takes (the device's)
are left out: what is left is Python, checks, tables and torch's own dispatch, which a GPU would have to wait for. Two
models of Qwen3-0.6B's blocks, 28 and 32 layers (196 and 224 matrices), under both gate controllers, with dense
gradients (every gate open) and packed ones (80% closed).

A wait is a call that returns values of a device's tensor to the host. On the CPU such calls look like those on tensors
that live on the host in any case: these, and checks that look at values on the CPU alone, are left out.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.cases import Place
from benchmarks.cases.shapes import MODELS, make_model
from benchmarks.compare import bring_benchmarks
from benchmarks.records import RESULTS, ROOT, cpu_environment, write_json
from fixtures.gates import gate_logits
from lcdd.config import LCDDConfig
from lcdd.models import layout_of
from lcdd.optimizer import LCDDOptimizer, packed
from lcdd.optimizer.block_grad import BlockGrad
from lcdd.optimizer.weights import MaskedWeight
from lcdd_kernels import PackCrossover, backends, checks
from lcdd_kernels.functional import delta_step as plans
from lcdd_kernels.reference.gates import open_indices_ref
from lcdd_kernels.triton_kernels import delta_step, gates

LAYERS = (28, 32)
SMALL = {"hidden_size": 32, "intermediate_size": 96, "head_dim": 4, "vocab_size": 256}
CONTROLLERS = ("dual", "paced")
DENSITIES = {"dense": 1.0, "packed": 0.2}
WARMUP, STEPS, TURNS = 3, 30, 3


# ---------------------------------------------------------------- a device that does nothing


class Device:
    """Kernels that leave behind what the step needs to go on: gates `values`, their open lists, gradients of 0.

    sorting: seconds that have gone into sorting, which is a device's work.
    """

    def __init__(self, values: Tensor, offsets: Tensor) -> None:
        self.sorting = 0.0
        indices, counts, rank = open_indices_ref(values, offsets)
        lists = {"indices_ptr": indices, "counts_ptr": counts, "rank_ptr": rank}
        zero = torch.zeros(())
        self._outputs = {
            "gate_values_fwd_kernel": {"gate_ptr": values, "l0_partial_ptr": zero},
            "gate_logits_bwd_kernel": {"d_logits_ptr": zero},
            "open_indices_kernel": lists,
            "weight_eff_fwd_kernel": {"differ_ptr": zero},
            "gate_gather_kernel": {"d_gate_ptr": zero},
            "sum_partials_kernel": {"out_ptr": zero},
        }

    def launch(self, kernel: Any, _grid: tuple[int, ...], _config: Any, /, **arguments: Any) -> None:
        for name, value in self._outputs.get(kernel.fn.__name__, {}).items():
            if arguments.get(name) is not None:
                arguments[name].copy_(value)


@contextmanager
def stubbed(device: Device) -> Iterator[None]:
    """Inside: the Triton route with `device` in the place of a GPU, and without what is looked at on a CPU alone."""
    crossover = PackCrossover(gather=1.0, crossover=0.8, min_elements=0, source="whatever pays")
    found = MaskedWeight.weight_eff

    sort = Tensor.sort

    def timed_sort(values: Tensor, **how: Any) -> Any:
        start = time.thread_time()
        try:
            return sort(values, **how)
        finally:
            device.sorting += time.thread_time() - start

    def weight_eff(weight: MaskedWeight, slots: Tensor) -> Tensor:
        return found(weight, slots).copy_(weight.here(weight.base))

    patches = [
        mock.patch.object(MaskedWeight, "weight_eff", weight_eff),
        mock.patch.object(Tensor, "sort", timed_sort),
        *(mock.patch.object(module, "launch", device.launch) for module in (gates, delta_step)),
        mock.patch.object(backends, "_DEFAULT", {"cpu": ("triton",)}),
        mock.patch.object(backends, "_mismatch", return_value=None),
        mock.patch.object(backends, "_self_test", return_value=None),
        mock.patch.object(checks, "check_no_nan"),
        mock.patch.object(plans.DeltaStepPlan, "_open_counts", return_value=None),
        mock.patch.object(packed, "check_index_list"),
        mock.patch.object(packed, "default_crossover", return_value=crossover),
    ]
    backends.reset()
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
    backends.reset()


# ---------------------------------------------------------------- waits

_LOOKS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "nonzero", "cpu", "numpy", "equal")
_LOOKS += ("masked_select", "unique", "is_nonzero", "argwhere")


class Waits(TorchFunctionMode):
    """Counts the calls inside it that bring a tensor's values to the host.

    on_host: tensors that are there anyhow. torch's own optimizers keep their step count there, too.
    """

    def __init__(self, on_host: Sequence[Tensor]) -> None:
        super().__init__()
        self.found: list[str] = []
        self._on_host = {tensor.data_ptr() for tensor in on_host}

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and _is_mask(args[1])
        if name in _LOOKS or by_mask:
            frame = sys._getframe(1)
            elsewhere = "torch/optim" in frame.f_code.co_filename or args[0].data_ptr() in self._on_host
            if not elsewhere:
                self.found.append(f"{name} at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    places = index if isinstance(index, tuple) else (index,)
    return any(isinstance(place, Tensor) and place.dtype == torch.bool for place in places)


# ---------------------------------------------------------------- runs


class Run:
    """An optimizer on the stubbed device, and gradients for its steps."""

    def __init__(self, layers: int, controller: str, density: float) -> None:
        sizes = {**MODELS["qwen3-0.6b"], **SMALL, "num_hidden_layers": layers}
        place = Place(device=torch.device("cpu"), size="cpu")
        base = make_model(sizes, place, seed=0).requires_grad_(False)
        model = copy.deepcopy(base)  # no delta: W_eff, which nothing writes here, is the base
        logits = gate_logits(model, density)
        layout = layout_of(model)
        self.device = Device((logits > 0).float(), layout.slot_offsets)
        config = LCDDConfig(gate_controller=controller, warmup_steps=1)
        with stubbed(self.device):
            self.optimizer = LCDDOptimizer.attach(model, base, config, total_steps=10_000, initial_logits=logits)
        self.loss = torch.tensor(1.0)
        self.matrices = len(self.optimizer.param_groups[0]["params"])

    def leave_gradients(self) -> None:
        """What a backward leaves."""
        plan = self.optimizer._plan
        assert plan is not None
        for site, linear, *_ in plan.linears:
            part = linear.part
            if part is None:
                site.parameter.grad = torch.zeros_like(site.parameter)
            else:
                block = torch.zeros(len(part.rows), len(part.cols))
                site.parameter.grad = BlockGrad.of(part, (block,), site.parameter.shape)

    def step(self) -> float:
        """Seconds that a step keeps the host's thread."""
        self.leave_gradients()
        start, sorting = time.thread_time(), self.device.sorting
        self.optimizer.step(self.loss)
        return time.thread_time() - start - (self.device.sorting - sorting)

    def waits(self) -> list[str]:
        """Where a step waits."""
        self.leave_gradients()
        with Waits([self.optimizer.gates.layout.slot_offsets]) as waits:
            self.optimizer.step(self.loss)
        return waits.found


def measure(layers: int, controller: str, gradients: str, *, steps: int) -> dict[str, Any]:
    """A lane: the median step in milliseconds, and the waits of the step that has most of them."""
    run = Run(layers, controller, DENSITIES[gradients])
    with stubbed(run.device):
        for _ in range(WARMUP):
            run.step()
        waits = max((run.waits() for _ in range(3)), key=len)
        seconds = [run.step() for _ in range(steps)]
    if run.optimizer.skipped_steps:
        raise RuntimeError(f"{run.optimizer.skipped_steps} steps were skipped")
    return {
        "matrices": run.matrices, "controller": controller, "gradients": gradients,
        "step_ms": round(1e3 * statistics.median(seconds), 2), "waits": len(waits), "waits_at": waits,
    }  # fmt: skip


def lanes(layers: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Every lane of this tree."""
    torch.set_num_threads(1)
    return [measure(n, c, g, steps=steps) for n, c, g in itertools.product(layers, CONTROLLERS, DENSITIES)]


def quietest(turns: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each lane the turn with the least time: what else ran on the machine can only add to it."""
    return [min(of_lane, key=lambda found: found["step_ms"]) for of_lane in zip(*turns, strict=True)]


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst lane of the smallest model, and all lanes."""
    smallest = min(lane["matrices"] for lane in found)
    worst = max((lane for lane in found if lane["matrices"] == smallest), key=lambda lane: lane["step_ms"])
    waits = max(lane["waits"] for lane in found)
    return {"matrices": smallest, "step_ms": worst["step_ms"], "waits": waits, "lanes": list(found)}


def in_turns(trees: Mapping[str, Path], steps: int) -> dict[str, list[dict[str, Any]]]:
    """The lanes of several trees, each turn in a process of its own."""
    turns: dict[str, list[Any]] = {name: [] for name in trees}
    for _ in range(TURNS):
        for name, tree in trees.items():
            command = [sys.executable, "-m", "benchmarks.host", "--lanes-only", "--steps", str(steps)]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            done = subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
            turns[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {name: quietest(found) for name, found in turns.items()}


def unpack(revision: str, folder: Path) -> Path:
    """The packages of another commit, with this benchmark beside them."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    bring_benchmarks(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="a commit to measure beside this tree")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps a lane")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu" / "host.json")
    parser.add_argument("--lanes-only", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.lanes_only:
        print(json.dumps(lanes(LAYERS, given.steps)))
        return
    with tempfile.TemporaryDirectory(prefix="lcdd-host-") as temporary:
        trees = {"here": ROOT}
        if given.base:
            trees["base"] = unpack(given.base, Path(temporary))
        found = in_turns(trees, given.steps)
    record = {**summary(found["here"]), "environment": cpu_environment()}
    if given.base:
        record["base"] = {"revision": given.base, **summary(found["base"])}
    write_json(given.output, record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
