"""The adapter, and a transformer block's sublayers with it, as one autograd node each.

A sublayer's node computes ``x + drop_path(layer_scale(sublayer(norm(x)))) + adapter(x)`` for frozen
weight matrices. Kernels that read x anyway carry the adapter along: forward, the one that
normalises x also writes ``x + adapter(x)``, onto which the sublayer's last product is added;
backward, the one that goes back through the norm also adds the adapter's part of the gradient of x
and sums up the gradients of the adapter's weights. What else may be trained is small: the norm's
and the linear layers' biases, and low-rank updates and scales of the latter. Nothing that only the
gradient of a frozen weight would need is computed or kept.

Under autocast the products and the attention are in its half type, with frozen weights converted
once and kept; the residual stream, norm and adapter stay in the type of x.

Backends differ in their :class:`SublayerKernels`; the equations are here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from gist_kernels.ops import needs_dispatcher
from gist_kernels.options import (
    AdapterWeights,
    AttentionWeights,
    LinearUpdate,
    MlpWeights,
    NormWeights,
)
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
    """``(d_out, q, k, v, lse, graph, num_heads, scale, d_q, d_k, d_v)``: writes the last
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
        dtype = _product_dtype(x)
        first = _Product.of(kernels, dtype, *weights[:2], weights.qkv_update)
        last = _Product.of(kernels, dtype, *weights[2:4], weights.proj_update)
        versions = _versions(*norm, *weights, drop_path)
        sublayer = _Sublayer(kernels, norm, weights, first, last, drop_path, adapter, versions)
        need_grad, tensors = torch.is_grad_enabled(), sublayer.tensors()
        if num_queries is None or num_queries >= x.shape[1]:
            return _AttentionNode.apply(sublayer, need_grad, grad_tokens, *tensors, x)
        return _PrefixNode.apply(sublayer, need_grad, num_queries, *tensors, x)

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
        dtype = _product_dtype(x)
        first = _Product.of(kernels, dtype, *weights[:2], weights.fc1_update)
        last = _Product.of(kernels, dtype, *weights[2:4], weights.fc2_update)
        versions = _versions(*norm, *weights, drop_path)
        sublayer = _Sublayer(kernels, norm, weights, first, last, drop_path, adapter, versions)
        return _MlpNode.apply(sublayer, *sublayer.tensors(), x)

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


