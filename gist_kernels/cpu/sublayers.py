"""What a block's sublayers run on here: C++, and oneDNN for products with frozen weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gist_kernels import sdpa
from gist_kernels.cpu import activation, adapter, attention, linear
from gist_kernels.fused import SublayerKernels


def _attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    scale: float | None,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    head_dim = q.shape[-1] // num_heads
    if q.dtype not in attention.DTYPES or head_dim > attention.MAX_HEAD_DIM:
        return sdpa.forward(q, k, v, num_heads, scale, need_grad)
    scale = head_dim**-0.5 if scale is None else scale
    return *attention.forward(q, k, v, num_heads, scale), None


def _attention_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    graph: Any,
    num_heads: int,
    scale: float | None,
    *gradients: torch.Tensor,
) -> None:
    if lse is None:
        sdpa.backward(d_out, graph, *gradients)
        return
    scale = (q.shape[-1] // num_heads) ** -0.5 if scale is None else scale
    attention.backward(d_out, q, k, v, out, lse, num_heads, scale, *gradients)


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
