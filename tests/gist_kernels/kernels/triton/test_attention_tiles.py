"""Attention by tiles of queries and keys: interpreted on a CPU, or for real."""

from __future__ import annotations

import importlib

import attention_cases
import pytest
import torch
from attention_cases import Case, Result, Shape, assert_same, computed, draw

from gist_kernels import Rotation
from gist_kernels.kernels.triton import DEVICE_TYPES, INTERPRETED, heuristics

attention = pytest.importorskip("gist_kernels.kernels.triton.attention", exc_type=ImportError)

pytestmark = pytest.mark.triton
DEVICE = DEVICE_TYPES[0]


def tiles(head_dim: int, stages: int = 2) -> heuristics.AttentionTiles:
    return heuristics.AttentionTiles(max(16, 1 << (head_dim - 1).bit_length()), stages)


@pytest.fixture(autouse=True)
def _by_tiles(monkeypatch):
    """Heads that a program could hold whole go by tiles too, so that few tokens suffice."""
    monkeypatch.setattr(attention, "_tile", lambda q, k, heads: tiles(q.shape[2] // heads))


def check(shape: Shape, kind: str = "random", dtype: torch.dtype = torch.bfloat16, **options):
    attention_cases.check(attention, shape, kind, dtype, DEVICE, **options)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"),
    # One of all; a tile of each, full; one more than that; some of each.
    [(1, 1, 8), (64, 32, 16), (65, 33, 24), (2, 100, 64), (70, 70, 32)],
)
def test_error_is_no_larger_than_that_of_pytorch(queries, keys, head_dim, stages, monkeypatch):
    monkeypatch.setattr(attention, "_tile", lambda q, k, heads: tiles(head_dim, stages))
    dtype = attention.DTYPES[stages - 1]
    check(Shape(1, 2, queries, keys, head_dim), dtype=dtype)


@pytest.mark.parametrize("dtype", attention.DTYPES)
@pytest.mark.parametrize("kind", ["peaked", "equal", "huge"])
def test_difficult_scores(kind, dtype):
    """Of which the largest may be in any tile."""
    check(Shape(1, 1, 70, 70, 32), kind, dtype)


@pytest.mark.parametrize("dtype", attention.DTYPES)
def test_alike_values(dtype):
    attention_cases.check_alike_values(attention, dtype, DEVICE)


@pytest.mark.parametrize("dtype", attention.DTYPES)
def test_means_that_change_from_tile_to_tile(dtype):
    """Those of the first keys are far from those of the others."""
    case = draw(Shape(1, 1, 20, 70, 16), dtype=dtype, device=DEVICE)
    case.v[:, :32] += 4
    case.v[:, 32:] -= 4
    attention_cases.assert_parity(
        computed(attention, case),
        attention_cases.truth(case),
        attention_cases.pytorch(case),
        attention_cases.magnitudes(case),
        4,
    )


@pytest.mark.parametrize(("scale", "kind"), [(0.0, "random"), (-0.3, "huge")])
def test_any_scale(scale, kind):
    """Also one that makes every score so low that those past the last key would be huge."""
    case = draw(Shape(1, 2, 30, 40, 16), kind, torch.float16, DEVICE)._replace(scale=scale)
    attention_cases.assert_parity(
        computed(attention, case),
        attention_cases.truth(case),
        attention_cases.pytorch(case),
        attention_cases.magnitudes(case),
        4,
    )


def test_rows_are_the_same_in_any_batch():
    case = draw(Shape(2, 1, 40, 40, 16), dtype=torch.bfloat16, device=DEVICE)
    together = computed(attention, case)
    assert_same(computed(attention, case), together)
    for image in range(2):
        part = slice(image, image + 1)
        one = Case(case.shape._replace(batch=1), case.scale, *(x[part] for x in case.tensors))
        assert_same(computed(attention, one), Result(*(x[part] for x in together)))


# Rows that end with the first of a tile, at the end of one, and within one.
@pytest.mark.parametrize(("queries", "lengths"), [(70, (65, 1, 32)), (2, (1, 50))])
def test_rows_of_a_padded_batch(queries, lengths):
    shape = Shape(len(lengths), 1, queries, 70, 16)
    check(shape, lengths=lengths)
    attention_cases.check_rows_are_those_without_padding(
        attention, shape, lengths, torch.bfloat16, DEVICE
    )


def test_rows_without_a_token_are_zero():
    case = draw(Shape(2, 1, 40, 40, 16), dtype=torch.float16, device=DEVICE)
    found = computed(attention, case._replace(lengths=torch.tensor((-3, 41), device=DEVICE)))
    attention_cases.assert_zero_past(found, (0, 40))
    full = Case(case.shape._replace(batch=1), case.scale, *(x[1:] for x in case.tensors))
    assert_same(Result(*(x[1:] for x in found)), computed(attention, full))


def test_rotary_positions_are_left_to_pytorch():
    q = torch.empty(1, 40, 64, dtype=torch.bfloat16, device=DEVICE)
    assert not attention.rotates(q, q, 2, Rotation(*torch.zeros(2, 40, 32), 0, True))


@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter loads and stores")
def test_traffic():
    """Forward reads keys and values once per tile of queries; backward stores each gradient
    once."""
    traffic = importlib.import_module("bench.traffic")
    found = traffic.measure_attention(1, 64, 1, 16, torch.bfloat16)
    assert found["forward"][0] == 4
    # Of 64 tokens: queries and the gradient of their result, and keys and values for both tiles;
    # the same for the tiles of keys; three gradients.
    assert found["backward"][0] == (2 + 4) + (2 + 4) + 3
