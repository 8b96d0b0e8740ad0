"""LCDD is an optimizer: gates, dual controller, packed gradients; and plain SFT beside it."""

from lcdd.optimizer.block_grad import BlockGrad, OpenPart
from lcdd.optimizer.controller import DualDescent, GateController
from lcdd.optimizer.dual import DualController
from lcdd.optimizer.forward import ForwardGates, GatedLinear, GatedMLP
from lcdd.optimizer.gates import Gates
from lcdd.optimizer.lcdd import LCDDOptimizer
from lcdd.optimizer.pacing import epsilon_of
from lcdd.optimizer.packed import PackedGradLinear, PackPlan
from lcdd.optimizer.protocol import TrainingOptimizer
from lcdd.optimizer.schedules import schedule
from lcdd.optimizer.sft import SFTOptimizer

__all__ = [
    "BlockGrad",
    "DualController",
    "DualDescent",
    "ForwardGates",
    "GateController",
    "GatedLinear",
    "GatedMLP",
    "Gates",
    "LCDDOptimizer",
    "OpenPart",
    "PackPlan",
    "PackedGradLinear",
    "SFTOptimizer",
    "TrainingOptimizer",
    "epsilon_of",
    "schedule",
]
