"""A transformer block's sublayers with an adapter, as one autograd node each.

A node computes ``x + drop_path(layer_scale(sublayer(norm(x)))) + adapter(x)`` for frozen weight
matrices. Kernels that read x anyway carry the adapter along. Forward, the kernel that normalises x
also writes ``x + adapter(x)``, onto which the last matmul is added. Backward, the kernel that goes
through the norm also adds the adapter's part of the gradient of x, and sums up the gradients of the
adapter's weights. Whatever else may be trained is small: the norm, the biases, and low-rank updates
and scales of the linear layers.

Under autocast the matmuls and the attention run in its dtype; the residual stream, norm and adapter
stay in x's dtype. A forward pass converts each frozen weight once, for its backward pass too.

Backends differ in their :class:`~gist_kernels.kernels.protocols.SublayerKernels`; the equations are
here only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gist_kernels.autograd.attention import (
    attention_backward,
    attention_forward,
    token_gradients,
)
from gist_kernels.autograd.derivatives import once_differentiable
from gist_kernels.autograd.linear import (
    FrozenLinear,
    LinearSaved,
    joined_grads,
    matmul_dtype,
    split_projection,
)
from gist_kernels.autograd.tensors import rows_of, versions_of
from gist_kernels.autograd.trained import (
    TRAINED,
    AdapterParts,
    Sublayer,
    SublayerRows,
    Trained,
)
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


class _AttentionSaved(NamedTuple):
    x: torch.Tensor
    z: torch.Tensor | None
    stats: torch.Tensor
    qkv: torch.Tensor
    attended: Any
    lse: torch.Tensor | None
    qkv_unscaled: torch.Tensor | None
    qkv_low: torch.Tensor | None
    proj_unscaled: torch.Tensor | None
    proj_low: torch.Tensor | None


class _Attention(torch.autograd.Function):
    """Attention over all tokens. With ``grad_tokens``, dx is computed for those tokens only and is
    zero elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        sublayer: Sublayer,
        need_grad: bool,
        grad_tokens: tuple[int, int] | None,
        *tensors: Any,
    ) -> torch.Tensor:
        kernels, norm, weights = sublayer[:3]
        x = tensors[-1]
        rows = rows_of(x)
        normed, adapted, z, stats = sublayer.normed_and_adapted(rows, norm)
        qkv, of_qkv = sublayer.first.forward(normed)
        qkv = qkv.view(*x.shape[:2], qkv.shape[1])
        q, k, v = qkv.chunk(3, dim=-1)
        attended, lse, ctx.graph = attention_forward(
            kernels.attention, q, k, v, weights.num_heads, weights.scale, need_grad
        )
        result, of_proj = sublayer.add_last(rows, adapted, attended)
        ctx.sublayer, ctx.grad_tokens = sublayer, grad_tokens
        read_again = sublayer.last.parts.down is not None or grad_tokens is not None
        kept = attended if read_again else None
        saved = _AttentionSaved(x, z, stats, qkv, kept, lse, *of_qkv, *of_proj)
        ctx.save_for_backward(*tensors[:-1], *saved)
        return result

    @staticmethod
    @once_differentiable("adapter_attention")
    def backward(ctx: Any, kept: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        trained, saved = _restored(kept, _AttentionSaved)
        sublayer = ctx.sublayer.with_trained(trained)
        kernels, _, weights = sublayer[:3]
        needs, need_dx = _needs(ctx, 3)
        x, lse = saved.x, saved.lse
        rows = SublayerRows(rows_of(d_out), rows_of(x), saved.z, saved.stats)
        inner_trained = any(needs.norm) or any(needs.first)
        d_attended, d_proj = sublayer.last_backward(
            d_out, lambda: rows_of(saved.attended),
            LinearSaved(saved.proj_unscaled, saved.proj_low), needs.last,
            need_dx or inner_trained,
        )  # fmt: skip
        if d_attended is None:
            adapter = sublayer.adapter_grads(rows.d_out, rows.x, rows.z)
            return None, None, None, *Trained(adapter, last=d_proj).flat(), None

        d_attended = d_attended.view(*x.shape[:2], d_attended.shape[1])
        if ctx.grad_tokens is None or lse is None or inner_trained:
            d_qkv = torch.empty_like(saved.qkv)
            q, k, v = saved.qkv.chunk(3, dim=-1)
            d_q, d_k, d_v = d_qkv.chunk(3, dim=-1)
            attention_backward(
                kernels.attention, d_attended, q, k, v, lse, ctx.graph,
                weights.num_heads, weights.scale, d_q, d_k, d_v,
            )  # fmt: skip
            of_qkv = LinearSaved(saved.qkv_unscaled, saved.qkv_low)
            d_x, grads = sublayer.first_backward(d_qkv, of_qkv, needs, rows)
            d_x = d_x.view(x.shape)
            if ctx.grad_tokens is not None:
                start, count = ctx.grad_tokens
                d_x[:, :start] = 0
                d_x[:, start + count :] = 0
            return None, None, None, *grads._replace(last=d_proj).flat(), d_x

        start, count = ctx.grad_tokens
        tokens = slice(start, start + count)
        d_qkv = token_gradients(d_attended, saved.qkv, saved.attended, lse, weights, tokens)
        adapter = sublayer.adapter_grads(rows.d_out, rows.x, rows.z)
        d_tokens, _ = sublayer.first_backward(
            d_qkv, LinearSaved(), needs, rows.of_tokens(x.shape[:2], tokens)
        )
        d_x = torch.zeros_like(x)
        d_x[:, tokens] = d_tokens.view(x.shape[0], count, x.shape[2])
        return None, None, None, *Trained(adapter, last=d_proj).flat(), d_x


class _PrefixSaved(NamedTuple):
    x: torch.Tensor
    z: torch.Tensor | None
    stats: torch.Tensor
    q: torch.Tensor
    kv: torch.Tensor
    attended: Any
    lse: torch.Tensor | None
    q_unscaled: torch.Tensor | None
    q_low: torch.Tensor | None
    kv_unscaled: torch.Tensor | None
    kv_low: torch.Tensor | None
    proj_unscaled: torch.Tensor | None
    proj_low: torch.Tensor | None


class _PrefixAttention(torch.autograd.Function):
    """Attention of the first tokens only, where nothing else is read afterwards: only they have
    queries, the projection, the residual and the adapter."""

    @staticmethod
    def forward(
        ctx: Any, sublayer: Sublayer, need_grad: bool, num_queries: int, *tensors: Any
    ) -> torch.Tensor:
        kernels, norm, weights = sublayer[:3]
        x = tensors[-1]
        read = rows_of(x[:, :num_queries])
        normed, _, _, stats = kernels.adapter.forward(rows_of(x), None, norm, None, None)
        assert normed is not None
        assert stats is not None
        _, adapted, z, _ = sublayer.normed_and_adapted(read, None)
        q_linear, kv_linear = split_projection(sublayer.first)
        q, of_q = q_linear.forward(rows_of(normed.view(x.shape)[:, :num_queries]))
        kv, of_kv = kv_linear.forward(normed)
        q = q.view(len(x), num_queries, q.shape[1])
        kv = kv.view(*x.shape[:2], kv.shape[1])
        k, v = kv.chunk(2, dim=-1)
        attended, lse, ctx.graph = attention_forward(
            kernels.attention, q, k, v, weights.num_heads, weights.scale, need_grad
        )
        result, of_proj = sublayer.add_last(read, adapted, attended)
        ctx.sublayer, ctx.num_queries = sublayer, num_queries
        kept = attended if sublayer.last.parts.down is not None else None
        saved = _PrefixSaved(x, z, stats, q, kv, kept, lse, *of_q, *of_kv, *of_proj)
        ctx.save_for_backward(*tensors[:-1], *saved)
        return result

    @staticmethod
    @once_differentiable("adapter_attention")
    def backward(ctx: Any, kept: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        trained, saved = _restored(kept, _PrefixSaved)
        sublayer, num_queries = ctx.sublayer.with_trained(trained), ctx.num_queries
        kernels, norm, weights = sublayer[:3]
        needs, need_dx = _needs(ctx, 3)
        x, q, kv = saved.x, saved.q, saved.kv
        rows = SublayerRows(rows_of(d_out), rows_of(x), saved.z, saved.stats)
        read = rows_of(x[:, :num_queries])
        d_attended, d_proj = sublayer.last_backward(
            d_out, lambda: rows_of(saved.attended),
            LinearSaved(saved.proj_unscaled, saved.proj_low), needs.last,
            need_dx or any(needs.norm) or any(needs.first),
        )  # fmt: skip
        if d_attended is None:
            adapter = sublayer.adapter_grads(rows.d_out, read, rows.z)
            return None, None, None, *Trained(adapter, last=d_proj).flat(), None

        d_q, d_kv = torch.empty_like(q), torch.empty_like(kv)
        k, v = kv.chunk(2, dim=-1)
        d_k, d_v = d_kv.chunk(2, dim=-1)
        attention_backward(
            kernels.attention, d_attended.view(q.shape), q, k, v, saved.lse, ctx.graph,
            weights.num_heads, weights.scale, d_q, d_k, d_v,
        )  # fmt: skip
        q_linear, kv_linear = split_projection(sublayer.first)
        d_normed, kv_grads = kv_linear.backward(
            rows_of(d_kv), lambda: sublayer.normed(rows.x),
            LinearSaved(saved.kv_unscaled, saved.kv_low), needs.first,
        )  # fmt: skip
        d_read_normed, q_grads = q_linear.backward(
            rows_of(d_q), lambda: sublayer.normed(read),
            LinearSaved(saved.q_unscaled, saved.q_low), needs.first,
        )  # fmt: skip
        assert d_normed is not None
        assert d_read_normed is not None
        of_read = d_normed.view(x.shape)[:, :num_queries]
        of_read += d_read_normed.view(of_read.shape)
        d_normed = d_normed.to(x.dtype)
        norm_grads = sublayer.norm_grads(d_normed, rows, needs.norm)
        d_x, *_ = kernels.adapter.backward(
            None, d_normed, rows.x, norm, rows.stats, None, None, pass_through=False
        )
        assert d_x is not None
        d_x, d_read, adapter = d_x.view(x.shape), rows.d_out, AdapterParts()
        if sublayer.adapter is not None:
            of_adapter: Any = kernels.adapter.backward(
                d_read, None, read, None, None, sublayer.adapter, rows.z, pass_through=True
            )
            d_read, adapter = of_adapter[0], AdapterParts(*of_adapter[1:])
        d_x[:, :num_queries] += d_read.view(of_read.shape)
        grads = Trained(adapter, norm_grads, joined_grads(q_grads, kv_grads), d_proj)
        return None, None, None, *grads.flat(), d_x


class _MlpSaved(NamedTuple):
    x: torch.Tensor
    z: torch.Tensor | None
    stats: torch.Tensor
    u: torch.Tensor
    fc1_unscaled: torch.Tensor | None
    fc1_low: torch.Tensor | None
    fc2_unscaled: torch.Tensor | None
    fc2_low: torch.Tensor | None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sublayer: Sublayer, *tensors: Any) -> torch.Tensor:
        kernels, norm, weights = sublayer[:3]
        x = tensors[-1]
        rows = rows_of(x)
        normed, adapted, z, stats = sublayer.normed_and_adapted(rows, norm)
        u, of_fc1 = sublayer.first.forward(normed)
        hidden = kernels.activation.forward(u, weights.activation)
        hidden = hidden.view(*x.shape[:2], hidden.shape[1])
        result, of_fc2 = sublayer.add_last(rows, adapted, hidden)
        ctx.sublayer = sublayer
        saved = _MlpSaved(x, z, stats, u, *of_fc1, *of_fc2)
        ctx.save_for_backward(*tensors[:-1], *saved)
        return result

    @staticmethod
    @once_differentiable("adapter_mlp")
    def backward(ctx: Any, kept: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        trained, saved = _restored(kept, _MlpSaved)
        sublayer = ctx.sublayer.with_trained(trained)
        activation, name = sublayer.kernels.activation, sublayer.weights.activation
        needs, need_dx = _needs(ctx, 1)
        rows = SublayerRows(rows_of(d_out), rows_of(saved.x), saved.z, saved.stats)
        d_hidden, d_fc2 = sublayer.last_backward(
            d_out, lambda: activation.forward(saved.u, name),
            LinearSaved(saved.fc2_unscaled, saved.fc2_low), needs.last,
            need_dx or any(needs.norm) or any(needs.first),
        )  # fmt: skip
        if d_hidden is None:
            adapter = sublayer.adapter_grads(rows.d_out, rows.x, rows.z)
            return None, *Trained(adapter, last=d_fc2).flat(), None
        d_u = activation.backward(d_hidden, saved.u, name, into_d_a=True)
        of_fc1 = LinearSaved(saved.fc1_unscaled, saved.fc1_low)
        d_x, grads = sublayer.first_backward(d_u, of_fc1, needs, rows)
        return None, *grads._replace(last=d_fc2).flat(), d_x.view(saved.x.shape)


def _restored(kept: Any, kind: Any) -> tuple[Trained, Any]:
    """What a node saved: what may be trained, and its own ``kind`` of holder."""
    return Trained.from_flat(kept[:TRAINED]), kind._make(kept[TRAINED:])


def _needs(ctx: Any, options: int) -> tuple[Trained, bool]:
    """Which of what may be trained needs a gradient, and whether x does, after ``options``."""
    needs = ctx.needs_input_grad[options:]
    return Trained.from_flat(needs[:TRAINED]), needs[TRAINED]
