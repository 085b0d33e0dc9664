"""The native kernels of LayerNorm and adapter, on every instruction set this processor has."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from adapter_cases import (
    EPS,
    Case,
    Result,
    assert_close,
    assert_same,
    computed,
    make,
    shares,
    truth,
)
from draws import assert_within_bounds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gist_kernels.activations import ACTIVATIONS
from gist_kernels.weights import AdapterWeights, NormWeights

pytest.importorskip(
    "gist_kernels.kernels.cpu._native",
    reason="the native module was not built",
)
kernels = pytest.importorskip("gist_kernels.kernels.cpu.adapter")

WIDTHS = (1, 7, 64, 100, 384, 768, 1000)
ROWS = (1, 2, 33, 198 * 2)
RANKS = (1, 3, 4, 8, 16, 33, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

pytestmark = pytest.mark.usefixtures("instruction_set")


def ours(case: Case, *, need_dx=True) -> Result:
    return computed(kernels, case, need_dx=need_dx)


def check(case: Case, ulps: float = 8) -> Result:
    result = ours(case)
    assert_close(case, result, ulps)
    return result


# Parity with float64, by PyTorch's own error.


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_error_is_no_larger_than_that_of_pytorch(width, rank):
    choices = itertools.cycle(itertools.product(ACTIVATIONS, ("x", "other", "none")))
    for rows in ROWS:
        activation, add = next(choices)
        check(make(rows, width, rank, activation=activation, add=add))


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, biases):
    for add, (width, rank) in itertools.product(("x", "other", "none"), ((100, 3), (384, 4))):
        check(make(66, width, rank, activation=activation, add=add, biases=biases))


@pytest.mark.parametrize("width, rank", [(1, 1), (7, 4), (100, 3), (384, 16), (1000, 33)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64(activation, width, rank):
    case = make(35, width, rank, activation=activation, dtype=torch.float64)
    check(case, 32)  # the truth rounds as well


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("add", ["x", "other", "none"])
@pytest.mark.parametrize("width, rank", [(1, 1), (7, 3), (64, 4), (100, 33), (1000, 8)])
def test_halves_are_float32_rounded_once(dtype, add, width, rank):
    """In x's dtype is what is large; weights keep theirs, so do their gradients."""
    case = make(35, width, rank, dtype=dtype, add=add)
    single = ours(case.to(torch.float32))
    result = ours(case)
    rounded = [None if t is None else t.to(dtype) for t in single]
    assert_same(result, Result(*rounded)._replace(z=single.z))
    mixed = case.to(torch.float32)
    x = case.x
    mixed = mixed._replace(
        x=x,
        add=x if case.add is case.x else case.add,
        d_out=case.d_out,
        d_normed=case.d_normed,
    )
    result = ours(mixed)
    large = {name: getattr(single, name).to(dtype) for name in ("normed", "out", "dx")}
    assert_same(result, single._replace(**large))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_another_dtype(dtype):
    case, exact = make(20, 100, 4), None
    for of_weights in DTYPES:
        weights = case.to(of_weights)
        mixed = case.to(dtype)
        mixed = mixed._replace(norm=weights.norm, adapter=weights.adapter, bias=weights.bias)
        result, exact = ours(mixed), truth(mixed)
        for name, x, y in zip(Result._fields, result, exact, strict=True):
            coarse = max(torch.finfo(t).eps for t in (x.dtype, dtype if x.ndim > 1 else x.dtype))
            error, scale = (x.double() - y).abs().max(), y.abs().max()
            assert error <= 8 * max(coarse, torch.finfo(torch.float32).eps) * scale, name
        for gradient, weight in zip(result[4:], mixed.adapter[:4], strict=True):
            assert gradient.dtype is of_weights
            assert gradient.shape == weight.shape


# What may be absent.


@pytest.mark.parametrize("width, rank", [(7, 1), (100, 4), (768, 20)])
def test_each_tensor_left_out(width, rank):
    case = make(37, width, rank)
    norm, adapter = case.norm, case.adapter
    variants = [
        case._replace(norm=None, d_normed=None),
        case._replace(adapter=None, d_out=None, add=None, bias=None),
        case._replace(d_normed=None),
        case._replace(d_out=None, add=None),
        case._replace(bias=None),
        case._replace(norm=norm._replace(weight=None)),
        case._replace(norm=norm._replace(bias=None)),
        case._replace(norm=norm._replace(weight=None, bias=None)),
        case._replace(adapter=adapter._replace(down_bias=None)),
        case._replace(adapter=adapter._replace(up_bias=None)),
        case._replace(adapter=adapter._replace(scale=0.0)),
        case._replace(adapter=adapter._replace(scale=-3.0)),
    ]
    for variant in variants:
        check(variant)


