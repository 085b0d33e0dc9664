"""Attention's arguments, its results in float64 and by PyTorch, and what an error may be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import oracles
import torch
import torch.nn.functional as F
from draws import assert_within_bounds

from gist_kernels import Rotation

SENTINEL = 12345.0
KINDS = ("random", "peaked", "equal", "huge")


class Shape(NamedTuple):
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class Turn(NamedTuple):
    """Rotary positions of a case: which tokens have none, before and after the others."""

    half: bool
    per_head: bool
    before: int
    after: int

    def rotation(self, shape: Shape, generator: torch.Generator, device: Any) -> Rotation:
        """The features of a pair have different entries."""
        start = min(self.before, shape.keys - 1)
        rows = max(1, shape.keys - start - self.after)
        size = *((shape.heads,) if self.per_head else ()), rows, shape.head_dim
        angles, factors = (torch.randn(size, generator=generator) for _ in range(2))
        factors = 1 + 0.2 * factors
        tables = (factors * (3 * angles).sin(), factors * (3 * angles).cos())
        return Rotation(*(table.to(device) for table in tables), start, self.half)


TURNS = (
    Turn(half=True, per_head=False, before=1, after=0),
    Turn(half=False, per_head=True, before=2, after=3),
    Turn(half=True, per_head=True, before=0, after=5),
    Turn(half=False, per_head=False, before=0, after=0),
)


class Result(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    d_q: torch.Tensor
    d_k: torch.Tensor
    d_v: torch.Tensor


class Case(NamedTuple):
    shape: Shape
    scale: float
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    rotation: Rotation | None = None
    lengths: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Without tables and lengths."""
        return self[2:6]

    def row(self, image: int) -> Case:
        """One row of a padded batch, without its padding."""
        keys = int(self.lengths[image])
        queries, part = min(self.shape.queries, keys), slice(image, image + 1)
        shape = self.shape._replace(batch=1, queries=queries, keys=keys)
        rotation = self.rotation
        if rotation is not None:
            rows = max(0, keys - rotation.start)
            sin, cos = (table[..., :rows, :] for table in rotation[:2])
            rotation = rotation._replace(sin=sin, cos=cos) if rows else None
        return Case(
            shape, self.scale, self.q[part, :queries], self.k[part, :keys], self.v[part, :keys],
            self.d_out[part, :queries], rotation,
        )  # fmt: skip

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys as the scores take them."""
        if self.rotation is None:
            return x
        return oracles.rotated(x, self.shape.heads, self.rotation)


class Buffer:
    """A view (B, rows, columns) into a larger tensor, with strides of its own."""

    def __init__(
        self, batch: int, rows: int, columns: int, dtype: torch.dtype, device: Any = "cpu"
    ) -> None:
        shape = batch, rows + 3, columns + 7
        self.whole = torch.full(shape, SENTINEL, dtype=dtype, device=device)
        self.view = self.whole[:, 1 : rows + 1, 3 : columns + 3]

    def untouched_outside(self, written: torch.Tensor) -> bool:
        rest = self.whole.clone()
        offset = written.storage_offset() - self.whole.storage_offset()
        rest.as_strided(written.shape, written.stride(), offset).fill_(SENTINEL)
        return bool((rest == SENTINEL).all())


def draw(
    shape: Shape,
    kind: str = "random",
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    seed: int = 0,
    turn: Turn | None = None,
    lengths: tuple[int, ...] | None = None,
) -> Case:
    """Queries, keys and values as slices of one packed tensor, where they have the same rows. What
    lies past a row's length is nan."""
    batch, _, queries, keys, head_dim = shape
    generator = torch.Generator().manual_seed(queries * keys + head_dim + 100_000 * seed)
    rows, width = max(queries, keys), shape.width
    packed = Buffer(batch, rows, 3 * width, dtype, device).view
    packed.copy_(torch.randn(batch, rows, 3 * width, generator=generator))
    q, k, v = packed[:, :queries, :width], *packed[:, :keys, width:].split(width, 2)
    if kind == "peaked":
        q *= 30
    elif kind == "equal":
        k[:] = k[:, :1].clone()
    elif kind == "huge":
        # Logits of 1e4, differing by some units.
        k[..., ::head_dim] = 100 * head_dim**0.5
        q[..., ::head_dim] = 100
    elif kind == "alike":
        # Values, and gradients, that have nearly all in common.
        v.mul_(0.1).add_(4)
    d_out = Buffer(batch, queries, width, dtype, device).view
    d_out.copy_(torch.randn(batch, queries, width, generator=generator))
    if kind == "alike":
        d_out.mul_(0.1).add_(1)
    rotation = None if turn is None else turn.rotation(shape, generator, device)
    case = Case(shape, head_dim**-0.5, q, k, v, d_out, rotation)
    if lengths is None:
        return case
    for image, length in enumerate(lengths):
        for x in case.tensors:
            x[image, length:] = torch.nan
    return case._replace(lengths=torch.tensor(lengths, device=device))


