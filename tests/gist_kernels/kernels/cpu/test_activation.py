"""The native activation, plain and gated, on every instruction set this processor has."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from gist_kernels.activations import ACTIVATIONS

pytest.importorskip(
    "gist_kernels.kernels.cpu._native",
    reason="the native module was not built",
)
activation = pytest.importorskip("gist_kernels.kernels.cpu.activation")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

pytestmark = pytest.mark.usefixtures("instruction_set")


def both(u, d_a, name):
    return activation.forward(u, name), activation.backward(d_a, u, name)


def by_autograd(function, u, d_a):
    u = u.clone().requires_grad_()
    a = function(u)
    return a.detach(), torch.autograd.grad(a, u, d_a)[0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_error_is_no_larger_than_that_of_pytorch(name):
    """In each window of 1/4, so that no value hides behind the scale of another."""
    u = torch.linspace(-14, 14, 28 * 4 * 500)
    d_a = torch.ones_like(u)
    result = both(u, d_a, name)
    pytorch = by_autograd(ACTIVATIONS[name], u, d_a)
    exact = by_autograd(oracles.ACTIVATIONS[name], u.double(), d_a.double())
    for x, theirs, y in zip(result, pytorch, exact, strict=True):
        error = (x.double() - y).abs().view(-1, 500).amax(1)
        ulp = torch.finfo(torch.float32).eps * y.abs().view(-1, 500).amax(1).clamp(min=1)
        allowed = (theirs.double() - y).abs().view(-1, 500).amax(1) + 2 * ulp
        assert (error <= allowed).all(), (error / ulp).max()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float64(name):
    u, d_a = torch.linspace(-14, 14, 20_001).double(), torch.randn(20_001).double()
    exact = by_autograd(oracles.ACTIVATIONS[name], u, d_a)
    for x, y in zip(both(u, d_a, name), exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-15, atol=4e-15 * d_a.abs().max().item())


def test_gelu_keeps_the_digits_of_its_tail():
    u = torch.linspace(-11, -1, 4001)
    exact = u.double() * 0.5 * torch.special.erfc(-u.double() / math.sqrt(2))
    torch.testing.assert_close(activation.forward(u, "gelu").double(), exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_float32_rounded_once(name, dtype):
    u, d_a = torch.linspace(-20, 20, 4003).to(dtype), torch.randn(4003).to(dtype)
    low, wide = both(u, d_a, name), both(u.float(), d_a.float(), name)
    for x, y in zip(low, wide, strict=True):
        assert x.dtype is dtype
        assert torch.equal(x, y.to(dtype))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits(name, dtype):
    """Infinities and NaNs among them. Kernels look them up, but for the last few of a tensor."""
    u = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    d_a = torch.full_like(u, 1.5)
    low, wide = both(u, d_a, name), both(u.float(), d_a.float(), name)
    for x, y in zip(low, wide, strict=True):
        torch.testing.assert_close(x, y.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_length(name, dtype):
    """A number's result is the same wherever it lies in a tensor, and nothing else is written."""
    u, d_a = torch.randn(100).to(dtype), torch.randn(100).to(dtype)
    expected = both(u, d_a, name)
    for n in (0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 99):
        for x, y in zip(both(u[:n], d_a[:n], name), expected, strict=True):
            assert torch.equal(x, y[:n])
    guarded = torch.full((60,), 7.0, dtype=dtype)
    guarded[8:51] = d_a[:43]
    activation.backward(guarded[8:51], u[:43], name, into_d_a=True)
    assert torch.equal(guarded[8:51], expected[1][:43])
    assert (guarded[:8] == 7).all()
    assert (guarded[51:] == 7).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(name, dtype):
    top = torch.finfo(dtype).max
    u = torch.tensor(
        [0.0, -0.0, top, -top, math.inf, -math.inf, math.nan, 1e-30, -1e-30], dtype=dtype
    )
    a, slope = both(u, torch.ones_like(u), name)
    finite_at_minus_infinity = name != "identity"
    assert a[0] == 0
    assert a[1] == 0
    assert a[2] == top
    assert a[3] == (0 if finite_at_minus_infinity else -top)
    assert a[4] == math.inf
    assert a[5] == (0 if finite_at_minus_infinity else -math.inf)
    assert a[6].isnan()
    at_zero = {"relu": 0.0, "identity": 1.0}.get(name, 0.5)
    assert slope[:2].tolist() == [at_zero, at_zero]
    left = 1.0 if name == "identity" else 0.0
    assert slope[2:6].tolist() == [1.0, left, 1.0, left]
    if name not in ("identity", "relu"):
        assert slope[6].isnan()


