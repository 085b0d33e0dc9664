"""A transformer block's sublayers with an adapter, as one autograd node each.

The nodes save what :mod:`gist_kernels.autograd.equations` keeps, and refuse weights that have
changed since. A forward pass converts each frozen weight once, for its backward pass too.

Backends differ in their :class:`~gist_kernels.kernels.protocols.SublayerKernels`.
"""

from __future__ import annotations

from typing import Any

import torch

from gist_kernels.autograd import equations
from gist_kernels.autograd.derivatives import once_differentiable
from gist_kernels.autograd.equations import AttentionSaved, MlpSaved, Needs, PrefixSaved
from gist_kernels.autograd.linear import FrozenLinear, matmul_dtype
from gist_kernels.autograd.tensors import versions_of
from gist_kernels.autograd.trained import TRAINED, Sublayer, Trained
from gist_kernels.kernels.protocols import SublayerKernels
from gist_kernels.weights import AdapterWeights, AttentionWeights, MlpWeights, NormWeights


def adapter_attention(
    kernels: SublayerKernels,
    x: torch.Tensor,
    norm: NormWeights,
    weights: AttentionWeights,
    adapter: AdapterWeights | None,
    num_queries: int | None,
    drop_path: torch.Tensor | None,
    grad_tokens: tuple[int, int] | None,
) -> torch.Tensor:
    """See :func:`gist_kernels.adapter_attention`."""
    dtype = matmul_dtype(x)
    qkv = FrozenLinear.of(kernels.linear, dtype, *weights[:2], weights.qkv_update)
    proj = FrozenLinear.of(kernels.linear, dtype, *weights[2:4], weights.proj_update)
    versions = versions_of(*norm, *weights, drop_path)
    sublayer = Sublayer(kernels, norm, weights, qkv, proj, drop_path, adapter, versions)
    trained, need_grad = sublayer.trained().flat(), torch.is_grad_enabled()
    if num_queries is None or num_queries >= x.shape[1]:
        return _Attention.apply(sublayer, need_grad, grad_tokens, *trained, x)
    return _PrefixAttention.apply(sublayer, need_grad, num_queries, *trained, x)


def adapter_mlp(
    kernels: SublayerKernels,
    x: torch.Tensor,
    norm: NormWeights,
    weights: MlpWeights,
    adapter: AdapterWeights | None,
    drop_path: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`gist_kernels.adapter_mlp`."""
    dtype = matmul_dtype(x)
    fc1 = FrozenLinear.of(kernels.linear, dtype, *weights[:2], weights.fc1_update)
    fc2 = FrozenLinear.of(kernels.linear, dtype, *weights[2:4], weights.fc2_update)
    versions = versions_of(*norm, *weights, drop_path)
    sublayer = Sublayer(kernels, norm, weights, fc1, fc2, drop_path, adapter, versions)
    return _Mlp.apply(sublayer, *sublayer.trained().flat(), x)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sublayer: Sublayer,
        need_grad: bool,
        grad_tokens: tuple[int, int] | None,
        *tensors: Any,
    ) -> torch.Tensor:
        result, saved, ctx.graph = equations.all_attention_forward(
            sublayer, tensors[-1], grad_tokens, need_grad
        )
        ctx.sublayer, ctx.grad_tokens = sublayer, grad_tokens
        ctx.save_for_backward(*tensors, *saved)
        return result

    @staticmethod
    @once_differentiable("adapter_attention")
    def backward(ctx: Any, kept: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        trained, x, saved = _restored(kept, AttentionSaved)
        d_x, grads = equations.all_attention_backward(
            ctx.sublayer.with_trained(trained), x, ctx.grad_tokens, saved, ctx.graph,
            _needs(ctx, 3), d_out,
        )  # fmt: skip
        return None, None, None, *grads.flat(), d_x


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sublayer: Sublayer, need_grad: bool, num_queries: int, *tensors: Any
    ) -> torch.Tensor:
        result, saved, ctx.graph = equations.few_attention_forward(
            sublayer, tensors[-1], num_queries, need_grad
        )
        ctx.sublayer, ctx.num_queries = sublayer, num_queries
        ctx.save_for_backward(*tensors, *saved)
        return result

    @staticmethod
    @once_differentiable("adapter_attention")
    def backward(ctx: Any, kept: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        trained, x, saved = _restored(kept, PrefixSaved)
        d_x, grads = equations.few_attention_backward(
            ctx.sublayer.with_trained(trained), x, ctx.num_queries, saved, ctx.graph,
            _needs(ctx, 3), d_out,
        )  # fmt: skip
        return None, None, None, *grads.flat(), d_x


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sublayer: Sublayer, *tensors: Any) -> torch.Tensor:
        result, saved = equations.mlp_forward(sublayer, tensors[-1])
        ctx.sublayer = sublayer
        ctx.save_for_backward(*tensors, *saved)
        return result

    @staticmethod
    @once_differentiable("adapter_mlp")
    def backward(ctx: Any, kept: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        trained, x, saved = _restored(kept, MlpSaved)
        d_x, grads = equations.mlp_backward(
            ctx.sublayer.with_trained(trained), x, saved, _needs(ctx, 1), d_out
        )
        return None, *grads.flat(), d_x


def _restored(kept: Any, kind: Any) -> tuple[Trained, torch.Tensor, Any]:
    """What a node saved: what may be trained, x, and what its equations keep, a ``kind``."""
    return Trained.from_flat(kept[:TRAINED]), kept[TRAINED], kind._make(kept[TRAINED + 1 :])


def _needs(ctx: Any, options: int) -> Needs:
    """Which gradients autograd asks for, after ``options``."""
    needs = ctx.needs_input_grad[options:]
    return Needs(needs[TRAINED], Trained.from_flat(needs[:TRAINED]))
