"""Rows of a padded batch in attention: every backend against rows without padding, in float64."""

from __future__ import annotations

import backends
import oracles
import pytest
import torch
from sublayer_cases import EPS, check, normal, rotation_of

import gist_kernels as gk

N, H, D = 19, 2, 16
LENGTHS = (19, 1, 7)
# Rotated tokens and their pairing, and the number of queries.
CASES = [(None, None), (((1, 18), True), 7), (((0, 12), False), 2), (((9, 4), True), None)]
on_every_backend = pytest.mark.parametrize("backend", backends.serving("attention", reference=True))


def drawn(dtype, device="cpu", queries=None):
    """A batch with nan in its padding, and upstream gradients likewise."""
    qkv = normal(len(LENGTHS), N, 3 * H * D, dtype=dtype, spread=1.0, device=device)
    upstream = normal(len(LENGTHS), queries or N, H * D, dtype=dtype, device=device)
    for row, length in enumerate(LENGTHS):
        qkv[row, length:] = upstream[row, length:] = torch.nan
    return qkv, upstream


def row_by_row(attention, qkv, upstream):
    """Results and gradients by a function of one row without padding; 0 elsewhere."""
    found = {"out": torch.zeros_like(upstream), "d_qkv": torch.zeros_like(qkv)}
    for row, length in enumerate(LENGTHS):
        part = slice(row, row + 1), slice(0, length)
        leaf = qkv[part].clone().requires_grad_()
        out = attention(leaf)
        found["out"][part] = out.detach()
        found["d_qkv"][part] = torch.autograd.grad(out, leaf, upstream[part])[0]
    return found


def results(function, qkv, upstream):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv)
    (d_qkv,) = torch.autograd.grad(out, qkv, upstream)
    return {"out": out.detach(), "d_qkv": d_qkv}


def ours(backend, rotation, queries, lengths=LENGTHS, scale=None):
    def call(qkv):
        with gk.use_backend(backend):
            return gk.prefix_attention(
                qkv, H, num_queries=queries, scale=scale, rotation=rotation,
                lengths=torch.tensor(lengths, device=qkv.device),
            )  # fmt: skip

    return call


def exact(rotation, queries, wide, scale=None):
    """By matrices. Rotated in float32 at least and rounded, as models do, unless ``wide``."""

    def call(qkv):
        q, k, v = qkv.chunk(3, dim=-1)
        if rotation is not None:
            width = torch.promote_types(qkv.dtype, torch.float32)
            q, k = (oracles.rotated(t.to(width), H, rotation).to(qkv.dtype) for t in (q, k))
        factor = D**-0.5 if scale is None else scale
        if wide:
            return oracles.attention(q[:, :queries], k, v, H, factor)[0]
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (q[:, :queries], k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=factor)
        return out.transpose(1, 2).flatten(2)

    return call


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rotation", "queries"), CASES)
def test_error_is_no_larger_than_that_of_pytorch(rotation, queries, dtype, backend):
    device = backends.device_of(backend)
    if rotation is not None:
        rotation = rotation_of(rotation[0], D, half=rotation[1], heads=H, device=device)
    found = []
    for _ in range(2 if backend == "triton" and device == "cpu" else 8):  # an interpreter is slow
        qkv, upstream = drawn(dtype, device, queries)
        found.append((
            results(ours(backend, rotation, queries), qkv, upstream),
            row_by_row(exact(rotation, queries, False), qkv, upstream),
            row_by_row(exact(rotation, queries, True), qkv.double(), upstream.double()),
        ))  # fmt: skip
    for name, each in found[0][0].items():
        for row, length in enumerate(LENGTHS):
            assert not each[row, length:].any(), name
    check(*map(list, zip(*found, strict=True)), dtype, EPS[dtype])


