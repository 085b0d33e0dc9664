"""The native loss kernels, on every instruction set this processor has."""

from __future__ import annotations

import functools
import math
import mmap
from typing import NamedTuple

import oracles
import pytest
import torch

from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.reference import loss as reference

pytest.importorskip(
    "gist_kernels.kernels.cpu._native",
    reason="the native module was not built",
)
loss = pytest.importorskip("gist_kernels.kernels.cpu.loss")

CLASSES = (1, 2, 5, 10, 45, 100, 397, 1000, 1023, 1024, 1025, 4096, 21843, 65537)
TEMPERATURES = (0.5, 1.0, 2.0, 3.0, 4.0, 4.7)
KINDS = ("random", "equal", "close", "peaked", "gap", "offset", "wide")
INF, NAN = math.inf, math.nan
EPS = torch.finfo(torch.float32).eps

pytestmark = pytest.mark.usefixtures("instruction_set")


class Result(NamedTuple):
    loss: torch.Tensor
    terms: torch.Tensor
    d_cls: torch.Tensor
    d_gist: torch.Tensor


def options(**changes) -> LossOptions:
    return LossOptions(3.0, 1.0, 0.5, 0.75, 0.75, 0.0, -100, "mean")._replace(**changes)


def ours(cls, gist, target, opts, grad=None) -> Result:
    """Forward, then backward; forward_backward must agree with them to the bit."""
    value, terms, stats = loss.forward(cls, gist, target, opts)
    upstream = torch.ones_like(value) if grad is None else grad
    gradients = loss.backward(upstream, cls, gist, target, stats, opts, True, True)
    result = Result(value, terms, *gradients)
    if grad is None:
        at_once = loss.forward_backward(cls, gist, target, opts)
        assert_same(Result(at_once[0], terms, *at_once[1:]), result)
    return result


def truth(cls, gist, target, opts, grad=None) -> Result:
    """The reference in float64."""
    cls, gist = (x.detach().double().requires_grad_() for x in (cls, gist))
    value, terms = reference.gist_loss(cls, gist, target, opts)
    upstream = torch.ones_like(value) if grad is None else grad.double()
    gradients = torch.autograd.grad(value, (cls, gist), upstream, materialize_grads=True)
    return Result(value.detach(), terms, *gradients)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equal, NaN for NaN."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    return bool(((x == y) | (x.isnan() & y.isnan())).all())


def assert_same(a: Result, b: Result) -> None:
    for name, x, y in zip(Result._fields, a, b, strict=True):
        assert same(x, y), name


def assert_close(a: Result, exact: Result, tolerance: float = 8 * EPS) -> None:
    """Within `tolerance` of the largest number of each tensor."""
    for name, x, y in zip(Result._fields, a, exact, strict=True):
        scale = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
        context = {"msg": lambda text, name=name: f"{name}: {text}", "equal_nan": True}
        torch.testing.assert_close(x.double(), y, rtol=0, atol=tolerance * scale, **context)


def draw(kind: str, rows: int, classes: int, dtype=torch.float32):
    """Two (rows, classes) tensors of one kind of difficulty, and class indices."""
    generator = torch.Generator().manual_seed(classes)

    def normal() -> torch.Tensor:
        return 3 * torch.randn(rows, classes, generator=generator)

    a, b = normal(), normal()
    if kind == "equal":
        b = a.clone()
    elif kind == "close":
        b = a + 1e-3 * normal()
    elif kind == "peaked":
        a[:, 0] += 60
        b[:, -1] += 60
    elif kind == "gap":
        a[:, 0] += 1e4
        b[:, -1] -= 1e4
    elif kind == "offset":
        a, b = a + 1e6, b - 1e6
    elif kind == "wide":
        a, b = 10 * a, 10 * b
    target = torch.randint(classes, (rows,), generator=generator)
    return a.to(dtype), b.to(dtype), target


# Parity with float64, by PyTorch's own error.


@functools.cache
def exact_and_pytorch(kind: str, classes: int, temperature: float) -> list[Result]:
    """Rows' losses, terms and gradients in float64, and by PyTorch's operators in float32."""
    a, b, target = draw(kind, 3, classes)
    results = []
    for precision in (torch.float64, torch.float32):
        x, y = (t.to(precision, copy=True).requires_grad_() for t in (a, b))
        terms = torch.stack(oracles.log_softmax_terms(x, y, target, temperature))
        weights = torch.tensor([1.0, 0.5, 0.75, 0.75], dtype=precision)
        value = (terms * weights[:, None]).sum(0)
        gradients = torch.autograd.grad(value.sum(), (x, y))
        results.append(Result(value.detach(), terms.detach(), *gradients))
    return results


