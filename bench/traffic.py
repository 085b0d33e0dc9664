"""Bytes that the Triton kernels move, counted in the interpreter: no device is needed.

    python bench/traffic.py [classes ...]

Every unmasked element of every load, store and atomic counts, also where a cache would serve it.
Printed as multiples of one logit tensor: first accesses to logits and their gradients, where the
least possible is 2, 4 and 4, then all accesses, with targets, statistics and sums. Of the adapter
and of attention, as multiples of one (M, D) tensor: of such tensors, then all, with weights, their
partial sums and log-sum-exps. Of a gated activation, as multiples of one (M, F) tensor.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import interpreter_builder

from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.kernels.triton import activation, adapter, attention, divergence, loss
from gist_kernels.weights import AdapterWeights, NormWeights

PUBLISHED = LossOptions(3.0, 1.0, 0.5, 0.75, 0.75, 0.0, -100, "mean")


class Traffic:
    """What kernels accessed while :func:`counted`."""

    def __init__(self) -> None:
        self._accesses: list[tuple[np.ndarray, int]] = []

    def add(self, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data]
        self._accesses.append((addresses, pointers.get_element_ty().primitive_bitwidth // 8))

    def bytes(self) -> int:
        return sum(addresses.size * size for addresses, size in self._accesses)

    def bytes_of(self, *tensors: torch.Tensor) -> int:
        """Of these tensors alone. They may be views of one another's memory."""
        total = 0
        for addresses, size in self._accesses:
            within = np.zeros(addresses.shape, bool)
            for tensor in tensors:
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                start = tensor.data_ptr()
                within |= (addresses >= start) & (addresses <= start + last * tensor.itemsize)
            total += int(within.sum()) * size
        return total


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what the kernels launched inside the block access."""
    traffic = Traffic()
    builder = type(interpreter_builder)

    def counting(method: Callable[..., Any], at: tuple[int, int]) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            traffic.add(args[at[0]], args[at[1]])
            return method(self, *args)

        return call

    methods = {"create_masked_load": (0, 1), "create_masked_store": (0, 2)}
    methods["create_atomic_rmw"] = (1, 3)
    with mock.patch.multiple(
        builder, **{name: counting(getattr(builder, name), at) for name, at in methods.items()}
    ):
        yield traffic


def measure(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    row_scale: torch.Tensor | None = None,
    in_place: bool = False,
) -> dict[str, tuple[float, float]]:
    """Traffic of each operation in logit tensors: of logits and gradients, and of everything.

    With ``in_place``, forward_backward writes over the logits, as a linear head's loss does.
    """
    options = PUBLISHED if row_scale is None else PUBLISHED._replace(reduction="sum")
    cls, gist = torch.randn(2, rows, classes).to(dtype)
    target = torch.randint(classes, (rows,))
    unit = cls.numel() * cls.itemsize
    found = {}
    with counted() as traffic:
        value, _, stats = loss.forward(cls, gist, target, options, True, row_scale)
    found["forward"] = traffic, (cls, gist)
    with counted() as traffic:
        one = torch.ones_like(value)
        gradients = loss.backward(one, cls, gist, target, stats, options, True, True, row_scale)
    found["backward"] = traffic, (cls, gist, *gradients)
    with counted() as traffic:
        gradients = loss.forward_backward(cls, gist, target, options, row_scale, in_place)[1:]
    found["forward_backward"] = traffic, (cls, gist, *gradients)
    return {
        name: (traffic.bytes_of(*tensors) / unit, traffic.bytes() / unit)
        for name, (traffic, tensors) in found.items()
    }


def measure_divergence(
    rows: int,
    classes: int,
    sides: int,
    row_scale: torch.Tensor | None = None,
    in_place: bool = False,
) -> dict[str, tuple[float, float]]:
    """Traffic of the Jensen-Shannon divergence, as :func:`measure`: in one side's logits."""
    logits = torch.randn(sides, rows, classes).unbind()
    settings = (1 / sides,) * sides, (1.0,) * sides
    found = {}
    with counted() as traffic:
        _, stats = divergence.forward(logits, *settings, row_scale)
    found["forward"] = traffic, logits
    with counted() as traffic:
        gradients = divergence.backward(
            torch.ones(rows), logits, *settings, stats, (True,) * sides, row_scale, in_place
        )
    found["backward"] = traffic, (*logits, *gradients)
    unit = logits[0].numel() * logits[0].itemsize
    return {
        name: (traffic.bytes_of(*tensors) / unit, traffic.bytes() / unit)
        for name, (traffic, tensors) in found.items()
    }


ADAPTER_LEAST = {"sublayer forward": 3, "sublayer backward": 4, "alone forward": 3,
                 "alone backward": 3}  # fmt: skip
"""Transfers of (M, D): in a sublayer x, the normalised and the adapted x, and both gradients coming
in, x and its own; alone x, a residual and the result, and the gradient coming in, x and its own."""


