"""The Triton attention kernels: interpreted on a CPU, or for real."""

from __future__ import annotations

import importlib
import mmap

import attention_cases
import pytest
import torch
from attention_cases import KINDS, TURNS, Case, Result, Shape, Turn, assert_same, computed, draw
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gist_kernels as gk
from gist_kernels import Rotation
from gist_kernels.kernels.triton import DEVICE_TYPES, INTERPRETED

attention = pytest.importorskip("gist_kernels.kernels.triton.attention", exc_type=ImportError)

pytestmark = pytest.mark.triton
DEVICE = DEVICE_TYPES[0]


def padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def check(
    shape: Shape,
    kind: str = "random",
    dtype: torch.dtype = torch.bfloat16,
    turn: Turn | None = None,
) -> None:
    attention_cases.check(attention, shape, kind, dtype, DEVICE, turn)


@pytest.mark.parametrize("dtype", attention.DTYPES)
@pytest.mark.parametrize("head_dim", [8, 32, 64, 80])
@pytest.mark.parametrize("keys", [1, 2, 16, 17, 100, 198])
def test_error_is_no_larger_than_that_of_pytorch(keys, head_dim, dtype):
    for queries in {1, 2, keys}:
        shape = Shape(2, 3, queries, keys, head_dim)
        q = draw(shape, dtype=dtype, device=DEVICE)
        if attention.serves(q.q, q.k, shape.heads):
            check(shape, dtype=dtype)
        else:  # smaller cards leave more to PyTorch, see test_launch.py
            assert not INTERPRETED or padded(keys) * padded(head_dim) > 8192


@pytest.mark.parametrize("dtype", attention.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", [5, 64, 100])
def test_difficult_scores(kind, keys, dtype):
    check(Shape(1, 2, keys, keys, 64), kind, dtype)


@pytest.mark.parametrize("dtype", attention.DTYPES)
def test_alike_values(dtype):
    attention_cases.check_alike_values(attention, dtype, DEVICE)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(1, 1, 16), (2, 40, 32), (70, 70, 64)])
def test_rotary_positions(queries, keys, head_dim, turn):
    for dtype in attention.DTYPES:
        check(Shape(2, 3, queries, keys, head_dim), dtype=dtype, turn=turn)


@pytest.mark.parametrize(
    ("keys", "head_dim", "rotates"),
    [(5, 8, False), (5, 16, True), (100, 64, True), (5, 80, False), (5, 128, False)],
)
def test_which_heads_it_rotates(keys, head_dim, rotates):
    rotation = Rotation(*torch.zeros(2, keys, head_dim), 0, True)
    q = torch.empty(1, keys, 2 * head_dim, dtype=torch.bfloat16, device=DEVICE)
    assert attention.rotates(q, q, 2, rotation) == rotates


@pytest.mark.parametrize("multiprocessors", [2, 4, 6])
def test_programs_that_take_several_blocks_of_queries(multiprocessors, monkeypatch):
    """All four of a head, or three and one, or two and two."""
    monkeypatch.setattr(attention.launch, "multiprocessors", lambda device: multiprocessors)
    check(Shape(2, 3, 100, 20, 16))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    queries=st.integers(1, 70),
    keys=st.integers(1, 120),
    head_dim=st.sampled_from(range(8, 65, 8)),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(attention.DTYPES),
)
def test_any_shape(batch, heads, queries, keys, head_dim, kind, dtype):
    shape = Shape(batch, heads, queries, keys, head_dim)
    like = torch.empty(1, keys, shape.width, dtype=dtype, device=DEVICE)
    assume(attention.serves(like, like, heads))
    check(shape, kind, dtype)


@pytest.mark.parametrize(("scale", "kind"), [(0.0, "random"), (2.5, "random"), (-0.3, "huge")])
def test_any_scale(scale, kind):
    """Also one that makes every score so low that those past the last key would be huge."""
    case = draw(Shape(2, 2, 30, 40, 16), kind, torch.float16, DEVICE)._replace(scale=scale)
    attention_cases.assert_parity(
        computed(attention, case),
        attention_cases.truth(case),
        attention_cases.pytorch(case),
        attention_cases.magnitudes(case),
        4,
    )


