"""The Jensen-Shannon divergence: values and gradients against float64, its options, its checks."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gist_kernels as gk

pytestmark = pytest.mark.usefixtures("served_by")

WEIGHTS = ((0.5, 0.5), (0.1, 0.9), (1 / 3, 1 / 3, 1 / 3), (0.1, 0.2, 0.3, 0.4))
KINDS = ("random", "equal", "close", "peaked", "gap", "offset")


def draw_sides(kind: str, sides: int, rows: int, classes: int) -> list[torch.Tensor]:
    """Logits of one kind of difficulty."""
    generator = torch.Generator().manual_seed(classes)

    def normal() -> torch.Tensor:
        return 3 * torch.randn(rows, classes, generator=generator)

    found = [normal() for _ in range(sides)]
    for k in range(sides):
        if kind == "equal":
            found[k] = found[0].clone()
        elif kind == "close":
            found[k] = found[0] + 1e-3 * normal()
        elif kind == "peaked":
            found[k][:, k % classes] += 60
        elif kind == "gap":
            found[k][:, k % classes] += 1e4 * (-1) ** k
        elif kind == "offset":
            found[k] += 1e5 * k
    return found


def truth(sides, weights, temperatures, dtype=torch.float64):
    """Each row's divergence and the gradients of their sum, in PyTorch's operators."""
    inputs = [side.detach().to(dtype).requires_grad_() for side in sides]
    rows = oracles.jensen_shannon_rows(inputs, weights, temperatures)
    return [rows.detach(), *torch.autograd.grad(rows.sum(), inputs)]


def ours(sides, **options):
    inputs = [side.detach().requires_grad_() for side in sides]
    rows = gk.jensen_shannon(*inputs, reduction="none", **options)
    return [rows.detach(), *torch.autograd.grad(rows.sum(), inputs)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 2, 7, 100, 1029])
def test_as_accurate_as_pytorch(served_by, kind, classes):
    for weights in WEIGHTS[1:3] if served_by == "triton" else WEIGHTS:
        sides = draw_sides(kind, len(weights), 3, classes)
        own = tuple(1 + 0.5 * k for k in range(len(weights)))
        for temperature in (own,) if served_by == "triton" else (1.0, 3.0, own):
            each = temperature if isinstance(temperature, tuple) else (temperature,) * len(sides)
            exact = truth(sides, weights, each)
            by_pytorch = truth(sides, weights, each, torch.float32)
            found = ours(sides, weights=weights, temperature=temperature)
            largest = max(x.abs().max().item() for x in exact[1:])
            # Either form rounds the log-probabilities, and log(p / m), which is at most log(1 / w).
            spread = max((x.amax(1) - x.amin(1)).max().item() for x in sides) / min(each)
            lost = -(2**-23) * math.log(min(weights)) + (0 if kind == "gap" else 2**-24 * spread)
            for x, theirs, y in zip(found, by_pytorch, exact, strict=True):
                error = (x.double() - y).abs().max().item()
                scale = max(y.abs().max().item(), largest)
                allowed = (theirs - y).abs().max().item() + 2**-23 * 8 * max(scale, 0.01) + lost
                assert error <= allowed, (weights, temperature, error, allowed)


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("classes", [50, 1000])
def test_close_sides_keep_their_digits(served_by, scale, classes):
    if served_by == "reference":
        pytest.skip("a difference of logarithms")
    for weights in WEIGHTS[:3]:
        a = torch.randn(4, classes)
        sides = [a + scale * torch.randn(4, classes) for _ in weights]
        exact = truth(sides, weights, (1.0,) * len(sides))
        found = ours(sides, weights=weights)
        assert (found[0] > 0).all()
        relative = 2e-6 + 3e-7 / scale  # a logit's own rounding is that much of a difference
        torch.testing.assert_close(found[0].double(), exact[0], rtol=relative, atol=0)
        for x, y in zip(found[1:], exact[1:], strict=True):
            assert (x - y).abs().max() <= relative * y.abs().max()


def test_equal_sides_have_no_divergence_and_no_gradient(served_by):
    if served_by == "reference":
        pytest.skip("a difference of logarithms")
    for sides in (2, 3, 5):
        found = ours(draw_sides("equal", sides, 3, 777))
        assert all((x == 0).all() for x in found)


@pytest.mark.float64
def test_float64_and_gradcheck():
    sides = [torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights, temperatures = (0.2, 0.3, 0.5), (1.0, 2.0, 0.7)
    for x, y in zip(
        ours(sides, weights=weights, temperature=temperatures),
        truth(sides, weights, temperatures),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)
    mask = torch.tensor([True, False, True])
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda *s, r=reduction: gk.jensen_shannon(
                *s, weights=weights, temperature=temperatures, mask=mask, reduction=r
            ),
            sides,
        )


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = draw(st.sampled_from(((5,), (2, 3), (1, 2, 2), (), (0,))))
    classes = draw(st.sampled_from((1, 2, 5, 17, 40)))
    dtypes = draw(
        st.sampled_from(((torch.float32,), (torch.bfloat16,), (torch.float32, torch.float16)))
    )
    count = draw(st.integers(2, 8))
    scale = draw(st.sampled_from((0.1, 3.0, 20.0)))
    sides = [
        (scale * torch.randn(*shape, classes, generator=generator)).to(dtypes[k % len(dtypes)])
        for k in range(count)
    ]
    share = draw(st.sampled_from((None, 0.5)))
    mask = None if share is None else torch.rand(shape, generator=generator) < share
    if mask is not None and mask.ndim:
        for side in sides:
            side[~mask] = math.nan
    weight = torch.rand(shape, generator=generator) if draw(st.booleans()) else None
    reduction = draw(st.sampled_from(("mean", "batchmean", "sum", "none")))
    divisor = draw(st.sampled_from((None, 3, torch.tensor(2)))) if "mean" in reduction else None
    shares = torch.rand(count, generator=generator) + 0.1
    return {
        "sides": sides,
        "weights": draw(
            st.sampled_from((None, (shares.double() / shares.double().sum()).tolist()))
        ),
        "temperature": draw(st.sampled_from((1.0, 2.5))),
        "mask": mask,
        "row_weight": weight,
        "divisor": divisor,
        "reduction": reduction,
    }


def check(call):
    sides, options = call["sides"], {k: v for k, v in call.items() if k != "sides"}
    inputs = [side.detach().requires_grad_() for side in sides]
    loss = gk.jensen_shannon(*inputs, **options)
    gradients = torch.autograd.grad(loss.sum(), inputs, materialize_grads=True)
    wide = [side.detach().double().requires_grad_() for side in sides]
    mask = call["mask"]
    clean = [x if mask is None else torch.where(mask[..., None], x, 0.0) for x in wide]
    rows = oracles.jensen_shannon_rows(
        clean,
        call["weights"] or (1 / len(sides),) * len(sides),
        (call["temperature"],) * len(sides),
    )
    exact = oracles.reduced(rows, call["reduction"], mask, call["row_weight"], call["divisor"])
    truths = torch.autograd.grad(exact.sum(), wide, materialize_grads=True)
    nothing = mask is call["row_weight"] is call["divisor"] is None and not rows.numel()
    if nothing and "mean" in call["reduction"]:
        assert loss.isnan()
        return
    torch.testing.assert_close(loss.detach().double(), exact.detach(), rtol=1e-5, atol=2e-5)
    for x, y, side in zip(gradients, truths, sides, strict=True):
        assert x.dtype is side.dtype
        assert x.shape == side.shape
        eps = torch.finfo(side.dtype).eps
        torch.testing.assert_close(x.double(), y, rtol=max(1e-4, 2 * eps), atol=2e-5)
        if mask is not None:
            assert (x[~mask] == 0).all()


def test_every_combination_of_options(served_by):
    examples = 20 if served_by == "triton" else 200
    settings(deadline=None, max_examples=examples)(given(call=calls())(check))()


@pytest.mark.parametrize("classes", [3, 60])
def test_classes_masked_on_any_side_leave_it_finite(classes):
    sides = draw_sides("random", 3, 4, classes)
    sides[0][1, 0] = sides[1][1, 0] = sides[2][1, 0] = -math.inf  # absent everywhere
    sides[0][2, 1] = -math.inf
    sides[1][3, 2] = sides[2][3, 2] = -math.inf
    found = ours(sides)
    assert all(x.isfinite().all() for x in found)
    assert all(x[1, 0] == 0 for x in found[1:])
    present = [side[1:2, 1:] for side in sides]
    torch.testing.assert_close(
        found[0][1:2].double(), truth(present, (1 / 3,) * 3, (1.0,) * 3)[0], rtol=1e-5, atol=1e-6
    )
    low = [side.clone() for side in sides]
    for side in low:
        side[side == -math.inf] = -1e4
    exact = truth(low, (1 / 3,) * 3, (1.0,) * 3)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6)


def test_beta_weighs_the_first_side_and_is_symmetric_at_a_half():
    a, b = torch.randn(2, 5, 9).unbind()
    torch.testing.assert_close(
        gk.jensen_shannon(a, b, beta=0.2), gk.jensen_shannon(a, b, weights=(0.2, 0.8))
    )
    torch.testing.assert_close(gk.jensen_shannon(a, b, beta=0.2), gk.jensen_shannon(b, a, beta=0.8))
    exact = truth((a, b), (0.2, 0.8), (1.0, 1.0))[0].mean()
    torch.testing.assert_close(gk.jensen_shannon(a, b, beta=0.2).double(), exact, rtol=1e-5, atol=0)
    # Between distributions that share nothing it is log 2.
    apart = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])
    assert gk.jensen_shannon(*apart).item() == pytest.approx(math.log(2))


def test_nan_reaches_only_its_row():
    sides = draw_sides("random", 2, 3, 50)
    sides[1][1, 7] = math.nan
    found = ours(sides)
    for x in found:
        assert x[1].isnan().any()
        assert x[::2].isfinite().all()


def test_one_side_alone_gets_the_same_bits_and_repeats_do_too():
    a, b = (x.requires_grad_() for x in draw_sides("random", 2, 4, 300))
    both = torch.autograd.grad(gk.jensen_shannon(a, b), (a, b))
    (student,) = torch.autograd.grad(gk.jensen_shannon(a, b.detach()), a)
    again = torch.autograd.grad(gk.jensen_shannon(a, b), (a, b))
    assert torch.equal(student, both[0])
    assert all(torch.equal(x, y) for x, y in zip(both, again, strict=True))


def test_inputs_are_not_written_and_strided_rows_are_read_in_place():
    wide = torch.randn(4, 3, 40)
    before = wide.clone()
    sides = wide.unbind(1)
    found = ours(sides)
    for x, y in zip(found, ours([side.contiguous() for side in sides]), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(wide, before)


def test_temperature_squared_multiplies():
    a, b = torch.randn(2, 5, 9).unbind()
    plain = gk.jensen_shannon(a, b, temperature=3.0)
    scaled = gk.jensen_shannon(a, b, temperature=3.0, scale_by_temperature_squared=True)
    torch.testing.assert_close(scaled, 9 * plain)


def test_compiles_without_a_graph_break():
    sides = [torch.randn(2, 3, 7, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[True, False, True], [False, True, True]])

    def loss_of(*sides):
        return gk.jensen_shannon(*sides, mask=mask, temperature=2.0)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    expected, found = loss_of(*sides), compiled(*sides)
    torch.testing.assert_close(found, expected)
    for x, y in zip(
        torch.autograd.grad(found, sides), torch.autograd.grad(expected, sides), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_second_derivatives_are_refused(served_by):
    a, b = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    (first,) = torch.autograd.grad(gk.jensen_shannon(a, b), a, create_graph=True)
    if served_by == "reference":
        assert torch.autograd.grad(first.square().sum(), b)[0].isfinite().all()
        return
    with pytest.raises(NotImplementedError, match="jensen_shannon has no second derivative"):
        first.square().sum().backward()


A = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("sides", "options", "error", "message"),
    [
        ((A, A), {"beta": 0.0}, ValueError, r"beta must be in \(0, 1\).*bidirectional_kl"),
        ((A, A), {"beta": 1}, ValueError, r"beta must be in \(0, 1\)"),
        ((A, A), {"beta": "1"}, TypeError, "beta must be a number"),
        ((A, A, A), {"beta": 0.5}, ValueError, "beta is of two sides; give weights"),
        ((A, A), {"beta": 0.5, "weights": (0.5, 0.5)}, ValueError, "beta is of two sides"),
        ((A, A), {"weights": (1.0,)}, ValueError, "weights must be 2 numbers"),
        ((A, A), {"weights": (0.7, 0.7)}, ValueError, "weights must sum to 1; they sum to 1.4"),
        ((A, A), {"weights": (1.0, 0.0)}, ValueError, r"weights\[1\] must be greater than 0"),
        ((A,) * 9, {}, ValueError, "at most 8 sides are taken; there are 9"),
        ((A, A, A[:, :2]), {}, ValueError, r"more\[0\] must have shape.*2 classes"),
        ((A, A.long()), {}, TypeError, "logits_b must be float32"),
        ((A, A), {"temperature": (1.0, 2.0, 3.0)}, ValueError, "one for each side"),
        ((A, A), {"mask": A}, TypeError, "mask must be bool"),
        ((A, A), {"reduction": "avg"}, ValueError, "reduction: 'avg' is not known"),
    ],
)
def test_arguments_that_do_not_fit_are_named(sides, options, error, message):
    with pytest.raises(error, match=message):
        gk.jensen_shannon(*sides, **options)
