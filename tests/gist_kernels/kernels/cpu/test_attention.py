"""The native attention kernels, on every instruction set this processor has."""

from __future__ import annotations

import itertools

import attention_cases
import pytest
import torch
from attention_cases import (
    KINDS,
    TURNS,
    Buffer,
    Case,
    Result,
    Shape,
    Turn,
    assert_parity,
    assert_same,
    draw,
    exact_peer_and_scales,
    magnitudes,
    pytorch,
    shares,
    truth,
)
from draws import assert_within_bounds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import slow_where

from gist_kernels import Rotation

pytest.importorskip(
    "gist_kernels.kernels.cpu._native",
    reason="the native module was not built",
)
attention = pytest.importorskip("gist_kernels.kernels.cpu.attention")

pytestmark = pytest.mark.usefixtures("instruction_set")


def ours(case: Case) -> Result:
    return attention_cases.computed(attention, case)


def check(
    shape: Shape,
    kind: str = "random",
    dtype: torch.dtype = torch.float32,
    turn: Turn | None = None,
) -> None:
    attention_cases.check(attention, shape, kind, dtype, turn=turn)


# Parity with float64, by PyTorch's own error.


@pytest.mark.parametrize("head_dim", [1, 8, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("keys", [2, 5, 16, 17, 64, 100, 198, 258, 579])
def test_error_is_no_larger_than_that_of_pytorch(keys, head_dim):
    for queries in {1, 2, keys}:
        shape = Shape(1, 3, queries, keys, head_dim)

        def drawn(seed, shape=shape):
            exact, peer, _ = exact_peer_and_scales(shape, "random", seed=seed)
            return shares(ours(draw(shape, seed=seed)), exact, peer, exact, 8)

        assert_within_bounds(drawn)


@pytest.mark.parametrize("head_dim", [1, 8, 64, 80])
@pytest.mark.parametrize("queries", [1, 2, 40])
def test_a_single_key(queries, head_dim):
    """It has probability 1, and its score no gradient but for rounding."""
    check(Shape(2, 3, queries, 1, head_dim))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [1, 3, 6])
def test_batches_and_heads(batch, heads):
    for queries, keys in ((17, 17), (2, 50), (60, 7)):
        check(Shape(batch, heads, queries, keys, 20))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", [1, 5, 64, 198])
def test_difficult_scores(kind, keys):
    for head_dim in (8, 64, 80):
        check(Shape(1, 2, keys, keys, head_dim), kind)


@pytest.mark.parametrize("head_dim", [3, 17, 255, 256])
def test_any_head_dimension(head_dim):
    check(Shape(2, 2, 9, 33, head_dim))


def test_keys_of_many_blocks():
    check(Shape(1, 1, 70, 5000, 16))
    check(Shape(1, 1, 1100, 3, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [1, 17, 198])
def test_halves(dtype, keys):
    for kind in ("random", "peaked"):
        for head_dim in (5, 64):
            check(Shape(2, 3, keys, keys, head_dim), kind, dtype)


def test_halves_are_float32_rounded_once():
    case = draw(Shape(2, 3, 40, 33, 24), dtype=torch.bfloat16)
    wide = Case(case.shape, case.scale, *(x.float() for x in case.tensors))
    low, high = ours(case), ours(wide)
    assert torch.equal(low.out, high.out.bfloat16())
    assert torch.equal(low.lse, high.lse)
    assert torch.equal(low.d_v, high.d_v.bfloat16())


@pytest.mark.parametrize(
    ("head_dim", "turn"),
    slow_where(
        lambda head_dim, turn: head_dim == 256 and not turn.per_head,  # 5 s each
        itertools.product([2, 6, 16, 34, 64, 256], TURNS),
    ),
)
def test_rotary_positions(head_dim, turn):
    for queries, keys in ((1, 1), (2, 40), (17, 17), (100, 100)):
        check(Shape(2, 3, queries, keys, head_dim), turn=turn)
    check(Shape(1, 2, 40, 40, head_dim), "huge", turn=turn)
    for dtype in (torch.bfloat16, torch.float16):
        check(Shape(2, 3, 17, 40, head_dim), dtype=dtype, turn=turn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turn", TURNS)
def test_rotated_queries_and_keys_are_rounded_to_their_dtype(turn, dtype):
    """So log-sum-exps are those of queries and keys that were rotated before."""
    case = draw(Shape(2, 3, 30, 30, 24), dtype=dtype, turn=turn)
    q, k = (case.rotated(x.float()).to(dtype) for x in (case.q, case.k))
    before = case._replace(q=q, k=k, rotation=None)
    found, expected = ours(case), ours(before)
    for name in ("out", "lse", "d_v"):
        few = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=few, atol=few
        )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    queries=st.integers(1, 130),
    keys=st.integers(1, 130),
    head_dim=st.integers(1, 140),
    kind=st.sampled_from(KINDS),
    turn=st.none() | st.sampled_from(TURNS),
)
def test_any_shape(batch, heads, queries, keys, head_dim, kind, turn):
    head_dim += head_dim % 2 if turn is not None else 0
    check(Shape(batch, heads, queries, keys, head_dim), kind, turn=turn)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
def test_any_scale(scale):
    case = draw(Shape(2, 2, 30, 40, 16))._replace(scale=scale)
    assert_parity(ours(case), truth(case), pytorch(case), magnitudes(case), 4)


def test_large_scores_lose_nothing_in_backward():
    """The log-sum-exp of scores near 1e4 is rounded to 1e-3, but probabilities still sum to 1."""
    case = draw(Shape(1, 2, 50, 60, 64), "huge")
    result = ours(case)
    assert result.lse.min() > 9000
    torch.testing.assert_close(result.d_v.sum(1), case.d_out.sum(1), rtol=1e-5, atol=1e-5)


# Reproducibility, memory.


@pytest.mark.parametrize("shape", [Shape(3, 3, 198, 198, 64), Shape(5, 2, 2, 198, 40)])
def test_same_for_any_number_of_threads_and_any_batch(shape, set_threads):
    case = draw(shape)
    set_threads(1)
    alone = ours(case)
    for threads in (2, 5):
        set_threads(threads)
        assert_same(ours(case), alone)
    for image in range(shape.batch):
        one = Case(
            shape._replace(batch=1), case.scale, *(x[image : image + 1] for x in case.tensors)
        )
        assert_same(ours(one), Result(*(x[image : image + 1] for x in alone)))


def test_memory_kept_between_calls_holds_no_result():
    """A small call after a large one, whose scratch memory it finds."""
    small = draw(Shape(1, 2, 5, 7, 12))
    fresh = ours(small)
    for kind in ("huge", "peaked"):
        ours(draw(Shape(2, 3, 150, 300, 64), kind))
        assert_same(ours(small), fresh)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alike_values(dtype):
    attention_cases.check_alike_values(attention, dtype)


def test_gradients_of_one_packed_tensor():
    shape = Shape(2, 3, 21, 21, 16)
    case = draw(shape)
    separate = ours(case)
    out, lse = separate.out, separate.lse
    packed = Buffer(2, 21, 3 * shape.width, torch.float32)
    d_q, d_k, d_v = packed.view.split(shape.width, 2)
    _, scale, q, k, v, d_out, *_ = case
    attention.backward(d_out, q, k, v, lse, 3, scale, d_q, d_k, d_v)
    assert_same(Result(out, lse, d_q, d_k, d_v), separate)
    assert packed.untouched_outside(packed.view)


def test_expanded_and_strided_inputs():
    shape = Shape(3, 2, 10, 12, 8)
    case = draw(shape)
    expanded = case._replace(
        q=case.q[:1].expand(3, -1, -1),
        k=case.k[:, :1].expand(-1, 12, -1),
        v=case.v.flip(1)[:, :12],
        d_out=torch.randn(3, 16).expand(10, 3, 16).transpose(0, 1),
    )
    dense = Case(shape, case.scale, *(x.contiguous() for x in expanded.tensors))
    assert_same(ours(expanded), ours(dense))
    spaced_lse = torch.stack((torch.zeros(3, 2, 10), ours(dense).lse), -1)[..., 1]
    gradients = [torch.empty(3, rows, 16) for rows in (10, 12, 12)]
    out = attention.forward(*dense[2:5], 2, case.scale)[0]
    attention.backward(dense.d_out, *dense[2:5], spaced_lse, 2, case.scale, *gradients)
    assert_same(Result(out, ours(dense).lse, *gradients), ours(dense))


def test_empty_batch():
    result = ours(draw(Shape(0, 3, 4, 5, 8)))
    assert result.out.shape == (0, 4, 24)
    assert result.lse.shape == (0, 3, 4)


def test_tables_that_do_not_fit():
    x, table = torch.randn(2, 5, 24), torch.zeros(5, 8)
    good = Rotation(table, table, 0, True)
    attention.forward(x, x, x, 3, 1.0, good)
    for bad in (
        good._replace(sin=table[:4]),
        good._replace(cos=table[:, :6]),
        good._replace(sin=table.expand(2, 5, 8), cos=table.expand(2, 5, 8)),
        good._replace(start=-1),
    ):
        with pytest.raises(ValueError, match="the rotation does not fit the heads"):
            attention.forward(x, x, x, 3, 1.0, bad)
        lse = torch.zeros(2, 3, 5)
        with pytest.raises(ValueError, match="the rotation does not fit the heads"):
            attention.backward(x, x, x, x, lse, 3, 1.0, *x.new_empty(3, 2, 5, 24), bad)


def test_what_it_does_not_take():
    x = torch.randn(2, 5, 24)
    with pytest.raises(TypeError, match="q must be float32, bfloat16 or float16"):
        attention.forward(x.double(), x.double(), x.double(), 3, 1.0)
    with pytest.raises(TypeError, match="v must be"):
        attention.forward(x, x, x.bfloat16(), 3, 1.0)
    for q, k, v, heads in (
        (x[0], x[0], x[0], 3),
        (x, x, x, 5),
        (x, x, x, 0),
        (x, x[:1], x[:1], 3),
        (x, x[..., :12], x[..., :12], 3),
        (x, x, x[:, :3], 3),
        (x[:, :0], x, x, 3),
        (x, x[:, :0], x[:, :0], 3),
        (x.mT.contiguous().mT, x, x, 3),
        (x[..., :0], x[..., :0], x[..., :0], 3),
        (torch.randn(1, 1, 257), torch.randn(1, 1, 257), torch.randn(1, 1, 257), 1),
    ):
        with pytest.raises(ValueError):
            attention.forward(q, k, v, heads, 1.0)


@pytest.mark.parametrize("place", [0, 4, 7, 8, 9])
def test_backward_checks_every_tensor(place):
    x = torch.randn(2, 5, 24)
    _, lse = attention.forward(x, x, x, 3, 1.0)
    good = [x, x, x, x, lse, 3, 1.0, *(torch.zeros_like(x) for _ in range(3))]
    attention.backward(*good)
    for bad in (good[place][:1], good[place].mT.contiguous().mT, good[place].double()):
        if place == 4 and bad.shape == lse.shape and bad.dtype is lse.dtype:
            continue  # any strides
        with pytest.raises((ValueError, TypeError)):
            attention.backward(*good[:place], bad, *good[place + 1 :])
