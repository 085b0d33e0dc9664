"""Rotary positions in attention: every backend against matrices and complex numbers in float64."""

from __future__ import annotations

import importlib

import backends
import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sublayer_cases import EPS, arguments, check, normal, rotation_of

import gist_kernels as gk
from gist_kernels.reference.rotation import rotate

N, H, D = 19, 3, 16
# The class token before; all; a Gist token before and prompts after; the last token only.
SPANS = [(1, 18), (0, 19), (2, 12), (18, 1)]
QUERIES = [None, 1, 2, 7]
# Each span with tables for all heads and for each head, and each number of queries with both.
CASES = [
    (span, per_head, QUERIES[(i + 2 * per_head) % 4])
    for i, span in enumerate(SPANS)
    for per_head in (False, True)
]


def exact(qkv, heads, rotation, queries, scale=None):
    """By matrices, in qkv's dtype."""
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = (oracles.rotated(t, heads, rotation) for t in (q, k))
    scale = (q.shape[-1] // heads) ** -0.5 if scale is None else scale
    return oracles.attention(q[:, :queries], k, v, heads, scale)[0]


def pytorch(qkv, heads, rotation, queries):
    """As models compute it: rotated in float32, rounded, PyTorch's attention."""
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = (oracles.rotated(t.float(), heads, rotation).to(v.dtype) for t in (q, k))
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q[:, :queries], k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def results(function, qkv, upstream):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv)
    (d_qkv,) = torch.autograd.grad(out, qkv, upstream.to(out.dtype))
    return {"out": out.detach(), "d_qkv": d_qkv}


def ours(backend, heads, rotation, queries, scale=None):
    def call(qkv):
        with gk.use_backend(backend):
            return gk.prefix_attention(
                qkv, heads, num_queries=queries, scale=scale, rotation=rotation
            )

    return call


@pytest.mark.parametrize("backend", backends.serving("attention", reference=True))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("span", "per_head", "queries"), CASES)
@pytest.mark.parametrize("half", [False, True])
def test_error_is_no_larger_than_that_of_pytorch(half, per_head, span, queries, dtype, backend):
    device = backends.device_of(backend)
    found = []
    for _ in range(3 if backend == "triton" and device == "cpu" else 8):  # an interpreter is slow
        qkv = normal(2, N, 3 * H * D, dtype=dtype, spread=1.0, device=device)
        upstream = normal(2, queries or N, H * D, dtype=dtype, device=device)
        rotation = rotation_of(span, D, half=half, heads=H if per_head else None, device=device)
        found.append((
            results(ours(backend, H, rotation, queries), qkv, upstream),
            results(lambda t: pytorch(t, H, rotation, queries), qkv, upstream),  # noqa: B023
            results(lambda t: exact(t, H, rotation, queries), qkv.double(), upstream),  # noqa: B023
        ))  # fmt: skip
    check(*map(list, zip(*found, strict=True)), dtype, EPS.get(dtype, 2**-10))