def computed(attention: Any, case: Case) -> Result:
    """By a module, into slices of packed tensors, around which nothing may change."""
    (batch, heads, queries, keys, _), scale, q, k, v, d_out, rotation, lengths = case
    width = case.shape.width
    inputs = q, k, v, d_out, *(() if rotation is None else rotation[:2])
    assert rotation is None or attention.rotates(q, k, heads, rotation)
    before = [x.clone() for x in inputs]
    out, lse = attention.forward(q, k, v, heads, scale, rotation, lengths)
    assert out.is_contiguous()
    of_q = Buffer(batch, queries, width, q.dtype, q.device)
    of_kv = Buffer(batch, keys, 2 * width, q.dtype, q.device)
    d_q, (d_k, d_v) = of_q.view, of_kv.view.split(width, 2)
    attention.backward(d_out, q, k, v, lse, heads, scale, d_q, d_k, d_v, rotation, lengths)
    assert of_q.untouched_outside(d_q)
    assert of_kv.untouched_outside(of_kv.view)
    for x, y in zip(inputs, before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=lengths is not None)
    return Result(out, lse, d_q, d_k, d_v)


def row_by_row(of: Callable[[Case], Result]) -> Callable[[Case], Result]:
    """Have a function of cases compute a padded batch row by row, each without its padding, and
    fill up with zeros."""

    @functools.wraps(of)
    def call(case: Case) -> Result:
        if case.lengths is None:
            return of(case)
        rows = [of(case.row(image)) for image in range(case.shape.batch)]
        queries, keys = case.shape.queries, case.shape.keys
        sizes = (1, queries), (2, queries), (1, queries), (1, keys), (1, keys)
        return Result(
            *(
                torch.cat([padded(each, *size) for each in parts])
                for parts, size in zip(zip(*rows, strict=True), sizes, strict=True)
            )
        )

    return call


