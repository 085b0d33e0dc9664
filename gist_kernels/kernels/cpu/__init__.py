"""The C++ backend for CPU tensors. CMake builds gist_kernels/csrc into ``_native``."""

from __future__ import annotations

import torch

from gist_kernels.kernels.cpu.native import import_error, native
from gist_kernels.kernels.protocols import (
    AdapterKernels,
    AttentionKernels,
    Backend,
    DivergenceKernels,
    LinearLossKernels,
    LossKernels,
    SublayerKernels,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _detail() -> str:
    from gist_kernels.kernels.cpu import linear

    return f"C++, {native.instruction_set()} instructions; {linear.detail()}"


def _loss() -> LossKernels:
    from gist_kernels.kernels.cpu import loss

    return loss


def _divergence() -> DivergenceKernels:
    from gist_kernels.kernels.cpu import divergence

    return divergence


def _linear_loss() -> LinearLossKernels:
    from gist_kernels.kernels.cpu import head

    return LinearLossKernels("cpu", _loss(), _divergence(), head)


def _adapter() -> AdapterKernels:
    from gist_kernels.kernels.cpu import adapter

    return adapter


def _attention() -> AttentionKernels:
    from gist_kernels.kernels.cpu import attention

    return attention


def _sublayers() -> SublayerKernels:
    from gist_kernels.kernels.cpu import activation, linear

    return SublayerKernels(_adapter(), activation, _attention(), linear)


if native is None:
    BACKEND = Backend(
        "cpu",
        unavailable=f"the native module is missing ({import_error}); reinstall with a C++17 "
        "compiler on the path and without GIST_KERNELS_NATIVE=0",
    )
else:
    BACKEND = Backend(
        "cpu",
        device_types=("cpu",),
        dtypes=DTYPES,
        detail=_detail,
        loss=_loss,
        divergence=_divergence,
        linear_loss=_linear_loss,
        adapter=_adapter,
        attention=_attention,
        sublayers=_sublayers,
    )
