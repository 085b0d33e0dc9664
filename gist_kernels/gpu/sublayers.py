"""What a block's sublayers run on here: Triton, and PyTorch's own products and long attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gist_kernels import sdpa
from gist_kernels.fused import SublayerKernels
from gist_kernels.gpu import activation, adapter, attention


def _attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    scale: float | None,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    if not attention.serves(q, k, num_heads):
        return sdpa.forward(q, k, v, num_heads, scale, need_grad)
    scale = (q.shape[-1] // num_heads) ** -0.5 if scale is None else scale
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


def _add_linear(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return out.addmm_(x, weight.t())


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
