"""The adapter beside a residual, forward and backward, against modules that compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import gist_kernels as gk
from bench.measure import Case, mismatch

SHAPES = {
    "cpu": ((1584, 384, 4), (792, 768, 4), (792, 768, 64)),
    "cuda": ((6336, 768, 4), (50688, 768, 4), (50688, 768, 64), (50688, 1024, 16)),
}
SCALE = 0.1


class Plain(nn.Module):
    """The bottleneck, composed of modules in the usual way."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.act, self.up = nn.Linear(width, rank), nn.GELU(), nn.Linear(rank, width)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + SCALE * self.up(self.act(self.down(x)))


def absent(device: torch.device) -> dict[str, str]:
    return {"HF PEFT": "it has no bottleneck adapter"}


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for rows, width, rank in SHAPES[device.type]:
        torch.compiler.reset()
        yield case(rows, width, rank, dtype, device)


def case(rows: int, width: int, rank: int, dtype: torch.dtype, device: torch.device) -> Case:
    torch.manual_seed(0)
    plain = Plain(width, rank).to(device, dtype)
    weights = plain.down.weight, plain.down.bias, plain.up.weight, plain.up.bias
    x, residual = (
        torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    upstream = torch.randn(rows, width, device=device, dtype=dtype)
    leaves = x, residual, *weights
    to = torch.empty_like(upstream)

    def ours(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return gk.adapter(x, *weights, scale=SCALE, residual=residual)

    def differentiated(adapter: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(adapter(x, residual), leaves, upstream)

    def parity() -> str | None:
        exact = Plain(width, rank).to(device, torch.float64)
        exact.load_state_dict(plain.state_dict())
        wide = [t.detach().double().requires_grad_() for t in (x, residual)]
        out = exact(*wide)
        truth = torch.autograd.grad(out, (*wide, *exact.parameters()), upstream.double())
        found = torch.autograd.grad(ours(x, residual), leaves, upstream)
        pairs = zip(found, truth, strict=True)
        return mismatch(
            {"out": (ours(x, residual).detach(), out.detach())}
            | {f"gradient {i}": pair for i, pair in enumerate(pairs)},
            relative=1e-5,
        )

    one = upstream.numel() * upstream.itemsize
    return Case(
        sizes={"M": rows, "D": width, "r": rank},
        dtype=dtype,
        calls={
            "ours": differentiated(ours),
            "modules": differentiated(plain),
            "modules, torch.compile": differentiated(torch.compile(plain, dynamic=False)),
            "copy": lambda: to.copy_(upstream),
        },
        parity=parity,
        # x, residual and result; upstream gradient, x and its gradient: a copy moves two of six.
        floors={"ours": ("copy", 3.0)},
        least_bytes={"ours": 6 * one},
    )
