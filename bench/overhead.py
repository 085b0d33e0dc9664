"""Python's share of a training step, in units of an empty autograd.Function.

The kernels of the first contender only allocate what they return, so that what is left is Python
and the dispatcher: plans, checks, autograd and the few operators of PyTorch around the blocks.
The loss has two floors: a node that keeps what ours keeps and computes nothing, and our kernel
without a node.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import timm
import torch

import gist
import gist_kernels as gk
from bench.loss import Nothing
from bench.measure import Case
from gist_kernels import backend
from gist_kernels.kernels.protocols import LossOptions, SublayerKernels

UNIT = "empty autograd.Function"
NOTHING = "nothing"


def absent(device: torch.device) -> dict[str, str]:
    return {}


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    dtype = dtype or torch.float32
    yield step_case(device, dtype)
    yield loss_case(device, dtype)


def step_case(device: torch.device, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=100)
    model = gist.wrap(backbone).to(device, dtype).train()
    loss, target = gist.GistLoss(), torch.zeros(1, dtype=torch.long, device=device)
    images = torch.randn(1, 3, 32, 32, device=device, dtype=dtype)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.grad(loss(model(images), target), trained)

    def without_kernels() -> None:
        with nothing():
            step()

    return Case(
        sizes={"B": 1, "N": 6, "D": 192, "blocks": 12},
        dtype=dtype,
        calls={"ours, no kernels": without_kernels, "ours": step, UNIT: unit(device, dtype)},
        parity=lambda: None,
        unit=UNIT,
    )


def loss_case(device: torch.device, dtype: torch.dtype) -> Case:
    a, b = torch.randn(2, 32, 100, device=device, dtype=dtype).unbind()
    a, b = a.requires_grad_(), b.requires_grad_()
    target = torch.zeros(32, dtype=torch.long, device=device)
    x, y = a.detach(), b.detach()
    kernels = backend.select("loss", x)
    options = LossOptions(3.0, 1.0, 0.5, 0.75, 0.75, 0.0, -100, "mean")
    return Case(
        sizes={"B": 32, "C": 100},
        dtype=dtype,
        calls={
            "ours": lambda: torch.autograd.grad(gk.gist_loss(a, b, target), (a, b)),
            "node of ours, no kernel": lambda: torch.autograd.grad(
                SameNode.apply(a, b, (target, None)), (a, b)
            ),
            "kernel of ours, no node": lambda: kernels.forward_backward(x, y, target, options),
            UNIT: unit(device, dtype),
        },
        parity=lambda: None,
        unit=UNIT,
        clock=time.process_time,  # one thread: the logits are too few for two
    )


class SameNode(torch.autograd.Function):
    """What PyTorch takes for the loss's node: its inputs, its outputs and what it keeps."""

    @staticmethod
    def forward(ctx: Any, cls: torch.Tensor, gist: torch.Tensor, others: Any) -> torch.Tensor:
        ctx.save_for_backward(cls, gist, *others)
        ctx.set_materialize_grads(False)
        ctx.ahead = torch.empty_like(cls), torch.empty_like(gist)
        return cls.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        _ = ctx.saved_tensors  # reading them checks that nobody has written to the inputs
        return *ctx.ahead, None


def unit(device: torch.device, dtype: torch.dtype) -> Any:
    """An autograd.Function of two inputs that computes nothing, forward and backward."""
    a, b = (torch.randn(32, 100, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    return lambda: torch.autograd.grad(Nothing.apply(a, b), (a, b))


@contextmanager
def nothing() -> Iterator[None]:
    """Serve the sublayers by kernels that only allocate what they return."""
    before = backend.BACKENDS
    found = next(each for each in before if each.sublayers is not None)
    kernels = SublayerKernels(_ADAPTER, _ACTIVATION, _ATTENTION, _LINEAR)
    backend.BACKENDS = (
        dataclasses.replace(found, name=NOTHING, sublayers=lambda: kernels),
        *before,
    )
    try:
        with gk.use_backend(NOTHING):
            yield
    finally:
        backend.BACKENDS = before


def _adapter_forward(
    x: Any, add: Any, norm: Any, adapter: Any, bias: Any = None, matmul_dtype: Any = None
) -> Any:
    normed = stats = out = z = None
    if norm is not None:
        normed = torch.empty_like(x, dtype=matmul_dtype)
        stats = x.new_empty((x.shape[0], 2))
    if adapter is not None:
        out, z = torch.empty_like(x), x.new_empty((x.shape[0], adapter.down_weight.shape[0]))
    return normed, out, z, stats


def _adapter_backward(
    d_out: Any, d_normed: Any, x: Any, norm: Any, stats: Any, adapter: Any, z: Any,
    *, pass_through: bool, need_dx: bool = True,
) -> Any:  # fmt: skip
    dx = torch.empty_like(x) if need_dx else None
    if adapter is None:
        return dx, None, None, None, None
    return dx, *(None if t is None else torch.empty_like(t) for t in adapter[:4])


def _attention_forward(
    q: Any, k: Any, v: Any, num_heads: int, scale: float, rotation: Any = None, lengths: Any = None
) -> Any:
    return torch.empty_like(q), q.new_empty((q.shape[0], num_heads, q.shape[1]))


_ADAPTER: Any = SimpleNamespace(forward=_adapter_forward, backward=_adapter_backward)
_ACTIVATION: Any = SimpleNamespace(
    forward=lambda u, activation: torch.empty_like(u),
    backward=lambda d_a, u, activation, *, into_d_a=False: d_a,
)
_ATTENTION: Any = SimpleNamespace(
    serves=lambda q, k, num_heads: True,
    rotates=lambda q, k, num_heads, rotation: True,
    forward=_attention_forward,
    backward=lambda *arguments: None,
)
_LINEAR: Any = SimpleNamespace(
    linear=lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
    add_linear=lambda out, x, weight: out,
)
