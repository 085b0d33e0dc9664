"""The kernels as PyTorch operators: tracing, aliasing, copies, gradients asked for in part."""

from __future__ import annotations

import math

import backends
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

import gist_kernels as gk
from gist_kernels.kernels.triton import DEVICE_TYPES

SETTINGS = ([3.0, 1.0, 0.5, 0.75, 0.75, 0.1, 1.0], -100)


@pytest.fixture(autouse=True, params=backends.serving("loss"))
def served_by(request):
    with gk.use_backend(request.param), torch.device(backends.device_of(request.param)):
        yield request.param


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "probability", "none"])
@pytest.mark.parametrize("stacked", [False, True])
def test_opcheck(served_by, reduction, kind, stacked):
    if stacked:
        both = torch.randn(4, 2, 7)
        cls, gist = (both[:, side].detach().requires_grad_() for side in (0, 1))
    else:
        cls, gist = (torch.randn(4, 7, requires_grad=True) for _ in range(2))
    targets = {
        "index": torch.tensor([0, -100, 6, 2]),
        "probability": torch.rand(4, 7).softmax(1),
        "none": None,
    }
    row_scale = None if reduction == "mean" else torch.tensor([1.0, 0.5, 0.0, 2.0])
    arguments = (cls, gist, targets[kind], row_scale, *SETTINGS, reduction, "")
    operator = getattr(torch.ops.gist_kernels, f"{served_by}_loss").default
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("sides", ["both", "cls", "gist"])
def test_compiled_gradients_are_eager_ones(sides):
    target = torch.tensor([0, -100, 6, 2])

    def loss_of(cls, gist):
        return gk.gist_loss(2 * cls, 3 * gist, target, label_smoothing=0.1)

    cls = torch.randn(4, 7, requires_grad=sides != "gist")
    gist = torch.randn(4, 7, requires_grad=sides != "cls")
    inputs = [t for t in (cls, gist) if t.requires_grad]
    eager = torch.autograd.grad(loss_of(cls, gist), inputs)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(cls, gist), inputs)
    for x, y in zip(traced, eager, strict=True):
        torch.testing.assert_close(x, y)


def test_no_copy_is_made_of_stacked_or_strided_logits(served_by):
    if served_by == "triton" and "cpu" in DEVICE_TYPES:
        pytest.skip("an interpreter itself copies tensors")
    target = torch.arange(64) % 100
    stacked = torch.randn(64, 2, 100)
    wide = torch.randn(64, 300)
    for cls, gist in ((stacked[:, 0], stacked[:, 1]), (wide[:, :100], wide[:, 150:250])):
        cls, gist = cls.detach().requires_grad_(), gist.detach().requires_grad_()
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            torch.autograd.grad(gk.gist_loss(cls, gist, target), (cls, gist))
        names = {event.key for event in trace.key_averages()}
        assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & names


def test_gradient_of_a_stacked_pair_is_one_tensor_that_nothing_copies(served_by):
    if served_by == "triton" and "cpu" in DEVICE_TYPES:
        pytest.skip("an interpreter itself copies tensors")
    target = torch.arange(64) % 100
    stacked = torch.randn(64, 2, 100, requires_grad=True)

    def gradient_of(split):
        (gradient,) = torch.autograd.grad(gk.gist_loss(*split(stacked), target), stacked)
        return gradient

    with profile(activities=[ProfilerActivity.CPU]) as trace:
        gradient = gradient_of(gk.split_heads)
    torch.testing.assert_close(gradient, gradient_of(lambda pair: pair.unbind(1)), rtol=0, atol=0)
    names = {event.key for event in trace.key_averages()}
    assert not {"aten::copy_", "aten::clone", "aten::stack", "aten::add", "aten::zero_"} & names


def test_split_heads_has_gradients_whatever_is_asked_of_them():
    stacked = torch.randn(4, 2, 7, requires_grad=True)
    target = torch.tensor([0, 5, 6, 2])

    def loss_of(pair):
        cls, gist = gk.split_heads(pair)
        return gk.gist_loss(cls, gist, target) + (cls * gist).sum() + cls.detach().sum()

    def plain(pair):
        cls, gist = pair.unbind(1)
        return gk.gist_loss(cls, gist, target) + (cls * gist).sum()

    (expected,) = torch.autograd.grad(plain(stacked), stacked)
    (eager,) = torch.autograd.grad(loss_of(stacked), stacked)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    (traced,) = torch.autograd.grad(compiled(stacked), stacked)
    torch.testing.assert_close(eager, expected)
    torch.testing.assert_close(traced, expected)
    cls, _ = gk.split_heads(stacked)
    (one_side,) = torch.autograd.grad(cls.sum(), stacked)
    assert one_side.sum(2).tolist() == [[7, 0]] * 4
    product = gk.split_heads(stacked)[0] * gk.split_heads(stacked)[1]
    (first,) = torch.autograd.grad(product.sum(), stacked, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), stacked)
    torch.testing.assert_close(second, 2 * stacked.detach())


