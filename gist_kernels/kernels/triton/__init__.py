"""The Triton backend, for tensors on CUDA and ROCm devices.

If the environment variable ``TRITON_INTERPRET=1`` is set before Triton is imported, the kernels run
in Triton's interpreter instead, on CPU tensors. That is slow, but tests then need no device.
"""

from __future__ import annotations

from gist_kernels.kernels.protocols import (
    AdapterKernels,
    AttentionKernels,
    Backend,
    DivergenceKernels,
    LinearLossKernels,
    LossKernels,
    SublayerKernels,
)
from gist_kernels.kernels.triton.launch import (
    DEVICE_TYPES,
    DTYPES,
    INTERPRETED,
    detail,
    unavailable,
)


def _loss() -> LossKernels:
    from gist_kernels.kernels.triton import loss

    return loss


def _divergence() -> DivergenceKernels:
    from gist_kernels.kernels.triton import divergence

    return divergence


def _linear_loss() -> LinearLossKernels:
    from gist_kernels.kernels.triton import head

    return LinearLossKernels("triton", _loss(), _divergence(), head)


def _adapter() -> AdapterKernels:
    from gist_kernels.kernels.triton import adapter

    return adapter


def _attention() -> AttentionKernels:
    from gist_kernels.kernels.triton import attention

    return attention


def _sublayers() -> SublayerKernels:
    from gist_kernels.kernels.triton import activation, linear

    return SublayerKernels(_adapter(), activation, _attention(), linear)


if unavailable() is not None:
    BACKEND = Backend("triton", unavailable=unavailable())
else:
    BACKEND = Backend(
        "triton",
        device_types=DEVICE_TYPES,
        dtypes=DTYPES,
        detail=detail,
        loss=_loss,
        divergence=_divergence,
        linear_loss=_linear_loss,
        adapter=_adapter,
        attention=_attention,
        sublayers=_sublayers,
    )

__all__ = ["BACKEND", "DEVICE_TYPES", "DTYPES", "INTERPRETED"]