def parts(result: Result, target: torch.Tensor):
    """What has a scale of its own: a gradient of 1 at the target would hide all the others."""
    at_target = torch.zeros(result.d_cls.shape, dtype=torch.bool).scatter_(1, target[:, None], True)
    yield "loss", result.loss
    yield from zip(("cls CE", "gist CE", "KL(p||q)", "KL(q||p)"), result.terms, strict=True)
    for name, gradient in (("d_cls", result.d_cls), ("d_gist", result.d_gist)):
        yield f"{name} at targets", gradient[at_target]
        yield f"{name} elsewhere", gradient[~at_target]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", CLASSES)
def test_error_is_no_larger_than_that_of_pytorch(kind, classes):
    for temperature in TEMPERATURES if classes < 5000 else (3.0, 4.7):
        a, b, target = draw(kind, 3, classes)
        exact, pytorch = exact_and_pytorch(kind, classes, temperature)
        result = ours(a, b, target, options(temperature=temperature, reduction="none"))
        for (name, x), (_, theirs), (_, y) in zip(
            parts(result, target), parts(pytorch, target), parts(exact, target), strict=True
        ):
            if y.numel() == 0:
                continue
            error = (x.double() - y).abs().max().item()
            allowed = (theirs.double() - y).abs().max().item() + 8 * EPS * y.abs().max().item()
            assert error <= allowed, f"{name}, T = {temperature}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("kind", ["random", "close", "peaked", "offset", "wide"])
@pytest.mark.parametrize("classes", [1, 2, 10, 397, 1025, 4096])
def test_float64(kind, classes):
    for temperature in TEMPERATURES:
        a, b, target = draw(kind, 3, classes, torch.float64)
        opts = options(temperature=temperature, label_smoothing=0.1, reduction="none")
        # The truth's own rounding of logits and differences as large as these.
        tolerance = 1e-9 if kind == "offset" else 1e-12
        exact = truth(a, b, target, opts, torch.ones(3))
        assert_close(ours(a, b, target, opts), exact, tolerance)


@pytest.mark.parametrize("gist_scale", [1.0, 0.5])
@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4])
def test_small_kl_is_relatively_accurate_and_not_negative(scale, gist_scale):
    a = torch.randn(4, 1000)
    b = (a + scale * torch.randn(4, 1000)) / gist_scale
    opts = options(reduction="none", temperature=1.0, gist_scale=gist_scale)
    kl = loss.forward(a, b, None, opts)[1][2:]
    exact = torch.stack(reference.kl_rows(a.double(), b.double() * gist_scale, 1.0))
    assert (kl >= 0).all()
    torch.testing.assert_close(kl.double(), exact, rtol=4e-7 + 1e-7 / scale, atol=0)


def test_equal_distributions_have_no_kl_and_no_gradient():
    a = 5 * torch.randn(3, 777)
    for b in (a.clone(), a + 64):
        b = b if torch.equal(b - 64, a) or torch.equal(a, b) else a.clone()
        result = ours(a, b, None, options())
        assert result.loss == 0
        assert (result.d_cls == 0).all()
        assert (result.d_gist == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 7, 100, 2000])
def test_halves_are_float32_rounded_once(dtype, classes):
    """Every gradient is the float32 kernel's, rounded to nearest even: denormals and inf too."""
    a, b, target = draw("wide", 4, classes, dtype)
    for upstream in (1.0, 1e-4, 1e6):
        opts = options(reduction="sum")
        grad = torch.tensor(upstream)
        low = ours(a, b, target, opts, grad)
        wide = ours(a.float(), b.float(), target, opts, grad)
        rounded = Result(wide.loss, wide.terms, wide.d_cls.to(dtype), wide.d_gist.to(dtype))
        assert_same(low, rounded)


# Options, against the reference in float64.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [1, 5, 100, 1025])
def test_class_indices(reduction, smoothing, classes):
    a, b, target = draw("random", 7, classes)
    target[2], target[5] = -1, -1
    a[2], b[5] = NAN, INF  # ignored: not looked at
    opts = options(reduction=reduction, label_smoothing=smoothing, ignore_index=-1)
    for temperature in (1.0, 3.0, 4.7):
        opts = opts._replace(temperature=temperature)
        result = ours(a, b, target, opts)
        assert_close(result, truth(a, b, target, opts, torch.ones_like(result.loss)))
        assert (result.d_cls[[2, 5]] == 0).all()
    spaced = torch.stack((target, target - 7), 1)[:, 0]
    assert spaced.stride(0) == 2
    assert_same(ours(a, b, spaced, opts), result)


