"""Attention as an autograd node: a backend's kernels where they serve, or PyTorch's attention.

The operators are for calls that kernels serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from gist_kernels.autograd import shapes
from gist_kernels.autograd.derivatives import once_differentiable
from gist_kernels.autograd.operators import Operation
from gist_kernels.autograd.tensors import in_memory
from gist_kernels.kernels.protocols import AttentionKernels
from gist_kernels.weights import AttentionWeights, Rotation


class AttentionGraph(NamedTuple):
    """PyTorch's attention with its own graph: which of its kernels runs, and what that keeps, is
    not told outside."""

    out: torch.Tensor
    leaves: tuple[torch.Tensor, ...]


def served(
    kernels: AttentionKernels, x: torch.Tensor, dtype: torch.dtype, num_heads: int, width: int
) -> bool:
    """Whether kernels take the attention of x's (B, N, ...) tokens, with ``width`` features."""
    like = x.new_empty((*x.shape[:2], width), dtype=dtype)
    return kernels.serves(like, like, num_heads)


def attention_forward(
    kernels: AttentionKernels,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    scale: float | None,
    rotation: Rotation | None,
    need_grad: bool,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, AttentionGraph | None]:
    """``(out, lse, graph)`` of (B, Q, H Dh) queries and (B, N, H Dh) keys and values.

    Backward takes one of the log-sum-exps, (B, H, Q), and of the graph; the other is None.
    """
    if kernels.serves(q, k, num_heads):
        if rotation is not None and not kernels.rotates(q, k, num_heads, rotation):
            q, k = (_rotated(part, num_heads, rotation) for part in (q, k))
            rotation = None
        scale = _scale(q, num_heads, scale)
        out, lse = kernels.forward(q, k, v, num_heads, scale, rotation, lengths)
        return out, lse, None
    from gist_kernels import reference

    if not need_grad:
        return reference.attention(q, k, v, num_heads, scale, rotation, lengths), None, None
    leaves = q, k, v = tuple(part.detach().requires_grad_() for part in (q, k, v))
    with torch.enable_grad():
        out = reference.attention(q, k, v, num_heads, scale, rotation, lengths)
    return out.detach(), None, AttentionGraph(out, leaves)


def attention_backward(
    kernels: AttentionKernels,
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor | None,
    graph: AttentionGraph | None,
    num_heads: int,
    scale: float | None,
    rotation: Rotation | None,
    d_q: torch.Tensor,
    d_k: torch.Tensor,
    d_v: torch.Tensor,
    lengths: torch.Tensor | None = None,
) -> None:
    """Write the gradients of ``q``, ``k`` and ``v`` into ``d_q``, ``d_k`` and ``d_v``."""
    if lse is not None:
        scale = _scale(q, num_heads, scale)
        if rotation is None or kernels.rotates(q, k, num_heads, rotation):
            kernels.backward(
                d_out, q, k, v, lse, num_heads, scale, d_q, d_k, d_v, rotation, lengths
            )
        else:
            from gist_kernels.reference.rotation import rotate_gradient_

            q, k = (_rotated(part, num_heads, rotation) for part in (q, k))
            kernels.backward(d_out, q, k, v, lse, num_heads, scale, d_q, d_k, d_v, None, lengths)
            for grad in (d_q, d_k):
                rotate_gradient_(grad, num_heads, rotation)
        return
    assert graph is not None
    # Kept: a second backward of the node around it asks again.
    grads = torch.autograd.grad(graph.out, graph.leaves, d_out, retain_graph=True)
    for grad, place in zip(grads, (d_q, d_k, d_v), strict=True):
        place.copy_(grad)


def _rotated(x: torch.Tensor, num_heads: int, rotation: Rotation) -> torch.Tensor:
    """(B, T, H Dh) from the first token on, rotated; x itself if none of its tokens is."""
    from gist_kernels.reference.rotation import rotate

    return rotate(x.unflatten(-1, (num_heads, -1)), rotation).flatten(2)


