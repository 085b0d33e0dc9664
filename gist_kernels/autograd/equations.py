"""The sublayers' forward and backward passes, as functions of plain tensors.

``x + drop_path(layer_scale(sublayer(norm(x)))) + adapter(x)`` for frozen weight matrices. Kernels
that read x anyway carry the adapter along. Forward, the kernel that normalises x also writes
``x + adapter(x)``, onto which the last matmul is added. Backward, the kernel that goes through the
norm also adds the adapter's part of the gradient of x, and sums up the gradients of the adapter's
weights. Whatever else may be trained is small: the norm, the biases, and low-rank updates and
scales of the linear layers.

A forward function returns the result and what its backward function reads beside x. A backward
function takes which gradients are needed, ``needs``; it may return more.

Under autocast the matmuls and the attention run in its dtype; the residual stream, norm and adapter
stay in x's dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gist_kernels.autograd.attention import (
    AttentionGraph,
    attention_backward,
    attention_forward,
    token_gradients,
)
from gist_kernels.autograd.linear import LinearSaved, joined_grads, split_projection
from gist_kernels.autograd.tensors import rows_of
from gist_kernels.autograd.trained import Sublayer, SublayerRows, Trained


class Needs(NamedTuple):
    """Which gradients are needed."""

    x: bool
    trained: Trained

    @property
    def inner(self) -> bool:
        """Whether a gradient is needed that leads through the sublayer itself."""
        return self.x or any(self.trained.norm) or any(self.trained.first)


class Gradients(NamedTuple):
    x: torch.Tensor | None
    trained: Trained


def _read_by_projection(
    sublayer: Sublayer, attended: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What attention's last layer reads, and its norm's statistics. Backward computes it once
    more."""
    norm = sublayer.weights.norm
    if norm is None:
        return attended, None
    normed, _, _, stats = sublayer.kernels.adapter.forward(
        rows_of(attended), None, norm, None, None
    )
    assert normed is not None
    return normed.view(attended.shape), stats


def _attended_backward(
    sublayer: Sublayer, attended: torch.Tensor, d_read: torch.Tensor
) -> torch.Tensor:
    """The gradient of what attention gives, from that of what its last layer reads, as rows."""
    norm = sublayer.weights.norm
    if norm is None:
        return d_read
    _, stats = _read_by_projection(sublayer, attended)
    d_attended, *_ = sublayer.kernels.adapter.backward(
        None, d_read, rows_of(attended), norm, stats, None, None, pass_through=False
    )
    assert d_attended is not None
    return d_attended


class AttentionSaved(NamedTuple):
    z: torch.Tensor | None
    stats: torch.Tensor | None
    qkv: torch.Tensor
    attended: Any
    lse: torch.Tensor | None
    qkv_unscaled: torch.Tensor | None
    qkv_low: torch.Tensor | None
    proj_unscaled: torch.Tensor | None
    proj_low: torch.Tensor | None


def _reads_attended(sublayer: Sublayer) -> bool:
    """Whether the gradients of attention's last layer or norm need what attention gives."""
    return sublayer.last.parts.down is not None or sublayer.weights.norm is not None


def all_attention_forward(
    sublayer: Sublayer, x: torch.Tensor, grad_tokens: tuple[int, int] | None, need_grad: bool
) -> tuple[torch.Tensor, AttentionSaved, AttentionGraph | None]:
    """Attention over all tokens."""
    kernels, weights = sublayer.kernels, sublayer.weights
    rows = rows_of(x)
    normed, adapted, z, stats = sublayer.normed_and_adapted(rows)
    qkv, of_qkv = sublayer.first.forward(normed)
    qkv = qkv.view(*x.shape[:2], qkv.shape[1])
    q, k, v = qkv.chunk(3, dim=-1)
    attended, lse, graph = attention_forward(
        kernels.attention, q, k, v, weights.num_heads, weights.scale, weights.rotation, need_grad,
        sublayer.lengths,
    )  # fmt: skip
    result, of_proj = sublayer.add_last(rows, adapted, _read_by_projection(sublayer, attended)[0])
    read_again = _reads_attended(sublayer) or grad_tokens is not None
    kept = attended if read_again else None
    return result, AttentionSaved(z, stats, qkv, kept, lse, *of_qkv, *of_proj), graph


