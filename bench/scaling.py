"""How the cost of a loss, and of a block's sublayers with an adapter, grows with each size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import gist_kernels as gk
from bench import loss
from bench.measure import Call, Case, mismatch

# One size varies, the others are fixed. The values are on both sides of the point where the work
# costs more than the call.
ROWS = tuple(4**k for k in range(7))
CLASSES = (10, 40, 160, 640, 2560, 10240, 40960, 163840)
SUBLAYERS = {
    "B": (1, 2, 4, 8, 16),
    "N": (50, 98, 198, 402, 802),
    "D": (192, 384, 768, 1536),
    "r": (1, 4, 16, 64, 128),
}
OTHERWISE = {"B": 4, "N": 198, "D": 384, "r": 4}
HEAD_DIM = 64
GRADIENTS = ("x", "down", "down_bias", "up", "up_bias")
RESULTS = ("output", *(f"gradient of {name}" for name in GRADIENTS))


def absent(device: torch.device) -> dict[str, str]:
    return {}


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for rows in ROWS:
        yield _loss("B", rows, 1000, dtype, device)
    for classes in CLASSES:
        yield _loss("C", 64, classes, dtype, device)
    for varied, sizes in SUBLAYERS.items():
        for size in sizes:
            yield sublayers(varied, {**OTHERWISE, varied: size}, dtype, device)


def _loss(varied: str, rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> Case:
    case = loss.case(rows, classes, dtype, device, {})
    case.varied = varied
    case.calls = {name: case.calls[name] for name in ("ours", "ours, no autograd")}
    case.floors.clear()
    case.graphs = ()
    return case


def sublayers(varied: str, sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> Case:
    """Attention and MLP of one block, each with an adapter, forward and backward."""
    generator = torch.Generator(device).manual_seed(0)

    def tensor(*shape: int, by: float = 1.0) -> torch.Tensor:
        return (by * torch.randn(shape, generator=generator, device=device)).to(dtype)

    batch, tokens, width, rank = sizes.values()
    x, upstream = tensor(batch, tokens, width).requires_grad_(), tensor(batch, tokens, width)
    down, up = tensor(rank, width, by=0.05), tensor(width, rank, by=0.05)
    trained = [t.requires_grad_() for t in (down, tensor(rank), up, tensor(width))]
    norm = tensor(width), tensor(width)
    of_attention = tensor(3 * width, width, by=0.05), None, tensor(width, width, by=0.05), None
    of_mlp = tensor(4 * width, width, by=0.05), None, tensor(width, 4 * width, by=0.05), None

    def attention(x, wide=lambda t: t) -> torch.Tensor:
        weights = gk.AttentionWeights(*map(wide, of_attention), width // HEAD_DIM)
        return gk.adapter_attention(x, _norm(norm, wide), weights, _adapter(trained, wide))

    def mlp(x, wide=lambda t: t) -> torch.Tensor:
        weights = gk.MlpWeights(*map(wide, of_mlp))
        return gk.adapter_mlp(x, _norm(norm, wide), weights, _adapter(trained, wide))

    def differentiated(sublayer: Callable[..., torch.Tensor]) -> Call:
        return lambda: torch.autograd.grad(sublayer(x), (x, *trained), upstream)

    def parity() -> str | None:
        def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.double()

        pairs = {}
        for name, sublayer in (("attention", attention), ("mlp", mlp)):
            found = sublayer(x).detach(), *differentiated(sublayer)()
            with gk.use_backend("reference"):
                theirs = sublayer(x).detach(), *differentiated(sublayer)()
                out = sublayer(x.double(), wide)
            truth = out.detach(), *torch.autograd.grad(out, (x, *trained), upstream.double())
            each = zip(found, truth, theirs, strict=True)
            pairs |= {f"{name}, {of}": tensors for of, tensors in zip(RESULTS, each, strict=True)}
        return mismatch(pairs, relative=1e-5)

    return Case(
        sizes=sizes,
        varied=varied,
        dtype=dtype,
        calls={"attention": differentiated(attention), "MLP": differentiated(mlp)},
        parity=parity,
    )


def _norm(weights, wide) -> gk.NormWeights:
    return gk.NormWeights(*map(wide, weights), 1e-6)


def _adapter(trained, wide) -> gk.AdapterWeights:
    return gk.AdapterWeights(*map(wide, trained), 0.1, "gelu")
