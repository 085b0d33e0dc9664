"""The place of the C++ backend, which a hub kernel without compiled code can't have."""

from .protocols import Backend

BACKEND = Backend(
    "cpu",
    unavailable="the hub kernel has no C++ kernels; the package gist-kernels has them, built from "
    "source",
)
