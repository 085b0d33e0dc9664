"""Logits of any leading shape, rows that are masked or weighted, and the KL terms' options: values
and gradients against float64."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import gist_kernels as gk

pytestmark = pytest.mark.usefixtures("served_by")

SHAPES = ((7,), (2, 3), (1, 2, 3), (), (0,))
LAYOUTS = ("contiguous", "wide", "transposed", "classes first", "expanded")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another layout."""
    if layout == "wide":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), math.nan)
        wide[..., 2:-3] = x
        return wide[..., 2:-3]
    if layout == "transposed" and x.ndim > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "classes first":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "expanded" and x.ndim > 1 and len(x):
        return x[:1].expand(x.shape)
    return x


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Two logit tensors, rows' options and the KL terms' options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = draw(st.sampled_from(SHAPES))
    classes = draw(st.sampled_from((1, 2, 5, 17, 40)))
    dtypes = [draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))]
    dtypes.append(draw(st.sampled_from((dtypes[0], torch.float32))))
    scale = draw(st.sampled_from((0.1, 3.0, 30.0)))
    a, b = (
        laid_out(
            (scale * torch.randn(*shape, classes, generator=generator)).to(dtype),
            draw(st.sampled_from(LAYOUTS)),
        )
        for dtype in dtypes
    )
    mask = draw(st.sampled_from((None, 0.5, 0.0, 1.0)))
    mask = None if mask is None else torch.rand(shape, generator=generator) < mask
    row_weight = None
    if draw(st.booleans()):
        row_weight = torch.randn(shape, generator=generator).relu()
        row_weight = row_weight.to(draw(st.sampled_from((torch.float32, torch.bfloat16))))
    reduction = draw(st.sampled_from(("mean", "sum", "none", "batchmean")))
    divisor = None
    if "mean" in reduction:
        divisor = draw(st.sampled_from((None, 2.5, 3, torch.tensor(4), torch.tensor(0.5))))
    temperature = draw(st.sampled_from((1.0, 2.0, 4.7, (1.0, 3.0), (2.0, 0.7))))
    return {
        "a": a,
        "b": b,
        "temperature": temperature,
        "reduction": reduction,
        "mask": mask,
        "row_weight": row_weight,
        "divisor": divisor,
        "stop_gradient": draw(st.sampled_from((None, "a", "b", "targets"))),
        "scale_by_temperature_squared": draw(st.booleans()),
        "upstream": draw(st.sampled_from((1.0, -2.5))),
    }


def expected(call, weights, cross_entropies=None):
    """Loss and gradients in float64. Masked rows are 0 in it, whatever they hold."""
    a, b = (call[side].detach().double().requires_grad_() for side in "ab")
    temperature = call["temperature"]
    pair = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    mask = call["mask"]
    x, y = (side if mask is None else torch.where(mask[..., None], side, 0.0) for side in (a, b))
    rows = oracles.kl_rows(x, y, pair, weights, call["stop_gradient"])
    rows = rows * (pair[0] * pair[1] if call["scale_by_temperature_squared"] else 1)
    if cross_entropies is not None:
        rows = rows + cross_entropies(x, y)
    loss = oracles.reduced(rows, call["reduction"], mask, call["row_weight"], call["divisor"])
    if loss.requires_grad:
        gradients = torch.autograd.grad(
            loss.sum() * call["upstream"], (a, b), materialize_grads=True
        )
    else:
        gradients = torch.zeros_like(a), torch.zeros_like(b)
    return loss.detach(), *gradients


def ours(call, operation):
    a, b = (call[side].detach().requires_grad_() for side in "ab")
    options = {k: v for k, v in call.items() if k not in ("a", "b", "upstream")}
    loss = operation(a, b, **options)
    gradients = torch.autograd.grad(loss.sum() * call["upstream"], (a, b), materialize_grads=True)
    return loss.detach(), *gradients


