"""The C++ backend for CPU tensors. CMake builds gist_kernels/csrc into ``_native``."""

from __future__ import annotations

import torch

from gist_kernels.kernels.cpu.native import import_error, native
from gist_kernels.kernels.protocols import Backend, LinearLossKernels, SublayerKernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

if native is None:
    BACKEND = Backend(
        "cpu",
        unavailable=f"the native module is missing ({import_error}); reinstall with a C++17 "
        "compiler on the path and without GIST_KERNELS_NATIVE=0",
    )
else:
    from gist_kernels.kernels.cpu import (
        activation,
        adapter,
        attention,
        divergence,
        head,
        linear,
        loss,
    )

    BACKEND = Backend(
        "cpu",
        device_types=("cpu",),
        dtypes=DTYPES,
        detail=f"C++, {native.instruction_set()} instructions; {linear.detail()}",
        loss=loss,
        divergence=divergence,
        linear_loss=LinearLossKernels("cpu", loss, divergence, head),
        adapter=adapter,
        attention=attention,
        sublayers=SublayerKernels(adapter, activation, attention, linear),
    )
