"""Rows of a padded batch in the Triton attention kernels."""

from __future__ import annotations

import importlib

import attention_cases
import pytest
import torch
from attention_cases import TURNS, Shape, assert_same, computed, draw

from gist_kernels.kernels.triton import DEVICE_TYPES, INTERPRETED

attention = pytest.importorskip("gist_kernels.kernels.triton.attention", exc_type=ImportError)

pytestmark = pytest.mark.triton
DEVICE = DEVICE_TYPES[0]


def check(shape, lengths, dtype=torch.bfloat16, turn=None):
    attention_cases.check(attention, shape, "random", dtype, DEVICE, turn, lengths)


@pytest.mark.parametrize(
    ("queries", "lengths", "dtype"),
    # Rows that end within a block of 32 queries, at its end, or with the first of a block.
    [(70, (70, 1, 32, 33), torch.bfloat16), (2, (1, 50), torch.float16)],
)
def test_error_is_no_larger_than_that_of_pytorch(queries, lengths, dtype):
    """Of rows without padding; what lies past their lengths is nan."""
    check(Shape(len(lengths), 1, queries, 70, 16), lengths, dtype)


@pytest.mark.parametrize("turn", TURNS[:2])
def test_rotary_positions(turn):
    check(Shape(3, 1, 40, 40, 16), (1, 40, 35), turn=turn)


def test_programs_that_take_several_blocks_of_queries(monkeypatch):
    """Two each, or one; of a short row the second program has none."""
    monkeypatch.setattr(attention.launch, "multiprocessors", lambda device: 3)
    check(Shape(3, 1, 100, 100, 16), (20, 100, 40))


def test_full_lengths_are_none_to_the_bit():
    case = draw(Shape(2, 1, 40, 40, 16), dtype=torch.bfloat16, device=DEVICE)
    full = case._replace(lengths=torch.full((2,), 40, device=DEVICE))
    assert_same(computed(attention, full), computed(attention, case))


def test_lengths_of_any_dtype_and_stride():
    case = draw(Shape(2, 1, 40, 40, 16), dtype=torch.float16, device=DEVICE, lengths=(3, 35))
    expected = computed(attention, case)
    spaced = torch.stack((case.lengths, torch.full_like(case.lengths, 1000)), 1)
    for lengths in (spaced[:, 0], spaced.int()[:, 0]):
        assert_same(computed(attention, case._replace(lengths=lengths)), expected)


def test_lengths_out_of_range_count_as_the_nearest():
    """The host can't check them without waiting for the device; no access leaves the tensors."""
    case = draw(Shape(4, 1, 40, 40, 16), dtype=torch.float16, device=DEVICE)
    nearest = (0, 40, 0, 40)
    found, expected = (
        computed(attention, case._replace(lengths=torch.tensor(values, device=DEVICE)))
        for values in ((-33, 41, -(2**40), 2**40), nearest)
    )
    assert_same(found, expected)
    attention_cases.assert_zero_past(found, nearest)


@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter loads and stores")
def test_traffic(monkeypatch):
    """Of padding, only zeros are stored."""
    traffic = importlib.import_module("bench.traffic")
    monkeypatch.setattr(attention.launch, "multiprocessors", lambda device: 1)
    tokens, lengths = 96, (96, 40, 1)
    found = traffic.measure_attention(3, tokens, 1, 16, torch.bfloat16, torch.tensor(lengths))
    share = sum(lengths) / (3 * tokens)
    # Loaded of the row's own tokens, stored of all.
    for name, loaded, stored in (("forward", 3, 1), ("backward", 4, 3)):
        assert found[name][0] == pytest.approx(loaded * share + stored), name
