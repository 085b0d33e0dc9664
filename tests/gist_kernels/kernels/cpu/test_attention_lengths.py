"""Rows of a padded batch in the native attention kernels, on every instruction set."""

from __future__ import annotations

import attention_cases
import pytest
import torch
from attention_cases import KINDS, TURNS, Case, Shape, assert_same, computed, draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip(
    "gist_kernels.kernels.cpu._native",
    reason="the native module was not built",
)
attention = pytest.importorskip("gist_kernels.kernels.cpu.attention")

pytestmark = pytest.mark.usefixtures("instruction_set")

# One block of queries, or several of other sizes than a full row's; the shortest and the longest.
LENGTHS = (1, 150, 73, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(shape, lengths, kind="random", dtype=torch.float32, turn=None):
    attention_cases.check(attention, shape, kind, dtype, turn=turn, lengths=lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 20, 150])
def test_error_is_no_larger_than_that_of_pytorch(queries, dtype):
    """Of rows without padding; what lies past their lengths is nan."""
    check(Shape(4, 3, queries, 150, 20), LENGTHS, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_difficult_scores(kind):
    check(Shape(3, 2, 60, 60, 64), (60, 1, 33), kind)


@pytest.mark.parametrize("turn", TURNS)
def test_rotary_positions(turn):
    """Also where a row ends before the first rotated token, or among those that are."""
    for queries in (4, 40):
        check(Shape(4, 3, queries, 40, 16), (1, 40, 2, 37), turn=turn)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    heads=st.integers(1, 3),
    queries=st.integers(1, 90),
    keys=st.integers(1, 90),
    head_dim=st.integers(1, 70),
    data=st.data(),
)
def test_any_shape(heads, queries, keys, head_dim, data):
    queries = min(queries, keys)
    lengths = tuple(data.draw(st.lists(st.integers(1, keys), min_size=1, max_size=4)))
    check(Shape(len(lengths), heads, queries, keys, head_dim), lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turn", [None, *TURNS[:2]])
def test_a_row_is_that_without_padding_to_the_bit(turn, dtype):
    for queries in (2, 150):
        attention_cases.check_rows_are_those_without_padding(
            attention, Shape(4, 2, queries, 150, 16), LENGTHS, dtype, turn=turn
        )


def test_full_lengths_are_none_to_the_bit():
    case = draw(Shape(3, 2, 50, 50, 16))
    full = case._replace(lengths=torch.full((3,), 50))
    assert_same(computed(attention, full), computed(attention, case))


def test_lengths_of_any_dtype_and_stride():
    case = draw(Shape(4, 2, 40, 40, 8), lengths=(40, 3, 1, 17))
    expected = computed(attention, case)
    spaced = torch.stack((case.lengths, torch.full((4,), 1000)), 1)
    for lengths in (
        case.lengths.int(),
        spaced[:, 0],
        spaced.int()[:, 0],
        case.lengths.flip(0)[[3, 2, 1, 0]],
    ):
        assert_same(computed(attention, case._replace(lengths=lengths)), expected)


def test_same_for_any_number_of_threads(set_threads):
    case = draw(Shape(6, 3, 150, 150, 32), lengths=(5, 150, 1, 90, 90, 140))
    set_threads(1)
    alone = computed(attention, case)
    for threads in (2, 5):
        set_threads(threads)
        assert_same(computed(attention, case), alone)


def test_a_short_row_needs_more_scratch_memory_than_a_long_one():
    """Its block of queries is larger: two halves of 145 are smaller than 140 at once."""
    for lengths in ((145, 140), (73, 72), (140, 140)):
        case = draw(Shape(2, 1, 145, 145, 8), lengths=lengths)
        attention_cases.assert_zero_past(computed(attention, case), lengths)
        attention_cases.check(attention, case.shape, lengths=lengths)


def test_empty_batch():
    case = draw(Shape(0, 3, 4, 5, 8))._replace(lengths=torch.empty(0, dtype=torch.int64))
    assert computed(attention, case).out.shape == (0, 4, 24)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1.0, 2.0]), TypeError, "lengths must be int32 or int64; it is torch.float"),
        (torch.tensor([1, 2, 3]), ValueError, r"lengths must have shape \(2,\), not \(3,\)"),
        (torch.tensor([[1, 2]]), ValueError, r"lengths must have shape \(2,\), not \(1, 2\)"),
        (torch.tensor([1, 0]), ValueError, r"lengths\[1\] is 0; it must be in \[1, 5\]"),
        (torch.tensor([6, 1]), ValueError, r"lengths\[0\] is 6; it must be in \[1, 5\]"),
        (torch.tensor([-1, 1]), ValueError, r"lengths\[0\] is -1"),
        (torch.tensor([1, 2**32 + 1]), ValueError, r"lengths\[1\] is 4294967297"),
    ],
)
def test_what_it_does_not_take(lengths, error, message):
    """Memory safety rests on it."""
    case: Case = draw(Shape(2, 3, 5, 5, 8))
    with pytest.raises(error, match=message):
        attention.forward(case.q, case.k, case.v, 3, 1.0, None, lengths)
    gradients = torch.empty(3, 2, 5, 24)
    _, lse = attention.forward(case.q, case.k, case.v, 3, 1.0)
    with pytest.raises(error, match=message):
        attention.backward(
            case.d_out, case.q, case.k, case.v, lse, 3, 1.0, *gradients, None, lengths
        )
