"""The cases: `suite(place)` lists them in the order in which they run, the most telling first."""

from dataclasses import dataclass

import torch

from benchmarks.harness import Case


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how large: size "cpu" (scaled-down models, minutes on two cores), "gpu" (real shapes) or "tiny"
    (seconds, on any device: the tests run the GPU's list this way)."""

    device: torch.device
    size: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the models' weights: bfloat16 at real shapes, float32 otherwise."""
        return torch.bfloat16 if self.size == "gpu" else torch.float32

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"


def name_of(dtype: torch.dtype) -> str:
    """As records have it."""
    return str(dtype).removeprefix("torch.")


def suite(place: Place, *, gpu_list: bool) -> list[Case]:
    """All cases of the CPU's list, or of the GPU's, in order of priority. Building a case allocates next to
    nothing."""
    from benchmarks.cases import eraser, kernels, losses, single, steps, training

    if not gpu_list:
        return [
            kernels.ceilings(place),
            *steps.cpu_cases(place),
            *single.packed_linears(place),
            *single.masked_matrix(place),
            *kernels.cpu_cases(place),
            losses.cross_entropy(place),
            *eraser.cases(place),
            training.whole_process(place),
        ]
    return [
        kernels.ceilings(place),
        kernels.correctness(place),
        *steps.one_layer(place, "llama-3-8b"),
        *kernels.gpu_cases(place),
        *single.masked_matrix(place),
        *single.packed_linears(place),
        *single.crossover(place),
        *steps.whole_small_model(place),
        *steps.four_large_layers(place),
        losses.cross_entropy(place),
        losses.kl(place),
        *eraser.cases(place),
        *steps.other_models(place),
        *steps.whole_large_model(place),
    ]