@pytest.mark.float64
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("half", [False, True])
def test_float64_is_exact(half, span):
    for heads_of_tables in (None, H):
        rotation = rotation_of(span, D, half=half, heads=heads_of_tables, dtype=torch.float64)
        for queries in (None, 1, 7):
            qkv, upstream = normal(2, N, 3 * H * D), normal(2, queries or N, H * D)
            truth = results(lambda t: exact(t, H, rotation, queries), qkv, upstream)  # noqa: B023
            for backend in ("auto", "reference"):
                found = results(ours(backend, H, rotation, queries), qkv, upstream)
                for name, each in truth.items():
                    torch.testing.assert_close(found[name], each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("half", [False, True])
def test_pairs_are_multiplied_as_complex_numbers(half):
    """Tables as models have them: both features of a pair turn by one angle."""
    x, angles = normal(2, N, H, D, spread=1.0), normal(N, D // 2, spread=3.0)
    tables = (
        t.repeat(1, 2) if half else t.repeat_interleave(2, dim=1)
        for t in (angles.sin(), angles.cos())
    )
    pairs = x.unflatten(-1, (2, -1) if half else (-1, 2))
    a, b = pairs.unbind(-2 if half else -1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.stack((turned.real, turned.imag), dim=-2 if half else -1).flatten(-2)
    found = rotate(x, gk.Rotation(*tables, 0, half))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", backends.serving("attention", reference=True))
def test_no_rotation_is_one_by_no_angle(backend):
    device = backends.device_of(backend)
    qkv = normal(2, N, 3 * H * D, dtype=torch.bfloat16, device=device)
    upstream = torch.randn_like(qkv[..., : H * D])
    still = gk.Rotation(torch.zeros(N, D), torch.ones(N, D), 0, True)
    still = still._replace(sin=still.sin.to(device), cos=still.cos.to(device))
    plain, same = (results(ours(backend, H, each, None), qkv, upstream) for each in (None, still))
    for name, tensor in plain.items():
        assert torch.equal(same[name], tensor)


@pytest.mark.parametrize("backend", backends.serving("attention", reference=True))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["dense", "reversed", "expanded", "negated"])
def test_tables_of_any_dtype_and_layout(layout, dtype, backend):
    device = backends.device_of(backend)
    qkv = normal(2, N, 3 * H * D, dtype=torch.bfloat16, device=device)
    upstream = torch.randn_like(qkv[..., : H * D])
    tables = [t.to(dtype) for t in rotation_of((1, 18), D, device=device)[:2]]
    if layout == "expanded":
        tables = [t[:, :1].expand(-1, D) for t in tables]
    plain = gk.Rotation(*(t.float().contiguous() for t in tables), 1, True)
    if layout == "reversed":
        tables = [t.mT.contiguous().mT for t in tables]
    elif layout == "negated":
        tables = [torch._neg_view(-t) for t in tables]
    given_ones = plain._replace(sin=tables[0], cos=tables[1])
    found, truth = (
        results(ours(backend, H, each, None), qkv, upstream) for each in (given_ones, plain)
    )
    for name, tensor in truth.items():
        if layout == "negated":  # kernels take none, the reference does
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2**-7 * tensor.abs().max())
        else:
            assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("backend", backends.serving("attention"))
@pytest.mark.parametrize("half", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 3),
    tokens=st.integers(1, 70),
    heads=st.integers(1, 4),
    pairs=st.integers(1, 40),
    per_head=st.booleans(),
    data=st.data(),
)
def test_any_shape(backend, half, batch, tokens, heads, pairs, per_head, data):
    device, dtype = backends.device_of(backend), torch.float32
    if backend == "triton":
        pairs, dtype = 4 * (1 + pairs % 8), torch.float16
    rows = data.draw(st.integers(1, tokens))
    span = data.draw(st.integers(0, tokens - rows)), rows
    queries = data.draw(st.none() | st.integers(1, tokens))
    rotation = rotation_of(
        span, 2 * pairs, half=half, heads=heads if per_head else None, device=device
    )
    qkv = normal(batch, tokens, 6 * heads * pairs, dtype=dtype, spread=1.0, device=device)
    upstream = normal(batch, queries or tokens, 2 * heads * pairs, dtype=dtype, device=device)
    truth = results(lambda t: exact(t, heads, rotation, queries), qkv.double(), upstream)
    found = results(ours(backend, heads, rotation, queries), qkv, upstream)
    few = 64 * EPS.get(dtype, 2**-10)
    for name, each in truth.items():
        size = each.abs().max().item() if each.numel() else 0.0
        assert found[name].shape == each.shape
        torch.testing.assert_close(found[name].double(), each, rtol=0, atol=few * max(1.0, size))


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("queries", [None, 4])
def test_kernels_that_do_not_rotate(queries, half, dtype, monkeypatch):
    """The node rotates queries and keys before them, and their gradients after them."""
    qkv = normal(2, N, 3 * H * D, dtype=dtype, spread=1.0)
    upstream = normal(2, queries or N, H * D, dtype=dtype)
    rotation = rotation_of((2, 12), D, half=half, heads=H)
    by_kernels = results(ours("cpu", H, rotation, queries), qkv, upstream)
    module = importlib.import_module("gist_kernels.kernels.cpu.attention")
    monkeypatch.setattr(module, "rotates", lambda *_: False)
    before = results(ours("cpu", H, rotation, queries), qkv, upstream)
    for name, tensor in by_kernels.items():
        few = 4 * EPS[dtype] * tensor.abs().max().item()
        torch.testing.assert_close(before[name], tensor, rtol=0, atol=few)


