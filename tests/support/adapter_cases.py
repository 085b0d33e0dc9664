"""Inputs of the adapter family's kernels, and what they must compute, for every backend's tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import oracles
import torch
import torch.nn.functional as F

from gist_kernels.activations import ACTIVATIONS
from gist_kernels.weights import AdapterWeights, NormWeights

EPS = 1e-6


class Case(NamedTuple):
    """Inputs; `add` may be x itself, and `d_out` or `d_normed` None."""

    x: torch.Tensor
    add: torch.Tensor | None
    norm: NormWeights | None
    adapter: AdapterWeights | None
    bias: torch.Tensor | None
    d_out: torch.Tensor | None
    d_normed: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> Case:
        """All tensors in `dtype`; `add` stays x where it was."""

        def convert(value):
            if isinstance(value, torch.Tensor):
                return value.to(dtype)
            if isinstance(value, tuple):
                return type(value)(*map(convert, value))
            return value

        converted = Case(*map(convert, self))
        return converted._replace(add=converted.x) if self.add is self.x else converted


class Result(NamedTuple):
    normed: torch.Tensor | None
    out: torch.Tensor | None
    z: torch.Tensor | None
    dx: torch.Tensor | None
    d_down_weight: torch.Tensor | None
    d_down_bias: torch.Tensor | None
    d_up_weight: torch.Tensor | None
    d_up_bias: torch.Tensor | None


def make(
    rows, width, rank, *, activation="gelu", dtype=torch.float32, add="x", biases=True, seed=0
):
    generator = torch.Generator().manual_seed(rows * 7919 + width * 31 + rank + 10_000_000 * seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    x = normal(rows, width)
    norm = NormWeights(1 + normal(width, scale=0.3), normal(width, scale=0.3), EPS)
    adapter = AdapterWeights(
        normal(rank, width, scale=width**-0.5),
        normal(rank, scale=0.3) if biases else None,
        normal(width, rank, scale=rank**-0.5),
        normal(width, scale=0.3) if biases else None,
        0.7,
        activation,
    )
    bias = normal(width, scale=0.3) if biases else None
    added = {"x": x, "other": normal(rows, width), "none": None}[add]
    return Case(x, added, norm, adapter, bias, normal(rows, width), normal(rows, width)).to(dtype)


def computed(kernels: Any, case: Case, *, need_dx: bool = True) -> Result:
    """Forward and backward by a backend; the gradient passes through where `add` is x."""
    x, add, norm, adapter, bias, d_out, d_normed = case
    normed, out, z, stats = kernels.forward(x, add, norm, adapter, bias)
    gradients = kernels.backward(
        d_out, d_normed, x, norm, stats, adapter, z, pass_through=add is x, need_dx=need_dx
    )
    return Result(normed, out, z, *gradients)


def by_autograd(case: Case, dtype: torch.dtype, layer_norm, bottleneck) -> Result:
    """All numbers of `case` in `dtype`, by autograd of the two functions."""
    x, add, norm, adapter, bias, d_out, d_normed = case.to(dtype)
    weights = [] if adapter is None else [None if w is None else w.clone() for w in adapter[:4]]
    leaves = [x.clone().requires_grad_(), *(w for w in weights if w is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    wanted, total = leaves[0], leaves[0].sum() * 0
    normed = out = z = None
    if norm is not None:
        normed = layer_norm(wanted, norm.weight, norm.bias, norm.eps)
        total = total if d_normed is None else total + (normed * d_normed).sum()
    if adapter is not None:
        update, z = bottleneck(wanted, *weights, adapter.scale, adapter.activation)
        added = wanted if case.add is case.x else add
        out = update if added is None else added + update
        out = out if bias is None else out + bias
        total = total if d_out is None else total + (out * d_out).sum()
    gradients = iter(torch.autograd.grad(total, leaves, materialize_grads=True))
    dx = next(gradients)
    of_weights = [None if w is None else next(gradients) for w in weights] or [None] * 4
    if d_out is None:
        of_weights = [None] * 4
    tensors = (None if t is None else t.detach() for t in (normed, out, z))
    return Result(*tensors, dx, *of_weights)


def truth(case: Case) -> Result:
    return by_autograd(case, torch.float64, oracles.layer_norm, oracles.bottleneck)


def pytorch(case: Case) -> Result:
    """PyTorch's own operators, in the dtype of x."""

    def layer_norm(x, weight, bias, eps):
        return F.layer_norm(x, (x.shape[1],), weight, bias, eps)

    def bottleneck(x, down_weight, down_bias, up_weight, up_bias, scale, activation):
        z = F.linear(x, down_weight, down_bias)
        return scale * F.linear(ACTIVATIONS[activation](z), up_weight, up_bias), z

    return by_autograd(case, case.x.dtype, layer_norm, bottleneck)


def assert_same(a: Result, b: Result) -> None:
    for name, x, y in zip(Result._fields, a, b, strict=True):
        assert (x is None) == (y is None), name
        if x is not None and y is not None:
            assert x.dtype is y.dtype
            assert torch.equal(x, y), name


def assert_close(case: Case, a: Result, ulps: float = 8) -> None:
    """Each error is at most that of PyTorch, and so many ulps of the tensor's scale."""
    found = shares(case, a, ulps)
    assert all(share <= 1 for share in found.values()), found  # also where one is nan


def shares(case: Case, a: Result, ulps: float) -> dict[str, float]:
    """Each tensor's largest error, as a share of what it may be."""
    exact, like = truth(case), pytorch(case)
    least = {}
    if case.adapter is not None and case.x.numel():
        # Of a single inner product that happens to be small, the scale is that of its terms.
        x, down = case.x.double(), case.adapter.down_weight.double()
        least["z"] = (x.square() @ down.square().T).sqrt().max().item()
        if case.d_out is not None:
            upstream = abs(case.adapter.scale) * case.d_out.double()
            # What the same rounding of z does to act(z) and on.
            least["d_up_weight"] = upstream.abs().max().item() * least["z"]
            least["d_up_bias"] = upstream.norm(dim=0).max().item()
            d_z = upstream @ case.adapter.up_weight.double()  # but for act'(z), about 1 at most
            least["d_down_bias"] = d_z.norm(dim=0).max().item()
            least["d_down_weight"] = (d_z.square().T @ x.square()).sqrt().max().item()
    found = {}
    for name, x, y, theirs in zip(Result._fields, a, exact, like, strict=True):
        assert (x is None) == (y is None), name
        if x is None or y.numel() == 0:
            continue
        assert x.shape == y.shape, name
        error = (x.double() - y).abs().max().item()
        scale = max(y.abs().max().item(), least.get(name, 0.0))
        ulp = scale * torch.finfo(x.dtype).eps
        allowed = (theirs.double() - y).abs().max().item() + ulps * ulp
        found[name] = error / allowed if allowed else (torch.inf if error else 0.0)
    return found
