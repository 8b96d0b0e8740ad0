"""Fused kernels of loss-constrained dual descent: gates, masked deltas, packed gradients and losses.

Tensors only: this package knows nothing of models. Importing it touches no GPU and imports neither Triton nor a
library.
"""

from lcdd_kernels import functional
from lcdd_kernels.backends import BACKENDS, BackendUnavailable, available, report, use_backend
from lcdd_kernels.functional import *  # noqa: F403

__all__ = ["BACKENDS", "BackendUnavailable", "available", "report", "use_backend", *functional.__all__]