def _scale(q: torch.Tensor, num_heads: int, scale: float | None) -> float:
    return (q.shape[-1] // num_heads) ** -0.5 if scale is None else scale


def prefix_attention(
    kernels: AttentionKernels,
    qkv: torch.Tensor,
    num_heads: int,
    num_queries: int | None,
    scale: float | None,
    rotation: Rotation | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the first tokens, or all, of a packed (B, N, 3 H Dh)."""
    need_grad = torch.is_grad_enabled()
    result: torch.Tensor = _PrefixAttention.apply(
        kernels, need_grad, num_heads, num_queries, scale, rotation, lengths, qkv
    )
    return result


def prefix_attention_operator(
    backend: str,
    qkv: torch.Tensor,
    num_heads: int,
    num_queries: int | None,
    scale: float | None,
    rotation: Rotation | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`prefix_attention`, by the registered operator, where kernels serve the call."""
    scale = None if scale is None else float(scale)
    sin, cos, start, half = flat_rotation(rotation)
    results = _OPERATORS[backend](
        qkv, sin, cos, lengths, num_heads, num_queries, scale, start, half
    )
    out: torch.Tensor = results[0]
    return out


def register(backend: str, load: Callable[[], AttentionKernels]) -> None:
    """Define a backend's operators."""
    _OPERATORS[backend] = _OPERATION.register(backend, load, shapes.of_attention(load))


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: AttentionKernels,
        need_grad: bool,
        num_heads: int,
        num_queries: int | None,
        scale: float | None,
        rotation: Rotation | None,
        lengths: torch.Tensor | None,
        qkv: torch.Tensor,
    ) -> torch.Tensor:
        qkv = _packed(qkv)
        ctx.options = _Options(num_heads, num_queries, scale, rotation, lengths)
        out, lse, ctx.graph = _of_packed(kernels, qkv, ctx.options, need_grad)
        ctx.kernels = kernels
        # Tables and lengths too: autograd sees to their versions.
        ctx.save_for_backward(qkv, lse, *flat_rotation(rotation)[:2], lengths)
        return out

    @staticmethod
    @once_differentiable("prefix_attention")
    def backward(ctx: Any, saved: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, lse, *_ = saved
        d_qkv = _of_packed_backward(ctx.kernels, qkv, ctx.options, lse, ctx.graph, d_out)
        return None, None, None, None, None, None, None, d_qkv


class _Options(NamedTuple):
    num_heads: int
    num_queries: int | None
    scale: float | None
    rotation: Rotation | None
    lengths: torch.Tensor | None


ROTATION_TABLES = "Tensor? rotation_sin", "Tensor? rotation_cos"
ROTATION_OPTIONS = "SymInt rotation_start", "bool rotation_half"
"""What an operator's schema has of a rotation."""


def flat_rotation(
    rotation: Rotation | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int, bool]:
    """Sine, cosine, start and pairing."""
    return (None, None, 0, False) if rotation is None else rotation


def rotation_of(tables: Sequence[torch.Tensor | None], options: Sequence[Any]) -> Rotation | None:
    """That of an operator's flat arguments."""
    sin, cos = tables
    return None if sin is None or cos is None else Rotation(sin, cos, *options)


def _packed(qkv: torch.Tensor) -> torch.Tensor:
    return qkv if qkv.stride(2) == 1 else qkv.contiguous()


def _of_packed(
    kernels: AttentionKernels, qkv: torch.Tensor, options: _Options, need_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None, AttentionGraph | None]:
    num_heads, num_queries, scale, rotation, lengths = options
    q, k, v = qkv.chunk(3, dim=-1)
    q = q[:, :num_queries]
    return attention_forward(kernels, q, k, v, num_heads, scale, rotation, need_grad, lengths)


def _of_packed_backward(
    kernels: AttentionKernels,
    qkv: torch.Tensor,
    options: _Options,
    lse: torch.Tensor | None,
    graph: AttentionGraph | None,
    d_out: torch.Tensor,
) -> torch.Tensor:
    num_heads, num_queries, scale, rotation, lengths = options
    q, k, v = qkv.chunk(3, dim=-1)
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    d_q, d_k, d_v = d_qkv.chunk(3, dim=-1)
    if num_queries is not None:
        d_q[:, num_queries:] = 0
    d_out = in_memory(d_out)
    if d_out.stride(2) != 1:
        d_out = d_out.contiguous()
    attention_backward(
        kernels, d_out, q[:, :num_queries], k, v, lse, graph, num_heads, scale, rotation,
        d_q[:, :num_queries], d_k, d_v, lengths,
    )  # fmt: skip
    return d_qkv


def _of_flat(tensors: Any, options: Any) -> tuple[torch.Tensor, _Options]:
    """The packed tensor, and the options."""
    qkv, *tables, lengths = tensors
    num_heads, num_queries, scale, *rotation = options
    return _packed(qkv), _Options(
        num_heads, num_queries, scale, rotation_of(tables, rotation), lengths
    )


def _forward(kernels: AttentionKernels, tensors: Any, options: Any) -> Any:
    out, lse, _ = _of_packed(kernels, *_of_flat(tensors, options), False)
    return out, (lse,)


def _backward(
    kernels: AttentionKernels, tensors: Any, options: Any, saved: Any, needs: Any, d_out: Any
) -> tuple[torch.Tensor]:
    qkv, options = _of_flat(tensors, options)
    return (_of_packed_backward(kernels, qkv, options, saved[0], None, d_out),)


_OPERATORS: dict[str, Any] = {}
_OPERATION = Operation(
    "prefix_attention",
    trained=("Tensor qkv",),
    frozen=(*ROTATION_TABLES, "Tensor? lengths"),
    options=("int num_heads", "SymInt? num_queries", "float? scale", *ROTATION_OPTIONS),
    saved=("lse",),
    forward=_forward,
    backward=_backward,
)


def token_gradients(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    weights: AttentionWeights,
    tokens: slice,
) -> torch.Tensor:
    """(B, T, 3 H Dh) gradients of some tokens' queries, keys and values: rows and columns of the
    (N, N) attention, where a full backward goes through all of it.

    Half types are computed in float32: a score that is rounded to bf16 before its exponential is
    off by up to 1/8 at 33.
    """
    batch, length, heads = *qkv.shape[:2], weights.num_heads

    def by_head(packed: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """Its (B, H, N, Dh) parts, contiguous: a matmul of others would copy them again."""
        size = packed.shape[2] // (parts * heads)
        split = packed.view(batch, length, parts, heads, size).permute(2, 0, 3, 1, 4)
        return torch.empty(split.shape, dtype=lse.dtype, device=qkv.device).copy_(split).unbind(0)

    (q, k, v), (d,), (o,) = by_head(qkv, 3), by_head(d_out, 1), by_head(out, 1)
    if weights.rotation is not None:
        q, k = (  # rounded as forward rounded them: lse is that of these scores
            _rotated_heads(part, weights.rotation).to(qkv.dtype).to(part.dtype) for part in (q, k)
        )
    scale = q.shape[-1] ** -0.5 if weights.scale is None else weights.scale
    k = k * scale
    delta = (d * o).sum(-1)

    def d_scores(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        p = torch.exp(q @ k.mT - lse[:, :, rows, None])
        return p, p * (d @ v.mT - delta[:, :, rows, None])

    _, d_rows = d_scores(q[:, :, tokens], k, v, d[:, :, tokens], tokens)
    p, d_columns = d_scores(q, k[:, :, tokens], v[:, :, tokens], d, slice(None))
    d_q, d_k = d_rows @ k, scale * d_columns.mT @ q
    if weights.rotation is not None:
        d_q, d_k = (
            _rotated_heads(part, weights.rotation, tokens.start, transposed=True)
            for part in (d_q, d_k)
        )
    parts = torch.stack((d_q, d_k, p.mT @ d))
    # (3, B, H, T, Dh)
    return parts.permute(1, 3, 0, 2, 4).to(qkv.dtype).flatten(2)


def _rotated_heads(
    x: torch.Tensor, rotation: Rotation, first: int = 0, *, transposed: bool = False
) -> torch.Tensor:
    """As ``reference.rotation.rotate``, (B, H, T, Dh)."""
    from gist_kernels.reference.rotation import rotate

    return rotate(x.transpose(1, 2), rotation, first, transposed=transposed).transpose(1, 2)
