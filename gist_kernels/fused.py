"""The adapter, and a transformer block's sublayers with it, as one autograd node each.

A sublayer's node computes ``x + drop_path(layer_scale(sublayer(norm(x)))) + adapter(x)`` for frozen
norm and sublayer. Kernels that read x anyway carry the adapter along: forward, the one that
normalises x also writes ``x + adapter(x)``, onto which the sublayer's last product is added;
backward, the one that goes back through the norm also adds the adapter's part of the gradient of x
and sums up the gradients of the adapter's weights. Nothing that only the gradient of a frozen
weight would need is computed or kept.

Backends differ in their :class:`SublayerKernels`; the equations are here alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gist_kernels.ops import needs_dispatcher
from gist_kernels.options import AdapterWeights, AttentionWeights, MlpWeights, NormWeights
from gist_kernels.reference import OPERATIONS as REFERENCE

Tensors = tuple[torch.Tensor | None, ...]


class SublayerKernels(NamedTuple):
    """What a backend brings. Nothing given is written to, except where a line says so."""

    adapter_forward: Callable[..., Any]
    """``(x, add, norm, adapter, bias) -> (normed, out, z, stats)``, see ``cpu.adapter.forward``."""
    adapter_backward: Callable[..., Any]
    """``(d_out, d_normed, x, norm, stats, adapter, z, pass_through=, need_dx=) -> (d_x, and of
    the adapter's four tensors)``, see ``cpu.adapter.backward``."""
    activation: Callable[..., torch.Tensor]
    """``(u, name) -> act(u)``."""
    activation_backward: Callable[..., torch.Tensor]
    """``(d_a, u, name) -> d_a * act'(u)``, written over d_a."""
    attention_forward: Callable[..., Any]
    """``(q, k, v, num_heads, scale, need_grad) -> (out, lse, graph)`` of (B, Q, H Dh) queries and
    (B, N, H Dh) keys and values, of any batch and row strides: backward takes one of the log-sum-
    exps, (B, H, Q), and of an object of the backend's own; the other is None."""
    attention_backward: Callable[..., None]
    """``(d_out, q, k, v, out, lse, graph, num_heads, scale, d_q, d_k, d_v)``: writes the last
    three."""
    linear: Callable[..., torch.Tensor]
    """``(x, weight, bias) -> x weight^T + bias``."""
    add_linear: Callable[..., torch.Tensor]
    """``(out, x, weight) -> out + x weight^T``; may write over ``out``."""


def sublayer_operations(kernels: SublayerKernels) -> dict[str, Callable[..., Any]]:
    """The adapter's and the sublayers' operations as a backend's table takes them."""

    def adapter(
        x: torch.Tensor,
        *weights: torch.Tensor | None,
        scale: float,
        activation: str,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        # Under autocast the reference's products are in a half type, which these kernels have not.
        if (
            needs_dispatcher(x, residual, *weights)
            or _negated(x, residual, *weights)
            or torch.is_autocast_enabled(x.device.type)
        ):
            return REFERENCE["adapter"](
                x, *weights, scale=scale, activation=activation, residual=residual
            )
        onto_x = residual is x
        options = kernels, scale, activation, onto_x
        return _AdapterNode.apply(options, *weights, x, None if onto_x else residual)

    def adapter_attention(
        x: torch.Tensor,
        norm: NormWeights,
        weights: AttentionWeights,
        adapter: AdapterWeights | None,
        *,
        num_queries: int | None,
        drop_path: torch.Tensor | None,
        grad_tokens: tuple[int, int] | None,
    ) -> torch.Tensor:
        if needs_dispatcher(x) or _negated(x, *norm, *weights, *(adapter or ())):
            return REFERENCE["adapter_attention"](
                x, norm, weights, adapter,
                num_queries=num_queries, drop_path=drop_path, grad_tokens=grad_tokens,
            )  # fmt: skip
        versions = _versions(*norm, *weights, drop_path)
        sublayer = _Sublayer(kernels, norm, weights, weights[2:4], drop_path, adapter, versions)
        need_grad, trainable = torch.is_grad_enabled(), (adapter or _NO_ADAPTER)[:4]
        if num_queries is None or num_queries >= x.shape[1]:
            return _AttentionNode.apply(sublayer, need_grad, grad_tokens, *trainable, x)
        return _PrefixNode.apply(sublayer, need_grad, num_queries, *trainable, x)

    def adapter_mlp(
        x: torch.Tensor,
        norm: NormWeights,
        weights: MlpWeights,
        adapter: AdapterWeights | None,
        *,
        drop_path: torch.Tensor | None,
    ) -> torch.Tensor:
        if needs_dispatcher(x) or _negated(x, *norm, *weights, *(adapter or ())):
            return REFERENCE["adapter_mlp"](x, norm, weights, adapter, drop_path=drop_path)
        versions = _versions(*norm, *weights, drop_path)
        sublayer = _Sublayer(kernels, norm, weights, weights[2:4], drop_path, adapter, versions)
        return _MlpNode.apply(sublayer, *(adapter or _NO_ADAPTER)[:4], x)

    def prefix_attention(
        qkv: torch.Tensor, num_heads: int, *, num_queries: int | None, scale: float | None
    ) -> torch.Tensor:
        if needs_dispatcher(qkv) or _negated(qkv):
            return REFERENCE["prefix_attention"](
                qkv, num_heads, num_queries=num_queries, scale=scale
            )
        need_grad = torch.is_grad_enabled()
        return _PackedAttentionNode.apply(kernels, need_grad, num_heads, num_queries, scale, qkv)

    return {
        "adapter": adapter,
        "adapter_attention": adapter_attention,
        "adapter_mlp": adapter_mlp,
        "prefix_attention": prefix_attention,
    }


_NO_ADAPTER = (None, None, None, None)


class _Sublayer(NamedTuple):
    """What a node is given beside the tensors that may need gradients."""

    kernels: SublayerKernels
    norm: NormWeights
    weights: Any
    """AttentionWeights or MlpWeights."""
    last: tuple[torch.Tensor, torch.Tensor | None]
    """Weight and bias of its last product."""
    drop_path: torch.Tensor | None
    adapter: AdapterWeights | None
    versions: list[int]
    """Of what is frozen, as forward found it."""

    def check_unchanged(self) -> None:
        """As autograd does for the tensors that it saves."""
        if self.versions != _versions(*self.norm, *self.weights, self.drop_path):
            raise RuntimeError(
                "a frozen weight of a sublayer, or its drop_path, was modified by an inplace "
                "operation after forward, which backward needs it for; modify it after backward"
            )

    def with_saved(self, trainable: Any) -> AdapterWeights | None:
        """The adapter, of tensors that autograd has seen to be unchanged since forward."""
        if self.adapter is None:
            return None
        return AdapterWeights._make((*trainable, *self.adapter[4:]))

    def factors(self) -> list[torch.Tensor]:
        """What scales the last product, bias included."""
        return [f for f in (self.weights.layer_scale, self.drop_path) if f is not None]

    def adapted(self, x: torch.Tensor, norm: NormWeights | None) -> Any:
        """``adapter_forward`` onto x itself, with the bias of the product that will be added."""
        bias = None if self.factors() else self.last[1]
        return self.kernels.adapter_forward(x, x, norm, self.adapter, bias)

    def add_product(
        self, x: torch.Tensor, adapted: torch.Tensor | None, inner: torch.Tensor
    ) -> torch.Tensor:
        """The last product, of (B, N, I) ``inner``, added to what ``adapted`` gave."""
        weight, bias = self.last
        shape = *inner.shape[:2], len(weight)
        factors = self.factors()
        if adapted is not None and not factors:
            return _result(self.kernels.add_linear(adapted, _rows(inner), weight), shape)
        update = _result(self.kernels.linear(_rows(inner), weight, bias), shape)
        for factor in factors:
            update = update * factor
        return update.add_((x if adapted is None else adapted).view_as(update))

    def before_product(self, d_out: torch.Tensor) -> torch.Tensor:
        """The gradient of ``inner``, from that of the sublayer, (B, N, D)."""
        for factor in self.factors():
            d_out = d_out * factor
        return self.kernels.linear(_rows(d_out), self.last[0].t(), None)


class _AdapterNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[SublayerKernels, float, str, bool],
        *tensors: Any,
    ) -> torch.Tensor:
        kernels, scale, activation, onto_x = ctx.options = options
        *weights, x, residual = tensors
        rows = _rows(x)
        add = rows if onto_x else None if residual is None else _rows(residual)
        adapter = AdapterWeights._make((*weights, scale, activation))
        _, out, z, _ = kernels.adapter_forward(rows, add, None, adapter, None)
        ctx.save_for_backward(*weights, x, z)
        return _result(out, x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Tensors:
        kernels, scale, activation, onto_x = ctx.options
        saved: Any = ctx.saved_tensors
        *weights, x, z = saved
        need_dx, need_residual = ctx.needs_input_grad[5:7]
        adapter = AdapterWeights._make((*weights, scale, activation))
        d_x, *of_weights = kernels.adapter_backward(
            _rows(d_out), None, _rows(x), None, None, adapter, z,
            pass_through=onto_x, need_dx=need_dx,
        )  # fmt: skip
        d_x = d_x.view(x.shape) if need_dx else None
        return None, *of_weights, d_x, d_out if need_residual else None


class _AttentionNode(torch.autograd.Function):
    """Of all tokens; the gradient of x may be left at that of ``grad_tokens``."""

    @staticmethod
    def forward(
        ctx: Any,
        sublayer: _Sublayer,
        need_grad: bool,
        grad_tokens: tuple[int, int] | None,
        *tensors: Any,
    ) -> torch.Tensor:
        kernels, norm, weights = sublayer[:3]
        *trainable, x = tensors
        rows = _rows(x)
        normed, out, z, stats = sublayer.adapted(rows, norm)
        qkv = kernels.linear(normed, weights.qkv_weight, weights.qkv_bias)
        qkv = qkv.view(*x.shape[:2], qkv.shape[1])
        attended, lse, ctx.graph = kernels.attention_forward(
            *qkv.chunk(3, dim=-1), weights.num_heads, weights.scale, need_grad
        )
        ctx.sublayer, ctx.grad_tokens = sublayer, grad_tokens
        ctx.save_for_backward(*trainable, x, z, stats, qkv, attended, lse)
        return sublayer.add_product(rows, out, attended)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Tensors:
        sublayer = ctx.sublayer
        sublayer.check_unchanged()
        kernels, norm, weights = sublayer[:3]
        *trainable, x, z, stats, qkv, attended, lse = ctx.saved_tensors
        adapter = sublayer.with_saved(trainable)
        rows = _rows(d_out), _rows(x), z, stats
        if not ctx.needs_input_grad[7]:
            return None, None, None, *_of_adapter_alone(kernels, adapter, *rows), None

        d_attended = sublayer.before_product(d_out).view(attended.shape)
        if ctx.grad_tokens is None or lse is None:
            d_qkv = torch.empty_like(qkv)
            kernels.attention_backward(
                d_attended, *qkv.chunk(3, dim=-1), attended, lse, ctx.graph,
                weights.num_heads, weights.scale, *d_qkv.chunk(3, dim=-1),
            )  # fmt: skip
            d_x, *of_adapter = _through_norm(
                kernels, norm, weights.qkv_weight, d_qkv, adapter, *rows
            )
            d_x = d_x.view(x.shape)
            if ctx.grad_tokens is not None:
                start, count = ctx.grad_tokens
                d_x[:, :start] = 0
                d_x[:, start + count :] = 0
            return None, None, None, *of_adapter, d_x

        start, count = ctx.grad_tokens
        tokens = slice(start, start + count)
        d_qkv = _token_gradients(d_attended, qkv, attended, lse, weights, tokens)
        of_adapter = _of_adapter_alone(kernels, adapter, *rows)
        some: Any = [
            None if t is None else _rows(t.view(*x.shape[:2], t.shape[1])[:, tokens]) for t in rows
        ]
        d_tokens, *_ = _through_norm(kernels, norm, weights.qkv_weight, d_qkv, adapter, *some)
        d_x = torch.zeros_like(x)
        d_x[:, tokens] = d_tokens.view(x.shape[0], count, x.shape[2])
        return None, None, None, *of_adapter, d_x


class _PrefixNode(torch.autograd.Function):
    """Of the first tokens alone, where nothing else is read afterwards: theirs are the queries,
    and the projection, the residual and the adapter."""

    @staticmethod
    def forward(
        ctx: Any, sublayer: _Sublayer, need_grad: bool, num_queries: int, *tensors: Any
    ) -> torch.Tensor:
        kernels, norm, weights = sublayer[:3]
        *trainable, x = tensors
        read = _rows(x[:, :num_queries])
        normed, _, _, stats = kernels.adapter_forward(_rows(x), None, norm, None, None)
        _, out, z, _ = sublayer.adapted(read, None)
        of_queries, of_keys = _split(weights)
        first = _rows(normed.view(x.shape)[:, :num_queries])
        q, kv = kernels.linear(first, *of_queries), kernels.linear(normed, *of_keys)
        q = q.view(len(x), num_queries, q.shape[1])
        kv = kv.view(*x.shape[:2], kv.shape[1])
        attended, lse, ctx.graph = kernels.attention_forward(
            q, *kv.chunk(2, dim=-1), weights.num_heads, weights.scale, need_grad
        )
        ctx.sublayer, ctx.num_queries = sublayer, num_queries
        ctx.save_for_backward(*trainable, x, z, stats, q, kv, attended, lse)
        return sublayer.add_product(read, out, attended)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Tensors:
        sublayer = ctx.sublayer
        sublayer.check_unchanged()
        kernels, norm, weights = sublayer[:3]
        *trainable, x, z, stats, q, kv, attended, lse = ctx.saved_tensors
        adapter, read = sublayer.with_saved(trainable), _rows(x[:, : ctx.num_queries])
        d_read = _rows(d_out)
        if not ctx.needs_input_grad[7]:
            of_adapter = _of_adapter_alone(kernels, adapter, d_read, read, z, None)
            return None, None, None, *of_adapter, None

        d_attended = sublayer.before_product(d_out).view(attended.shape)
        d_q, d_kv = torch.empty_like(q), torch.empty_like(kv)
        kernels.attention_backward(
            d_attended, q, *kv.chunk(2, dim=-1), attended, lse, ctx.graph,
            weights.num_heads, weights.scale, d_q, *d_kv.chunk(2, dim=-1),
        )  # fmt: skip
        (query_weight, _), (key_weight, _) = _split(weights)
        d_normed = kernels.linear(_rows(d_kv), key_weight.t(), None)
        first = d_normed.view(x.shape)[:, : ctx.num_queries]
        first += kernels.linear(_rows(d_q), query_weight.t(), None).view(first.shape)
        d_x, *_ = kernels.adapter_backward(
            None, d_normed, _rows(x), norm, stats, None, None, pass_through=False
        )
        d_x, of_adapter = d_x.view(x.shape), _NO_ADAPTER
        if adapter is not None:
            d_read, *of_adapter = kernels.adapter_backward(
                d_read, None, read, None, None, adapter, z, pass_through=True
            )
        d_x[:, : ctx.num_queries] += d_read.view(first.shape)
        return None, None, None, *of_adapter, d_x


class _MlpNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sublayer: _Sublayer, *tensors: Any) -> torch.Tensor:
        kernels, norm, weights = sublayer[:3]
        ctx.sublayer = sublayer
        *trainable, x = tensors
        rows = _rows(x)
        normed, out, z, stats = sublayer.adapted(rows, norm)
        u = kernels.linear(normed, weights.fc1_weight, weights.fc1_bias)
        hidden = kernels.activation(u, weights.activation)
        ctx.save_for_backward(*trainable, x, z, stats, u)
        return sublayer.add_product(rows, out, hidden.view(*x.shape[:2], hidden.shape[1]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Tensors:
        sublayer = ctx.sublayer
        sublayer.check_unchanged()
        kernels, norm, weights = sublayer[:3]
        *trainable, x, z, stats, u = ctx.saved_tensors
        adapter = sublayer.with_saved(trainable)
        rows = _rows(d_out), _rows(x), z, stats
        if not ctx.needs_input_grad[5]:
            return None, *_of_adapter_alone(kernels, adapter, *rows), None
        d_hidden = sublayer.before_product(d_out)
        d_u = kernels.activation_backward(d_hidden, u, weights.activation)
        d_x, *of_adapter = _through_norm(kernels, norm, weights.fc1_weight, d_u, adapter, *rows)
        return None, *of_adapter, d_x.view(x.shape)


class _PackedAttentionNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: SublayerKernels,
        need_grad: bool,
        num_heads: int,
        num_queries: int | None,
        scale: float | None,
        qkv: torch.Tensor,
    ) -> torch.Tensor:
        if qkv.stride(2) != 1:
            qkv = qkv.contiguous()
        q, k, v = qkv.chunk(3, dim=-1)
        out, lse, ctx.graph = kernels.attention_forward(
            q[:, :num_queries], k, v, num_heads, scale, need_grad
        )
        ctx.options = kernels, num_heads, num_queries, scale
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Tensors:
        kernels, num_heads, num_queries, scale = ctx.options
        qkv, out, lse = ctx.saved_tensors
        q, k, v = qkv.chunk(3, dim=-1)
        d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        d_q, d_k, d_v = d_qkv.chunk(3, dim=-1)
        if num_queries is not None:
            d_q[:, num_queries:] = 0
        d_out = _in_memory(d_out)
        if d_out.stride(2) != 1:
            d_out = d_out.contiguous()
        kernels.attention_backward(
            d_out, q[:, :num_queries], k, v, out, lse, ctx.graph, num_heads, scale,
            d_q[:, :num_queries], d_k, d_v,
        )  # fmt: skip
        return None, None, None, None, None, d_qkv


def _versions(*arguments: Any) -> list[int]:
    # Inference tensors have none.
    return [t._version for t in arguments if isinstance(t, torch.Tensor) and not t.is_inference()]


def _result(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A node's output in its shape, but no view: autograd lets nobody write to those."""
    result: torch.Tensor = torch.ops.aten._unsafe_view.default(rows, shape)
    return result


def _negated(*arguments: Any) -> bool:
    """Whether a tensor's numbers are those in memory with the other sign (``torch._neg_view``,
    the imaginary part of a conjugate), which kernels know nothing of."""
    return any(isinstance(t, torch.Tensor) and t.is_neg() for t in arguments)


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its numbers as they lie in memory: an upstream gradient may be negated, or
    zeros without memory."""
    return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(..., D) as (M, D), features side by side."""
    rows = _in_memory(tensor).reshape(-1, tensor.shape[-1])
    return rows if rows.shape[1] == 1 or rows.stride(1) == 1 else rows.contiguous()


def _split(weights: AttentionWeights) -> Any:
    """Weight and bias of the queries, and of the keys and values."""
    weight, bias = weights.qkv_weight, weights.qkv_bias
    inner = weight.shape[0] // 3
    if bias is None:
        return (weight[:inner], None), (weight[inner:], None)
    return (weight[:inner], bias[:inner]), (weight[inner:], bias[inner:])


def _of_adapter_alone(
    kernels: SublayerKernels,
    adapter: AdapterWeights | None,
    d_out: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    _stats: torch.Tensor | None,
) -> Tensors:
    """The gradients of the adapter's tensors, without that of x."""
    if adapter is None:
        return _NO_ADAPTER
    _, *of_adapter = kernels.adapter_backward(
        d_out, None, x, None, None, adapter, z, pass_through=False, need_dx=False
    )
    return tuple(of_adapter)


def _through_norm(
    kernels: SublayerKernels,
    norm: NormWeights,
    weight: torch.Tensor,
    d_product: torch.Tensor,
    adapter: AdapterWeights | None,
    d_out: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor | None,
    stats: torch.Tensor,
) -> Any:
    """From the gradient of the sublayer's first product, and of its output, to that of x and of
    the adapter's tensors."""
    d_normed = kernels.linear(_rows(d_product), weight.t(), None)
    return kernels.adapter_backward(d_out, d_normed, x, norm, stats, adapter, z, pass_through=True)


def _token_gradients(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    weights: AttentionWeights,
    tokens: slice,
) -> torch.Tensor:
    """(B, T, 3 H Dh) gradients of some tokens' queries, keys and values: rows and columns of the
    (N, N) attention, where a full backward goes through all of it."""
    heads = [
        part.unflatten(-1, (weights.num_heads, -1)).transpose(1, 2)
        for part in (*qkv.chunk(3, dim=-1), d_out, out)
    ]
    q, k, v, d, o = heads
    scale = q.shape[-1] ** -0.5 if weights.scale is None else weights.scale
    delta = (d * o).sum(-1, dtype=lse.dtype)

    def d_scores(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        p = torch.exp(scale * (q @ k.mT).to(lse.dtype) - lse[:, :, rows, None])
        return p.to(q.dtype), (p * (d @ v.mT - delta[:, :, rows, None])).to(q.dtype)

    _, d_rows = d_scores(q[:, :, tokens], k, v, d[:, :, tokens], tokens)
    p, d_columns = d_scores(q, k[:, :, tokens], v[:, :, tokens], d, slice(None))
    parts = scale * d_rows @ k, scale * d_columns.mT @ q, p.mT @ d
    return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], dim=-1)
