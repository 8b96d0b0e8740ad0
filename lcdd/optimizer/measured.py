"""What a step is judged by before it is taken: the host's one look at the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcdd.optimizer.gates import Drawn


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a step is judged by, of all ranks together: on the device (tensors) and, after the look, on the host.

    gate_sum: of gate gradients. foreign: entries of the weight that was probed which somebody else has written.
    proposed: what the gates' controller wants to know.
    """

    loss: Any
    norm: Any
    gate_sum: Any
    foreign: Any
    proposed: Sequence[Any] = ()

    def look(self, drawn: Drawn) -> "Measured":
        """The same on the host, and what `drawn` is to be told: one wait."""
        there, count = [self.norm, self.gate_sum, self.foreign, *self.proposed], len(self.proposed)
        if isinstance(self.loss, Tensor):
            there.append(self.loss.to(drawn.values.device))
        found = torch.cat([torch.stack([value.double() for value in there]), drawn.to_tell()]).tolist()
        drawn.tell(found[len(there) :])
        norm, gate_sum, foreign, *rest = found[: len(there)]
        loss = rest[count] if isinstance(self.loss, Tensor) else self.loss
        return Measured(loss=loss, norm=norm, gate_sum=gate_sum, foreign=foreign, proposed=rest[:count])

    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.norm, self.gate_sum, *self.proposed)))

    def __str__(self) -> str:
        of_gates = f"sum of gate gradients {self.gate_sum:g}, the gates' controller {list(self.proposed)}"
        return f"loss {self.loss:g}, gradient norm {self.norm:g}, {of_gates}"
