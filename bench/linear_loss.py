"""The loss of a linear head's logits, forward and backward, against what else computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import gist_kernels as gk
from bench.loss import log_softmax_form
from bench.measure import Call, Case, mismatch
from gist_kernels.backend import select

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, gk.HeadWeights], torch.Tensor]

HAS_CROSS_ENTROPY = hasattr(torch.nn, "LinearCrossEntropyOptions")
# Rows of a chunk of linear_cross_entropy; the best of them counts.
CHUNKS = (128, 256, 512)
# Row pairs, features, classes (MiniLM's vocabulary, Llama 3's), and whether the head is trained.
SHAPES = {
    "cpu": ((512, 384, 30522, True), (512, 384, 30522, False), (192, 768, 128256, False)),
    "cuda": ((4096, 384, 30522, True), (4096, 4096, 128256, True), (4096, 4096, 128256, False)),
}


def fused(
    f: torch.Tensor, g: torch.Tensor, target: torch.Tensor, head: gk.HeadWeights
) -> torch.Tensor:
    loss = gk.linear_gist_loss(f, g, target, head)
    assert isinstance(loss, torch.Tensor)
    return loss


def fused_in_smaller_chunks(
    f: torch.Tensor, g: torch.Tensor, target: torch.Tensor, head: gk.HeadWeights
) -> torch.Tensor:
    """The same with a quarter of the memory."""
    loss = gk.linear_gist_loss(f, g, target, head, chunk_rows=64)
    assert isinstance(loss, torch.Tensor)
    return loss


def unfused(
    f: torch.Tensor, g: torch.Tensor, target: torch.Tensor, head: gk.HeadWeights
) -> torch.Tensor:
    """One matmul for both sides, then the loss."""
    logits = F.linear(torch.stack((f, g), 1), *head)
    return gk.gist_loss(*gk.split_heads(logits), target)


def eager(
    f: torch.Tensor, g: torch.Tensor, target: torch.Tensor, head: gk.HeadWeights
) -> torch.Tensor:
    return log_softmax_form(F.linear(f, *head), F.linear(g, *head), target)


def checkpointed(
    f: torch.Tensor, g: torch.Tensor, target: torch.Tensor, head: gk.HeadWeights
) -> torch.Tensor:
    """Chunks whose logits the backward pass computes again."""
    total = f.new_zeros((), dtype=torch.float32)
    for chunk in zip(f.split(128), g.split(128), target.split(128), strict=True):
        part = checkpoint(eager, *chunk, head, use_reentrant=False)
        total = total + part * (len(chunk[0]) / len(f))
    return total


def cross_entropies(chunk: int) -> Loss:
    """PyTorch's fused head on both sides' rows in one call. It has no KL: it computes less than
    the others, the mean of both cross-entropies."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def loss(
        f: torch.Tensor, g: torch.Tensor, target: torch.Tensor, head: gk.HeadWeights
    ) -> torch.Tensor:
        found: torch.Tensor = F.linear_cross_entropy(
            torch.cat((f, g)), head.weight, target.repeat(2), linear_bias=head.bias, options=options
        )
        return found

    return loss


def peers() -> dict[str, Loss]:
    found = {
        "ours, chunks of 64": fused_in_smaller_chunks,
        "unfused, ours": unfused,
        "log-softmax": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
        "checkpointed chunks": checkpointed,
    }
    if HAS_CROSS_ENTROPY:
        for chunk in CHUNKS:
            found[f"linear_cross_entropy, no KL, {chunk} rows"] = cross_entropies(chunk)
    return found


def absent(device: torch.device) -> dict[str, str]:
    if HAS_CROSS_ENTROPY:
        return {}
    return {"linear_cross_entropy": "not in PyTorch before 2.13"}


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for rows, width, classes, trained in SHAPES[device.type]:
        torch.compiler.reset()
        yield case(rows, width, classes, trained, dtype, device, peers())


def case(
    rows: int,
    width: int,
    classes: int,
    trained: bool,
    dtype: torch.dtype,
    device: torch.device,
    others: dict[str, Loss],
) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    f, g = (normal(rows, width).requires_grad_() for _ in range(2))
    weight = (3 * width**-0.5 * normal(classes, width)).requires_grad_(trained)
    head = gk.HeadWeights(weight, normal(classes).requires_grad_(trained))
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    inputs = [t for t in (f, g, *head) if t is not None and t.requires_grad]

    def differentiated(loss: Loss) -> Call:
        return lambda: torch.autograd.grad(loss(f, g, target, head), inputs)

    return Case(
        sizes={"B": rows, "D": width, "C": classes, "trained": int(trained)},
        dtype=dtype,
        calls={
            "ours": differentiated(fused),
            **{name: differentiated(loss) for name, loss in others.items()},
            "matmuls alone": lambda: matmuls(f.detach(), g.detach(), head),
        },
        parity=lambda: _parity(f, g, target, head),
        floors={"ours": ("matmuls alone", 1.0)},
    )


def matmuls(f: torch.Tensor, g: torch.Tensor, head: gk.HeadWeights) -> None:
    """The same chunks' matmuls, of the same kernels, without a loss."""
    weight, bias = (t if t is None else t.detach() for t in head)
    assert weight is not None
    kernels = select("linear_loss", f).head
    total = torch.zeros_like(weight, dtype=torch.float32) if head.weight.requires_grad else None
    buffer = None
    size = kernels.chunk_rows(len(weight), f.itemsize)
    for pair in zip(f.split(size), g.split(size), strict=True):
        rows = torch.cat(pair)
        buffer = kernels.buffer(rows, weight) if buffer is None else buffer
        out = None if buffer is None else buffer[: len(rows)]
        logits = kernels.logits(rows, weight, bias, out)
        kernels.rows_gradient(logits, weight)
        if total is not None:
            kernels.add_weight_gradient(total, logits, rows)
        del logits


def _parity(
    f: torch.Tensor, g: torch.Tensor, target: torch.Tensor, head: gk.HeadWeights
) -> str | None:
    """Of all rows, or of the first ones where all in float64 would not fit."""
    rows = max(1, min(len(f), 2**23 // len(head.weight)))
    inputs = [t.detach().requires_grad_() for t in (f[:rows], g[:rows], head.weight)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    bias = head.bias
    assert bias is not None
    bias = bias.detach()
    found = fused(*inputs[:2], target[:rows], gk.HeadWeights(inputs[2], bias))
    truth = eager(*exact[:2], target[:rows], gk.HeadWeights(exact[2], bias.double()))
    gradients = torch.autograd.grad(found, inputs), torch.autograd.grad(truth, exact)
    named = {"loss": (found.detach(), truth.detach())}
    for name, *pair in zip(("d_cls", "d_gist", "d_weight"), *gradients, strict=True):
        named[name] = (pair[0], pair[1])
    return mismatch(named, relative=1e-4)
