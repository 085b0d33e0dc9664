"""The loss, forward and backward, against its peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import gist_kernels as gk
from bench.measure import Call, Case, mismatch

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SHAPES = {
    "cpu": ((32, 100), (64, 1000), (256, 21843), (1024, 32000)),
    "cuda": ((64, 100), (64, 1000), (256, 21843), (4096, 32000), (2048, 131072)),
}


def released(cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss as published with the method: nan where a probability underflows."""
    p, q = F.softmax(cls / 3, dim=1), F.softmax(gist / 3, dim=1)
    kl = F.kl_div(q.log(), p, reduction="batchmean") + F.kl_div(p.log(), q, reduction="batchmean")
    return F.cross_entropy(cls, target) + 0.5 * F.cross_entropy(gist, target) + 0.75 * kl


def log_softmax_form(cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same loss as a careful user of PyTorch would write it."""
    log_p, log_q = F.log_softmax(cls / 3, dim=1), F.log_softmax(gist / 3, dim=1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    kl = kl + F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return F.cross_entropy(cls, target) + 0.5 * F.cross_entropy(gist, target) + 0.75 * kl


def liger() -> Loss:
    """Liger-Kernel's operators, composed so that both sides get gradients."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    cross_entropy = LigerCrossEntropyLoss()
    kl_div = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        log_p, log_q = F.log_softmax(cls / 3, dim=1), F.log_softmax(gist / 3, dim=1)
        # Its KL treats the target as a constant. PyTorch's operators compute each direction's
        # gradient into that side.
        p, q = log_p.detach(), log_q.detach()
        into_target = (log_p.exp() * (log_p - q)).sum(1).mean()
        into_target = into_target + (log_q.exp() * (log_q - p)).sum(1).mean()
        kl = kl_div(log_q, p) + kl_div(log_p, q) + into_target - into_target.detach()
        # Its cross-entropy overwrites the logits with their gradient, so it gets copies.
        ce = cross_entropy(cls.clone(), target) + 0.5 * cross_entropy(gist.clone(), target)
        return ce + 0.75 * kl

    return loss


class Nothing(torch.autograd.Function):
    """PyTorch's own cost of a loss in Python: it runs no kernel and writes no gradient."""

    @staticmethod
    def forward(ctx, cls, gist):
        ctx.save_for_backward(cls, gist)
        return cls.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        cls, gist = ctx.saved_tensors
        return torch.empty_like(cls), torch.empty_like(gist)


def peers(device: torch.device) -> tuple[dict[str, Loss], dict[str, str]]:
    """The peers that compute the loss, and those that can't take part, with the reason."""
    found: dict[str, Loss] = {
        "released": released,
        "log-softmax": log_softmax_form,
        "torch.compile": torch.compile(log_softmax_form, dynamic=False),
    }
    if device.type != "cuda":
        return found, {"Liger-Kernel": "its operators need a GPU"}
    if importlib.util.find_spec("liger_kernel") is None:
        return found, {"Liger-Kernel": "not installed"}
    return found | {"Liger-Kernel": liger()}, {}


def absent(device: torch.device) -> dict[str, str]:
    return peers(device)[1]


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for rows, classes in SHAPES[device.type]:
        torch.compiler.reset()
        yield case(rows, classes, dtype, device, peers(device)[0])


def case(
    rows: int, classes: int, dtype: torch.dtype, device: torch.device, others: dict[str, Loss]
) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    cls, gist = (
        (3 * torch.randn(rows, classes, generator=generator, device=device)).to(dtype)
        for _ in range(2)
    )
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    copies = [(x, torch.empty_like(x)) for x in (cls, gist)]
    a, b = (x.detach().requires_grad_() for x in (cls, gist))

    def differentiated(loss: Loss) -> Call:
        return lambda: torch.autograd.grad(loss(a, b, target), (a, b))

    calls: dict[str, Call] = {"ours": differentiated(gk.gist_loss)}
    calls["ours, no autograd"] = lambda: gk.gist_loss_and_grad(cls, gist, target)
    calls |= {name: differentiated(loss) for name, loss in others.items()}
    calls["empty autograd.Function"] = differentiated(lambda a, b, _: Nothing.apply(a, b))
    calls["copy of both"] = lambda: [to.copy_(x) for x, to in copies]
    # Forward and backward with nothing kept in between read both logits twice and write both
    # gradients: 6 transfers of a logit tensor's bytes. At once it is 4, as a copy of both takes.
    one = cls.numel() * cls.itemsize
    return Case(
        sizes={"B": rows, "C": classes},
        dtype=dtype,
        calls=calls,
        parity=lambda: _parity(cls, gist, target),
        floors={"ours": ("copy of both", 6 / 4), "ours, no autograd": ("copy of both", 1.0)},
        least_bytes={"ours": 6 * one, "ours, no autograd": 4 * one},
        graphs=("ours", "ours, no autograd", "log-softmax", "torch.compile"),
    )


def _parity(cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor) -> str | None:
    """The error over all rows, or over the first ones if all in float64 would not fit."""
    rows = max(1, min(len(cls), 2**23 // cls.shape[1]))
    inputs = [x[:rows].detach().requires_grad_() for x in (cls, gist)]
    exact = [x[:rows].double().requires_grad_() for x in (cls, gist)]
    ours = gk.gist_loss(*inputs, target[:rows])
    truth = log_softmax_form(*exact, target[:rows])
    d_ours, d_truth = torch.autograd.grad(ours, inputs), torch.autograd.grad(truth, exact)
    return mismatch(
        {
            "loss": (ours.detach(), truth.detach()),
            "d_cls": (d_ours[0], d_truth[0]),
            "d_gist": (d_ours[1], d_truth[1]),
        },
        relative=1e-5,
    )