@pytest.mark.parametrize("of", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_probabilities(of, dtype, smoothing):
    for classes in (1, 5, 100, 1500):
        a, b, _ = draw("random", 4, classes, dtype)
        target = torch.rand(4, classes + 3).mul(2).to(of)[:, 2 : classes + 2]
        target[:, ::3] = 0
        opts = options(label_smoothing=smoothing, reduction="sum")
        assert_close(ours(a, b, target, opts), truth(a, b, target.double(), opts))


def test_no_target_is_kl_alone():
    a, b, target = draw("random", 5, 100)
    opts = options(cls_weight=0.0, gist_weight=0.0)
    without, exact = ours(a, b, None, opts), truth(a, b, target, opts)
    assert (without.terms[:2] == 0).all()
    exact.terms[:2] = 0
    assert_close(without, exact)
    # With weights that no target uses, and with a target that no weight uses.
    assert_same(ours(a, b, None, options()), without)
    assert same(ours(a, b, target, opts).d_cls, without.d_cls)


@pytest.mark.parametrize("zero", range(4))
def test_each_weight_alone_and_left_out(zero):
    a, b, target = draw("random", 5, 100)
    names = ("cls_weight", "gist_weight", "kl_cls_gist_weight", "kl_gist_cls_weight")
    left_out = options(**{names[zero]: 0.0})
    alone = options(**{name: 0.0 for name in names if name != names[zero]})
    for opts in (left_out, alone):
        assert_close(ours(a, b, target, opts), truth(a, b, target, opts), 16 * EPS)


def test_negative_weights_and_upstream_gradient():
    a, b, target = draw("random", 5, 100)
    opts = options(cls_weight=-1.5, kl_gist_cls_weight=-0.25)
    grad = torch.tensor(-3.5)
    assert_close(ours(a, b, target, opts, grad), truth(a, b, target, opts, grad), 16 * EPS)


def test_one_sided_gradients():
    a, b, target = draw("random", 5, 100)
    _, _, stats = loss.forward(a, b, target, options())
    grad = torch.ones(())
    both = loss.backward(grad, a, b, target, stats, options(), True, True)
    d_cls, none = loss.backward(grad, a, b, target, stats, options(), True, False)
    assert none is None
    assert same(d_cls, both[0])
    none, d_gist = loss.backward(grad, a, b, target, stats, options(), False, True)
    assert none is None
    assert same(d_gist, both[1])


def test_upstream_gradients_of_any_stride():
    a, b, target = draw("random", 6, 50)
    opts = options(reduction="none")
    for grad in (torch.ones(()).expand(6), torch.randn(6, 3)[:, 1], torch.randn(6)):
        assert_close(ours(a, b, target, opts, grad), truth(a, b, target, opts, grad), 16 * EPS)
    same_twice = ours(a, b, target, opts, torch.ones(6)), ours(a, b, target, opts)
    assert_same(*same_twice)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_and_nothing_kept(reduction):
    opts = options(reduction=reduction)
    a, b = torch.empty(0, 9), torch.empty(0, 9)
    for target in (torch.empty(0, dtype=torch.int64), torch.empty(0, 9), None):
        result = ours(a, b, target, opts)
        assert result.d_cls.shape == result.d_gist.shape == (0, 9)
        expected = {"mean": torch.tensor(NAN), "sum": torch.tensor(0.0), "none": torch.empty(0)}
        assert same(result.loss, expected[reduction])
    ignored = torch.full((3,), -100)
    result = ours(torch.full((3, 9), NAN), torch.full((3, 9), INF), ignored, opts)
    assert result.loss.isnan().all() if reduction == "mean" else (result.loss == 0).all()
    assert (result.d_cls == 0).all()
    assert (result.d_gist == 0).all()


@pytest.mark.parametrize("bad", [-1, 400, 2**40, -(2**63), 2**63 - 1])
def test_class_index_out_of_range_is_named(bad):
    a, b, target = draw("random", 64, 400)  # on two threads
    target[[40, 3, 50]] = bad
    for run in (loss.forward, loss.forward_backward):
        for reduction in ("mean", "none"):
            with pytest.raises(IndexError, match=rf"target\[3\] is {bad}, outside the 400 classes"):
                run(a, b, target, options(reduction=reduction))


@pytest.mark.parametrize("bad", [-1, 100, 2**40, -(2**63), 2**63 - 1])
def test_backward_reads_no_class_index_out_of_range(bad):
    a, b, target = draw("random", 4, 100)
    opts = options(reduction="none")
    value, _, stats = loss.forward(a, b, target, opts)
    arguments = torch.ones_like(value), a, b
    good = loss.backward(*arguments, target, stats, opts, True, True)
    target[1] = bad
    for gradient, before in zip(
        loss.backward(*arguments, target, stats, opts, True, True), good, strict=True
    ):
        assert gradient[1].isnan().all()
        assert same(gradient[[0, 2, 3]], before[[0, 2, 3]])


@pytest.mark.parametrize("classes", [1, 5, 100, 1025, 21843])
@pytest.mark.parametrize("stop", ["", "a", "b", "targets"])
def test_row_scales_two_temperatures_and_stopped_gradients(classes, stop):
    a, b, target = draw("random", 6, classes)
    scale = torch.tensor([1.0, 0.0, 0.5, 0.0, -2.0, 3.0])
    exact = [a.clone(), b.clone(), target.clone()]
    for row in (1, 3):
        a[row], b[row], target[row] = NAN, INF, 2**40
        exact[0][row] = exact[1][row] = exact[2][row] = 0
    for reduction in ("sum", "none"):
        for temperature, gist_scale in ((3.0, 1.0), (2.0, 0.4), (1.0, 3.0)):
            opts = options(reduction=reduction, temperature=temperature, gist_scale=gist_scale)
            opts = opts._replace(stop_gradient=stop)
            value, terms, stats = loss.forward(a, b, target, opts, True, scale)
            grad = torch.full_like(value, 1.5)
            gradients = loss.backward(grad, a, b, target, stats, opts, True, True, scale)
            x, y = (side.double().requires_grad_() for side in exact[:2])
            total, exact_terms = reference.gist_loss(x, y, exact[2], opts, True, scale.double())
            truths = torch.autograd.grad(total, (x, y), grad.double())
            found = Result(value, terms, *gradients)
            assert_close(found, Result(total.detach(), exact_terms, *truths), 16 * EPS)
            assert (found.d_cls[[1, 3]] == 0).all()
            assert (found.d_gist[[1, 3]] == 0).all()
            at_once = loss.forward_backward(a, b, target, opts, scale)
            if reduction == "sum":
                again = loss.backward(torch.ones(()), a, b, target, stats, opts, True, True, scale)
                assert_same(Result(at_once[0], terms, *at_once[1:]), Result(value, terms, *again))


def test_a_nan_row_scale_is_no_bad_target():
    a, b, target = draw("random", 3, 10)
    scale = torch.tensor([1.0, NAN, 1.0])
    value, *gradients = loss.forward_backward(a, b, target, options(reduction="none"), scale)
    assert value.isnan().tolist() == [False, True, False]
    assert gradients[0].isnan().all(1).tolist() == [False, True, False]


def test_gradients_of_masked_rows_past_the_cache_are_zero_to_the_last_class():
    a, b, _ = draw("random", 66, 65537)
    scale = (torch.arange(66) % 2).float()
    opts = options(reduction="sum")
    _, d_cls, d_gist = loss.forward_backward(a, b, None, opts, scale)
    for gradient in (d_cls, d_gist):
        assert (gradient[::2] == 0).all()
        assert gradient[1::2].isfinite().all()


# Masked classes, infinities, NaN.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [4, 40, 1030])
def test_classes_masked_in_both_heads(dtype, classes):
    a, b, _ = draw("random", 5, classes, dtype)
    mask = torch.rand(5, classes) < 0.5
    mask[:, :2] = True  # also at the start,
    mask[:, -1] = False
    mask[1] = True  # a whole vector and more,
    mask[1, -1] = False
    a[mask], b[mask] = -INF, -INF
    target = torch.full((5,), classes - 1)
    tolerance = {torch.float64: 1e-13, torch.float32: 8 * EPS}.get(dtype, 8e-3)
    for temperature in TEMPERATURES:
        opts = options(temperature=temperature)
        result = ours(a, b, target, opts)
        assert_close(result, truth(a, b, target, opts), tolerance)
        assert (result.d_cls[mask] == 0).all()
        assert (result.d_gist[mask] == 0).all()


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("column", [0, 9, 39])
def test_class_masked_in_one_head(head, column):
    pair = list(draw("random", 3, 40)[:2])
    target = torch.tensor([1, 2, 3])
    pair[head][1, column] = -INF
    opts = options(reduction="none")
    result, exact = ours(*pair, target, opts), truth(*pair, target, opts, torch.ones(3))
    infinite = 3 if head == 0 else 2  # KL(other || masked)
    assert result.terms[infinite, 1] == INF
    assert result.loss.tolist()[1] == INF
    torch.testing.assert_close(result.terms.double(), exact.terms, rtol=1e-6, atol=1e-6)
    for row in (0, 2):
        torch.testing.assert_close(result.d_cls[row].double(), exact.d_cls[row], rtol=0, atol=1e-6)
    # Left out by its weight, the infinite direction touches neither loss nor gradients.
    weights = {"kl_cls_gist_weight": 0.0} if head == 1 else {"kl_gist_cls_weight": 0.0}
    opts = options(reduction="sum", **weights)
    result, exact = ours(*pair, target, opts), truth(*pair, target, opts)
    assert result.terms[infinite] == INF
    assert_close(result, exact)


def test_masked_target_and_probability_zero_at_a_masked_class():
    a, b, _ = draw("random", 3, 20)
    a[:, 4] = b[:, 4] = -INF
    assert ours(a, b, torch.tensor([1, 4, 2]), options()).loss == INF
    target = torch.rand(3, 20)
    target[:, 4] = 0
    assert_close(ours(a, b, target, options()), truth(a, b, target.double(), options()))


def test_fully_masked_row_is_nan_and_no_other():
    a, b, target = draw("random", 3, 33)
    opts = options(reduction="none")
    good = ours(a, b, target, opts)
    a[1] = -INF
    result = ours(a, b, target, opts)
    assert result.loss[1].isnan()
    assert result.d_cls[1].isnan().all()
    assert same(result.d_gist[[0, 2]], good.d_gist[[0, 2]])
    # Without KL the other head is whole.
    alone = options(kl_cls_gist_weight=0.0, kl_gist_cls_weight=0.0, cls_weight=0.0)
    assert ours(a, b, target, alone).loss.isfinite()
    assert ours(a, b, target, alone).d_gist.isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("column", [0, 17, 32])
def test_nan_and_inf_are_not_lost(value, column):
    a, b, target = draw("random", 2, 33)
    a[1, column] = value
    result = ours(a, b, target, options(reduction="none"))
    assert result.loss.isnan().tolist() == [False, True]
    assert result.d_cls[1].isnan().any()


def test_each_term_of_a_row_with_nan_is_nan():
    a, b, target = draw("random", 3, 40)
    a[1, 7] = b[2, 7] = math.nan
    target[:] = 3
    terms = ours(a, b, target, options(reduction="none")).terms.isnan()
    assert terms.T.tolist() == [[False] * 4, [True, False, True, True], [False, True, True, True]]


def test_nan_of_every_bit_pattern():
    bits = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x00400000 + 0x1FF])
    for pattern in bits.to(torch.int32):
        a, b, target = draw("random", 1, 20)
        a[0, 3] = pattern.view(torch.float32)
        assert ours(a, b, target, options()).loss.isnan()