@pytest.mark.parametrize("backend", backends.serving("attention", reference=True))
@pytest.mark.parametrize("half", [False, True])
def test_scores_near_10_000_stay_finite(half, backend):
    """And probabilities still sum to 1: the gradient of the values is that of the result."""
    device = backends.device_of(backend)
    dtype = torch.float32 if backends.takes(backend, torch.float32) else torch.bfloat16
    rotation = rotation_of((2, 12), D, half=half, device=device)
    qkv = normal(2, N, 3 * H * D, dtype=dtype, spread=1.0, device=device)
    qkv[..., : 2 * H * D] *= 50
    upstream = normal(2, N, H * D, dtype=dtype, device=device)
    found = results(ours(backend, H, rotation, None), qkv, upstream)
    assert all(each.isfinite().all() for each in found.values())
    d_v = found["d_qkv"][..., 2 * H * D :]
    torch.testing.assert_close(d_v.sum(1), upstream.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.float64
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_queries": 2}, {"num_queries": 1}])
def test_gradcheck(options, half):
    rotation = rotation_of((1, 3), 4, half=half, heads=2, dtype=torch.float64)
    x, norm, attention, _, adapter = arguments(
        torch.float64, tokens=5, width=8, heads=2, rank=2, rotation=rotation
    )
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: gk.adapter_attention(x, norm, attention, adapter, **options), x
    )
    qkv = normal(2, 5, 24).requires_grad_()

    def attended(qkv):
        return gk.prefix_attention(qkv, 2, rotation=rotation, **options)

    assert torch.autograd.gradcheck(attended, qkv)
    with gk.use_backend("reference"):
        assert torch.autograd.gradcheck(attended, qkv, check_forward_ad=True)
        # Of fewer numbers: it takes a pass for each pair of them.
        assert torch.autograd.gradgradcheck(attended, normal(1, 4, 24).requires_grad_())