@pytest.mark.float64
@pytest.mark.parametrize("queries", [None, 1, 7])
@pytest.mark.parametrize("span", [None, (2, 12)])
def test_float64_is_exact(span, queries, served_by):
    rotation = None if span is None else rotation_of(span, D, half=True, dtype=torch.float64)
    qkv, upstream = drawn(torch.float64, queries=queries)
    found = results(ours(served_by, rotation, queries, scale=0.4), qkv, upstream)
    truth = row_by_row(exact(rotation, queries, True, 0.4), qkv, upstream)
    for name, each in truth.items():
        torch.testing.assert_close(found[name], each, rtol=1e-12, atol=1e-12)


@on_every_backend
def test_what_lies_in_the_padding_changes_no_bit(backend):
    device = backends.device_of(backend)
    rotation = rotation_of((1, 18), D, device=device)
    given = drawn(torch.bfloat16, device, 7)
    call = ours(backend, rotation, 7)
    expected = results(call, *(t.nan_to_num() for t in given))
    assert all(each.isfinite().all() for each in expected.values())
    infinite = (torch.where(t.isnan(), torch.inf, t) for t in given)
    for found in (results(call, *given), results(call, *infinite)):
        for name, each in expected.items():
            assert torch.equal(found[name], each), name


@pytest.mark.parametrize("backend", backends.serving("attention"))
def test_full_lengths_are_none_to_the_bit(backend):
    device = backends.device_of(backend)
    qkv = normal(3, N, 3 * H * D, dtype=torch.bfloat16, device=device)
    upstream = normal(3, N, H * D, dtype=torch.bfloat16, device=device)
    with gk.use_backend(backend):
        plain = results(lambda t: gk.prefix_attention(t, H), qkv, upstream)
    full = results(ours(backend, None, None, (N, N, N)), qkv, upstream)
    for name, each in plain.items():
        assert torch.equal(full[name], each)


@on_every_backend
def test_lengths_of_any_dtype_and_layout(backend):
    device = backends.device_of(backend)
    qkv, upstream = drawn(torch.bfloat16, device)
    plain = torch.tensor(LENGTHS, device=device)
    expected = results(ours(backend, None, None), qkv, upstream)
    for lengths in (torch.stack((plain, plain + 99), 1).int()[:, 0], torch._neg_view(-plain)):
        with gk.use_backend(backend):
            found = results(lambda t: gk.prefix_attention(t, H, lengths=lengths), qkv, upstream)  # noqa: B023
        for name, each in expected.items():
            if lengths.is_neg():  # kernels take none, the reference does
                torch.testing.assert_close(found[name], each, rtol=0, atol=2**-6)
            else:
                assert torch.equal(found[name], each)


@pytest.mark.parametrize("half", [False, True])
def test_kernels_that_do_not_rotate(half, monkeypatch):
    """The node rotates padding too, which nothing reads."""
    import gist_kernels.kernels.cpu.attention as kernels

    qkv, upstream = drawn(torch.float32)
    rotation = rotation_of((2, 12), D, half=half, heads=H)
    by_kernels = results(ours("cpu", rotation, None), qkv, upstream)
    monkeypatch.setattr(kernels, "rotates", lambda *_: False)
    before = results(ours("cpu", rotation, None), qkv, upstream)
    for name, each in by_kernels.items():
        torch.testing.assert_close(before[name], each, rtol=0, atol=4 * 2**-23 * each.abs().max())


@pytest.mark.float64
@pytest.mark.parametrize("options", [{}, {"num_queries": 3}, {"rotation": ((1, 2), True)}])
def test_gradcheck(options, served_by):
    """test_derivatives.py has second and forward-mode derivatives."""
    if "rotation" in options:
        span, half = options["rotation"]
        rotation = rotation_of(span, 2, half=half, heads=2, dtype=torch.float64)
        options = {"rotation": rotation}
    qkv, lengths = normal(2, 4, 12).requires_grad_(), torch.tensor([4, 2])

    def attended(qkv):
        return gk.prefix_attention(qkv, 2, lengths=lengths, **options)

    assert torch.autograd.gradcheck(attended, qkv)