def test_second_backward_and_second_derivatives():
    cls, gist = (torch.randn(4, 7, requires_grad=True) for _ in range(2))
    loss = gk.bidirectional_kl(cls, gist)
    first = torch.autograd.grad(loss, (cls, gist), retain_graph=True)
    second = torch.autograd.grad(loss, (cls, gist), create_graph=True)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
    penalty = loss + second[0].square().sum()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        penalty.backward()


def test_an_operator_of_a_compiled_loss_refuses_second_derivatives():
    a, b = torch.randn(2, 4, 7).unbind()
    a.requires_grad_()
    compiled = torch.compile(gk.bidirectional_kl, fullgraph=True, backend="eager")
    (first,) = torch.autograd.grad(compiled(a, b), a, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'use_backend\("reference"\)'):
        torch.autograd.grad(first.sum() + a.square().sum(), a)


def test_negative_bits_are_resolved():
    a, b = torch.randn(2, 4, 7).unbind()
    minus_a = torch._neg_view(a)
    expected = gk.bidirectional_kl(-a, b)
    torch.testing.assert_close(gk.bidirectional_kl(minus_a, b), expected)
    target = torch.rand(4, 7)
    torch.testing.assert_close(
        gk.gist_loss(b, a, torch._neg_view(target)), gk.gist_loss(b, a, -target)
    )
    a.requires_grad_()
    upstream = torch.randn(4)
    rows = gk.bidirectional_kl(a, b, reduction="none")
    (expected,) = torch.autograd.grad(rows, a, -upstream, retain_graph=True)
    (ours,) = torch.autograd.grad(rows, a, torch._neg_view(upstream))
    torch.testing.assert_close(ours, expected)


def test_no_memory_is_no_crash(served_by):
    a, b = torch.randn(2, 4, 7).unbind()
    target = torch.tensor([0, 5, 6, 2])
    expected = gk.gist_loss(a, b, target)
    with torch.device("meta"):  # what others allocate, not what is here
        torch.testing.assert_close(gk.gist_loss(a, b, target), expected)
        gk.gist_loss_and_grad(a, b, target)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert gk.gist_loss(a, b, target).shape == ()
        fake = mode.from_tensor(target)
    with mode:
        assert type(gk.gist_loss(a, b, fake)) is FakeTensor


def test_a_trace_holds_the_kernel_and_not_its_empty_outputs():
    a, b = torch.randn(2, 4, 7).unbind()
    target = torch.tensor([0, 5, 6, 2])
    graph = make_fx(lambda a, b, target: gk.gist_loss(a, b, target))(a, b, target)
    torch.testing.assert_close(graph(2 * a, b, target), gk.gist_loss(2 * a, b, target))


