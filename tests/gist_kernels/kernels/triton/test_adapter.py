"""The Triton kernels of LayerNorm and adapter: in Triton's interpreter, or for real on a device."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from adapter_cases import Case, Result, assert_close, assert_same, computed, make

from gist_kernels.activations import ACTIVATIONS
from gist_kernels.kernels import triton as gpu
from gist_kernels.kernels.triton import heuristics
from gist_kernels.weights import AdapterWeights, NormWeights

pytest.importorskip("triton.language")
kernels = importlib.import_module("gist_kernels.kernels.triton.adapter")
elementwise = importlib.import_module("gist_kernels.kernels.triton.activation")

DEVICE = gpu.DEVICE_TYPES[0]
pytestmark = pytest.mark.triton

WIDTHS = (1, 7, 64, 100, 384)
# Of either regime: summed in registers, and by tensor cores.
RANKS = (1, 4, 8, 33)


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return type(value)(*(moved(part, device) for part in value))
    return value


def ours(case: Case, **options) -> Result:
    there = Case(*(moved(part, DEVICE) for part in case))
    if case.add is case.x:
        there = there._replace(add=there.x)
    return moved(computed(kernels, there, **options), "cpu")


def check(case: Case, ulps: float = 8) -> None:
    assert_close(case, ours(case), ulps)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_error_is_no_larger_than_that_of_pytorch(width, rank):
    choices = itertools.cycle(itertools.product(ACTIVATIONS, ("x", "other", "none")))
    for rows in (1, 2, 33):
        activation, add = next(choices)
        check(make(rows, width, rank, activation=activation, add=add))


def test_more_rows_than_programs(monkeypatch):
    """The last program has fewer rows than the others; their sums are more than a tile holds."""
    rows = 1201
    if DEVICE == "cpu":  # an interpreter takes row by row
        rows = 145
        monkeypatch.setattr(kernels.launch, "multiprocessors", lambda device: 9)
        assert heuristics.adapter_backward(24, 4).parts(rows, 9) == (49, 3)
        assert heuristics.ADAPTER_SUMS.rows < 49
    check(make(rows, 24, 4))


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, biases):
    for add, (width, rank) in itertools.product(("x", "other", "none"), ((100, 3), (64, 4))):
        check(make(5, width, rank, activation=activation, add=add, biases=biases))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width, rank", [(7, 3), (64, 4), (100, 8)])
def test_half_types(dtype, width, rank):
    case = make(9, width, rank, dtype=dtype)
    check(case)
    # Weights may be wider than x; their gradients have their dtype.
    single = case._replace(adapter=case.to(torch.float32).adapter)
    assert ours(single).d_up_weight.dtype is torch.float32


@pytest.mark.parametrize("width, rank", [(7, 1), (100, 4)])
def test_each_tensor_left_out(width, rank):
    case = make(11, width, rank)
    norm, adapter = case.norm, case.adapter
    check(case._replace(norm=None, d_normed=None))
    check(case._replace(adapter=None, d_out=None, add=None, bias=None))
    check(case._replace(norm=norm._replace(weight=None)))
    check(case._replace(norm=norm._replace(bias=None)))
    check(case._replace(bias=None))
    check(case._replace(d_normed=None))
    check(case._replace(adapter=adapter._replace(down_bias=None)))
    check(case._replace(adapter=adapter._replace(up_bias=None)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [4, 33])
def test_normed_and_its_gradient_in_the_dtype_of_a_matmul(rank, dtype):
    case = make(33, 100, rank)
    case = Case(*(moved(part, DEVICE) for part in case))
    x, norm, adapter = case.x, case.norm, case.adapter
    single = kernels.forward(x, x, norm, adapter, None)
    half = kernels.forward(x, x, norm, adapter, None, dtype)
    assert torch.equal(half[0], single[0].to(dtype))
    _, _, z, stats = single
    d_normed = case.d_normed.to(dtype)
    found, exact = (
        kernels.backward(case.d_out, d, x, norm, stats, adapter, z, pass_through=True)
        for d in (d_normed, d_normed.float())
    )
    for ours, theirs in zip((*half[1:], *found), (*single[1:], *exact), strict=True):
        assert ours.dtype is theirs.dtype
        if rank == 4:
            assert torch.equal(ours, theirs)
        else:  # whose own matmuls may round as the one that reads normed does
            atol = 2e-3 * theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=atol)


def test_weights_alone():
    case = make(33, 64, 4)._replace(d_normed=None)
    whole, alone = ours(case), ours(case, need_dx=False)
    assert alone.dx is None
    assert_same(alone, whole._replace(dx=None))


def test_pass_through_without_adapter():
    x, d_out, d_normed = torch.randn(3, 9, 40).to(DEVICE)
    norm = NormWeights(torch.randn(40).to(DEVICE), None, 1e-6)
    _, _, _, stats = kernels.forward(x, None, norm, None)
    with_d_out, *_ = kernels.backward(
        d_out, d_normed, x, norm, stats, None, None, pass_through=True
    )
    without, *_ = kernels.backward(None, d_normed, x, norm, stats, None, None, pass_through=False)
    torch.testing.assert_close(with_d_out, without + d_out)


def test_no_rows():
    result = ours(make(0, 24, 4))
    assert result.out.shape == result.dx.shape == (0, 24)
    for gradient in result[4:]:
        assert gradient.abs().sum() == 0


@pytest.mark.parametrize("kind", ["large", "offset", "constant"])
def test_rows_that_are_hard_to_normalise(kind):
    case = make(6, 100, 4)
    x = {"large": case.x * 1e4, "offset": case.x + 1e3, "constant": torch.full_like(case.x, 3.0)}
    check(case._replace(x=x[kind], add=x[kind]), 16)


@pytest.mark.parametrize("rank", [0, 4, 64])
def test_a_row_too_large_for_its_variance_is_nan(rank):
    case = make(6, 48, max(rank, 1))
    case.x[3] *= 1e30
    if rank == 0:
        case = case._replace(adapter=None, bias=None, d_out=None)
    result = ours(case)
    assert result.normed[3].isnan().all()
    assert result.dx[3].isnan().all()
    assert result.normed[[0, 1, 2, 4, 5]].isfinite().all()
    assert result.dx[[0, 1, 2, 4, 5]].isfinite().all()


def test_layouts_do_not_matter():
    case = make(9, 24, 4, add="other")
    wide = torch.randn(9, 40)
    wide[:, 8:32] = case.x

    def transposed(weight):
        return None if weight is None else weight.t().contiguous().t()

    adapter = AdapterWeights(*map(transposed, case.adapter[:4]), *case.adapter[4:])
    expected = ours(case)
    assert_same(ours(case._replace(x=wide[:, 8:32], adapter=adapter)), expected)
    down = case.d_out.t().contiguous().t()
    assert_same(ours(case._replace(d_out=down)), expected)


@pytest.mark.slow
def test_bitwise_equal_over_repeats():
    case = make(300, 48, 4)
    first = ours(case)
    for _ in range(1 if DEVICE == "cpu" else 100):
        assert_same(ours(case), first)


@pytest.mark.skipif(not gpu.INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_traffic():
    """Each (M, D) tensor is read or written once, whatever rank and norm add to it."""
    traffic = importlib.import_module("bench.traffic")
    found = traffic.measure_adapter(60, 768, 4, torch.bfloat16)
    for name, (of_large, _) in found.items():
        assert of_large <= 1.001 * traffic.ADAPTER_LEAST[name], name


@pytest.mark.skipif(not gpu.INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_gated_traffic():
    """Each number is read or written once, and nothing else is."""
    traffic = importlib.import_module("bench.traffic")
    assert traffic.measure_gated(3, 1365, torch.bfloat16) == traffic.GATED_LEAST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_elementwise_activation(activation, dtype):
    u = torch.cat((torch.linspace(-12, 12, 1001), torch.tensor([0.0, -1e4, 1e4, -0.0]))).to(dtype)
    d_a = torch.randn(u.shape).to(dtype)
    exact = u.double().requires_grad_()
    truth = ACTIVATIONS[activation](exact)
    (gradient,) = torch.autograd.grad(truth, exact, d_a.double())
    there, upstream = u.to(DEVICE), d_a.to(DEVICE)
    a = elementwise.forward(there, activation)
    d_u = elementwise.backward(upstream, there, activation)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(a.cpu().double(), truth.detach(), rtol=tolerance, atol=2e-6)
    torch.testing.assert_close(d_u.cpu().double(), gradient, rtol=tolerance, atol=4e-6)
    assert torch.equal(upstream.cpu(), d_a)
    assert elementwise.backward(upstream, there, activation, into_d_a=True) is upstream
    assert torch.equal(upstream, d_u)


# In units of 1, 2, 4 and 16; more columns than a program takes.
@pytest.mark.parametrize("shape", [(3, 7), (5, 1030), (2, 100), (9, 64), (0, 8), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation(activation, dtype, shape):
    gate, value, d_hidden = (4 * torch.randn(3, *shape)).to(dtype)
    gate[:1, :4] = torch.tensor([0.0, -0.0, 1e3, -1e3])[: shape[1]]
    exact = [half.double().requires_grad_() for half in (gate, value)]
    truth = ACTIVATIONS[activation](exact[0]) * exact[1]
    gradients = torch.autograd.grad(truth, exact, d_hidden.double())
    u = torch.cat((gate, value), 1)
    there, upstream = u.to(DEVICE), d_hidden.to(DEVICE)
    hidden = elementwise.gated_forward(there, activation)
    d_u = elementwise.gated_backward(upstream, there, activation)
    assert hidden.dtype is d_u.dtype is dtype
    assert d_u.shape == u.shape
    # The plain kernels' absolute errors, times what multiplies the activation or its derivative.
    for found, true, factor in (
        (hidden, truth.detach(), value),
        (d_u[:, : shape[1]], gradients[0], d_hidden.double() * value),
        (d_u[:, shape[1] :], gradients[1], d_hidden),
    ):
        error = (found.cpu().double() - true).abs()
        allowed = 4 * torch.finfo(dtype).eps * true.abs() + 4e-6 * (1 + factor.abs())
        assert (error <= allowed).all(), (error / allowed).max()
    assert torch.equal(there.cpu(), u)
    assert torch.equal(upstream.cpu(), d_hidden)
