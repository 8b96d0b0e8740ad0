"""What an optimizer leaves in its model when it goes: nothing of its own."""

from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lcdd.errors import InputError
from lcdd.models import PreTrainedModel
from lcdd.optimizer.controller import GateController
from lcdd.optimizer.watch import Watch
from lcdd.optimizer.weights import MaskedWeights


def leave(model: PreTrainedModel, watch: Watch, masked: MaskedWeights, inside: Sequence[Callable[[], None]]) -> None:
    """Take everything of ours out of the model."""
    watch.close(model)
    masked.close()
    for take_out in inside:
        take_out()


def leave_folded(
    model: PreTrainedModel,
    watch: Watch,
    masked: MaskedWeights,
    controller: GateController,
    inside: Sequence[Callable[[], None]],
) -> None:
    """What a deleted optimizer leaves behind: deterministic gates, but where somebody else wrote the weights last.

    The garbage collector may come by while another model is being traced, or built on the meta device: this one's
    tensors are real all the same.
    """
    with _disable_current_modes(), torch.device("cpu"):
        try:
            ours = not masked.differing(controller.gates)
        except InputError:  # replaced, cast or moved
            ours = False
        if ours and watch.sampled:
            controller.draw(evaluation=True)
            masked.write(controller.gates)
        leave(model, watch, masked, inside)
