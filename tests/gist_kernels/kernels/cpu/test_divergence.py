"""The native kernels of the Jensen-Shannon divergence, on every instruction set here."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

pytest.importorskip(
    "gist_kernels.kernels.cpu._native",
    reason="the native module was not built",
)
divergence = pytest.importorskip("gist_kernels.kernels.cpu.divergence")

pytestmark = pytest.mark.usefixtures("instruction_set")
SETTINGS = {
    2: ((0.3, 0.7), (1.0, 1.0)),
    3: ((1 / 3, 1 / 3, 1 / 3), (2.0, 2.0, 2.0)),
    5: ((0.1, 0.2, 0.3, 0.15, 0.25), (1.0, 2.0, 0.5, 3.0, 1.5)),
}


def both_ways(sides, settings, scale=None, grad=None, needs=None):
    rows, stats = divergence.forward(sides, *settings, scale)
    grad = torch.ones_like(rows) if grad is None else grad
    needs = needs or (True,) * len(sides)
    return [rows, *divergence.backward(grad, sides, *settings, stats, needs, scale)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 100, 1025, 21843])
@pytest.mark.parametrize("sides", SETTINGS)
def test_rows_and_gradients(sides, classes, dtype):
    settings = SETTINGS[sides]
    scale = torch.tensor([1.0, 0.0, -0.5]).to(torch.promote_types(dtype, torch.float32))
    logits = [(3 * torch.randn(3, classes)).to(dtype) for _ in range(sides)]
    exact = [x.double().clone().requires_grad_() for x in logits]
    truth = oracles.jensen_shannon_rows(exact, *settings) * scale.double()
    grad = torch.tensor([2.0, 5.0, 1.0]).to(scale.dtype)
    truths = [truth.detach(), *torch.autograd.grad(truth, exact, grad.double())]
    for x in logits:
        x[1] = math.nan  # not looked at
    found = both_ways(logits, settings, scale, grad)
    relative = {torch.float64: 1e-13, torch.float32: 4e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    for index, (x, y) in enumerate(zip(found, truths, strict=True)):
        error = (x.double() - y).abs().max().item()
        tolerance = (4e-6 if dtype != torch.float64 else 1e-13) if index == 0 else relative
        lost = 1e-15 if dtype == torch.float64 else 6e-8  # an ulp of log(p / m)
        assert error <= tolerance * y.abs().max().item() + lost
        assert (x[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_over_repeats_threads_and_batches(set_threads, dtype):
    logits = [torch.randn(40, 1100).to(dtype) for _ in range(3)]
    set_threads(1)
    expected = both_ways(logits, SETTINGS[3])
    set_threads(3)
    for _ in range(5):
        again = both_ways(logits, SETTINGS[3])
        assert all(torch.equal(x, y) for x, y in zip(again, expected, strict=True))
    alone = both_ways([x[7:8] for x in logits], SETTINGS[3])
    assert all(torch.equal(x, y[7:8]) for x, y in zip(alone, expected, strict=True))


def test_gradients_past_the_cache_have_the_same_bits():
    logits = [torch.randn(70, 65537) for _ in range(2)]
    scale = torch.ones(70)
    scale[3] = 0
    many = both_ways(logits, SETTINGS[2], scale)
    few = both_ways([x[:5] for x in logits], SETTINGS[2], scale[:5])
    assert all(torch.equal(x[:5], y) for x, y in zip(many, few, strict=True))
    (_, none, gradient) = both_ways(logits, SETTINGS[2], scale, needs=(False, True))
    assert none is None
    assert torch.equal(gradient, many[2])


@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (2.0, 4.0, 0.5), (1.0, 2.0, 0.5, 4.0)])
@pytest.mark.parametrize("scale", [1e-2, 1e-3])
def test_close_sides_at_different_temperatures_keep_their_digits(scale, temperatures):
    settings = (1 / len(temperatures),) * len(temperatures), temperatures
    common = torch.randn(4, 1000)
    logits = [t * (common + scale * torch.randn(4, 1000)) for t in temperatures]
    exact = [x.double().requires_grad_() for x in logits]
    truth = oracles.jensen_shannon_rows(exact, *settings)
    found, *gradients = both_ways(logits, settings)
    assert (found > 0).all()
    relative = 4e-7 + 1e-7 / scale
    torch.testing.assert_close(found.double(), truth.detach(), rtol=relative, atol=0)
    for x, y in zip(gradients, torch.autograd.grad(truth.sum(), exact), strict=True):
        error = (x.double() - y).abs().max().item()
        assert error <= relative * y.abs().max().item()


def test_what_is_masked_and_what_is_nan():
    a, b = torch.randn(2, 4, 40).unbind()
    a[0, :20] = b[0, 20:] = -math.inf  # nothing in common
    a[1] = -math.inf
    b[2, 39] = math.nan
    rows, d_a, d_b = both_ways((a, b), ((0.5, 0.5), (1.0, 1.0)))
    assert rows[0].item() == pytest.approx(math.log(2), rel=1e-6)
    assert rows.isnan().tolist() == [False, True, True, False]
    assert d_a[::3].isfinite().all()
    assert d_b[::3].isfinite().all()


def test_refuses_what_it_cannot_read_safely():
    a, b = torch.randn(2, 4, 8).unbind()
    settings = SETTINGS[2]
    with pytest.raises(ValueError, match="contiguous"):
        divergence.forward((a.t().contiguous().t(), b), *settings, None)
    with pytest.raises(ValueError, match="same shape"):
        divergence.forward((a, b[:3]), *settings, None)
    with pytest.raises(ValueError, match="row_scale"):
        divergence.forward((a, b), *settings, torch.ones(3))
    with pytest.raises(ValueError, match="2 to 8 sides"):
        divergence.forward((a,) * 9, (1 / 9,) * 9, (1.0,) * 9, None)
    _, stats = divergence.forward((a, b), *settings, None)
    with pytest.raises(ValueError, match="needs"):
        divergence.backward(torch.ones(4), (a, b), *settings, stats, (True,), None)
    with pytest.raises(ValueError, match="stats"):
        divergence.backward(torch.ones(4), (a, b), *settings, stats[:2], (True, True), None)
