"""The loss family: values and gradients against float64, its conventions, its argument checks."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gist_kernels as gk
from gist_kernels.functional import loss as loss_module

pytestmark = pytest.mark.usefixtures("served_by")


CLASSES = (1, 2, 5, 10, 45, 100, 397, 1000)
KINDS = ("random", "equal", "peaked", "gap", "offset")


def logits(kind: str, rows: int, classes: int, dtype: torch.dtype = torch.float32):
    """Two (rows, classes) tensors of one kind of difficulty, and a target."""
    generator = torch.Generator().manual_seed(classes)

    def normal() -> torch.Tensor:
        return 3 * torch.randn(rows, classes, generator=generator)

    a, b = normal(), normal()
    if kind == "equal":
        b = a.clone()
    elif kind == "peaked":
        a[:, 0] += 60
        b[:, -1] += 60
    elif kind == "gap":
        a[:, 0] += 1e4
        b[:, -1] -= 1e4
    elif kind == "offset":
        a, b = a + 1e6, b - 1e6
    target = torch.randint(classes, (rows,), generator=generator)
    return a.to(dtype), b.to(dtype), target


def truth(a, b, target, *, temperature=3.0, label_smoothing=0.0, weights=(1.0, 0.5, 0.75, 0.75)):
    """Loss, terms and gradients in float64 from PyTorch's log-softmax operators."""
    return differentiated(a.double(), b.double(), target, temperature, label_smoothing, weights)


def differentiated(a, b, target, temperature, label_smoothing, weights):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    rows = oracles.log_softmax_terms(a, b, target, temperature, label_smoothing)
    terms = [row.mean() for row in rows]
    loss = sum(w * t for w, t in zip(weights, terms, strict=True))
    return [x.detach().double() for x in (loss, *terms, *torch.autograd.grad(loss, (a, b)))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("temperature", [0.5, 3.0, 4.7])
def test_loss_terms_and_gradients_are_as_accurate_as_pytorch(served_by, kind, classes, temperature):
    a, b, target = logits(kind, 6, classes)
    expected = truth(a, b, target, temperature=temperature)
    by_pytorch = differentiated(a, b, target, temperature, 0.0, (1.0, 0.5, 0.75, 0.75))

    ga, gb = a.clone().requires_grad_(), b.clone().requires_grad_()
    loss, terms = gk.gist_loss(ga, gb, target, temperature=temperature, return_terms=True)
    loss.backward()
    ours = [loss.detach(), *terms, ga.grad, gb.grad]

    names = ("loss", *gk.GistLossTerms._fields, "d_cls", "d_gist")
    for name, value, torchs, exact in zip(names, ours, by_pytorch, expected, strict=True):
        ulp = torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
        error = (value.double() - exact).abs().max().item()
        allowed = (torchs - exact).abs().max().item() + 4 * ulp
        if served_by == "triton":
            # Half an ulp of the largest log-probability, which either form rounds on its way.
            allowed += (
                2**-24 * max((x.amax(1) - x.amin(1)).max().item() for x in (a, b)) / temperature
            )
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.float64
@pytest.mark.parametrize("classes", [2, 10, 397])
def test_equals_the_released_formula_where_that_is_finite(classes):
    a, b, target = (
        x.double() if x.is_floating_point() else x for x in logits("random", 8, classes)
    )
    a.requires_grad_(), b.requires_grad_()
    released = oracles.released_loss(a, b, target)
    ours = gk.gist_loss(a, b, target)
    torch.testing.assert_close(ours, released, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (a, b)), torch.autograd.grad(released, (a, b)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_is_finite_where_the_released_formula_is_not():
    a, b, target = logits("gap", 4, 10)
    assert not oracles.released_loss(a, b, target).isfinite()
    loss, d_cls, d_gist = gk.gist_loss_and_grad(a, b, target)
    assert loss.isfinite()
    assert d_cls.isfinite().all()
    assert d_gist.isfinite().all()


rows_of_logits = st.lists(
    st.floats(-50, 50, width=32) | st.just(-math.inf), min_size=2, max_size=12
).filter(lambda row: max(row) > -math.inf)


@pytest.mark.float64
@settings(deadline=None, max_examples=60)
@given(data=st.data(), temperature=st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.7]))
def test_kl_follows_its_definition_with_masked_classes(data, temperature):
    a = data.draw(rows_of_logits)
    other = st.lists(st.floats(-50, 50, width=32), min_size=len(a), max_size=len(a))
    # Masked on the same classes: only there is every KL finite.
    b = [y if x > -math.inf else -math.inf for x, y in zip(a, data.draw(other), strict=True)]
    ta = torch.tensor([a], dtype=torch.float64, requires_grad=True)
    tb = torch.tensor([b], dtype=torch.float64, requires_grad=True)
    for weights, expected in (
        ((1.0, 0.0), oracles.kl_by_definition(a, b, temperature)),
        ((0.0, 1.0), oracles.kl_by_definition(b, a, temperature)),
    ):
        loss = gk.bidirectional_kl(ta, tb, temperature=temperature, weights=weights)
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        for gradient in torch.autograd.grad(loss, (ta, tb)):
            assert gradient.isfinite().all()
            assert (gradient[ta == -torch.inf] == 0).all()
            assert gradient.sum().item() == pytest.approx(0, abs=1e-9)