def all_attention_backward(
    sublayer: Sublayer,
    x: torch.Tensor,
    grad_tokens: tuple[int, int] | None,
    saved: AttentionSaved,
    graph: AttentionGraph | None,
    needs: Needs,
    d_out: torch.Tensor,
) -> Gradients:
    """With ``grad_tokens``, dx is computed for those tokens only and is zero elsewhere."""
    kernels, weights = sublayer.kernels, sublayer.weights
    lse = saved.lse
    rows = SublayerRows(rows_of(d_out), rows_of(x), saved.z, saved.stats)
    d_attended, d_proj = sublayer.last_backward(
        d_out, lambda: rows_of(_read_by_projection(sublayer, saved.attended)[0]),
        LinearSaved(saved.proj_unscaled, saved.proj_low), needs.trained.last, needs.inner,
    )  # fmt: skip
    if d_attended is None:
        adapter = sublayer.adapter_grads(rows.d_out, rows.x, rows.z)
        return Gradients(None, Trained(adapter, last=d_proj))

    d_attended = _attended_backward(sublayer, saved.attended, d_attended)
    d_attended = d_attended.view(*x.shape[:2], d_attended.shape[1])
    inner_trained = any(needs.trained.norm) or any(needs.trained.first)
    if grad_tokens is None or lse is None or inner_trained or sublayer.lengths is not None:
        d_qkv = torch.empty_like(saved.qkv)
        q, k, v = saved.qkv.chunk(3, dim=-1)
        d_q, d_k, d_v = d_qkv.chunk(3, dim=-1)
        attention_backward(
            kernels.attention, d_attended, q, k, v, lse, graph,
            weights.num_heads, weights.scale, weights.rotation, d_q, d_k, d_v, sublayer.lengths,
        )  # fmt: skip
        of_qkv = LinearSaved(saved.qkv_unscaled, saved.qkv_low)
        d_x, grads = sublayer.first_backward(d_qkv, of_qkv, needs.trained, rows)
        d_x = d_x.view(x.shape)
        if grad_tokens is not None:
            start, count = grad_tokens
            d_x[:, :start] = 0
            d_x[:, start + count :] = 0
        return Gradients(d_x, grads._replace(last=d_proj))

    start, count = grad_tokens
    tokens = slice(start, start + count)
    d_qkv = token_gradients(d_attended, saved.qkv, saved.attended, lse, weights, tokens)
    adapter = sublayer.adapter_grads(rows.d_out, rows.x, rows.z)
    d_tokens, _ = sublayer.first_backward(
        d_qkv, LinearSaved(), needs.trained, rows.of_tokens((x.shape[0], x.shape[1]), tokens)
    )
    d_x = torch.zeros_like(x)
    d_x[:, tokens] = d_tokens.view(x.shape[0], count, x.shape[2])
    return Gradients(d_x, Trained(adapter, last=d_proj))


class PrefixSaved(NamedTuple):
    z: torch.Tensor | None
    stats: torch.Tensor | None
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


def few_attention_forward(
    sublayer: Sublayer, x: torch.Tensor, num_queries: int, need_grad: bool
) -> tuple[torch.Tensor, PrefixSaved, AttentionGraph | None]:
    """Attention of the first tokens only, where nothing else is read afterwards: only they have
    queries, the projection, the residual and the adapter."""
    kernels, weights = sublayer.kernels, sublayer.weights
    read = rows_of(x[:, :num_queries])
    normed, stats = sublayer.normed(rows_of(x))
    adapted, z = sublayer.adapted(read)
    q_linear, kv_linear = split_projection(sublayer.first)
    q, of_q = q_linear.forward(rows_of(normed.view(x.shape)[:, :num_queries]))
    kv, of_kv = kv_linear.forward(normed)
    q = q.view(x.shape[0], num_queries, q.shape[1])
    kv = kv.view(*x.shape[:2], kv.shape[1])
    k, v = kv.chunk(2, dim=-1)
    attended, lse, graph = attention_forward(
        kernels.attention, q, k, v, weights.num_heads, weights.scale, weights.rotation, need_grad,
        sublayer.lengths,
    )  # fmt: skip
    result, of_proj = sublayer.add_last(read, adapted, _read_by_projection(sublayer, attended)[0])
    kept = attended if _reads_attended(sublayer) else None
    return result, PrefixSaved(z, stats, q, kv, kept, lse, *of_q, *of_kv, *of_proj), graph


