"""The kernels behind the operations: a folder for each backend."""
