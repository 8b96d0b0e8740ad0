"""What is right: plain PyTorch, forward and backward written out, safe in float64.

Every other backend implements functions with the same names (another suffix), parameters and results as the `*_ref`
here.
"""
