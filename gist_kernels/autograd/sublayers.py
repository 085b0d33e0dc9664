"""A transformer block's sublayers with an adapter, as one autograd node each.

The nodes save what :mod:`gist_kernels.autograd.equations` keeps, and refuse weights that have
changed since. A forward pass converts each frozen weight once, for its backward pass too.

Backends differ in their :class:`~gist_kernels.kernels.protocols.SublayerKernels`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from gist_kernels.autograd import equations
from gist_kernels.autograd.casts import frozen_in_dtype
from gist_kernels.autograd.derivatives import once_differentiable
from gist_kernels.autograd.equations import AttentionSaved, MlpSaved, Needs, PrefixSaved
from gist_kernels.autograd.linear import FrozenLinear, LinearParts, QuantisedMatmuls
from gist_kernels.autograd.trained import TRAINED, Sublayer, Trained
from gist_kernels.kernels.protocols import SublayerKernels
from gist_kernels.quantised import QuantisedWeight
from gist_kernels.weights import (
    AdapterWeights,
    AttentionWeights,
    LinearUpdate,
    MlpWeights,
    NormWeights,
    Rotation,
)


def sublayer_of(
    kernels: SublayerKernels,
    dtype: torch.dtype,
    norm: NormWeights | None,
    weights: AttentionWeights | MlpWeights,
    adapter: AdapterWeights | None,
) -> Sublayer:
    """What :func:`adapter_attention` or :func:`adapter_mlp` takes, for matmuls in ``dtype``."""
    if isinstance(weights, AttentionWeights):
        first_update, last_update = weights.qkv_update, weights.proj_update
    else:
        first_update, last_update = weights.fc1_update, weights.fc2_update
    first = _frozen(kernels, dtype, *weights[:2], first_update)
    last = _frozen(kernels, dtype, *weights[2:4], last_update)
    return Sublayer(kernels, norm, weights, first, last, adapter)


def _frozen(
    kernels: SublayerKernels,
    dtype: torch.dtype,
    weight: torch.Tensor | QuantisedWeight,
    bias: torch.Tensor | None,
    update: LinearUpdate | None,
) -> FrozenLinear:
    parts = LinearParts(bias) if update is None else LinearParts(bias, *update)
    if isinstance(weight, QuantisedWeight):
        matmuls = QuantisedMatmuls(kernels.linear)
        return FrozenLinear.of(matmuls, weight.in_dtype(dtype), parts, frozen_in_dtype)
    # No detached view of a weight that needs no conversion: `weight.data = ...` would leave it.
    weight = frozen_in_dtype(weight, dtype)
    return FrozenLinear.of(kernels.linear, weight, parts, frozen_in_dtype)


def adapter_attention(
    sublayer: Sublayer,
    x: torch.Tensor,
    num_queries: int | None,
    drop_path: torch.Tensor | None,
    grad_tokens: tuple[int, int] | None,
    rotation: Rotation | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`gist_kernels.adapter_attention`; ``rotation`` is None for the weights' own."""
    sublayer, need_grad = sublayer.of_call(drop_path, rotation, lengths), torch.is_grad_enabled()
    if num_queries is None or num_queries >= x.shape[1]:
        return _Attention.apply(sublayer, need_grad, grad_tokens, *sublayer.trained, x)
    return _PrefixAttention.apply(sublayer, need_grad, num_queries, *sublayer.trained, x)


def adapter_mlp(
    sublayer: Sublayer, x: torch.Tensor, drop_path: torch.Tensor | None
) -> torch.Tensor:
    """See :func:`gist_kernels.adapter_mlp`."""
    sublayer = sublayer.of_call(drop_path)
    return _Mlp.apply(sublayer, *sublayer.trained, x)


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
        ctx.grad_tokens = grad_tokens
        _keep(ctx, sublayer, tensors, saved)
        return result

    @staticmethod
    @once_differentiable("adapter_attention")
    def backward(ctx: Any, kept: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sublayer, x, saved = _restored(ctx, kept, AttentionSaved)
        d_x, grads = equations.all_attention_backward(
            sublayer, x, ctx.grad_tokens, saved, ctx.graph,
            _needs(ctx.needs_input_grad[3:]), d_out,
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
        ctx.num_queries = num_queries
        _keep(ctx, sublayer, tensors, saved)
        return result

    @staticmethod
    @once_differentiable("adapter_attention")
    def backward(ctx: Any, kept: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sublayer, x, saved = _restored(ctx, kept, PrefixSaved)
        d_x, grads = equations.few_attention_backward(
            sublayer, x, ctx.num_queries, saved, ctx.graph,
            _needs(ctx.needs_input_grad[3:]), d_out,
        )  # fmt: skip
        return None, None, None, *grads.flat(), d_x


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sublayer: Sublayer, *tensors: Any) -> torch.Tensor:
        result, saved = equations.mlp_forward(sublayer, tensors[-1])
        _keep(ctx, sublayer, tensors, saved)
        return result

    @staticmethod
    @once_differentiable("adapter_mlp")
    def backward(ctx: Any, kept: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sublayer, x, saved = _restored(ctx, kept, MlpSaved)
        d_x, grads = equations.mlp_backward(
            sublayer, x, saved, _needs(ctx.needs_input_grad[1:]), d_out
        )
        return None, *grads.flat(), d_x


def _keep(ctx: Any, sublayer: Sublayer, tensors: tuple[Any, ...], saved: tuple[Any, ...]) -> None:
    ctx.sublayer, ctx.versions = sublayer, sublayer.versions()
    # The trained tensors too, though the sublayer has them: autograd sees to their versions.
    ctx.save_for_backward(*tensors, *saved)


def _restored(ctx: Any, kept: Any, kind: Any) -> tuple[Sublayer, torch.Tensor, Any]:
    """The sublayer as forward found it, x, and what its equations keep, a ``kind``."""
    ctx.sublayer.check_versions(ctx.versions)
    return ctx.sublayer, kept[TRAINED], kind._make(kept[TRAINED + 1 :])


@lru_cache(maxsize=256)
def _needs(flags: tuple[bool, ...]) -> Needs:
    """Which gradients autograd asks for."""
    return Needs(flags[TRAINED], Trained.from_flat(flags[:TRAINED]))
