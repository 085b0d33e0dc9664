"""Native attention by matmuls of bf16: with AMX, and as plain C++ where a processor has none."""

from __future__ import annotations

import attention_cases
import pytest
import torch
from attention_cases import KINDS, TURNS, Shape, assert_same, computed, draw, truth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

native = pytest.importorskip(
    "gist_kernels.kernels.cpu._native",
    reason="the native module was not built",
)
attention = pytest.importorskip("gist_kernels.kernels.cpu.attention")

pytestmark = pytest.mark.usefixtures("bf16_set")

BF16 = torch.bfloat16
# Tiles have 16 rows and columns and 32 numbers in depth: one less, as many, one more.
EDGES = (1, 15, 16, 17, 31, 32, 33)


def check(shape, kind="random", turn=None, lengths=None):
    """Parity with float64 by PyTorch's own error in bf16, which rounds as often."""
    attention_cases.check(attention, shape, kind, BF16, turn=turn, lengths=lengths)


@pytest.mark.parametrize("head_dim", [*EDGES, 64, 80])
@pytest.mark.parametrize("keys", EDGES)
def test_edges_of_tiles(keys, head_dim):
    for queries in (1, 16, 33):
        check(Shape(1, 2, queries, keys, head_dim))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", [5, 64, 198])
def test_difficult_scores(kind, keys):
    check(Shape(1, 2, keys, keys, 64), kind)


def test_keys_and_queries_of_many_blocks():
    check(Shape(1, 1, 40, 3000, 16))
    check(Shape(1, 1, 500, 40, 16))


@pytest.mark.parametrize("turn", TURNS)
def test_rotary_positions(turn):
    for queries, keys in ((1, 1), (2, 40), (40, 40)):
        check(Shape(2, 3, queries, keys, 34), turn=turn)


def test_rows_of_a_padded_batch():
    lengths = (1, 150, 73, 8)
    check(Shape(4, 3, 150, 150, 20), lengths=lengths)
    attention_cases.check_rows_are_those_without_padding(
        attention, Shape(4, 2, 150, 150, 16), lengths, BF16
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    heads=st.integers(1, 3),
    queries=st.integers(1, 100),
    keys=st.integers(1, 100),
    head_dim=st.integers(1, 100),
    kind=st.sampled_from(KINDS),
)
def test_any_shape(heads, queries, keys, head_dim, kind):
    check(Shape(1, heads, queries, keys, head_dim), kind)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(scale):
    case = draw(Shape(2, 2, 30, 40, 16), dtype=BF16)._replace(scale=scale)
    found, exact = computed(attention, case), truth(case)
    for x, y in zip(found, exact, strict=True):
        assert (x.double() - y).abs().max() <= 2 * torch.finfo(BF16).eps * y.abs().max()


def test_large_scores_lose_nothing_in_backward():
    """A log-sum-exp near 1e6 is rounded to 0.06. Probabilities still sum to 1."""
    case = draw(Shape(1, 2, 50, 60, 64), "huge", dtype=BF16)
    result = computed(attention, case._replace(scale=100 * case.scale))
    assert result.lse.min() > 9e5
    d_v = result.d_v.double()
    error = (d_v.sum(1) - case.d_out.double().sum(1)).abs()
    assert (error <= torch.finfo(BF16).eps * d_v.abs().sum(1)).all()


def test_alike_values():
    attention_cases.check_alike_values(attention, BF16)


def test_what_is_not_finite_stays_in_its_query():
    case = draw(Shape(1, 1, 40, 40, 32), dtype=BF16)
    whole = computed(attention, case)
    case.q[0, 7] = torch.nan
    found = computed_of_nan(case)
    others = torch.arange(40) != 7
    assert found.out[0, 7].isnan().all()
    assert torch.equal(found.out[0, others], whole.out[0, others])
    assert found.d_q[0, 7].isnan().all()
    assert torch.equal(found.d_q[0, others], whole.d_q[0, others])
    assert found.d_k.isnan().all()
    assert found.d_v.isnan().all()


def computed_of_nan(case):
    shape, scale, q, k, v, d_out, *_ = case
    out, lse = attention.forward(q, k, v, shape.heads, scale)
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    attention.backward(d_out, q, k, v, lse, shape.heads, scale, *gradients)
    return attention_cases.Result(out, lse, *gradients)


@pytest.mark.parametrize("shape", [Shape(3, 3, 198, 198, 64), Shape(5, 2, 2, 198, 40)])
def test_same_for_any_number_of_threads(shape, set_threads):
    case = draw(shape, dtype=BF16)
    set_threads(1)
    alone = computed(attention, case)
    for threads in (2, 5):
        set_threads(threads)
        assert_same(computed(attention, case), alone)


def test_memory_kept_between_calls_holds_no_result():
    small = draw(Shape(1, 2, 5, 7, 12), dtype=BF16)
    fresh = computed(attention, small)
    computed(attention, draw(Shape(2, 3, 150, 300, 64), "huge", dtype=BF16))
    assert_same(computed(attention, small), fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_as_without(dtype, bf16_set):
    case = draw(Shape(2, 3, 40, 33, 24), dtype=dtype)
    found = computed(attention, case)
    native.use_instruction_set({"amx": "avx512", "portable_bf16": "portable"}[bf16_set])
    assert_same(computed(attention, case), found)


def test_pytorchs_own_matmuls_keep_their_tiles(set_threads):
    """oneDNN configures AMX's tiles on the same threads."""
    set_threads(1)
    a, b = torch.randn(200, 300).to(BF16), torch.randn(300, 100).to(BF16)
    before = a @ b
    case = draw(Shape(1, 2, 60, 60, 64), dtype=BF16)
    ours = computed(attention, case)
    for _ in range(3):
        assert torch.equal(a @ b, before)
        assert_same(computed(attention, case), ours)