def few_attention_backward(
    sublayer: Sublayer,
    x: torch.Tensor,
    num_queries: int,
    saved: PrefixSaved,
    graph: AttentionGraph | None,
    needs: Needs,
    d_out: torch.Tensor,
) -> Gradients:
    kernels, weights = sublayer.kernels, sublayer.weights
    q, kv = saved.q, saved.kv
    rows = SublayerRows(rows_of(d_out), rows_of(x), saved.z, saved.stats)
    read = rows_of(x[:, :num_queries])
    d_attended, d_proj = sublayer.last_backward(
        d_out, lambda: rows_of(_read_by_projection(sublayer, saved.attended)[0]),
        LinearSaved(saved.proj_unscaled, saved.proj_low), needs.trained.last, needs.inner,
    )  # fmt: skip
    if d_attended is None:
        adapter = sublayer.adapter_grads(rows.d_out, read, rows.z)
        return Gradients(None, Trained(adapter, last=d_proj))

    d_attended = _attended_backward(sublayer, saved.attended, d_attended)
    d_q, d_kv = torch.empty_like(q), torch.empty_like(kv)
    k, v = kv.chunk(2, dim=-1)
    d_k, d_v = d_kv.chunk(2, dim=-1)
    attention_backward(
        kernels.attention, d_attended.view(q.shape), q, k, v, saved.lse, graph,
        weights.num_heads, weights.scale, weights.rotation, d_q, d_k, d_v, sublayer.lengths,
    )  # fmt: skip
    q_linear, kv_linear = split_projection(sublayer.first)
    d_normed, kv_grads = kv_linear.backward(
        rows_of(d_kv), lambda: sublayer.normed(rows.x)[0],
        LinearSaved(saved.kv_unscaled, saved.kv_low), needs.trained.first,
    )  # fmt: skip
    d_read_normed, q_grads = q_linear.backward(
        rows_of(d_q), lambda: sublayer.normed(read)[0],
        LinearSaved(saved.q_unscaled, saved.q_low), needs.trained.first,
    )  # fmt: skip
    assert d_normed is not None
    assert d_read_normed is not None
    of_read = d_normed.view(x.shape)[:, :num_queries]
    of_read += d_read_normed.view(of_read.shape)
    norm_grads = sublayer.norm_grads(d_normed, rows, needs.trained.norm)
    d_x = sublayer.normed_backward(d_normed, rows).view(x.shape)
    d_read, adapter = sublayer.adapted_backward(rows.d_out, read, rows.z)
    d_x[:, :num_queries] += d_read.view(of_read.shape)
    return Gradients(d_x, Trained(adapter, norm_grads, joined_grads(q_grads, kv_grads), d_proj))


class MlpSaved(NamedTuple):
    z: torch.Tensor | None
    stats: torch.Tensor | None
    u: torch.Tensor
    hidden_stats: torch.Tensor | None
    fc1_unscaled: torch.Tensor | None
    fc1_low: torch.Tensor | None
    fc2_unscaled: torch.Tensor | None
    fc2_low: torch.Tensor | None


def mlp_forward(sublayer: Sublayer, x: torch.Tensor) -> tuple[torch.Tensor, MlpSaved]:
    rows = rows_of(x)
    normed, adapted, z, stats = sublayer.normed_and_adapted(rows)
    u, of_fc1 = sublayer.first.forward(normed)
    hidden, hidden_stats = _hidden(sublayer, u)
    hidden = hidden.view(*x.shape[:2], hidden.shape[1])
    result, of_fc2 = sublayer.add_last(rows, adapted, hidden)
    return result, MlpSaved(z, stats, u, hidden_stats, *of_fc1, *of_fc2)


def _activated(sublayer: Sublayer, u: torch.Tensor) -> torch.Tensor:
    activation, weights = sublayer.kernels.activation, sublayer.weights
    forward = activation.gated_forward if weights.gated else activation.forward
    return forward(u, weights.activation)


def _hidden(sublayer: Sublayer, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the last layer reads, from the first layer's output, and its norm's statistics. Backward
    computes it once more."""
    hidden, norm = _activated(sublayer, u), sublayer.weights.norm
    if norm is None:
        return hidden, None
    normed, _, _, stats = sublayer.kernels.adapter.forward(hidden, None, norm, None, None)
    assert normed is not None
    return normed, stats


def mlp_backward(
    sublayer: Sublayer, x: torch.Tensor, saved: MlpSaved, needs: Needs, d_out: torch.Tensor
) -> Gradients:
    activation, weights = sublayer.kernels.activation, sublayer.weights
    rows = SublayerRows(rows_of(d_out), rows_of(x), saved.z, saved.stats)
    d_hidden, d_fc2 = sublayer.last_backward(
        d_out, lambda: _hidden(sublayer, saved.u)[0],
        LinearSaved(saved.fc2_unscaled, saved.fc2_low), needs.trained.last, needs.inner,
    )  # fmt: skip
    if d_hidden is None:
        adapter = sublayer.adapter_grads(rows.d_out, rows.x, rows.z)
        return Gradients(None, Trained(adapter, last=d_fc2))
    if weights.norm is not None:
        d_hidden, *_ = sublayer.kernels.adapter.backward(
            None, d_hidden, _activated(sublayer, saved.u), weights.norm, saved.hidden_stats,
            None, None, pass_through=False,
        )  # fmt: skip
        assert d_hidden is not None
    if weights.gated:
        d_u = activation.gated_backward(d_hidden, saved.u, weights.activation)
    else:
        d_u = activation.backward(d_hidden, saved.u, weights.activation, into_d_a=True)
    of_fc1 = LinearSaved(saved.fc1_unscaled, saved.fc1_low)
    d_x, grads = sublayer.first_backward(d_u, of_fc1, needs.trained, rows)
    return Gradients(d_x.view(x.shape), grads._replace(last=d_fc2))
