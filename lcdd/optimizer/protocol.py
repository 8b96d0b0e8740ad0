"""What the training loop asks of an optimizer; `SFTOptimizer` and `LCDDOptimizer` both have it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from lcdd.config import TrainConfig
from lcdd.models import PreTrainedModel


class TrainingOptimizer(Protocol):
    """An optimizer over one model's weights that takes a step's mean loss, skips bad steps and has a whole state.

    Attributes:
        param_groups, state: as of torch.optim.Optimizer.
        skipped_steps, skipped_in_a_row: steps not taken because the loss or a gradient was not finite.
        last_loss: nats, of the last step taken; NaN before the first.
    """

    param_groups: list[dict[str, Any]]
    state: Any
    skipped_steps: int
    skipped_in_a_row: int
    last_loss: float

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def base(self) -> PreTrainedModel | None:
        """The model it holds beside the one in training; None without."""

    @property
    def config(self) -> TrainConfig: ...

    @property
    def loss_weight(self) -> float:
        """Factor on the loss whose gradient the coming step takes; the loss given to `step` is without it."""

    @property
    def gates_frozen(self) -> bool:
        """Whether the coming step moves nothing but weights."""

    def averaging(self) -> Callable[[], AbstractContextManager[None]] | None:
        """What to wrap a step's last backward in, if it averages gradients over ranks itself; None: an engine does."""

    def begin_step(self, micro_batches: int) -> None:
        """Called before a step's first backward with the number of backwards on this rank."""

    def step(self, loss: float | Tensor) -> None:
        """Take one step on the gradients in the weights; `loss` is the step's mean over its tokens, in nats."""

    def zero_grad(self) -> None: ...

    def stats(self) -> dict[str, Any]:
        """One step's line for the log."""

    def stop_reason(self) -> str | None:
        """Called once after every step: why going on would be a waste, or None."""

    def eval(self) -> None:
        """Write the weights that ship into the model."""

    def train(self) -> None:
        """Back to the coming step's weights, bit for bit."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...