def test_largest_finite_logits():
    lowest = torch.finfo(torch.float32).min
    a, b, target = draw("random", 2, 40)
    a[:, 5] = b[:, 5] = lowest
    result = ours(a, b, target, options())
    masked = a.clone(), b.clone()
    masked[0][:, 5] = masked[1][:, 5] = -INF
    assert_close(result, truth(*masked, target, options()))


# Memory: layouts, huge offsets, what is read and what is written.


def layouts(a, b):
    rows, classes = a.shape
    stacked = torch.stack((a, b), 1)
    yield "stacked", stacked[:, 0], stacked[:, 1]
    yield "swapped", torch.stack((b, a), 1)[:, 1], torch.stack((b, a), 1)[:, 0]
    wide = torch.full((rows, 2 * classes + 9), NAN, dtype=a.dtype)
    wide[:, 1 : classes + 1], wide[:, classes + 5 : 2 * classes + 5] = a, b
    yield "unaligned", wide[:, 1 : classes + 1], wide[:, classes + 5 : 2 * classes + 5]
    yield "reversed rows", a.flip(0).flip(0), b.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [1, 3, 16, 100, 1029])
def test_layouts_do_not_matter(dtype, classes):
    a, b, target = draw("random", 5, classes, dtype)
    expected = ours(a, b, target, options())
    for name, x, y in layouts(a, b):
        before = x.clone(), y.clone()
        result = ours(x, y, target, options())
        assert_same(result, expected)
        assert same(x, before[0]), f"{name}: an input was written"
        assert same(y, before[1]), f"{name}: an input was written"
        for gradient in (result.d_cls, result.d_gist):
            assert classes == 1 or gradient.stride(1) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_classes_beyond_a_rows_end_are_neither_read_nor_written(dtype):
    for classes in range(1, 34):  # every number of lanes in the last vector
        x, y = torch.full((2, 3, classes + 40), NAN, dtype=dtype).unbind()
        a, b, target = draw("random", 3, classes, dtype)
        x[:, :classes], y[:, :classes] = a, b
        longer = torch.full((2, 3, classes + 40), -INF, dtype=dtype)  # no class with probability
        longer[:, :, :classes] = torch.stack((a, b))
        expected = ours(*longer.unbind(), target, options())
        assert (expected.d_cls[:, classes:] == 0).all()
        expected = expected._replace(
            d_cls=expected.d_cls[:, :classes], d_gist=expected.d_gist[:, :classes]
        )
        assert_same(ours(x[:, :classes], y[:, :classes], target, options()), expected)
        # Written over the logits, gradients leave what lies beyond as it was.
        loss.forward_backward(x[:, :classes], y[:, :classes], target, options(), None, True)
        assert_same(expected._replace(d_cls=x[:, :classes], d_gist=y[:, :classes]), expected)
        assert x[:, classes:].isnan().all()
        assert y[:, classes:].isnan().all()


