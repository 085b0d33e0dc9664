"""What a block's sublayers run on here: C++, and oneDNN for products with frozen weights."""

from __future__ import annotations

from functools import partial

from gist_kernels.fused import SublayerKernels
from gist_kernels.kernels.cpu import activation, adapter, attention, linear
from gist_kernels.sdpa import attention_by

_attention_forward, _attention_backward = attention_by(attention)

KERNELS = SublayerKernels(
    adapter_forward=adapter.forward,
    adapter_backward=adapter.backward,
    activation=activation.forward,
    activation_backward=partial(activation.backward, into_d_a=True),
    attention_forward=_attention_forward,
    attention_backward=_attention_backward,
    linear=linear.linear,
    add_linear=linear.add_linear,
)