def test_pass_through_without_adapter():
    case = make(37, 100, 4)
    _, _, _, stats = kernels.forward(case.x, None, case.norm, None)
    arguments = (case.x, case.norm, stats, None, None)
    plain = kernels.backward(None, case.d_normed, *arguments, pass_through=True)
    passed = kernels.backward(case.d_out, case.d_normed, *arguments, pass_through=True)
    only = kernels.backward(case.d_out, None, case.x, None, None, None, None, pass_through=True)
    nothing = kernels.backward(case.d_out, None, case.x, None, None, None, None, pass_through=False)
    torch.testing.assert_close(passed[0], plain[0] + case.d_out, rtol=1e-6, atol=1e-6)
    assert torch.equal(only[0], case.d_out)
    assert (nothing[0] == 0).all()
    assert plain[1:] == passed[1:] == only[1:] == (None,) * 4


@pytest.mark.parametrize("rank", [1, 4, 33])
def test_weights_alone(rank):
    case = make(77, 100, rank)
    result, alone = ours(case), ours(case, need_dx=False)
    assert alone.dx is None
    assert_same(alone, result._replace(dx=None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4, 33])
def test_no_rows(dtype, rank):
    result = ours(make(0, 100, rank, dtype=dtype))
    for tensor in result[:4]:
        assert tensor.shape[0] == 0
    for gradient, shape in zip(
        result[4:], ((rank, 100), (rank,), (100, rank), (100,)), strict=True
    ):
        assert gradient.shape == shape
        assert (gradient == 0).all()


# Extreme values.


