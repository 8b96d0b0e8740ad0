"""What a step is judged by: on the device, where pass B waits for nobody, and by the host's one look at it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lcdd.optimizer.gates import Drawn


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a step is judged by, of all ranks together, on the device.

    loss: [], or a number that the host has already. norm: ‖dΔ‖ []. gate_sum: of gate gradients []. foreign: entries of
    the weight that was probed which somebody else has written []. proposed: what the gates' controller wants to know.
    """

    loss: float | Tensor
    norm: Tensor
    gate_sum: Tensor
    foreign: Tensor
    proposed: Sequence[Tensor] = ()

    @cached_property
    def _values(self) -> Tensor:
        """All of it, float64 [n]: foreign, norm, gate_sum, proposed, and the loss where it is there, too."""
        there = [self.foreign, self.norm, self.gate_sum, *self.proposed]
        if isinstance(self.loss, Tensor):
            there.append(self.loss)
        return torch.stack(there).double()

    @property
    def hopeless(self) -> bool:
        """Whether the host knows without a look that the step is not to be taken."""
        return not (isinstance(self.loss, Tensor) or math.isfinite(self.loss))

    def grad_scale(self, limit: float) -> Tensor:
        """Factor on the gradients that clips their norm to `limit` (0: does not), [] in the gates' dtype; NaN where the
        step is not to be taken."""
        good = self._values.isfinite().all() & (self._values[0] == 0)
        scale = (limit / (self._values[1] + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(self._values[1])
        return torch.where(good, scale, math.nan).to(self.gate_sum.dtype)

    def look(self, drawn: Drawn) -> "Found":
        """The same on the host, and what `drawn` is to be told: one wait."""
        count = len(self._values)
        found = torch.cat([self._values, drawn.to_tell()]).tolist()
        drawn.tell(found[count:])
        foreign, norm, gate_sum, *proposed = found[:count]
        loss = proposed.pop() if isinstance(self.loss, Tensor) else self.loss
        return Found(loss=loss, norm=norm, gate_sum=gate_sum, foreign=foreign, proposed=proposed)


@dataclass(frozen=True, kw_only=True)
class Found:
    """`Measured`, on the host."""

    loss: float
    norm: float
    gate_sum: float
    foreign: float
    proposed: Sequence[float]

    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.norm, self.gate_sum, *self.proposed)))

    def __str__(self) -> str:
        of_gates = f"sum of gate gradients {self.gate_sum:g}, the gates' controller {list(self.proposed)}"
        return f"loss {self.loss:g}, gradient norm {self.norm:g}, {of_gates}"
