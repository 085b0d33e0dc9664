"""The public operations: docstrings, argument checks, choice of kernels."""