def test_in_place_only_on_request():
    u, d_a = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    before = u.clone(), d_a.clone()
    result = activation.backward(d_a, u, "gelu")
    assert torch.equal(u, before[0])
    assert torch.equal(d_a, before[1])
    assert result.shape == u.shape
    assert activation.backward(d_a, u, "gelu", into_d_a=True) is d_a
    assert torch.equal(d_a, result)
    assert activation.forward(u, "identity") is not u


def test_bitwise_equal_over_threads(set_threads):
    u, d_a = torch.randn(150_001), torch.randn(150_001)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(both(u, d_a, "gelu"))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


def test_refuses_what_it_cannot_read_safely():
    u = torch.randn(4, 6)
    with pytest.raises(ValueError, match="u must be a contiguous"):
        activation.forward(u.t(), "gelu")
    with pytest.raises(ValueError, match="u must be a contiguous"):
        activation.forward(u.long(), "gelu")
    with pytest.raises(ValueError, match="d_a must be a contiguous"):
        activation.backward(u.t(), u, "gelu")
    for other in (u[:3], u.double()):
        with pytest.raises(ValueError, match="shape and dtype"):
            activation.backward(other, u, "gelu")


# ---- gated ----


def gated(u, d_hidden, name):
    """Result, and the gradients of gates and values."""
    gradient = activation.gated_backward(d_hidden, u, name)
    return activation.gated_forward(u, name), *gradient.chunk(2, dim=1)