def assert_close(found, exact, call):
    """Within some ulps of float32: of a loss whose rows' divergences are 1, and of a logit of 100,
    whose exponential has lost 100 ulps. Gradients are rounded to their dtype."""
    one = torch.ones(call["a"].shape[:-1], dtype=torch.float64)
    unit = oracles.reduced(
        one, call["reduction"], *(call[k] for k in ("mask", "row_weight", "divisor"))
    )
    unit = unit.abs().max().item() if unit.numel() else 0.0
    if call["scale_by_temperature_squared"]:
        unit *= (
            math.prod(call["temperature"])
            if isinstance(call["temperature"], tuple)
            else call["temperature"] ** 2
        )
    largest = max((call[s].float().abs().max().item() for s in "ab" if call[s].numel()), default=0)
    ulps = 2**-23 * max(16.0, 3 * largest)
    for name, x, y, side in zip(("loss", "d_a", "d_b"), found, exact, ("", "a", "b"), strict=True):
        assert x.shape == y.shape, name
        dtype = call[side].dtype if side else torch.float32
        assert x.dtype is dtype, name
        if y.isnan().any():  # a mean of no rows
            assert x.isnan().all(), name
            continue
        if not y.numel():
            continue
        size = y.abs().max().item()
        tolerance = ulps * max(size, unit * (abs(call["upstream"]) if side else 1))
        if side and dtype is not torch.float32:
            tolerance += torch.finfo(dtype).eps * size + 2**-24
        assert (x.double() - y).abs().max().item() <= tolerance, name


def run(check, backend, **strategies):
    """Many random calls; in Triton's interpreter one takes a hundred times as long."""
    examples = 30 if backend == "triton" else 1150
    settings(deadline=None, max_examples=examples)(given(**strategies)(check))()


def check_divergence(call, weights):
    def operation(a, b, **options):
        return gk.bidirectional_kl(a, b, weights=weights, **options)

    exact = expected(call, weights)
    unscaled = call["mask"] is call["row_weight"] is call["divisor"] is None
    if unscaled and call["a"].numel() == 0 and "mean" in call["reduction"]:
        exact = (exact[0] * math.nan, *exact[1:])
    assert_close(ours(call, operation), exact, call)


def test_divergence_of_every_combination_of_options(served_by):
    weights = ((1.0, 1.0), (0.0, 1.0), (0.5, -0.25), (2.0, 0.0))
    run(check_divergence, served_by, call=calls(), weights=st.sampled_from(weights))


def check_loss(call, kind, smoothing):
    shape = call["a"].shape
    if 0 in shape:
        return
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(shape[-1], shape[:-1], generator=generator)
    target = indices
    if kind == "probability":
        target = torch.rand(shape, generator=generator).softmax(-1)
    elif kind == "ignored":
        target = torch.where(torch.rand(shape[:-1], generator=generator) < 0.3, -100, indices)
    kept = torch.ones(shape[:-1], dtype=torch.bool)
    if kind == "ignored":
        kept = target != -100
    weights = (0.75, 0.6)

    def operation(a, b, **options):
        return gk.gist_loss(a, b, target, kl_weights=weights, label_smoothing=smoothing, **options)

    def cross_entropies(a, b):
        y = target.double() if kind == "probability" else F.one_hot(indices, shape[-1]).double()
        y = y * (1 - smoothing) + smoothing / shape[-1]
        return -(y * (F.log_softmax(a, -1) + 0.5 * F.log_softmax(b, -1))).sum(-1)

    # An ignored row counts no more than a masked one.
    masked = {**call, "mask": kept if call["mask"] is None else kept & call["mask"]}
    exact = expected(masked, weights, cross_entropies)
    if call["mask"] is call["row_weight"] is call["divisor"] is None and not kept.any():
        exact = (exact[0] * (math.nan if "mean" in call["reduction"] else 1), *exact[1:])
    assert_close(ours(call, operation), exact, call)
    if call["upstream"] == 1:
        options = {k: v for k, v in call.items() if k not in ("a", "b", "upstream")}
        at_once = gk.gist_loss_and_grad(
            call["a"], call["b"], target, kl_weights=weights, label_smoothing=smoothing, **options
        )
        assert_close(at_once, exact, call)


def test_loss_of_every_combination_of_options(served_by):
    kinds = st.sampled_from(("index", "ignored", "probability"))
    run(check_loss, served_by, call=calls(), kind=kinds, smoothing=st.sampled_from((0.0, 0.1)))


