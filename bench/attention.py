"""Attention from a packed projection, forward and backward, against PyTorch's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import gist_kernels as gk
from bench.machine import linear_of
from bench.measure import Case, mismatch, wall_clock
from gist_kernels.kernels.cpu.native import native

# Images, tokens, heads, queries: ViT-S and -B at 224 pixels, a longer sequence, a last block.
SHAPES = {
    "cpu": (
        (4, 198, 6, 198),
        (8, 198, 6, 198),
        (4, 198, 12, 198),
        (2, 579, 12, 579),
        (8, 198, 6, 2),
    ),
    "cuda": ((128, 198, 12, 198), (128, 258, 12, 258), (64, 579, 12, 579), (128, 198, 12, 2)),
}
HEAD_DIM = 64
# Images, tokens, heads, and the shortest row: lengths are uniform from there to all tokens.
PADDED = {"cpu": (16, 64, 12, 8), "cuda": (512, 64, 12, 8)}


# Of PyTorch's kernels for a GPU, beside the one that it would take by itself.
KERNELS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def absent(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {}
    found = {}
    q = torch.ones(1, 2, 16, HEAD_DIM, dtype=torch.bfloat16, device=device)
    for name, kernel in KERNELS.items():
        try:
            with sdpa_kernel(kernel):
                torch.nn.functional.scaled_dot_product_attention(q, q, q)
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
    return found


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernels = {}
    if device.type == "cuda" and dtype is not torch.float32:
        missing = absent(device)
        kernels = {name: kernel for name, kernel in KERNELS.items() if name not in missing}
    for shape in SHAPES[device.type]:
        yield case(*shape, dtype, device, kernels)
    yield padded_case(*PADDED[device.type], dtype, device)


def case(
    batch: int,
    tokens: int,
    heads: int,
    queries: int,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Mapping[str, SDPBackend] = MappingProxyType({}),
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

    def sdpa_by(kernel: SDPBackend) -> Callable[..., torch.Tensor]:
        def run(qkv: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(kernel):
                return sdpa(qkv)

        return run

    def differentiated(attention: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention(qkv), qkv, upstream)

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
            **{name: differentiated(sdpa_by(kernel)) for name, kernel in kernels.items()},
            **least(batch * heads * queries * tokens, dtype, device),
        },
        parity=parity,
        floors={"ours": (floor(dtype, device), 1.0)},
        clock=clock(device),
    )


def padded_case(
    batch: int,
    tokens: int,
    heads: int,
    shortest: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """Rows of ``shortest`` to ``tokens`` tokens, padded to ``tokens``."""
    torch.manual_seed(0)
    width = heads * HEAD_DIM
    lengths = torch.randint(shortest, tokens + 1, (batch,))
    scores = heads * int(lengths.square().sum())
    lengths = lengths.to(device)
    present = torch.arange(tokens, device=device) < lengths[:, None]
    qkv = torch.randn(batch, tokens, 3 * width, device=device, dtype=dtype, requires_grad=True)
    # A loss that leaves the padding out.
    upstream = torch.randn(batch, tokens, width, device=device, dtype=dtype) * present[..., None]

    def ours(qkv: torch.Tensor) -> torch.Tensor:
        return gk.prefix_attention(qkv, heads, lengths=lengths)

    def without_lengths(qkv: torch.Tensor) -> torch.Tensor:
        return gk.prefix_attention(qkv, heads)

    def masked(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.unflatten(-1, (3, heads, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        mask = present[:, None, None]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return out.transpose(1, 2).flatten(2)

    def differentiated(attention: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention(qkv), qkv, upstream)

    def parity() -> str | None:
        exact = qkv.detach().double().requires_grad_()
        found, truth = ours(qkv), masked(exact) * present[..., None]
        (d_found,) = torch.autograd.grad(found, qkv, upstream)
        (d_truth,) = torch.autograd.grad(truth, exact, upstream.double())
        return mismatch(
            {"out": (found.detach(), truth.detach()), "d_qkv": (d_found, d_truth)}, relative=1e-5
        )

    return Case(
        sizes={"B": batch, "N": tokens, "H": heads, "shortest": shortest},
        dtype=dtype,
        calls={
            "ours": differentiated(ours),
            "ours, without lengths": differentiated(without_lengths),
            "SDPA, boolean mask": differentiated(masked),
            **least(scores, dtype, device),
        },
        parity=parity,
        floors={"ours": (floor(dtype, device), 1.0)},
        clock=clock(device),
    )


# Two matmuls forward and five backward: multiply-adds per score.
MULTIPLY_ADDS = 7 * HEAD_DIM
PRODUCT, ARITHMETIC = "a product as large", "its matmuls at the peak of multiply-adds"


def floor(dtype: torch.dtype, device: torch.device) -> str:
    """AMX multiplies bf16 faster than any other instruction multiplies and adds."""
    if device.type != "cpu" or native is None:
        return PRODUCT
    by_amx = dtype is torch.bfloat16 and native.instruction_set() == "amx"
    return PRODUCT if by_amx else ARITHMETIC


def least(scores: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """As many multiply-adds as attention with so many scores has: as one large matmul and, on a
    CPU, in registers only."""
    rows = MULTIPLY_ADDS * scores // (64 * 2048)
    a, b = (torch.randn(n, 2048, device=device, dtype=dtype) for n in (rows, 64))
    linear = linear_of(device)
    found: dict[str, Callable[[], object]] = {PRODUCT: lambda: linear(a, b, None)}
    if floor(dtype, device) == ARITHMETIC:
        count, threads = MULTIPLY_ADDS * scores, torch.get_num_threads()
        found[ARITHMETIC] = lambda: native.multiply_adds(count, threads)
    return found


def clock(device: torch.device) -> Callable[[], float]:
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if one_thread else wall_clock
