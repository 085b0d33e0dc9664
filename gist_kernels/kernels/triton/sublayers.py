"""What a block's sublayers run on here: Triton, and PyTorch's own products and long attention."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from gist_kernels.fused import SublayerKernels
from gist_kernels.kernels.triton import activation, adapter, attention
from gist_kernels.sdpa import attention_by


def _add_linear(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return out.addmm_(x, weight.t())


_attention_forward, _attention_backward = attention_by(attention)

KERNELS = SublayerKernels(
    adapter_forward=adapter.forward,
    adapter_backward=adapter.backward,
    activation=activation.forward,
    activation_backward=partial(activation.backward, into_d_a=True),
    attention_forward=_attention_forward,
    attention_backward=_attention_backward,
    linear=F.linear,
    add_linear=_add_linear,
)