def test_transforms_take_them():
    """torch.vmap over rows and their lengths, which no host reads."""
    qkv, _ = drawn(torch.float32)
    lengths = torch.tensor(LENGTHS)
    expected = gk.prefix_attention(qkv, H, lengths=lengths)

    def one(qkv, length):
        return gk.prefix_attention(qkv[None], H, lengths=length[None])[0]

    torch.testing.assert_close(torch.vmap(one)(qkv, lengths), expected, rtol=1e-4, atol=1e-5)
    leaf = qkv.clone().requires_grad_()
    gk.prefix_attention(leaf, H, lengths=lengths).square().sum().backward()
    grad = torch.func.grad(lambda t: gk.prefix_attention(t, H, lengths=lengths).square().sum())
    torch.testing.assert_close(grad(qkv), leaf.grad, rtol=1e-4, atol=1e-5)


def test_lengths_changed_after_forward_are_noticed():
    lengths = torch.tensor(LENGTHS)
    out = gk.prefix_attention(drawn(torch.float32)[0].requires_grad_(), H, lengths=lengths)
    lengths.sub_(1).clamp_(min=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_backward_gives_the_same():
    qkv, upstream = drawn(torch.float32)
    out = gk.prefix_attention(qkv.requires_grad_(), H, lengths=torch.tensor(LENGTHS))
    first, second = (
        torch.autograd.grad(out, qkv, upstream, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([19, 1, 7], TypeError, "lengths must be a torch.Tensor, not list"),
        (torch.ones(3), TypeError, "lengths must be int32 or int64; it is torch.float32"),
        (torch.ones(3).bool(), TypeError, "lengths must be int32 or int64; it is torch.bool"),
        (torch.ones(3).short(), TypeError, "lengths must be int32 or int64; it is torch.int16"),
        (torch.tensor(3), ValueError, r"lengths must have shape \(B,\) of qkv, here \(3\)"),
        (torch.tensor([1, 2]), ValueError, r"here \(3\); it has \(2,\)"),
        (torch.ones(3, 1, dtype=torch.int64), ValueError, r"here \(3\); it has \(3, 1\)"),
        (torch.ones(3, dtype=torch.int64, device="meta"), ValueError, "on meta and qkv on cpu"),
        (torch.tensor([1, 0, 5]), ValueError, r"lengths\[1\] is 0; it must be in \[1, 19\]"),
        (torch.tensor([1, 2, 20]), ValueError, r"lengths\[2\] is 20; it must be in \[1, 19\]"),
        (torch.tensor([-3, 2, 2]).int(), ValueError, r"lengths\[0\] is -3"),
    ],
)  # fmt: skip
def test_bad_lengths_are_named(lengths, error, message, backend):
    with gk.use_backend(backend), pytest.raises(error, match=message):
        gk.prefix_attention(torch.zeros(3, N, 3 * H * D), H, lengths=lengths)


def test_the_host_reads_no_lengths_of_another_device():
    """To read a tensor without memory raises, where a GPU would have to be waited for."""
    qkv = torch.empty(3, N, 3 * H * D, device="meta", requires_grad=True)
    out = gk.prefix_attention(qkv, H, lengths=torch.ones(3, dtype=torch.int64, device="meta"))
    assert out.shape == (3, N, H * D)
    out.sum().backward()


def test_compiled_code_checks_values_when_it_runs():
    call = torch.compile(
        lambda qkv, lengths: gk.prefix_attention(qkv, H, lengths=lengths),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    qkv = torch.randn(3, N, 3 * H * D)
    call(qkv, torch.tensor(LENGTHS))
    with pytest.raises(ValueError, match=r"lengths\[1\] is 20; it must be in \[1, 19\]"):
        call(qkv, torch.tensor([1, 20, 3]))
