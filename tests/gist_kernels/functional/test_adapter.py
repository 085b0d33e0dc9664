"""The adapter: value and gradients against its formula in float64, dtypes, argument checks."""

from __future__ import annotations

import math

import pytest
import torch

import gist_kernels as gk


def by_definition(x, wd, bd, wu, bu, scale, activation, residual):
    """The formula with the activations written out, no library function."""
    functions = {
        "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
        "gelu_tanh": lambda z: (
            0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        ),
        "relu": lambda z: z.clamp(min=0),
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "identity": lambda z: z,
    }
    hidden = torch.einsum("...d,rd->...r", x, wd)
    hidden = functions[activation](hidden if bd is None else hidden + bd)
    update = torch.einsum("...r,dr->...d", hidden, wu)
    update = scale * (update if bu is None else update + bu)
    return update if residual is None else residual + update


def arguments(shape, rank, dtype=torch.float64, biases=True, residual=True):
    width = shape[-1]

    def normal(*size):
        return torch.randn(*size, dtype=dtype).requires_grad_()

    return (
        normal(*shape),
        normal(rank, width),
        normal(rank) if biases else None,
        normal(width, rank),
        normal(width) if biases else None,
    ), (normal(*shape) if residual else None)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "identity"])
@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 33), (16,), (0, 8)])
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("full", [True, False])
def test_value_and_every_gradient(activation, shape, rank, full):
    tensors, residual = arguments(shape, rank, biases=full, residual=full)
    inputs = [t for t in (*tensors, residual) if t is not None]
    upstream = torch.randn(shape, dtype=torch.float64)

    ours = gk.adapter(*tensors, scale=0.3, activation=activation, residual=residual)
    expected = by_definition(*tensors, 0.3, activation, residual)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_float32_is_close_to_float64():
    tensors, residual = arguments((3, 50, 192), 4)
    exact = gk.adapter(*tensors, scale=0.1, residual=residual)
    single = gk.adapter(*(t.float() for t in tensors), scale=0.1, residual=residual.float())
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-4)


def test_autocast_keeps_the_residuals_dtype():
    tensors, residual = arguments((2, 5, 32), 4, dtype=torch.float32)
    exact = gk.adapter(*tensors, residual=residual)
    with torch.autocast("cpu", torch.bfloat16):
        half = gk.adapter(*tensors, residual=residual)
        assert gk.adapter(*tensors).dtype == torch.float32  # no residual to promote it
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)  # the linears did run in bfloat16
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.3)


def test_compiles_without_a_graph_break():
    tensors, residual = arguments((2, 5, 32), 4, dtype=torch.float32)
    compiled = torch.compile(gk.adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(*tensors, residual=residual), gk.adapter(*tensors, residual=residual)
    )


X, WD, BD, WU, BU = (torch.zeros(s) for s in ((2, 8), (4, 8), (4,), (8, 4), (8,)))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.int(), WD, BD, WU, BU), {}, TypeError, "x must be float32"),
        ((X.sum(), WD, BD, WU, BU), {}, ValueError, "x must have at least one dimension"),
        ((X, WU, BD, WU, BU), {}, ValueError, r"down_weight must have shape \(rank, D\)"),
        ((X, WD, BU, WU, BU), {}, ValueError, "down_bias must have shape"),
        ((X, WD, BD, WD, BU), {}, ValueError, r"up_weight must have shape .* \(8, 4\)"),
        ((X, WD, BD, WU, BD), {}, ValueError, "up_bias must have shape"),
        ((X, WD[:0], None, WU[:, :0], BU), {}, ValueError, "rank of at least 1"),
        ((X, WD.double(), BD, WU, BU), {}, TypeError, "down_weight is torch.float64 and x"),
        ((X, WD, BD, WU.to("meta"), BU), {}, ValueError, "up_weight is on meta and x on cpu"),
        ((X, WD, BD, WU, BU), {"residual": X[:1]}, ValueError, "residual must have shape"),
        ((X, WD, BD, WU, BU), {"scale": math.nan}, ValueError, "scale must be finite"),
        ((X, WD, BD, WU, BU), {"activation": "gelo"}, ValueError, "did you mean 'gelu'"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gk.adapter(*arguments, **options)