_converted: Any = WeakIdKeyDictionary()


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """What the products of a sublayer are computed in: x's dtype, or autocast's."""
    device = x.device.type
    if x.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _in_dtype(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A frozen weight in the compute dtype, converted once unless it changes. Autocast itself
    keeps the copies of trained weights alone."""
    if weight.dtype is dtype:
        return weight
    version = -1 if weight.is_inference() else weight._version
    state = version, weight.data_ptr(), dtype
    found = _converted.get(weight)
    if found is None or found[0] != state:
        found = _converted[weight] = state, weight.detach().to(dtype)
    return found[1]


class _Product(NamedTuple):
    """A linear layer of (M, I) rows: a frozen weight, and what may be trained beside it."""

    kernels: SublayerKernels
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    down: torch.Tensor | None
    up: torch.Tensor | None

    @classmethod
    def of(
        cls,
        kernels: SublayerKernels,
        dtype: torch.dtype,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        update: LinearUpdate | None,
    ) -> _Product:
        return cls(kernels, _in_dtype(weight, dtype), bias, *(update or LinearUpdate()))

    def outputs(self, rows: slice) -> _Product:
        """Some of its outputs."""
        weight, bias, scale, up = (
            None if t is None else t[rows] for t in (self.weight, self.bias, self.scale, self.up)
        )
        assert weight is not None
        return self._replace(weight=weight, bias=bias, scale=scale, up=up)

    def small(self) -> Any:
        """Bias, scale, down and up in the weight's dtype."""
        return [None if t is None else t.to(self.weight.dtype) for t in self[2:]]

    def forward(self, x: torch.Tensor) -> Any:
        """``y`` in the weight's dtype, and for backward ``W x`` before its scale, and ``down x``,
        if there are such."""
        linear, unscaled, low = self.kernels.linear, None, None
        bias, scale, down, up = self.small()
        x = x.to(self.weight.dtype)
        if scale is None:
            y = linear(x, self.weight, bias)
        else:
            unscaled = linear(x, self.weight, None)
            y = unscaled * scale
            y = y if bias is None else y.add_(bias)
        if down is not None:
            low = linear(x, down, None)
            y = self.kernels.add_linear(y, low, up)
        return y, unscaled, low

    def backward(
        self,
        d_y: torch.Tensor,
        x: Callable[[], torch.Tensor],
        kept: Sequence[torch.Tensor | None],
        needs: Sequence[bool],
        need_dx: bool = True,
    ) -> Any:
        """``d_x`` in the weight's dtype, and a list of the gradients of bias, scale, down and up.
        ``x`` is called where ``down`` is trained."""
        unscaled, low = kept
        linear, d_x, d_bias, d_scale, d_down, d_up = self.kernels.linear, *(None,) * 5
        _, scale, down, up = self.small()
        if needs[0] and self.bias is not None:
            d_bias = _column_sums(d_y, self.bias)
        if needs[1] and self.scale is not None and unscaled is not None:
            d_scale = _column_sums(d_y * unscaled, self.scale)
        d_y = d_y.to(self.weight.dtype)
        if need_dx:
            d_x = linear(d_y if scale is None else d_y * scale, self.weight.t(), None)
        if self.down is not None and self.up is not None:
            d_low = linear(d_y, up.t(), None)
            if needs[2]:
                d_down = (d_low.t() @ x().to(d_low.dtype)).to(self.down.dtype)
            if needs[3]:
                assert low is not None
                d_up = (d_y.t() @ low).to(self.up.dtype)
            if need_dx:
                d_x = self.kernels.add_linear(d_x, d_low, down.t())
        return d_x, [d_bias, d_scale, d_down, d_up]


class _Sublayer(NamedTuple):
    """What a node is given beside x."""

    kernels: SublayerKernels
    norm: NormWeights
    weights: Any
    """AttentionWeights or MlpWeights, for what is not in the products."""
    first: _Product
    last: _Product
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

    def tensors(self) -> Tensors:
        """All that may be trained: 4 of the adapter, 2 of the norm, 4 of each product."""
        adapter = _NO_ADAPTER if self.adapter is None else self.adapter[:4]
        return *adapter, *self.norm[:2], *self.first[2:], *self.last[2:]

    def with_saved(self, tensors: Any) -> _Sublayer:
        """The same, of tensors that autograd has seen to be unchanged since forward."""
        self.check_unchanged()
        adapter = self.adapter
        return self._replace(
            adapter=adapter and AdapterWeights._make((*tensors[:4], *adapter[4:])),
            norm=NormWeights._make((*tensors[4:6], self.norm.eps)),
            first=_Product._make((*self.first[:2], *tensors[6:10])),
            last=_Product._make((*self.last[:2], *tensors[10:14])),
        )

    def factors(self) -> list[torch.Tensor]:
        """What scales the last product, bias included."""
        return [f for f in (self.weights.layer_scale, self.drop_path) if f is not None]

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """What the first product reads, once more."""
        return self.kernels.adapter_forward(x, None, self.norm, None, None)[0]

    def adapted(self, x: torch.Tensor, norm: NormWeights | None) -> Any:
        """``adapter_forward`` onto x itself, with the bias of the product that will be added."""
        bias = None if self.factors() or self.last.scale is not None else self.last.bias
        return self.kernels.adapter_forward(x, x, norm, self.adapter, bias)

    def add_product(
        self, x: torch.Tensor, adapted: torch.Tensor | None, inner: torch.Tensor
    ) -> Any:
        """The last product, of (B, N, I) ``inner``, added to what ``adapted`` gave; and what it
        keeps for backward."""
        last, rows, factors = self.last, _rows(inner), self.factors()
        shape = *inner.shape[:2], len(last.weight)
        if adapted is not None and not factors and last.scale is None:
            last = last._replace(bias=None)  # which adapted has
            if adapted.dtype is rows.dtype:
                out, low = self.kernels.add_linear(adapted, rows, last.weight), None
                _, _, down, up = last.small()
                if down is not None:
                    low = self.kernels.linear(rows, down, None)
                    out = self.kernels.add_linear(out, low, up)
                return _result(out, shape), None, low
        update, *kept = last.forward(rows)
        update = _result(update, shape)
        for factor in factors:
            update = update * factor
        out = (x if adapted is None else adapted).view(shape)
        return (update.add_(out) if update.dtype is out.dtype else out + update), *kept

    def before_product(
        self,
        d_out: torch.Tensor,
        inner: Callable[[], torch.Tensor],
        kept: Any,
        needs: Sequence[bool],
        need_dx: bool = True,
    ) -> Any:
        """The gradient of ``inner``, from that of the sublayer, (B, N, D), and those of what the
        last product trains."""
        for factor in self.factors():
            d_out = d_out * factor
        return self.last.backward(_rows(d_out), inner, kept, needs, need_dx)

    def through_norm(
        self,
        d_product: torch.Tensor,
        kept: Any,
        needs: Sequence[bool],
        d_out: torch.Tensor,
        x: torch.Tensor,
        z: torch.Tensor | None,
        stats: torch.Tensor,
    ) -> Any:
        """From the gradient of the first product, and of the sublayer's output, to that of x, and
        a list of those of adapter, norm and first product."""
        d_normed, of_first = self.first.backward(
            _rows(d_product), lambda: self.normed(x), kept, needs[6:10]
        )
        d_normed = d_normed.to(x.dtype)
        of_norm = self.of_norm(d_normed, x, stats, needs[4:6])
        d_x, *of_adapter = self.kernels.adapter_backward(
            d_out, d_normed, x, self.norm, stats, self.adapter, z, pass_through=True
        )
        return d_x, [*of_adapter, *of_norm, *of_first]

    def of_norm(
        self, d_normed: torch.Tensor, x: torch.Tensor, stats: torch.Tensor, needs: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """The gradients of the norm's weight and bias."""
        weight, bias, _ = self.norm
        d_weight = d_bias = None
        if needs[0] and weight is not None:
            centred = x.to(stats.dtype).sub(stats[:, :1]).mul_(stats[:, 1:])
            d_weight = _column_sums(centred.mul_(d_normed), weight)
        if needs[1] and bias is not None:
            d_bias = _column_sums(d_normed, bias)
        return [d_weight, d_bias]


def _column_sums(d: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Over the rows, in float32 at least."""
    return d.sum(0, dtype=torch.promote_types(d.dtype, torch.float32)).to(like.dtype)


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


_TRAINED = 14
"""How many tensors a node is given before x."""


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
        x = tensors[-1]
        rows = _rows(x)
        normed, out, z, stats = sublayer.adapted(rows, norm)
        qkv, *of_first = sublayer.first.forward(normed)
        qkv = qkv.view(*x.shape[:2], qkv.shape[1])
        attended, lse, ctx.graph = kernels.attention_forward(
            *qkv.chunk(3, dim=-1), weights.num_heads, weights.scale, need_grad
        )
        result, *of_last = sublayer.add_product(rows, out, attended)
        ctx.sublayer, ctx.grad_tokens = sublayer, grad_tokens
        read = sublayer.last.down is not None or grad_tokens is not None
        kept = attended if read else None
        ctx.save_for_backward(*tensors, z, stats, qkv, kept, lse, *of_first, *of_last)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Tensors:
        saved = ctx.saved_tensors
        sublayer = ctx.sublayer.with_saved(saved)
        kernels, _, weights = sublayer[:3]
        x, z, stats, qkv, attended, lse = saved[_TRAINED : _TRAINED + 6]
        of_first, of_last = saved[-4:-2], saved[-2:]
        needs = ctx.needs_input_grad[3:]
        inner_trained, rows = any(needs[4:10]), (_rows(d_out), _rows(x), z, stats)
        d_attended, last = sublayer.before_product(
            d_out, lambda: _rows(attended), of_last, needs[10:14],
            need_dx=needs[_TRAINED] or inner_trained,
        )  # fmt: skip
        if d_attended is None:
            adapter = _of_adapter_alone(kernels, sublayer.adapter, *rows)
            return None, None, None, *adapter, *(None,) * 6, *last, None

        d_attended = d_attended.view(*x.shape[:2], d_attended.shape[1])
        if ctx.grad_tokens is None or lse is None or inner_trained:
            d_qkv = torch.empty_like(qkv)
            kernels.attention_backward(
                d_attended, *qkv.chunk(3, dim=-1), lse, ctx.graph,
                weights.num_heads, weights.scale, *d_qkv.chunk(3, dim=-1),
            )  # fmt: skip
            d_x, inner = sublayer.through_norm(d_qkv, of_first, needs, *rows)
            d_x = d_x.view(x.shape)
            if ctx.grad_tokens is not None:
                start, count = ctx.grad_tokens
                d_x[:, :start] = 0
                d_x[:, start + count :] = 0
            return None, None, None, *inner, *last, d_x

        start, count = ctx.grad_tokens
        tokens = slice(start, start + count)
        d_qkv = _token_gradients(d_attended, qkv, attended, lse, weights, tokens)
        adapter = _of_adapter_alone(kernels, sublayer.adapter, *rows)
        some: Any = [
            None if t is None else _rows(t.view(*x.shape[:2], t.shape[1])[:, tokens]) for t in rows
        ]
        d_tokens, _ = sublayer.through_norm(d_qkv, (None, None), needs, *some)
        d_x = torch.zeros_like(x)
        d_x[:, tokens] = d_tokens.view(x.shape[0], count, x.shape[2])
        return None, None, None, *adapter, *(None,) * 6, *last, d_x


class _PrefixNode(torch.autograd.Function):
    """Of the first tokens alone, where nothing else is read afterwards: theirs are the queries,
    and the projection, the residual and the adapter."""

    @staticmethod
    def forward(
        ctx: Any, sublayer: _Sublayer, need_grad: bool, num_queries: int, *tensors: Any
    ) -> torch.Tensor:
        kernels, norm, weights = sublayer[:3]
        x = tensors[-1]
        read = _rows(x[:, :num_queries])
        normed, _, _, stats = kernels.adapter_forward(_rows(x), None, norm, None, None)
        _, out, z, _ = sublayer.adapted(read, None)
        of_queries, of_keys = _split(sublayer.first)
        q, *of_q = of_queries.forward(_rows(normed.view(x.shape)[:, :num_queries]))
        kv, *of_kv = of_keys.forward(normed)
        q = q.view(len(x), num_queries, q.shape[1])
        kv = kv.view(*x.shape[:2], kv.shape[1])
        attended, lse, ctx.graph = kernels.attention_forward(
            q, *kv.chunk(2, dim=-1), weights.num_heads, weights.scale, need_grad
        )
        result, *of_last = sublayer.add_product(read, out, attended)
        ctx.sublayer, ctx.num_queries = sublayer, num_queries
        kept = attended if sublayer.last.down is not None else None
        ctx.save_for_backward(*tensors, z, stats, q, kv, kept, lse, *of_q, *of_kv, *of_last)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Tensors:
        saved, num_queries = ctx.saved_tensors, ctx.num_queries
        sublayer = ctx.sublayer.with_saved(saved)
        kernels, norm, weights, _, _, _, adapter, _ = sublayer
        x, z, stats, q, kv, attended, lse = saved[_TRAINED : _TRAINED + 7]
        of_q, of_kv, of_last = saved[-6:-4], saved[-4:-2], saved[-2:]
        needs = ctx.needs_input_grad[3:]
        rows, read, d_read = _rows(x), _rows(x[:, :num_queries]), _rows(d_out)
        d_attended, last = sublayer.before_product(
            d_out, lambda: _rows(attended), of_last, needs[10:14],
            need_dx=needs[_TRAINED] or any(needs[4:10]),
        )  # fmt: skip
        if d_attended is None:
            of_adapter = _of_adapter_alone(kernels, adapter, d_read, read, z, None)
            return None, None, None, *of_adapter, *(None,) * 6, *last, None

        d_q, d_kv = torch.empty_like(q), torch.empty_like(kv)
        kernels.attention_backward(
            d_attended.view(q.shape), q, *kv.chunk(2, dim=-1), lse, ctx.graph,
            weights.num_heads, weights.scale, d_q, *d_kv.chunk(2, dim=-1),
        )  # fmt: skip
        of_queries, of_keys = _split(sublayer.first)
        d_normed, for_keys = of_keys.backward(
            _rows(d_kv), lambda: sublayer.normed(rows), of_kv, needs[6:10]
        )
        first = d_normed.view(x.shape)[:, :num_queries]
        d_first, for_queries = of_queries.backward(
            _rows(d_q), lambda: sublayer.normed(read), of_q, needs[6:10]
        )
        first += d_first.view(first.shape)
        d_normed, of_first = d_normed.to(x.dtype), _join(for_queries, for_keys)
        of_norm = sublayer.of_norm(d_normed, rows, stats, needs[4:6])
        d_x, *_ = kernels.adapter_backward(
            None, d_normed, rows, norm, stats, None, None, pass_through=False
        )
        d_x, of_adapter = d_x.view(x.shape), _NO_ADAPTER
        if adapter is not None:
            d_read, *of_adapter = kernels.adapter_backward(
                d_read, None, read, None, None, adapter, z, pass_through=True
            )
        d_x[:, :num_queries] += d_read.view(first.shape)
        return None, None, None, *of_adapter, *of_norm, *of_first, *last, d_x


class _MlpNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sublayer: _Sublayer, *tensors: Any) -> torch.Tensor:
        kernels, norm, weights = sublayer[:3]
        x = tensors[-1]
        rows = _rows(x)
        normed, out, z, stats = sublayer.adapted(rows, norm)
        u, *of_first = sublayer.first.forward(normed)
        hidden = kernels.activation(u, weights.activation)
        hidden = hidden.view(*x.shape[:2], hidden.shape[1])
        result, *of_last = sublayer.add_product(rows, out, hidden)
        ctx.sublayer = sublayer
        ctx.save_for_backward(*tensors, z, stats, u, *of_first, *of_last)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Tensors:
        saved = ctx.saved_tensors
        sublayer = ctx.sublayer.with_saved(saved)
        kernels, _, weights = sublayer[:3]
        x, z, stats, u = saved[_TRAINED : _TRAINED + 4]
        of_first, of_last = saved[-4:-2], saved[-2:]
        needs = ctx.needs_input_grad[1:]
        rows = _rows(d_out), _rows(x), z, stats
        d_hidden, last = sublayer.before_product(
            d_out, lambda: kernels.activation(u, weights.activation), of_last, needs[10:14],
            need_dx=needs[_TRAINED] or any(needs[4:10]),
        )  # fmt: skip
        if d_hidden is None:
            adapter = _of_adapter_alone(kernels, sublayer.adapter, *rows)
            return None, *adapter, *(None,) * 6, *last, None
        d_u = kernels.activation_backward(d_hidden, u, weights.activation)
        d_x, inner = sublayer.through_norm(d_u, of_first, needs, *rows)
        return None, *inner, *last, d_x.view(x.shape)


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
        ctx.save_for_backward(qkv, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Tensors:
        kernels, num_heads, num_queries, scale = ctx.options
        qkv, lse = ctx.saved_tensors
        q, k, v = qkv.chunk(3, dim=-1)
        d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        d_q, d_k, d_v = d_qkv.chunk(3, dim=-1)
        if num_queries is not None:
            d_q[:, num_queries:] = 0
        d_out = _in_memory(d_out)
        if d_out.stride(2) != 1:
            d_out = d_out.contiguous()
        kernels.attention_backward(
            d_out, q[:, :num_queries], k, v, lse, ctx.graph, num_heads, scale,
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
    return any(
        t.is_neg() if isinstance(t, torch.Tensor) else isinstance(t, tuple) and _negated(*t)
        for t in arguments
    )


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its numbers as they lie in memory: an upstream gradient may be negated, or
    zeros without memory."""
    return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(..., D) as (M, D), features side by side."""
    rows = _in_memory(tensor).reshape(-1, tensor.shape[-1])
    return rows if rows.shape[1] == 1 or rows.stride(1) == 1 else rows.contiguous()


def _split(first: _Product) -> tuple[_Product, _Product]:
    """Of the queries, and of the keys and values."""
    inner = first.weight.shape[0] // 3
    return first.outputs(slice(0, inner)), first.outputs(slice(inner, None))


def _join(of_queries: Any, of_keys: Any) -> Tensors:
    """The gradients of a product that :func:`_split` has split."""
    bias, scale, up = (
        None if of_keys[i] is None else torch.cat((of_queries[i], of_keys[i])) for i in (0, 1, 3)
    )
    down = None if of_keys[2] is None else of_queries[2] + of_keys[2]
    return bias, scale, down, up


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