def test_transforms_take_it():
    rotation = rotation_of((2, 17), D)
    qkv = normal(2, N, 3 * H * D, dtype=torch.float32)

    def total(qkv):
        return gk.prefix_attention(qkv, H, rotation=rotation).square().sum()

    leaf = qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(qkv), expected, rtol=1e-4, atol=1e-5)
    each = torch.vmap(lambda t: gk.prefix_attention(t, H, rotation=rotation))(qkv[:, None])
    torch.testing.assert_close(
        each[:, 0], gk.prefix_attention(qkv, H, rotation=rotation), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("backend", backends.serving("attention", reference=True))
def test_tables_are_frozen(backend):
    device = backends.device_of(backend)
    rotation = rotation_of((0, N), D, device=device)
    x, norm, attention, _, _ = arguments(torch.bfloat16, device=device)
    qkv = normal(2, N, 3 * H * D, dtype=torch.bfloat16, device=device).requires_grad_()
    for table in ("sin", "cos"):
        trained = rotation._replace(**{table: getattr(rotation, table).clone().requires_grad_()})
        with gk.use_backend(backend):
            with pytest.raises(ValueError, match=f"rotation.{table} requires a gradient"):
                gk.prefix_attention(qkv, H, rotation=trained)
            with pytest.raises(ValueError, match=f"attention.rotation.{table} requires a gradient"):
                gk.adapter_attention(x, norm, attention._replace(rotation=trained))
            with torch.no_grad():
                out = gk.prefix_attention(qkv, H, rotation=trained)
        assert not out.requires_grad


@pytest.mark.parametrize("table", ["sin", "cos"])
@pytest.mark.parametrize("queries", [None, 2])
def test_tables_changed_after_forward_are_noticed(queries, table):
    rotation = rotation_of((0, N), D)
    x, norm, attention, _, _ = arguments(torch.float32, rotation=rotation)
    qkv = normal(2, N, 3 * H * D, dtype=torch.float32).requires_grad_()
    for out in (
        gk.prefix_attention(qkv, H, num_queries=queries, rotation=rotation),
        gk.adapter_attention(x.requires_grad_(), norm, attention, num_queries=queries),
    ):
        getattr(rotation, table).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_a_second_backward_gives_the_same():
    rotation = rotation_of((1, 15), D)
    x, norm, attention, _, _ = arguments(torch.float32, rotation=rotation)
    for options in ({}, {"num_queries": 4}, {"grad_tokens": (1, 3)}):
        out = gk.adapter_attention(x.requires_grad_(), norm, attention, **options)
        first, second = (
            torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for _ in range(2)
        )
        assert torch.equal(first, second)


TABLE = torch.zeros(18, D)


@pytest.mark.parametrize(
    ("rotation", "error", "message"),
    [
        ((TABLE, TABLE, 1, True), TypeError, "rotation must be a gist_kernels.Rotation, not tuple"),
        (gk.Rotation(0, TABLE, 1, True), TypeError, "rotation.sin must be a torch.Tensor"),
        (gk.Rotation(TABLE, None, 1, True), TypeError, "rotation.cos must be a torch.Tensor"),
        (gk.Rotation(TABLE.long(), TABLE, 1, True), TypeError, "rotation.sin must be float32"),
        (gk.Rotation(TABLE[0], TABLE, 1, True), ValueError, "rotation.sin must have shape"),
        (gk.Rotation(TABLE[:, 2:], TABLE, 1, True), ValueError, "rotation.sin must have shape"),
        (gk.Rotation(TABLE, TABLE[:17], 1, True), ValueError, "rotation.cos must have shape"),
        (
            gk.Rotation(TABLE.expand(2, -1, -1), TABLE.expand(2, -1, -1), 1, True),
            ValueError, "rotation.sin must have shape .*num_heads",
        ),
        (
            gk.Rotation(TABLE[:0], TABLE[:0], 1, True),
            ValueError, "rotation must be of 1 or more of qkv's 19 tokens; .* have 0 rows",
        ),
        (gk.Rotation(TABLE, TABLE, 2, True), ValueError, "qkv's 19 tokens; it starts at 2"),
        (gk.Rotation(TABLE, TABLE, -1, True), ValueError, "it starts at -1"),
        (gk.Rotation(TABLE, TABLE, 1.0, True), TypeError, "rotation.start must be an integer"),
        (gk.Rotation(TABLE, TABLE, True, True), TypeError, "rotation.start must be an integer"),
        (gk.Rotation(TABLE, TABLE, 1, "half"), TypeError, "rotation.half must be True or False"),
        (
            gk.Rotation(TABLE.to("meta"), TABLE, 1, True),
            ValueError, "rotation.sin is on meta and qkv on cpu",
        ),
    ],
)  # fmt: skip
def test_bad_rotations_are_named(rotation, error, message):
    with pytest.raises(error, match=message):
        gk.prefix_attention(torch.zeros(2, N, 3 * H * D), H, rotation=rotation)


def test_heads_of_an_odd_number_of_features():
    table = torch.zeros(4, 5)
    with pytest.raises(ValueError, match="rotation needs heads with an even number of features"):
        gk.prefix_attention(torch.zeros(2, 4, 30), 2, rotation=gk.Rotation(table, table, 0, True))