def test_transforms_are_left_to_the_reference(served_by):
    a, b = torch.randn(2, 4, 7).unbind()
    target = torch.tensor([0, 5, 6, 2])
    expected = gk.gist_loss_and_grad(a, b, target)[1]
    with pytest.raises(RuntimeError, match=r"no part in torch.func.*'reference' does"):
        torch.func.grad(gk.gist_loss)(a, b, target)
    with gk.use_backend("auto"):
        torch.testing.assert_close(torch.func.grad(gk.gist_loss)(a, b, target), expected)
        _, tangent = torch.func.jvp(lambda x: gk.gist_loss(x, b, target), (a,), (a,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(a, a)
            found = forward_ad.unpack_dual(gk.gist_loss(dual, b, target)).tangent
    torch.testing.assert_close(tangent, (expected * a).sum())
    torch.testing.assert_close(found, (expected * a).sum())


def test_gradients_per_row_by_vmap_are_those_of_the_rows():
    a, b = torch.randn(2, 4, 7).unbind()
    target = torch.tensor([0, 5, -100, 2])
    with gk.use_backend("reference"):
        rows = gk.gist_loss(a, b, target, reduction="none")
        _, *expected = gk.gist_loss_and_grad(a, b, target, reduction="sum")

    def one(a, b, target):
        return gk.gist_loss(a[None], b[None], target[None], reduction="sum")

    def one_and_grad(a, b, target):
        return gk.gist_loss_and_grad(a[None], b[None], target[None], reduction="sum")

    with gk.use_backend("auto"):
        found = torch.vmap(torch.func.grad(one, argnums=(0, 1)))(a, b, target)
        values, *direct = torch.vmap(one_and_grad)(a, b, target)
    torch.testing.assert_close(values, rows)
    for x, y, z in zip(found, direct, expected, strict=True):
        torch.testing.assert_close(x, z)
        torch.testing.assert_close(y.squeeze(1), z)


def test_split_heads_takes_part_in_transforms():
    stacked = torch.randn(4, 2, 7, requires_grad=True)
    target = torch.tensor([0, 5, 6, 2])
    (expected,) = torch.autograd.grad(gk.gist_loss(*stacked.unbind(1), target), stacked)
    with gk.use_backend("auto"):
        of_pair = torch.func.grad(lambda pair: gk.gist_loss(*gk.split_heads(pair), target))
        torch.testing.assert_close(of_pair(stacked.detach()), expected)
    cls, _ = gk.split_heads(stacked)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones(4, 7), torch.full((4, 7), 2.0))
        (gradient,) = torch.autograd.grad(cls, stacked, upstream)
        tangent = forward_ad.unpack_dual(gradient).tangent
    assert tangent.sum(2).tolist() == [[14, 0]] * 4


def test_compiled_with_changing_sizes_and_temperatures():
    compiled = torch.compile(gk.gist_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, temperature in ((4, 3.0), (5, 2.5), (6, 1.0)):
        a, b = torch.randn(2, rows, 7).unbind()
        target = torch.arange(rows)
        torch.testing.assert_close(
            compiled(a, b, target, temperature=temperature),
            gk.gist_loss(a, b, target, temperature=temperature),
        )


@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_gradients_of_stacked_logits(rows):
    both = torch.randn(rows, 2, 7)
    target = torch.arange(rows)
    compiled = torch.compile(gk.gist_loss_and_grad, fullgraph=True, backend="aot_eager")
    expected = gk.gist_loss_and_grad(both[:, 0], both[:, 1], target)
    for x, y in zip(compiled(both[:, 0], both[:, 1], target), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_empty_batches_of_any_stride():
    wide = torch.randn(5, 14)[:0, ::2]
    none = torch.empty(0, dtype=torch.int64)
    assert gk.gist_loss(wide, wide, none, reduction="sum").item() == 0
    assert gk.gist_loss(wide, wide, wide, reduction="sum").item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1.0, -2.5, 0.0, math.inf])
def test_gradients_computed_ahead_are_those_of_the_backward_pass(
    monkeypatch, served_by, dtype, upstream
):
    if served_by != "cpu":
        pytest.skip("other kernels compute none ahead")
    kernels = pytest.importorskip("gist_kernels.kernels.cpu.loss")
    cls, gist = (torch.randn(6, 11, dtype=dtype, requires_grad=True) for _ in range(2))
    target = torch.tensor([0, 3, -100, 10, 5, 5])

    def gradients():
        loss = gk.gist_loss(cls, gist, target)
        given = torch.full_like(loss, upstream)
        found = torch.autograd.grad(loss, (cls, gist), given, retain_graph=True)
        kept = [d.clone() for d in found]
        for d in found:
            d.fill_(7)  # what the caller got is the caller's
        again = torch.autograd.grad(loss, (cls, gist), given)
        return *kept, *again

    ahead = gradients()
    monkeypatch.setattr(kernels, "AHEAD", 0)
    for ours, theirs in zip(ahead, gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient_of_zeros_without_memory(reduction):
    cls, gist = (torch.randn(4, 7, requires_grad=True) for _ in range(2))
    loss = gk.gist_loss(cls, gist, torch.zeros(4, dtype=torch.long), reduction=reduction)
    for gradient in torch.autograd.grad(loss, (cls, gist), torch._efficientzerotensor(loss.shape)):
        assert (gradient == 0).all()


def test_gradients_computed_ahead_refuse_logits_written_to_since():
    cls, gist = (torch.randn(4, 7, requires_grad=True) for _ in range(2))
    loss = gk.gist_loss(cls, gist, torch.zeros(4, dtype=torch.long))
    with torch.no_grad():
        cls.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