def test_rows_are_the_same_in_any_batch():
    case = draw(Shape(3, 3, 50, 50, 64), dtype=torch.bfloat16, device=DEVICE)
    together = computed(attention, case)
    assert_same(computed(attention, case), together)
    for image in range(3):
        part = slice(image, image + 1)
        one = Case(case.shape._replace(batch=1), case.scale, *(x[part] for x in case.tensors))
        assert_same(computed(attention, one), Result(*(x[part] for x in together)))


def test_strides_of_any_kind():
    shape = Shape(3, 2, 10, 12, 8)
    case = draw(shape, dtype=torch.float16, device=DEVICE)
    expanded = case._replace(
        q=case.q[:1].expand(3, -1, -1),
        k=case.k[:, :1].expand(-1, 12, -1),
        d_out=case.d_out[:, :1].expand(-1, 10, -1),
    )
    dense = Case(shape, case.scale, *(x.contiguous() for x in expanded.tensors))
    assert_same(computed(attention, expanded), computed(attention, dense))


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU this would take the memory for real")
@pytest.mark.parametrize("strides", [(2**31 + 16, 16, 1), (16, 2**31 + 16, 1)])
def test_offsets_beyond_2_31_elements(strides):
    """Strides of images and of rows; pages between them are never touched."""
    case = draw(Shape(2, 1, 2, 4, 16), dtype=torch.float16, device=DEVICE)
    # All strides are multiples of 16, and passed as such: in 32 bits, unlike their products.
    case = case._replace(k=case.k.contiguous(), v=case.v.contiguous())
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 128)), dtype=torch.float16)
    q = memory.as_strided((2, 2, 16), strides)
    q.copy_(case.q)
    assert_same(computed(attention, case._replace(q=q)), computed(attention, case))


@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter loads and stores")
def test_traffic(monkeypatch):
    """Each tensor is passed once, where heads are enough that one program takes all of one."""
    traffic = importlib.import_module("bench.traffic")
    monkeypatch.setattr(attention.launch, "multiprocessors", lambda device: 1)
    found = traffic.measure_attention(1, 198, 3, 64, torch.bfloat16)
    for name, (of_large, everything) in found.items():
        assert of_large == traffic.ATTENTION_LEAST[name], name
        assert everything <= 1.02 * of_large, name


def test_empty_batch():
    result = computed(attention, draw(Shape(0, 3, 4, 5, 8), dtype=torch.float16, device=DEVICE))
    assert result.out.shape == (0, 4, 24)
    assert result.lse.shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("dtype", "tokens", "by_pytorch"),
    [(torch.bfloat16, 100, False), (torch.float32, 100, True), (torch.bfloat16, 321, True)],
)
def test_what_is_long_or_wide_is_pytorchs(dtype, tokens, by_pytorch, monkeypatch):
    calls = []
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a: calls.append(a) or forward(*a))
    qkv = torch.randn(1, tokens, 3 * 64, dtype=dtype, device=DEVICE, requires_grad=True)
    with gk.use_backend("triton"):
        gk.prefix_attention(qkv, 1, num_queries=2).sum().backward()
    assert bool(calls) != by_pytorch
    assert qkv.grad is not None
    assert not qkv.grad[:, 2:, :64].any()


def test_258_tokens_are_the_kernels(monkeypatch):
    """16 x 16 patches, class and Gist token; the last layer's two queries."""
    calls = []
    forward = attention.attention_tiles.forward
    monkeypatch.setattr(
        attention.attention_tiles, "forward", lambda *a: calls.append(a) or forward(*a)
    )
    qkv = torch.randn(1, 258, 3 * 16, dtype=torch.bfloat16, device=DEVICE)
    found, exact = (x.detach().requires_grad_() for x in (qkv, qkv.double()))
    with gk.use_backend("triton"):
        out = gk.prefix_attention(found, 1, num_queries=2)
    with gk.use_backend("reference"):
        truth = gk.prefix_attention(exact, 1, num_queries=2)
    assert len(calls) == 1
    d_out = torch.randn_like(out)
    out.backward(d_out)
    truth.backward(d_out.double())
    for x, y in ((out, truth), (found.grad, exact.grad)):
        assert (x.double() - y).norm() < 4e-3 * y.norm()