def test_stacked_logits_get_one_stacked_gradient():
    stacked = torch.randn(4, 2, 100)
    d_cls, d_gist = ours(stacked[:, 0], stacked[:, 1], torch.arange(4), options())[2:]
    assert d_cls.untyped_storage().data_ptr() == d_gist.untyped_storage().data_ptr()
    assert d_cls.stride() == d_gist.stride() == (200, 1)
    assert d_gist.data_ptr() - d_cls.data_ptr() == 400


def test_expanded_rows():
    a, b, target = draw("random", 4, 100)
    x, y = a[:1].expand(4, 100), b[:1].expand(4, 100)
    assert_same(
        ours(x, y, target, options()), ours(x.contiguous(), y.contiguous(), target, options())
    )


def test_offsets_beyond_32_bits():
    stride, classes = 2**31 + 11, 70
    # Address space without memory: only the pages touched exist.
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * 4 * stride, flags=flags)
    x, y, target = draw("random", 3, classes)
    spread = torch.frombuffer(memory, dtype=torch.float32).as_strided((2, classes), (stride, 1))
    spread.copy_(x[:2])
    close = spread.contiguous(), y[:2]
    assert_same(ours(spread, y[:2], target[:2], options()), ours(*close, target[:2], options()))


def test_refuses_what_it_cannot_read_safely():
    a, b, target = draw("random", 4, 8)
    with pytest.raises(ValueError, match="contiguous"):
        loss.forward(a.t().contiguous().t(), b, target, options())
    with pytest.raises(ValueError, match="shape"):
        loss.forward(a, b[:3], target, options())
    with pytest.raises(ValueError, match="shape"):
        loss.forward(a, b, target[:3], options())
    with pytest.raises(ValueError, match="stats"):
        loss.backward(torch.ones(()), a, b, target, torch.empty(2), options(), True, True)


# Determinism.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_over_repeats_and_threads(set_threads, dtype):
    a, b, target = draw("random", 97, 1100, dtype)
    set_threads(1)
    expected = ours(a, b, target, options())
    for threads in (2, 3):
        set_threads(threads)
        for _ in range(20):
            assert_same(ours(a, b, target, options()), expected)


def test_a_row_does_not_depend_on_its_batch():
    """Nor on the way its gradient is written: that of a batch this large passes by the cache."""
    a, b, target = draw("random", 80, 65537)
    opts = options(reduction="none")
    together = ours(a, b, target, opts)
    for row in (0, 41, 79):
        one = slice(row, row + 1)
        alone = ours(a[one], b[one], target[one], opts)
        assert same(together.loss[one], alone.loss)
        assert same(together.terms[:, one], alone.terms)
        assert same(together.d_cls[one], alone.d_cls)
        assert same(together.d_gist[one], alone.d_gist)