def gated_by_autograd(function, u, d_hidden):
    gate, value = (half.clone().requires_grad_() for half in u.chunk(2, dim=1))
    hidden = function(gate) * value
    return hidden.detach(), *torch.autograd.grad(hidden, (gate, value), d_hidden)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_error_is_no_larger_than_that_of_pytorch(name):
    """In each row, whose gates span 1/4."""
    gate = torch.linspace(-14, 14, 28 * 4 * 500).view(-1, 500)
    u, d_hidden = torch.cat((gate, torch.randn_like(gate)), 1), torch.randn_like(gate)
    result = gated(u, d_hidden, name)
    pytorch = gated_by_autograd(ACTIVATIONS[name], u, d_hidden)
    exact = gated_by_autograd(oracles.ACTIVATIONS[name], u.double(), d_hidden.double())
    for x, theirs, y in zip(result, pytorch, exact, strict=True):
        assert x.dtype is torch.float32
        error = (x.double() - y).abs().amax(1)
        ulp = torch.finfo(torch.float32).eps * y.abs().amax(1).clamp(min=1)
        allowed = (theirs.double() - y).abs().amax(1) + 2 * ulp
        assert (error <= allowed).all(), (error / ulp).max()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_float64(name):
    gate = torch.linspace(-14, 14, 20_001).double()[None]
    u, d_hidden = torch.cat((gate, torch.randn_like(gate)), 1), torch.randn_like(gate)
    exact = gated_by_autograd(oracles.ACTIVATIONS[name], u, d_hidden)
    size = u[:, 20_001:].abs().max().item() * d_hidden.abs().max().item()
    for x, y in zip(gated(u, d_hidden, name), exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-15, atol=4e-15 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_is_the_plain_one_times_the_values(name, dtype):
    """Rows of any length; more numbers than a part that a thread takes, which ends within a row."""
    for rows, width in ((0, 4), (3, 0), (1, 1), (5, 1), (3, 7), (3, 16), (70, 1001), (1, 70_001)):
        gate, value, d_hidden = 4 * torch.randn(3, rows, width, dtype=dtype)
        u = torch.cat((gate, value), 1)
        before = u.clone(), d_hidden.clone()
        hidden, d_gate, d_value = gated(u, d_hidden, name)
        a, d_a = activation.forward(gate, name), d_hidden * value
        assert torch.equal(hidden, a * value)
        assert torch.equal(d_value, d_hidden * a)
        # A compiler may contract the derivative's sums in either way.
        error = (d_gate - activation.backward(d_a, gate, name)).abs()
        assert (error <= 2 * torch.finfo(dtype).eps * d_a.abs()).all()
        assert torch.equal(u, before[0])
        assert torch.equal(d_hidden, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_of_every_width(name, dtype):
    """A number's result is the same wherever it lies in a tensor."""
    gate, value, d_hidden = torch.randn(3, 5, 100).to(dtype)
    expected = gated(torch.cat((gate, value), 1), d_hidden, name)
    for n in (1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 99):
        u = torch.cat((gate[:, :n], value[:, :n]), 1)
        for x, y in zip(gated(u, d_hidden[:, :n].contiguous(), name), expected, strict=True):
            assert torch.equal(x, y[:, :n])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gated_halves_are_float32_rounded_once(name, dtype):
    u, d_hidden = (4 * torch.randn(37, 2 * 53)).to(dtype), torch.randn(37, 53).to(dtype)
    low, wide = gated(u, d_hidden, name), gated(u.float(), d_hidden.float(), name)
    for x, y in zip(low, wide, strict=True):
        assert x.dtype is dtype
        assert torch.equal(x, y.to(dtype))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_extremes(name, dtype):
    top = torch.finfo(dtype).max
    gate = torch.tensor([[0.0, -0.0, top, -top, math.inf, -math.inf, 3.0, math.nan]], dtype=dtype)
    value = torch.full_like(gate, 0.5)
    value[0, 6] = -math.inf
    a, slope = both(gate, torch.ones_like(gate), name)
    hidden, d_gate, d_value = gated(torch.cat((gate, value), 1), 2 * torch.ones_like(gate), name)
    linear = name == "identity"
    assert hidden[0, :7].tolist() == [
        0, 0, top / 2, -top / 2 if linear else 0, math.inf, -math.inf if linear else 0, -math.inf,
    ]  # fmt: skip
    assert hidden[0, 7].isnan()
    assert torch.equal(d_gate[0, :6], slope[0, :6])  # 2 * 0.5 * act'
    assert d_gate[0, 6] == (-math.inf if slope[0, 6] > 0 else math.inf)
    assert torch.equal(d_value[0, :7], 2 * a[0, :7])
    assert d_value[0, 7].isnan()


def test_gated_is_bitwise_equal_over_threads(set_threads):
    u, d_hidden = torch.randn(151, 2 * 1003), torch.randn(151, 1003)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(gated(u, d_hidden, "gelu"))
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert torch.equal(x, y)


def test_gated_refuses_what_it_cannot_read_safely():
    u, d_hidden = torch.randn(4, 6), torch.randn(4, 3)
    with pytest.raises(ValueError, match="u must be a contiguous"):
        activation.gated_forward(u.t(), "gelu")
    for shape in ((4, 5), (2, 2, 6), (6,)):
        with pytest.raises(ValueError, match=r"u must be \(M, 2 F\)"):
            activation.gated_forward(torch.randn(shape), "gelu")
    with pytest.raises(ValueError, match="d_hidden must be a contiguous"):
        activation.gated_backward(torch.randn(3, 4).t(), u, "gelu")
    for other in (u, d_hidden[:3], d_hidden.double()):
        with pytest.raises(ValueError, match="d_hidden must have half of u's columns"):
            activation.gated_backward(other, u, "gelu")
