"""Draws loss.svg: how each direction of the KL divergence pulls two heads over two classes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

import gist_kernels as gk

DIRECTIONS = {
    "KL(p || q)": ((1.0, 0.0), "C0"),
    "KL(q || p)": ((0.0, 1.0), "C1"),
    "both, half each": ((0.5, 0.5), "C2"),
}


def heads(p: torch.Tensor, q: torch.Tensor) -> list[torch.Tensor]:
    """Logits (..., 2) of both heads, whose first class has the probabilities p and q."""
    return [torch.stack([r.log(), (1 - r).log()], -1).requires_grad_() for r in (p, q)]


def pulls(weights: tuple[float, float], both: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Minus the gradients of both heads' logits, at temperature 1."""
    divergence = gk.bidirectional_kl(*both, weights=weights, reduction="sum")
    return tuple(-gradient for gradient in torch.autograd.grad(divergence, both))


def descent(weights: tuple[float, float], p: float, q: float) -> torch.Tensor:
    """(2, 40): p and q in 40 steps of gradient descent on both heads, with the rate 0.5."""
    both, path = heads(torch.tensor(p), torch.tensor(q)), []
    for _ in range(40):
        path.append(torch.stack([side.detach().softmax(-1)[0] for side in both]))
        moved = zip(both, pulls(weights, both), strict=True)
        both = [(side + 0.5 * pull).detach().requires_grad_() for side, pull in moved]
    return torch.stack(path, -1)


figure = Figure(figsize=(8, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)
q = torch.linspace(0.001, 0.999, 400)
for name, (weights, colour) in DIRECTIONS.items():
    pull = pulls(weights, heads(torch.full_like(q, 0.9), q))[1]
    left.plot(q, pull[:, 0], color=colour, label=name)
    for path, style in zip(descent(weights, 0.9, 0.02), ("-", "--"), strict=True):
        right.plot(path, style, color=colour)
left.axvline(0.9, color="gray", linewidth=0.8)
left.set(title="p = 0.9", xlabel="q", ylabel="pull on the Gist head's logit")
right.set(title="both heads move: p solid, q dashed", xlabel="step", ylim=(0, 1))
left.legend(fontsize="small")
with matplotlib.rc_context({"svg.hashsalt": "loss"}):  # the same file each time
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