def test_class_masked_in_one_head_gives_an_infinite_kl_that_a_zero_weight_leaves_out():
    a = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    b = torch.tensor([[1.0, -math.inf, 3.0]], requires_grad=True)
    assert gk.bidirectional_kl(a, b).item() == math.inf
    one_way = gk.bidirectional_kl(a, b, weights=(0.0, 1.0))
    expected = oracles.kl_by_definition(b[0].tolist(), a[0].tolist(), 1.0)
    assert one_way.item() == pytest.approx(expected, rel=1e-6)
    for gradient in torch.autograd.grad(one_way, (a, b)):
        assert gradient.isfinite().all()


@pytest.mark.float64
def test_gradcheck_of_every_option():
    a = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 4, -100, 2])
    mixed = torch.rand(4, 5, dtype=torch.float64).softmax(1)
    for target in (index, mixed):
        for reduction in ("mean", "batchmean", "sum", "none"):
            assert torch.autograd.gradcheck(
                lambda a, b, t=target, r=reduction: gk.gist_loss(
                    a, b, t, label_smoothing=0.1, temperature=2.0, reduction=r
                ),
                (a, b),
            )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropies_are_pytorchs_with_smoothing_ignored_rows_and_probabilities(smoothing):
    a, b, target = logits("random", 6, 7)
    target[2] = -100
    options = {"label_smoothing": smoothing, "return_terms": True}
    for t in (target, torch.rand(6, 7).softmax(1)):
        _, terms = gk.gist_loss(a, b, t, **options)
        for ours, side in ((terms.cls_cross_entropy, a), (terms.gist_cross_entropy, b)):
            torch.testing.assert_close(ours, F.cross_entropy(side, t, label_smoothing=smoothing))


def test_one_hot_probabilities_equal_indices():
    a, b, target = logits("peaked", 5, 6)
    a[0, 3] = b[0, 3] = -math.inf  # masked, and not the target
    target[0] = 1
    indices = gk.gist_loss_and_grad(a, b, target)
    probabilities = gk.gist_loss_and_grad(a, b, F.one_hot(target, 6).float())
    for x, y in zip(indices, probabilities, strict=True):
        torch.testing.assert_close(x, y)


def test_ignored_rows_change_nothing_even_when_they_hold_nan():
    a, b, target = logits("random", 5, 4)
    kept = torch.tensor([0, 2, 4])
    expected = gk.gist_loss_and_grad(a[kept], b[kept], target[kept])
    target[1] = target[3] = 7
    a[1] = b[3] = math.nan
    loss, d_cls, d_gist = gk.gist_loss_and_grad(a, b, target, ignore_index=7)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(d_cls[kept], expected[1])
    torch.testing.assert_close(d_gist[kept], expected[2])
    assert (d_cls[[1, 3]] == 0).all()
    assert (d_gist[[1, 3]] == 0).all()
    rows = gk.gist_loss(a, b, target, ignore_index=7, reduction="none")
    assert (rows[[1, 3]] == 0).all()


