"""Divergences of sequences of tokens, half of them masked, forward and backward, against eager
PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import gist_kernels as gk
from bench.measure import Call, Case, mismatch

Divergence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

HALF = "half of the rows, and zeros"
SHAPES = {"cpu": ((8, 512, 32000),), "cuda": ((8, 512, 32000), (8, 1024, 128256))}


def _log_softmax(x: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(x, -1, dtype=torch.promote_types(x.dtype, torch.float32))


def eager_kl(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Both directions over the rows that count, as a careful user of PyTorch would write it."""
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    kl = kl + F.kl_div(log_p, log_q, reduction="none", log_target=True)
    return kl.sum(-1).masked_fill(~mask, 0).sum() / mask.sum()


def eager_jsd(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The Jensen-Shannon divergence over the rows that count, in the same manner."""
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    mixture = torch.logsumexp(torch.stack((log_p, log_q)) - 0.6931471805599453, 0)
    jsd = F.kl_div(mixture, log_p, reduction="none", log_target=True)
    jsd = jsd + F.kl_div(mixture, log_q, reduction="none", log_target=True)
    return 0.5 * jsd.sum(-1).masked_fill(~mask, 0).sum() / mask.sum()


def our_kl(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return gk.bidirectional_kl(a, b, mask=mask)


def our_jsd(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return gk.jensen_shannon(a, b, mask=mask)


KINDS: dict[str, tuple[Divergence, Divergence]] = {
    "KL both ways": (our_kl, eager_kl),
    "Jensen-Shannon": (our_jsd, eager_jsd),
}


def absent(device: torch.device) -> dict[str, str]:
    return {}


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape in SHAPES[device.type]:
        for kind in KINDS:
            torch.compiler.reset()
            yield case(kind, shape, dtype, device)


def case(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """Ours with half of the rows masked comes first. Its floor is a call that has the other half
    only, and writes zeros where the masked rows' gradients are: what masked rows cost beyond that
    is reading them."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        (3 * torch.randn(shape, generator=generator, device=device)).to(dtype).requires_grad_()
        for _ in range(2)
    )
    mask = torch.arange(shape[0] * shape[1], device=device).reshape(shape[:2]) % 2 == 0
    every = torch.ones_like(mask)
    ours, eager = KINDS[kind]
    count = mask.numel() // 2
    halves = [x.detach().flatten(0, 1)[:count].requires_grad_() for x in (a, b)]
    zeros = [torch.empty_like(half) for half in halves]

    def differentiated(divergence: Divergence, counted: torch.Tensor) -> Call:
        return lambda: torch.autograd.grad(divergence(a, b, counted), (a, b))

    def half_and_zeros() -> None:
        torch.autograd.grad(ours(*halves, None), halves)
        for gradient in zeros:
            gradient.zero_()

    return Case(
        sizes={"B": shape[0], "T": shape[1], "C": shape[2]},
        dtype=dtype,
        calls={
            f"{kind}, half masked": differentiated(ours, mask),
            "no row masked": differentiated(ours, every),
            HALF: half_and_zeros,
            "eager": differentiated(eager, mask),
            "torch.compile": differentiated(torch.compile(eager, dynamic=False), mask),
        },
        parity=lambda: _parity(kind, a, b, mask),
        floors={f"{kind}, half masked": (HALF, 1.0)},
        own=("no row masked", HALF),
    )


def _parity(kind: str, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> str | None:
    """Of the first rows."""
    rows = max(2, 2**22 // a.shape[-1])
    inputs = [x.detach().flatten(0, 1)[:rows].requires_grad_() for x in (a, b)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    counted = mask.flatten()[:rows]
    ours, eager = KINDS[kind]
    found, truth = ours(*inputs, counted), eager(*exact, counted)
    gradients = zip(
        ("d_a", "d_b"),
        torch.autograd.grad(found, inputs),
        torch.autograd.grad(truth, exact),
        strict=True,
    )
    pairs = {name: (x, y) for name, x, y in gradients}
    return mismatch({"loss": (found.detach(), truth.detach()), **pairs}, relative=1e-5)