def measure_adapter(rows: int, width: int, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Traffic of the adapter's kernels in (M, D) tensors: of such tensors, and of everything."""
    x, other, d_out, d_normed = torch.randn(4, rows, width).to(dtype)
    norm = NormWeights(torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype), 1e-6)
    weights = AdapterWeights(
        torch.randn(rank, width), torch.randn(rank), torch.randn(width, rank),
        torch.randn(width), 0.1, "gelu",
    )  # fmt: skip
    found = {}
    with counted() as traffic:
        normed, out, z, stats = adapter.forward(x, x, norm, weights)
    found["sublayer forward"] = traffic, (x, normed, out)
    with counted() as traffic:
        dx, *_ = adapter.backward(d_out, d_normed, x, norm, stats, weights, z, pass_through=True)
    found["sublayer backward"] = traffic, (d_out, d_normed, x, dx)
    with counted() as traffic:
        _, out, z, _ = adapter.forward(x, other, None, weights)
    found["alone forward"] = traffic, (x, other, out)
    with counted() as traffic:
        dx, *_ = adapter.backward(d_out, None, x, None, None, weights, z, pass_through=False)
    found["alone backward"] = traffic, (d_out, x, dx)
    unit = x.numel() * x.itemsize
    return {
        name: (traffic.bytes_of(*tensors) / unit, traffic.bytes() / unit)
        for name, (traffic, tensors) in found.items()
    }


GATED_LEAST = {"forward": 3, "backward": 5}
"""Transfers of (M, F): gates, values and the result; its gradient, gates, values and theirs."""


def measure_gated(rows: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Traffic of a gated activation in (M, F) tensors."""
    u, d_hidden = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    with counted() as forward:
        activation.gated_forward(u, "silu")
    with counted() as backward:
        activation.gated_backward(d_hidden, u, "silu")
    unit = d_hidden.numel() * d_hidden.itemsize
    return {"forward": forward.bytes() / unit, "backward": backward.bytes() / unit}


ATTENTION_LEAST = {"forward": 4, "backward": 7}
"""Transfers of (M, D): queries, keys, values and the result; its gradient, the three and theirs."""


def measure_attention(
    images: int,
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    lengths: torch.Tensor | None = None,
) -> dict[str, tuple[float, float]]:
    """Traffic of attention over one packed tensor in (M, D) tensors, as :func:`measure_adapter`."""
    qkv = torch.randn(images, tokens, 3 * heads * head_dim).to(dtype)
    gradients = torch.empty_like(qkv)
    found = {}
    with counted() as traffic:
        out, lse = attention.forward(*qkv.chunk(3, dim=-1), heads, head_dim**-0.5, lengths=lengths)
    found["forward"] = traffic, (qkv, out)
    d_out = torch.randn_like(out)
    with counted() as traffic:
        attention.backward(
            d_out, *qkv.chunk(3, dim=-1), lse, heads, head_dim**-0.5,
            *gradients.chunk(3, dim=-1), lengths=lengths,
        )  # fmt: skip
    found["backward"] = traffic, (qkv, d_out, gradients)
    unit = out.numel() * out.itemsize
    return {
        name: (traffic.bytes_of(*tensors) / unit, traffic.bytes() / unit)
        for name, (traffic, tensors) in found.items()
    }


def main() -> None:
    classes = [int(n) for n in sys.argv[1:]] or [2, 10, 100, 397, 1000, 4096, 8192, 21843, 65537]
    print(
        f"{'rows x classes':>16} {'dtype':>9} "
        + "".join(f"{name:>22}" for name in ("forward", "backward", "forward_backward"))
    )
    for count in classes:
        rows = 64 if count <= 1000 else 4
        for dtype in (torch.float32, torch.bfloat16):
            cells = measure(rows, count, dtype).values()
            line = "".join(f"{logits:>13.3f} /{everything:7.3f}" for logits, everything in cells)
            print(f"{f'{rows} x {count}':>16} {str(dtype)[6:]:>9} {line}", flush=True)
    print(f"{'rows x classes':>16} {'sides':>9} {'forward':>22}{'backward':>22}")
    for count in classes:
        for sides in (2, 3):
            cells = measure_divergence(4, count, sides).values()
            line = "".join(f"{logits:>13.3f} /{everything:7.3f}" for logits, everything in cells)
            print(f"{f'4 x {count}':>16} {sides:>9} {line}", flush=True)
    print(f"{'M x D, rank':>20} {'dtype':>9} " + "".join(f"{n:>22}" for n in ADAPTER_LEAST))
    for rows, width, rank in ((1584, 384, 4), (1584, 768, 4), (1584, 768, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            cells = measure_adapter(rows, width, rank, dtype).values()
            line = "".join(f"{large:>13.3f} /{everything:7.3f}" for large, everything in cells)
            print(f"{f'{rows} x {width}, {rank}':>20} {str(dtype)[6:]:>9} {line}", flush=True)
    print(f"{'M x F, gated':>20} {'dtype':>9} " + "".join(f"{n:>22}" for n in GATED_LEAST))
    for width in (1024, 1365):
        cells = "".join(f"{n:>22.3f}" for n in measure_gated(198, width, torch.bfloat16).values())
        print(f"{f'198 x {width}':>20} {'bfloat16':>9} {cells}", flush=True)
    print(f"{'B x N x H x Dh':>20} {'dtype':>9} " + "".join(f"{n:>22}" for n in ATTENTION_LEAST))
    for shape in ((1, 198, 6, 64), (50, 198, 6, 64), (50, 50, 12, 64)):
        cells = measure_attention(*shape, torch.bfloat16).values()
        line = "".join(f"{large:>13.3f} /{everything:7.3f}" for large, everything in cells)
        print(f"{' x '.join(map(str, shape)):>20} {'bfloat16':>9} {line}", flush=True)


if __name__ == "__main__":
    main()
