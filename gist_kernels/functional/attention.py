"""Attention of packed queries, keys and values."""

from __future__ import annotations

import torch

from gist_kernels import autograd, check
from gist_kernels.autograd.attention import flat_rotation
from gist_kernels.autograd.tensors import negated
from gist_kernels.backend import BACKENDS, select, serving
from gist_kernels.tracing import batched, needs_dispatcher, takes_operators
from gist_kernels.weights import Rotation

for _backend in BACKENDS:
    if _backend.attention is not None:
        autograd.register_attention(_backend.name, _backend.attention)


def prefix_attention(
    qkv: torch.Tensor,
    num_heads: int,
    *,
    num_queries: int | None = None,
    scale: float | None = None,
    rotation: Rotation | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multi-head self-attention over a packed projection, for the first tokens or all.

    Args:
        qkv: (B, N, 3 H Dh): the features of the queries, then of the keys, then of the values;
            each is H heads of Dh features.
        num_heads: H.
        num_queries: compute the result for this many first tokens. Default: for all.
        scale: factor on the scores. Default: ``Dh ** -0.5``.
        rotation: of queries and keys, by frozen tables of any floating dtype. It is computed in
            float32 at least. Default: none.
        lengths: (B,), int32 or int64, on qkv's device: each row's number of tokens, 1 to N. The
            tokens after them are padding: no token attends to them, their results and gradients are
            0, and nothing they hold, nan included, reaches anything else. The kernels don't read
            them. Values are checked on a CPU. On other devices, and by the reference in compiled
            code, they are not: a check would wait for the device. There a length below 0 counts as
            0, one above N as N. Default: N for every row.

    Returns:
        (B, num_queries, H Dh), dense, in qkv's dtype.

    Raises:
        TypeError: not a floating-point tensor, or lengths of another dtype.
        ValueError: a wrong shape, device or value, or a table that requires a gradient.
    """
    check.floating("qkv", qkv)
    check.shape("qkv", qkv, (None, None, None), "(B, N, 3 * num_heads * head_dim)")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be an integer of at least 1; it is {num_heads!r}")
    if qkv.shape[2] == 0 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            "qkv must have 3 * num_heads * head_dim features; it has "
            f"{qkv.shape[2]} and num_heads is {num_heads}"
        )
    check.token_count("num_queries", num_queries, qkv.shape[1])
    if scale is not None:
        check.finite("scale", scale)
    if rotation is not None:
        check_rotation("rotation", rotation, "qkv", qkv, num_heads, qkv.shape[2] // 3 // num_heads)
    if lengths is not None:
        check_lengths(lengths, "qkv", qkv)
    kernels = select("attention", qkv)
    if needs_dispatcher(qkv, *flat_rotation(rotation)[:2], lengths):
        width = qkv.shape[2] // 3
        if (
            kernels is None
            or not takes_operators(qkv, rotation, lengths)
            or not autograd.served(kernels, qkv, qkv.dtype, num_heads, width)
        ):
            from gist_kernels import reference

            return reference.prefix_attention(qkv, num_heads, num_queries, scale, rotation, lengths)
        backend = serving("attention", qkv.device.type, qkv.dtype)
        return autograd.prefix_attention_operator(
            backend, qkv, num_heads, num_queries, scale, rotation, lengths
        )
    if kernels is None or negated(qkv, rotation, lengths):
        from gist_kernels import reference

        return reference.prefix_attention(qkv, num_heads, num_queries, scale, rotation, lengths)
    return autograd.prefix_attention(kernels, qkv, num_heads, num_queries, scale, rotation, lengths)


def check_lengths(lengths: torch.Tensor, of: str, tokens: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless lengths are those of ``tokens``' (B, N, ...) rows."""
    check.tensor("lengths", lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64; it is {lengths.dtype}")
    check.shape("lengths", lengths, tokens.shape[:1], f"(B,) of {of}")
    if lengths.device != tokens.device:
        raise ValueError(
            f"lengths is on {lengths.device} and {of} on {tokens.device}; move them to one device"
        )
    if lengths.device.type == "cpu" and not needs_dispatcher(lengths) and not batched(lengths):
        check.token_lengths("lengths", lengths, tokens.shape[1])


def check_rotation(
    name: str, rotation: Rotation, like: str, x: torch.Tensor, num_heads: int, head_dim: int
) -> None:
    """Check the rotation of x's (B, N, ...) tokens; ``like`` is the name of x."""
    if not isinstance(rotation, Rotation):
        raise TypeError(f"{name} must be a gist_kernels.Rotation, not {type(rotation).__name__}")
    if head_dim % 2:
        raise ValueError(
            f"{name} needs heads with an even number of features; they have {head_dim}"
        )
    sin, cos, start, half = rotation
    check.boolean(f"{name}.half", half)
    if isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f"{name}.start must be an integer, not {type(start).__name__}")
    check.tensor(f"{name}.sin", sin)
    heads = (num_heads,) if sin.ndim == 3 else ()
    meaning = "(rows, head_dim) or (num_heads, rows, head_dim)"
    check.shape(f"{name}.sin", sin, (*heads, None, head_dim), meaning)
    check.shape(f"{name}.cos", cos, sin.shape, f"of {name}.sin")
    rows = sin.shape[-2]
    if rows < 1 or start < 0 or start + rows > x.shape[1]:
        raise ValueError(
            f"{name} must be of 1 or more of {like}'s {x.shape[1]} tokens; "
            f"it starts at {start} and its tables have {rows} rows"
        )
    for table, tensor in (("sin", sin), ("cos", cos)):
        check.alike(f"{name}.{table}", tensor, like, x, any_float=True)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}.{table} requires a gradient, but is frozen here; pass it detached"
            )