@pytest.mark.parametrize("width", [7, 64, 384, 1000])
@pytest.mark.parametrize("kind", ["large", "offset", "constant", "outlier", "tiny"])
def test_rows_that_are_hard_to_normalise(kind, width):
    case = make(33, width, 4)
    x = case.x.clone()
    if kind == "large":
        x *= 1e4
    elif kind == "offset":
        x += 1e4
    elif kind == "constant":
        x[::2] = x[::2, :1] * 1e4
    elif kind == "outlier":
        x[:, width // 2] = 1e6
    else:
        x *= 1e-6
    check(case._replace(x=x, add=x))


@pytest.mark.parametrize("width", [1, 7, 384, 1000])
def test_constant_rows_are_exactly_the_bias(width):
    case = make(5, width, 4)
    x = torch.tensor([0.1, 1e4 / 3, -7e7 / 9, 0.0, 1e-20])[:, None].expand(5, width).contiguous()
    normed, _, _, stats = kernels.forward(x, None, case.norm, None)
    assert torch.equal(normed, case.norm.bias.expand(5, width))
    assert torch.equal(stats[:, 0], x[:, 0])
    torch.testing.assert_close(stats[:, 1], torch.full((5,), EPS**-0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturated_activations(activation):
    case = make(33, 100, 4, activation=activation)
    wide = case.adapter._replace(down_weight=100 * case.adapter.down_weight)
    check(case._replace(adapter=wide))
    bias = torch.tensor([1e5, -1e5, 30.0, -30.0])
    check(case._replace(adapter=case.adapter._replace(down_bias=bias)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 17, 99])
def test_nan_and_inf_stay_in_their_row(value, column):
    for rank in (3, 33):
        case = make(23, 100, rank)
        expected = ours(case)
        x = case.x.clone()
        x[6, column] = value
        result = ours(case._replace(x=x, add=x))
        others = torch.arange(23) != 6
        for name in ("normed", "out", "z", "dx"):
            a, b = getattr(result, name), getattr(expected, name)
            assert torch.equal(a[others], b[others])
            assert not a[6].isfinite().all()
        assert not result.d_down_weight.isfinite().all()
        # What does not depend on x is not touched by it.
        assert torch.equal(result.d_up_bias, expected.d_up_bias)


@pytest.mark.parametrize("rank", [1, 3, 33])
def test_infinity_that_the_activation_stops(rank):
    """Ranks that only fill up a block would make it NaN: infinity times their zeros."""
    case = make(9, 100, rank, activation="relu", add="other")
    case.adapter.down_weight[:, 5] = -1.0
    case.x[2, 5] = math.inf
    out, update = ours(case).out, case.adapter.scale * case.adapter.up_bias
    torch.testing.assert_close(out[2], case.add[2] + update + case.bias)


# Layouts.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, rank", [(1, 1), (7, 3), (100, 4), (770, 16)])
def test_layouts_do_not_matter(dtype, width, rank):
    case = make(21, width, rank, dtype=dtype, add="other")
    expected = ours(case)

    def spaced(tensor):
        """The same numbers between others, which no result may depend on."""
        wide = torch.full((tensor.shape[0], width + 9), math.nan, dtype=dtype)
        wide[:, 5 : width + 5] = tensor
        return wide[:, 5 : width + 5]

    def transposed(weight):
        return weight.t().contiguous().t() if weight.ndim == 2 else weight.repeat_interleave(2)[::2]

    tensors = ("x", "add", "d_out", "d_normed")
    views = case._replace(**{name: spaced(getattr(case, name)) for name in tensors})
    views = views._replace(
        norm=NormWeights(transposed(case.norm.weight), transposed(case.norm.bias), EPS),
        adapter=AdapterWeights(*map(transposed, case.adapter[:4]), *case.adapter[4:]),
        bias=transposed(case.bias),
    )
    before = [getattr(views, name).clone() for name in tensors]
    assert_same(ours(views), expected)
    for name, tensor in zip(tensors, before, strict=True):
        assert torch.equal(getattr(views, name), tensor), f"{name} was written"


def test_expanded_and_reversed_rows():
    case = make(9, 100, 4, add="other")
    one = case._replace(
        **{name: getattr(case, name)[:1].expand(9, 100) for name in ("x", "d_out", "d_normed")}
    )
    copied = one._replace(**{n: getattr(one, n).contiguous() for n in ("x", "d_out", "d_normed")})
    assert_same(ours(one), ours(copied))
    # The same memory by another stride is not x.
    x = case.x
    added = ours(case._replace(add=x[:1].expand(9, 100)))
    assert torch.equal(added.out, ours(case._replace(add=x[:1].repeat(9, 1))).out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [4, 33])
def test_normed_and_its_gradient_in_the_dtype_of_a_matmul(rank, dtype):
    case = make(33, 100, rank)
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


def test_refuses_what_it_cannot_read_safely():
    case = make(6, 8, 4)
    x, norm, adapter, d = case.x, case.norm, case.adapter, case.d_out
    _, _, z, stats = kernels.forward(x, None, norm, adapter)

    def forward(**changes):
        changed = case._replace(**changes)
        return kernels.forward(changed.x, changed.add, changed.norm, changed.adapter, changed.bias)

    def backward(d_out=d, d_normed=d, norm=norm, stats=stats, adapter=adapter, z=z):
        return kernels.backward(d_out, d_normed, x, norm, stats, adapter, z, pass_through=False)

    for call in (
        lambda: forward(x=x.t().contiguous().t()),
        lambda: forward(x=x[0]),
        lambda: forward(x=x.long()),
        lambda: forward(x=x[:, :0]),
        lambda: forward(add=x[:5]),
        lambda: forward(add=x.double()),
        lambda: forward(bias=case.bias[:7]),
        lambda: forward(norm=norm._replace(weight=norm.weight[:7])),
        lambda: forward(norm=norm._replace(bias=norm.bias[:7])),
        lambda: forward(adapter=adapter._replace(down_weight=adapter.down_weight[:, :7])),
        lambda: forward(adapter=adapter._replace(down_weight=adapter.down_weight[:0])),
        lambda: forward(adapter=adapter._replace(down_bias=adapter.down_bias[:3])),
        lambda: forward(adapter=adapter._replace(up_weight=adapter.up_weight.t())),
        lambda: forward(adapter=adapter._replace(up_bias=adapter.up_bias[:7])),
        lambda: backward(d_out=d[:5]),
        lambda: backward(d_out=d.double()),
        lambda: backward(d_out=d.t().contiguous().t()),
        lambda: backward(norm=None),
        lambda: backward(stats=None),
        lambda: backward(stats=stats[:5]),
        lambda: backward(stats=stats.double()),
        lambda: backward(z=None),
        lambda: backward(z=z[:, :3]),
    ):
        with pytest.raises(ValueError):
            call()


# Determinism.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 64])
def test_bitwise_equal_over_repeats_and_threads(dtype, rank, set_threads):
    case = make(500, 200, rank, dtype=dtype)
    set_threads(1)
    expected = ours(case)
    for threads in (2, 3):
        set_threads(threads)
        for _ in range(10):
            assert_same(ours(case), expected)


@pytest.mark.parametrize("rank", [4, 33])
def test_a_row_does_not_depend_on_its_batch(rank):
    case = make(70, 100, rank)
    together = ours(case)
    for row in (0, 3, 33, 69):
        one = slice(row, row + 1)
        x = case.x[one]
        alone = ours(case._replace(x=x, add=x, d_out=case.d_out[one], d_normed=case.d_normed[one]))
        for name in ("normed", "out", "z", "dx"):
            assert torch.equal(getattr(together, name)[one], getattr(alone, name))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(0, 150),
    width=st.integers(1, 300),
    rank=st.integers(1, 40),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    add=st.sampled_from(["x", "other", "none"]),
    biases=st.booleans(),
)
def test_any_shape(rows, width, rank, activation, add, biases):
    def drawn(seed):
        case = make(rows, width, rank, activation=activation, add=add, biases=biases, seed=seed)
        return shares(case, ours(case), 16)

    # Of two or three features, a variance that happens to be small makes much of any rounding.
    assert_within_bounds(drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_too_large_for_its_variance_is_nan(dtype):
    """As PyTorch's LayerNorm gives it: 1 / infinity would pass for a row of zeros."""
    case = make(6, 48, 4, dtype=dtype)
    plain = kernels.forward(case.x, None, case.norm, None)[0]
    case.x[3] *= 1e30
    normed, _, _, stats = kernels.forward(case.x, None, case.norm, None)
    assert normed[3].isnan().all()
    d_x = kernels.backward(
        None, case.d_normed, case.x, case.norm, stats, None, None, pass_through=False
    )[0]
    assert d_x[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(normed[others], plain[others])
    assert d_x[others].isfinite().all()
