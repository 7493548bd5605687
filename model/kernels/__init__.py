"""Triton kernels of the passes between matrix products. Triton is imported at the first call of an operator, on a GPU."""