def padded(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Zeros after it."""
    rest = [*x.shape]
    rest[dim] = size - rest[dim]
    return torch.cat((x, x.new_zeros(rest)), dim)


@row_by_row
def truth(case: Case) -> Result:
    """The plain formula and its gradients in float64."""
    q, k, v = (x.double().requires_grad_() for x in (case.q, case.k, case.v))
    turned = (case.rotated(x) for x in (q, k))
    out, lse = oracles.attention(*turned, v, case.shape.heads, case.scale)
    gradients = torch.autograd.grad(out, (q, k, v), case.d_out.double())
    return Result(out.detach(), lse.detach(), *gradients)


@row_by_row
def pytorch(case: Case) -> Result:
    """PyTorch's fused attention, and its log-sum-exp, in the case's own dtype. Rotated in float32
    and rounded, as models do."""
    inputs = q, k, v = tuple(x.detach().clone().requires_grad_() for x in case.tensors[:3])
    q, k = (case.rotated(x.float()).to(x.dtype) for x in (q, k))
    of_heads = (x.unflatten(2, (case.shape.heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*of_heads, scale=case.scale).transpose(1, 2).flatten(2)
    gradients = torch.autograd.grad(out, inputs, case.d_out)
    _, lse = oracles.attention(q.float(), k.float(), v.float(), case.shape.heads, case.scale)
    return Result(out.detach(), lse.detach(), *gradients)


@row_by_row
def magnitudes(case: Case) -> Result:
    """As the truth, of magnitudes: no term cancels another, and a probability is as uncertain as
    one rounding of the products in its score makes it."""
    heads, scale = case.shape.heads, abs(case.scale)

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.double().unflatten(2, (heads, case.shape.head_dim)).transpose(1, 2)

    q, k = (by_head(case.rotated(x.double())) for x in (case.q, case.k))
    p = (case.scale * (q @ k.mT)).softmax(-1)
    q, k, v, d_out = (by_head(x).abs() for x in case.tensors)
    turns = [torch.eye(case.shape.head_dim).to(q)] * 2
    if case.rotation is not None:
        tokens = max(case.shape.queries, case.shape.keys)
        matrices = oracles.rotation_matrices(case.rotation, heads, tokens).abs()
        turns = [matrices[:, : x.shape[2]] for x in (q, k)]
        q, k = (
            torch.einsum("...ij,...j->...i", turn, x) for turn, x in zip(turns, (q, k), strict=True)
        )
    scores = scale * (q @ k.mT)
    rounded = p * (1 + scores)
    d_p = d_out @ v.mT
    d_s = scale * rounded * (d_p + (p * d_p).sum(-1, keepdim=True))
    d_q, d_k = (
        torch.einsum("...ij,...i->...j", turn, d)
        for turn, d in zip(turns, (d_s @ k, d_s.mT @ q), strict=True)
    )
    out, *gradients = (
        x.transpose(1, 2).flatten(2) for x in (rounded @ v, d_q, d_k, rounded.mT @ d_out)
    )
    return Result(out, 1 + scores.amax(-1), *gradients)


def assert_parity(result: Result, exact: Result, peer: Result, scales: Result, ulps: int) -> None:
    """No tensor's error above the peer's by more than some units in its largest number."""
    found = shares(result, exact, peer, scales, ulps)
    assert all(share <= 1 for share in found.values()), found


def shares(
    result: Result, exact: Result, peer: Result, scales: Result, ulps: int
) -> dict[str, float]:
    """Each tensor's largest error, as a share of what it may be."""
    found = {}
    for name, x, theirs, y, scale in zip(Result._fields, result, peer, exact, scales, strict=True):
        assert x.shape == y.shape
        error = (x.double() - y).abs().max().item()
        few = ulps * torch.finfo(x.dtype).eps * scale.abs().max().item()
        allowed = (theirs.double() - y).abs().max().item() + few
        found[name] = error / allowed if allowed else (torch.inf if error else 0.0)
    return found


@functools.cache
def exact_peer_and_scales(
    shape: Shape,
    kind: str,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    seed: int = 0,
    turn: Turn | None = None,
    lengths: tuple[int, ...] | None = None,
) -> tuple[Result, Result, Result]:
    case = draw(shape, kind, dtype, device, seed, turn, lengths)
    return truth(case), pytorch(case), magnitudes(case)


def check(
    attention: Any,
    shape: Shape,
    kind: str = "random",
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    turn: Turn | None = None,
    lengths: tuple[int, ...] | None = None,
) -> None:
    """Parity within units of what the results are sums of, which may all but cancel.

    The largest of many roundings is a matter of luck: where it is above its bound in one draw, the
    geometric mean over eight decides.
    """

    def drawn(seed: int) -> dict[str, float]:
        given = shape, kind, dtype, device, seed, turn, lengths
        found = computed(attention, draw(*given))
        assert_zero_past(found, lengths)
        return shares(found, *exact_peer_and_scales(*given), 4)

    assert_within_bounds(drawn)


def assert_zero_past(found: Result, lengths: Sequence[int] | None) -> None:
    for image, length in enumerate(lengths or ()):
        assert not found.lse[image, :, length:].any()
        for x in (found.out, *found[2:]):
            assert not x[image, length:].any()


def check_rows_are_those_without_padding(
    attention: Any,
    shape: Shape,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    device: Any = "cpu",
    turn: Turn | None = None,
) -> None:
    """To the bit."""
    case = draw(shape, "random", dtype, device, turn=turn, lengths=lengths)
    assert_same(computed(attention, case), row_by_row(functools.partial(computed, attention))(case))


def check_alike_values(attention: Any, dtype: torch.dtype, device: Any = "cpu") -> None:
    """Where values and upstream gradients have nearly all in common, little is left of what scores
    are to change. That little is as exact as the dtype; of PyTorch it is off by ten times as much,
    for it takes the mean change from a rounded output."""
    case = draw(Shape(2, 3, 40, 40, 32), "alike", dtype, device)
    found, exact = computed(attention, case), truth(case)
    for name in ("d_q", "d_k", "d_v"):
        ours, true = getattr(found, name).double(), getattr(exact, name)
        assert (ours - true).norm() <= 1.5 * torch.finfo(dtype).eps * true.norm(), name


def assert_same(a: Result, b: Result) -> None:
    for name, x, y in zip(Result._fields, a, b, strict=True):
        assert torch.equal(x, y), name