@pytest.mark.float64
@pytest.mark.parametrize("stop_gradient", [None, "a", "b", "targets"])
def test_options_are_exact_in_float64(stop_gradient):
    call = {
        "a": torch.randn(3, 4, 6, dtype=torch.float64),
        "b": torch.randn(3, 4, 6, dtype=torch.float64),
        "temperature": (2.0, 3.5),
        "reduction": "mean",
        "mask": torch.rand(3, 4) < 0.6,
        "row_weight": torch.rand(3, 4, dtype=torch.float64),
        "divisor": None,
        "stop_gradient": stop_gradient,
        "scale_by_temperature_squared": True,
        "upstream": 1.0,
    }
    target = torch.randint(6, (3, 4))

    def cross_entropies(a, b):
        y = F.one_hot(target, 6).double()
        return -(y * (F.log_softmax(a, -1) + 0.5 * F.log_softmax(b, -1))).sum(-1)

    found = ours(call, lambda a, b, **o: gk.gist_loss(a, b, target, **o))
    for x, y in zip(found, expected(call, (0.75, 0.75), cross_entropies), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    found = ours(call, lambda a, b, **o: gk.bidirectional_kl(a, b, weights=(0.3, 1.0), **o))
    for x, y in zip(found, expected(call, (0.3, 1.0)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.float64
def test_gradcheck_with_masked_and_weighted_rows():
    a, b = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    weight = torch.rand(2, 3, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda a, b, r=reduction: gk.bidirectional_kl(
                a, b, temperature=(2.0, 0.5), mask=mask, row_weight=weight, reduction=r
            ),
            (a, b),
        )


@pytest.mark.parametrize("classes", [5, 700, 9000])
def test_nan_in_masked_rows_reaches_no_result(classes):
    a, b = (torch.randn(2, 3, classes) for _ in range(2))
    target = torch.randint(classes, (2, 3))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    kept = [x[mask] for x in (a, b, target)]
    loss, d_a, d_b = gk.gist_loss_and_grad(*kept)
    a[0, 1] = b[1, 0] = math.nan
    b[0, 1], a[1, 1, 2] = math.inf, math.nan
    target[1, 1] = 10**6  # no class, and not looked at
    found = gk.gist_loss_and_grad(a, b, target, mask=mask)
    torch.testing.assert_close(found[0], loss)
    for gradient, of_kept in zip(found[1:], (d_a, d_b), strict=True):
        torch.testing.assert_close(gradient[mask], of_kept)
        assert (gradient[~mask] == 0).all()
    weight = mask.float()
    weight[~mask] = math.nan
    weighted = gk.gist_loss_and_grad(a, b, target, mask=mask, row_weight=weight)
    for x, y in zip(weighted, found, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("classes", [5, 700, 9000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_masked_is_zero(classes, reduction):
    a, b = (torch.full((2, 3, classes), math.nan, requires_grad=True) for _ in range(2))
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = gk.bidirectional_kl(a, b, mask=mask, reduction=reduction)
    assert (loss == 0).all()
    for gradient in torch.autograd.grad(loss.sum(), (a, b)):
        assert (gradient == 0).all()
    if reduction == "mean":  # num_items_in_batch of a micro-batch of padding
        assert gk.bidirectional_kl(a, b, mask=mask, divisor=torch.tensor(0)) == 0


def test_a_row_of_weight_zero_adds_nothing_but_is_counted():
    a, b = torch.randn(2, 4, 6).unbind()
    a[2] = math.nan
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5])
    rows = gk.bidirectional_kl(a[[0, 1, 3]], b[[0, 1, 3]], reduction="none")
    expected = (rows * weight[[0, 1, 3]]).sum()
    for reduction, divisor in (("sum", 1), ("mean", 4)):
        found = gk.bidirectional_kl(a, b, row_weight=weight, reduction=reduction)
        torch.testing.assert_close(found, expected / divisor)
    by_weight = gk.bidirectional_kl(a, b, row_weight=weight, divisor=weight.sum())
    torch.testing.assert_close(by_weight, expected / 3.5)


def test_parts_of_a_batch_with_its_divisor_add_up_to_the_batch():
    a, b = torch.randn(2, 6, 5, 7).unbind()
    mask = torch.rand(6, 5) < 0.5
    whole = gk.bidirectional_kl(a, b, mask=mask)
    parts = sum(
        gk.bidirectional_kl(a[part], b[part], mask=mask[part], divisor=mask.sum())
        for part in (slice(0, 2), slice(2, 6))
    )
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 4, 8), (8,)])
def test_leading_shape_is_that_of_the_rows(shape):
    a, b = (torch.randn(shape, requires_grad=True) for _ in range(2))
    target = torch.randint(8, shape[:-1])
    rows = gk.gist_loss(a, b, target, reduction="none")
    flat = gk.gist_loss(a.reshape(-1, 8), b.reshape(-1, 8), target.reshape(-1), reduction="none")
    assert rows.shape == target.shape
    assert torch.equal(rows.flatten(), flat)
    loss, terms = gk.gist_loss(a, b, target, reduction="none", return_terms=True)
    assert terms.kl_cls_gist.shape == target.shape
    upstream = torch.randn(shape[:-1])
    for x, y in zip(
        torch.autograd.grad(loss, (a, b), upstream, retain_graph=True),
        torch.autograd.grad(flat, (a, b), upstream.flatten()),
        strict=True,
    ):
        assert x.shape == shape
        assert torch.equal(x, y)
    one_hot = F.one_hot(target, 8).float()
    torch.testing.assert_close(gk.gist_loss(a, b, one_hot, reduction="none"), rows)


def test_no_copy_is_made_of_rows_with_one_stride(served_by):
    if served_by != "cpu":
        pytest.skip("the interpreter and the reference copy")
    tokens = torch.randn(3, 5, 2, 100)  # two heads of each token
    images = torch.randn(2, 100, 4, 4).permute(0, 2, 3, 1)

    def copies(a, b):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            torch.autograd.grad(gk.bidirectional_kl(a, b), (a, b))
        names = {event.key for event in trace.key_averages()}
        return {"aten::copy_", "aten::clone", "aten::contiguous"} & names

    assert not copies(tokens[..., 0, :], tokens[..., 1, :])
    assert not copies(torch.randn(3, 5, 200)[..., :100], torch.randn(3, 5, 100))
    assert copies(images, images)  # classes lie apart


def test_halves_of_each_token_have_the_bits_of_separate_tensors():
    tokens = torch.randn(3, 5, 2, 9)
    a, b = (tokens[..., side, :].detach().requires_grad_() for side in (0, 1))
    x, y = (side.detach().contiguous().requires_grad_() for side in (a, b))
    for found, other in zip(
        torch.autograd.grad(gk.bidirectional_kl(a, b), (a, b)),
        torch.autograd.grad(gk.bidirectional_kl(x, y), (x, y)),
        strict=True,
    ):
        assert torch.equal(found, other)


@pytest.mark.parametrize("classes", [5, 700])
def test_a_masked_row_changes_no_bit_of_another(classes):
    a, b = (torch.randn(9, classes) for _ in range(2))
    mask = torch.tensor([True, False, True, True, False, True, True, False, True])
    ones = torch.ones(9)
    x, y = (side.clone().requires_grad_() for side in (a, b))
    with_mask = gk.bidirectional_kl(x, y, mask=mask, reduction="none")
    without = gk.bidirectional_kl(a[mask], b[mask], row_weight=ones[mask], reduction="none")
    assert torch.equal(with_mask[mask], without)
    gradients = [torch.autograd.grad(with_mask.sum(), (x, y), retain_graph=True) for _ in range(3)]
    plain = gk.bidirectional_kl(x, y, reduction="none")[mask].sum()
    for again in (*gradients[1:], torch.autograd.grad(plain, (x, y))):
        assert all(torch.equal(p, q) for p, q in zip(gradients[0], again, strict=True))


def test_sides_of_two_dtypes_get_gradients_of_their_own(served_by):
    a = torch.randn(4, 50, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(4, 50, dtype=torch.float32, requires_grad=True)
    exact = gk.bidirectional_kl(a.float(), b)
    loss = gk.bidirectional_kl(a, b)
    torch.testing.assert_close(loss, exact)
    for found, expected in zip(
        torch.autograd.grad(loss, (a, b)), torch.autograd.grad(exact, (a, b)), strict=True
    ):
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected)
    if served_by != "triton":
        wide = gk.bidirectional_kl(a, b.double())
        assert wide.dtype is torch.float64
        torch.testing.assert_close(wide, exact.double(), rtol=1e-5, atol=1e-6)


def test_stopped_targets_leave_the_difference_of_the_distributions():
    """d KL(p || q) / d logits of q is q - p, and p's is 0."""
    a, b = (torch.randn(3, 20, requires_grad=True) for _ in range(2))
    options = {"reduction": "sum", "stop_gradient": "targets"}
    loss = gk.bidirectional_kl(a, b, weights=(1.0, 0.0), **options)
    d_a, d_b = torch.autograd.grad(loss, (a, b), materialize_grads=True)
    assert (d_a == 0).all()
    torch.testing.assert_close(d_b, b.softmax(1) - a.softmax(1))
    torch.testing.assert_close(loss, gk.bidirectional_kl(a, b, weights=(1.0, 0.0), reduction="sum"))


def test_options_of_rows_compile_without_a_graph_break():
    a, b = (torch.randn(2, 3, 7, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 3) < 0.5

    def loss_of(a, b, mask, divisor):
        return gk.bidirectional_kl(
            a, b, mask=mask, divisor=divisor, temperature=(1.0, 2.0), stop_gradient="targets"
        )

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    divisor = torch.tensor(4)  # read on the host, it would break the graph
    expected = loss_of(a, b, mask, divisor)
    found = compiled(a, b, mask, divisor)
    torch.testing.assert_close(found, expected)
    for x, y in zip(
        torch.autograd.grad(found, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True
    ):
        torch.testing.assert_close(x, y)


A, B, T = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, True where a row counts"),
        ({"mask": [True]}, TypeError, "mask must be a torch.Tensor"),
        ({"mask": torch.ones(3, 2).bool()}, ValueError, r"mask must have shape .*here \(2, 3\)"),
        ({"mask": torch.ones(2, 3, 1).bool()}, ValueError, "mask must have shape"),
        ({"row_weight": T}, TypeError, "row_weight must be float32"),
        ({"row_weight": torch.ones(6)}, ValueError, "row_weight must have shape"),
        (
            {"row_weight": torch.ones(2, 3, requires_grad=True)},
            ValueError,
            r"row_weight.detach\(\)",
        ),
        ({"mask": T.bool().to("meta")}, ValueError, "mask is on meta"),
        ({"divisor": torch.ones(1)}, ValueError, "0-dim tensor; it has shape"),
        ({"divisor": 0}, ValueError, "divisor must be greater than 0"),
        ({"divisor": "all"}, TypeError, "divisor must be a number"),
        ({"divisor": 3, "reduction": "sum"}, ValueError, "divisor .* reduction is 'sum'"),
        ({"temperature": (1.0,)}, ValueError, "temperature must be a number or a pair"),
        ({"temperature": (1.0, 0)}, ValueError, r"temperature\[1\] must be greater than 0"),
        ({"temperature": (1e-3, 1e4)}, ValueError, "factor of 1e6"),
        ({"stop_gradient": "c"}, ValueError, "stop_gradient: 'c' is not known"),
        ({"scale_by_temperature_squared": 1}, TypeError, "must be True or False"),
    ],
)
def test_options_that_do_not_fit_are_named(options, error, message):
    with pytest.raises(error, match=message):
        gk.bidirectional_kl(A, B, **options)
    with pytest.raises(error, match=message):
        gk.gist_loss_and_grad(A, B, T, **options)


def test_a_head_of_another_width_is_named():
    with pytest.raises(ValueError, match="5 classes, where logits_a has 4; cut or pad"):
        gk.bidirectional_kl(A, torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="target must have shape .* class probabilities"):
        gk.gist_loss(A, B, torch.zeros(2, 3, 5))
