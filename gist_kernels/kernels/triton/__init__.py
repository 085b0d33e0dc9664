"""The Triton backend, for tensors on CUDA and ROCm devices.

If the environment variable ``TRITON_INTERPRET=1`` is set before Triton is imported, the kernels run
in Triton's interpreter instead, on CPU tensors. That is slow, but tests then need no device.
"""

from __future__ import annotations

from gist_kernels.kernels.protocols import Backend, LinearLossKernels, SublayerKernels
from gist_kernels.kernels.triton.launch import (
    DEVICE_TYPES,
    DTYPES,
    INTERPRETED,
    detail,
    unavailable,
)

if unavailable() is not None:
    BACKEND = Backend("triton", unavailable=unavailable())
else:  # import Triton only where it can run
    from gist_kernels.kernels.triton import (
        activation,
        adapter,
        attention,
        divergence,
        head,
        linear,
        loss,
    )

    BACKEND = Backend(
        "triton",
        device_types=DEVICE_TYPES,
        dtypes=DTYPES,
        detail=detail(),
        loss=loss,
        divergence=divergence,
        linear_loss=LinearLossKernels("triton", loss, divergence, head),
        adapter=adapter,
        attention=attention,
        sublayers=SublayerKernels(adapter, activation, attention, linear),
    )

__all__ = ["BACKEND", "DEVICE_TYPES", "DTYPES", "INTERPRETED"]
