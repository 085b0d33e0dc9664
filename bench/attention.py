"""Attention from a packed projection, forward and backward, against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import gist_kernels as gk
from bench.measure import Case, mismatch
from bench.step import linear_of

# Images, tokens, heads, queries: ViT-S and -B at 224 pixels, a longer sequence, a last block.
SHAPES = {
    "cpu": ((8, 198, 6, 198), (4, 198, 12, 198), (2, 579, 12, 579), (8, 198, 6, 2)),
    "cuda": ((128, 198, 12, 198), (128, 258, 12, 258), (64, 579, 12, 579), (128, 198, 12, 2)),
}
HEAD_DIM = 64


def absent(device: torch.device) -> dict[str, str]:
    return {}


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape in SHAPES[device.type]:
        torch.compiler.reset()
        yield case(*shape, dtype, device)


def case(
    batch: int, tokens: int, heads: int, queries: int, dtype: torch.dtype, device: torch.device
) -> Case:
    torch.manual_seed(0)
    width = heads * HEAD_DIM
    qkv = torch.randn(batch, tokens, 3 * width, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(batch, queries, width, device=device, dtype=dtype)

    def ours(qkv: torch.Tensor) -> torch.Tensor:
        return gk.prefix_attention(qkv, heads, num_queries=queries)

    def sdpa(qkv: torch.Tensor) -> torch.Tensor:
        with gk.use_backend("reference"):
            return ours(qkv)

    def differentiated(attention: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention(qkv), qkv, upstream)

    # Two products forward, five backward: as many operations as one product of these sizes.
    rows = 7 * batch * heads * queries * tokens // 2048
    a, b = (torch.randn(n, HEAD_DIM * 32, device=device, dtype=dtype) for n in (rows, 64))
    linear = linear_of(device)

    def parity() -> str | None:
        image = qkv[:1].detach()
        exact = image.double().requires_grad_()
        image.requires_grad_()
        found, truth = ours(image), sdpa(exact)
        (d_found,) = torch.autograd.grad(found, image, upstream[:1])
        (d_truth,) = torch.autograd.grad(truth, exact, upstream[:1].double())
        return mismatch(
            {"out": (found.detach(), truth.detach()), "d_qkv": (d_found, d_truth)}, relative=1e-5
        )

    return Case(
        sizes={"B": batch, "N": tokens, "H": heads, "Q": queries},
        dtype=dtype,
        calls={
            "ours": differentiated(ours),
            "SDPA": differentiated(sdpa),
            "a product as large": lambda: linear(a, b, None),
        },
        parity=parity,
        floors={"ours": ("a product as large", 1.0)},
    )