def test_reductions_agree():
    a, b, target = logits("random", 5, 4)
    rows = gk.gist_loss(a, b, target, reduction="none")
    assert rows.shape == (5,)
    torch.testing.assert_close(gk.gist_loss(a, b, target, reduction="sum"), rows.sum())
    torch.testing.assert_close(gk.gist_loss(a, b, target), rows.mean())
    torch.testing.assert_close(gk.gist_loss(a, b, target, reduction="batchmean"), rows.mean())
    loss, terms = gk.gist_loss(a, b, target, return_terms=True)
    weighted = terms[0] + 0.5 * terms[1] + 0.75 * (terms[2] + terms[3])
    torch.testing.assert_close(loss, weighted)
    assert not any(term.requires_grad for term in terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32_and_give_gradients_in_their_own(dtype):
    a, b, target = logits("random", 4, 100, dtype)
    loss, d_cls, d_gist = gk.gist_loss_and_grad(a, b, target)
    exact = truth(a, b, target)
    assert loss.dtype == torch.float32
    assert d_cls.dtype == d_gist.dtype == dtype
    assert loss.item() == pytest.approx(exact[0].item(), rel=1e-5)
    for ours, expected in ((d_cls, exact[5]), (d_gist, exact[6])):
        torch.testing.assert_close(ours, expected.to(dtype))


def test_empty_batch_and_all_ignored_are_as_pytorchs():
    empty = torch.empty(0, 3)
    none = torch.empty(0, dtype=torch.int64)
    assert gk.gist_loss(empty, empty, none).isnan()
    assert gk.gist_loss(empty, empty, none, reduction="sum").item() == 0
    assert gk.gist_loss(empty, empty, none, reduction="none").shape == (0,)
    a, b, _ = logits("random", 2, 3)
    ignored = torch.full((2,), -100)
    assert gk.gist_loss(a, b, ignored).isnan()
    assert gk.gist_loss(a, b, ignored, reduction="sum").item() == 0


def test_views_and_stride_zero_gradients():
    stacked = torch.randn(6, 2, 5, requires_grad=True)
    target = torch.arange(6) % 5
    rows = gk.gist_loss(stacked[:, 0], stacked[:, 1], target, reduction="none")
    rows.backward(torch.ones(()).expand(6))
    exact = truth(stacked[:, 0], stacked[:, 1], target)
    torch.testing.assert_close(stacked.grad[:, 0].double(), 6 * exact[5], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(stacked.grad[:, 1].double(), 6 * exact[6], rtol=2e-6, atol=2e-6)


def test_inputs_are_never_written_and_either_side_alone_may_need_a_gradient():
    a, b, target = logits("random", 4, 6)
    a.requires_grad_()
    before = (a.detach().clone(), b.clone(), target.clone())
    (gradient,) = torch.autograd.grad(gk.gist_loss(a, b, target), (a,))
    torch.testing.assert_close(gradient, truth(a, b, target)[5].float())
    for now, then in zip((a.detach(), b, target), before, strict=True):
        assert torch.equal(now, then)


def test_gradients_come_in_any_grad_mode():
    a, b, target = logits("random", 4, 6)
    expected = gk.gist_loss_and_grad(a, b, target)
    with torch.no_grad():
        without = gk.gist_loss_and_grad(a, b, target)
    with torch.inference_mode():
        inference = gk.gist_loss_and_grad(a * 1, b * 1, target)  # inference tensors
    for results in (without, inference):
        for x, y in zip(results, expected, strict=True):
            assert torch.equal(x, y)
            assert not x.requires_grad


def test_numpy_scalars_are_numbers():
    options = {"temperature": np.float32(2), "ignore_index": np.int64(-100)}
    a, b, target = logits("random", 4, 6)
    assert torch.equal(
        gk.gist_loss(a, b, target, **options), gk.gist_loss(a, b, target, temperature=2)
    )


def test_compiles_without_a_graph_break():
    a, b, target = logits("random", 4, 6)
    compiled = torch.compile(gk.gist_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b, target), gk.gist_loss(a, b, target))


A, B, T = torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], B, T), TypeError, "cls_logits must be a torch.Tensor, not list"),
        ((A.to_sparse(), B, T), TypeError, "cls_logits must be a dense tensor.*sparse_coo"),
        ((A.long(), B, T), TypeError, "cls_logits must be float32.*it is torch.int64"),
        ((A[0, 0], B, T), ValueError, r"cls_logits must have shape \(..., C\); it has \(\)"),
        ((A, B[:2], T), ValueError, r"gist_logits.*here \(3, 4\); it has \(2, 4\)"),
        ((A, B[:, :2], T), ValueError, "2 classes, where cls_logits has 4; cut or pad one side"),
        ((A, B.long(), T), TypeError, "gist_logits must be float32.*it is torch.int64"),
        ((A[:, :0], B[:, :0], T), ValueError, "at least one class"),
        ((A, B, T.int()), TypeError, r"int64.*target.long\(\)"),
        ((A, B, T[:2]), ValueError, r"target must have shape \(...\)"),
        ((A, B, torch.rand(3, 5)), ValueError, "target must have shape .* class probabilities"),
        ((A, B, T.to("meta")), ValueError, "target is on meta"),
        ((A, B, torch.ones(3, 4, requires_grad=True)), ValueError, r"pass target.detach\(\)"),
        ((A, B.to("meta"), T), ValueError, "gist_logits is on meta"),
    ],
)
def test_tensors_that_do_not_fit_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        gk.gist_loss(*arguments)


