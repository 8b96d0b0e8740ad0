"""Sample inputs and same-dtype PyTorch expressions of every op, one module per stem; see `lcdd_kernels.testing`."""