@pytest.mark.parametrize("index", [4, -1])
def test_class_index_out_of_range_is_named_or_its_row_is_nan(served_by, monkeypatch, index):
    target = torch.tensor([0, index, 1])
    if served_by == "triton":  # as on a device, where nothing waits for an answer
        rows = gk.gist_loss(A, B, target, reduction="none")
        assert rows.isnan().tolist() == [False, True, False]
        monkeypatch.setattr(loss_module, "_CHECK_TARGETS", True)
    with pytest.raises(IndexError, match=rf"target\[1\] is {index}, outside the 4 classes"):
        gk.gist_loss(A, B, target)
    with pytest.raises(IndexError, match=rf"target\[1\] is {index}"):
        gk.gist_loss_and_grad(A, B, target)
    assert gk.gist_loss(A, B, target, ignore_index=index).isfinite()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature must be greater than 0; it is 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite"),
        ({"temperature": 10**400}, ValueError, "temperature must be finite"),
        ({"temperature": 1e16}, ValueError, r"temperature must be in \[1e-15, 1e15\]"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index must fit in 64 bits"),
        ({"temperature": "3"}, TypeError, "temperature must be a number, not str"),
        ({"cls_weight": math.inf}, ValueError, "cls_weight must be finite"),
        ({"kl_weights": (1.0,)}, ValueError, "kl_weights must be a pair"),
        ({"kl_weights": (1.0, math.nan)}, ValueError, r"kl_weights\[1\] must be finite"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\)"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int"),
        ({"reduction": "avg"}, ValueError, "reduction: 'avg' is not known"),
    ],
)
def test_options_that_do_not_fit_are_named(options, error, message):
    with pytest.raises(error, match=message):
        gk.gist_loss(A, B, T, **options)
    with pytest.raises(error, match=message):
        gk.gist_loss_and_grad(A, B, T, **options)


def test_bidirectional_kl_checks_its_own_arguments():
    with pytest.raises(ValueError, match="logits_b must have shape"):
        gk.bidirectional_kl(A, B[:, :2])
    with pytest.raises(ValueError, match="weights must be a pair"):
        gk.bidirectional_kl(A, B, weights=0.5)
    with pytest.raises(ValueError, match="temperature"):
        gk.bidirectional_kl(A, B, temperature=-1)
