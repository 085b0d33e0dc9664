"""What the driver gets of each family's launches: test_stub_driver.py runs this in a process of its
own, on the stub driver.

Every expected number is written out here. Strides and sizes are in the units that a kernel's
docstring names.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch

import stub_driver
from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.kernels.triton import activation, adapter, attention, divergence, loss
from gist_kernels.weights import AdapterWeights, NormWeights

SOME_TENSOR = object()
BF16, F32 = torch.bfloat16, torch.float32


def check(
    launch: stub_driver.Launch,
    kernel: Any,
    grid: tuple[int, ...],
    threads: int,
    parameters: dict[str, Any],
) -> None:
    """``parameters`` are those that the binary has, in its order; a tuple's members follow one
    another."""
    assert launch.name == kernel.__name__
    assert launch.grid == (*grid, 1, 1)[:3]
    assert launch.block == (threads, 1, 1)
    binaries = kernel.device_caches[0][0].values()
    assert launch.shared in {binary.metadata.shared for binary in binaries}
    assert launch.stream == 0
    expected = {}
    for name, value in parameters.items():
        if isinstance(value, tuple):
            expected |= {f"{name}[{i}]": each for i, each in enumerate(value)}
        else:
            expected[name] = value
    *given, global_scratch, profile_scratch = launch.parameters
    assert len(given) == len(expected)
    found = {
        name: _decoded(raw, value)
        for raw, (name, value) in zip(given, expected.items(), strict=True)
    }
    assert found == {name: _plain(value) for name, value in expected.items()}
    assert not any(global_scratch)
    assert not any(profile_scratch)


def _decoded(raw: bytes, like: Any) -> Any:
    if like is SOME_TENSOR:
        return len(raw) == 8 and any(raw)
    if isinstance(like, float):
        (value,) = struct.unpack("<f", raw)
        return value
    signed = not isinstance(like, torch.Tensor)
    return int.from_bytes(raw, "little", signed=signed)


def _plain(value: Any) -> Any:
    if value is SOME_TENSOR:
        return True
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return struct.unpack("<f", struct.pack("<f", value))[0] if isinstance(value, float) else value


# ---- the loss ----

OPTIONS = LossOptions(3.0, 1.0, 0.5, 0.75, 0.6, 0.1, -100, "mean")
SCALARS = {
    "tempered_scale": math.log2(math.e) / 3, "inverse_t": 1 / 3, "gist_scale": 1.0,
    "smoothing": 0.1, "ignore_index": -100,
    "weights": (1.0, 0.5, 0.75, 0.6), "kl_weights": (0.75, 0.6, 0.75, 0.6),
}  # fmt: skip


def stacked(rows: int, classes: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    """Both heads' logits side by side, as a model gives them, and a target of stride 2."""
    pair = torch.zeros(rows, 2, classes, dtype=dtype)
    return pair[:, 0], pair[:, 1], torch.zeros(rows, 2, dtype=torch.int64)[:, 0]


def test_loss_forward_and_backward():
    cls, gist, target = stacked(5, 100)  # units of 4 classes; 4 rows of 128 classes a program
    grad = torch.ones(())
    with stub_driver.recorded() as launches:
        value, terms, stats = loss.forward(cls, gist, target, OPTIONS)
        d_cls, d_gist = loss.backward(grad, cls, gist, target, stats, OPTIONS, True, True)
    forward, backward = launches
    check(forward, loss._forward_kernel, (2,), 128, {
        "a": cls, "b": gist, "target": target, "loss": value, "terms": terms, "stats": stats,
        "sums": SOME_TENSOR, "counter": loss._counters[None, 0],
        "rows": 5, "target_stride": 2, "scale_stride": 0, "class_units": 25, "stride_a": 50,
        "stride_b": 50, "d_stride": 0, **SCALARS,
    })  # fmt: skip
    check(backward, loss._backward_kernel, (2,), 128, {
        "grad": grad, "a": cls, "b": gist, "target": target, "stats": stats, "d_a": d_cls,
        "d_b": d_gist, "rows": 5, "target_stride": 2, "scale_stride": 0, "grad_stride": 0,
        "class_units": 25, "stride_a": 50, "stride_b": 50, "d_stride": 50, **SCALARS,
    })  # fmt: skip


def test_loss_forward_backward_at_once():
    """More rows than a program counts itself: another launch counts them."""
    cls, gist, target = stacked(300, 1000, F32)
    with stub_driver.recorded() as launches:
        value, d_cls, d_gist = loss.forward_backward(cls, gist, target, OPTIONS)
    count, kept = launches
    check(count, loss._count_kernel, (1,), 128, {
        "target": target, "count": SOME_TENSOR, "rows": 300, "target_stride": 2,
        "ignore_index": -100,
    })  # fmt: skip
    check(kept, loss._forward_kernel, (300,), 128, {
        "a": cls, "b": gist, "target": target, "loss": value, "sums": SOME_TENSOR,
        "counter": loss._counters[None, 0], "d_a": d_cls, "d_b": d_gist, "count": SOME_TENSOR,
        "rows": 300, "target_stride": 2, "scale_stride": 0, "class_units": 125, "stride_a": 250,
        "stride_b": 250, "d_stride": 250, **SCALARS,
    })  # fmt: skip
    assert kept.parameters[8] == count.parameters[1]


def test_loss_of_long_rows():
    """Three chunks a row; rows with factors of stride 3, and a Gist side with its temperature."""
    cls, gist = torch.zeros(2, 2, 9000, dtype=BF16)
    scale = torch.ones(2, 3)[:, 0]
    options = OPTIONS._replace(reduction="none", gist_scale=1.5, stop_gradient="b")
    scalars = SCALARS | {"gist_scale": 1.5, "kl_weights": (0.75, 0.0, 0.0, 0.6)}
    with stub_driver.recorded() as launches:
        value, terms, stats = loss.forward(cls, gist, None, options, True, scale)
        grad = torch.ones(2, 2)[:, 0]
        d_cls, _ = loss.backward(grad, cls, gist, None, stats, options, True, False, scale)
    forward, combine, backward = launches
    sizes = {"class_units": 1125, "stride_a": 1125, "stride_b": 1125}
    check(forward, loss._forward_kernel, (2, 3), 128, {
        "a": cls, "b": gist, "row_scale": scale, "loss": value, "terms": terms, "stats": stats,
        "partials": SOME_TENSOR, "rows": 2, "target_stride": 0, "scale_stride": 3, **sizes,
        "d_stride": 0, **scalars,
    })  # fmt: skip
    check(combine, loss._combine_kernel, (1,), 128, {
        "partials": SOME_TENSOR, "row_scale": scale, "loss": value, "terms": terms, "stats": stats,
        "rows": 2, "classes": 9000, "target_stride": 0, "scale_stride": 3, "inverse_t": 1 / 3,
        "gist_scale": 1.5, "ignore_index": -100, "weights": (1.0, 0.5, 0.75, 0.6),
    })  # fmt: skip
    assert forward.parameters[6] == combine.parameters[0]
    check(backward, loss._backward_kernel, (2, 5), 128, {
        "grad": grad, "a": cls, "b": gist, "row_scale": scale, "stats": stats, "d_a": d_cls,
        "rows": 2, "target_stride": 0, "scale_stride": 3, "grad_stride": 2, **sizes,
        "d_stride": 1125, **scalars,
    })  # fmt: skip


# ---- the divergence ----


def test_divergence():
    sides = tuple(torch.zeros(4, 100 + i)[:, :100] for i in range(3))
    scale, grad = torch.ones(4, 3)[:, 0], torch.ones(4, 2)[:, 0]
    weights, temperatures = (0.2, 0.3, 0.5), (1.0, 2.0, 4.0)
    with stub_driver.recorded() as launches:
        value, stats = divergence.forward(sides, weights, temperatures, scale)
        gradients = divergence.backward(
            grad, sides, weights, temperatures, stats, (True, False, True), scale
        )
    forward, backward = launches
    settings = {
        "classes": 100, "weights": weights, "inverse_ts": (1.0, 0.5, 0.25),
        "ratios": (1.0, 0.5, 0.25),
    }  # fmt: skip
    check(forward, divergence._forward_kernel, (4,), 128, {
        "sides": sides, "row_scale": scale, "loss": value, "stats": stats,
        "strides": (100, 101, 102), "scale_stride": 3, **settings,
    })  # fmt: skip
    to = gradients[0], sides[1], gradients[2]  # nothing is written to the second
    check(backward, divergence._backward_kernel, (4,), 128, {
        "grad": grad, "sides": sides, "row_scale": scale, "stats": stats, "gradients": to,
        "strides": (100, 101, 102), "scale_stride": 3, "grad_stride": 2, **settings,
    })  # fmt: skip


# ---- adapter and activation ----


def adapter_weights(rank: int) -> AdapterWeights:
    return AdapterWeights(
        torch.zeros(rank, 768), torch.zeros(rank), torch.zeros(768, rank), torch.zeros(768), 0.7,
        "gelu",
    )  # fmt: skip


def test_adapter_of_a_small_rank():
    """A row at a time, on 128 multiprocessors: 3 programs each forward, 2 backward."""
    x, d_out, d_normed = torch.zeros(3, 700, 768, dtype=BF16)
    norm = NormWeights(torch.ones(768, dtype=BF16), torch.zeros(768, dtype=BF16), 1e-6)
    weights, bias = adapter_weights(4), torch.zeros(768, dtype=BF16)
    with stub_driver.recorded() as launches:
        normed, out, z, stats = adapter.forward(x, x, norm, weights, bias)
        dx, d_down, d_down_bias, d_up, d_up_bias = adapter.backward(
            d_out, d_normed, x, norm, stats, weights, z, pass_through=True
        )
    forward, backward, total = launches
    check(forward, adapter._forward_kernel, (350,), 128, {
        "x": x, "down": weights.down_weight, "down_bias": weights.down_bias,
        "up": weights.up_weight, "up_bias": weights.up_bias, "bias": bias,
        "norm_weight": norm.weight, "norm_bias": norm.bias, "normed": normed, "out": out, "z": z,
        "stats": stats, "rows": 700, "feature_units": 192, "stride_x": 192, "stride_add": 0,
        "scale": 0.7, "eps": 1e-6, "each": 2,
    })  # fmt: skip
    check(backward, adapter._backward_kernel, (234,), 128, {
        "d_out": d_out, "d_normed": d_normed, "x": x, "norm_weight": norm.weight, "stats": stats,
        "down": weights.down_weight, "up": weights.up_weight, "z": z, "dx": dx, "rows": 700,
        "feature_units": 192, "stride_x": 192, "stride_out": 192, "stride_normed": 192,
        "scale": 0.7, "partials": SOME_TENSOR, "each": 3,
    })  # fmt: skip
    # 2 x 4 x 768 weights and 768 + 4 biases, 64 a program.
    check(total, adapter._sum_kernel, (109,), 128, {
        "partials": SOME_TENSOR, "d_down": d_down, "d_down_bias": d_down_bias, "d_up": d_up,
        "d_up_bias": d_up_bias, "parts": 234, "feature_units": 192,
    })  # fmt: skip
    assert backward.parameters[15] == total.parameters[0]


def test_adapter_of_a_large_rank():
    """32 rows a program; the weights' gradients 32 features and a part of the rows a program."""
    x, add, d_out = torch.zeros(3, 40, 768, dtype=BF16)
    weights = adapter_weights(64)
    with stub_driver.recorded() as launches:
        _, out, z, _ = adapter.forward(x, add, None, weights)
        dx, *gradients = adapter.backward(
            d_out, None, x, None, None, weights, z, pass_through=False
        )
    forward, backward, products, total = launches
    check(forward, adapter._forward_chunks_kernel, (2,), 256, {
        "x": x, "add": add, "down": weights.down_weight, "down_bias": weights.down_bias,
        "up": weights.up_weight, "up_bias": weights.up_bias, "out": out, "z": z, "rows": 40,
        "feature_units": 192, "stride_x": 192, "stride_add": 192, "scale": 0.7, "eps": 0.0,
    })  # fmt: skip
    check(backward, adapter._backward_chunks_kernel, (2,), 256, {
        "d_out": d_out, "x": x, "down": weights.down_weight, "up": weights.up_weight, "z": z,
        "dx": dx, "rows": 40, "feature_units": 192, "stride_x": 192, "stride_out": 192,
        "stride_normed": 0, "scale": 0.7, "dz": SOME_TENSOR,
    })  # fmt: skip
    check(products, adapter._weights_kernel, (24, 2), 256, {
        "d_out": d_out, "x": x, "z": z, "dz": SOME_TENSOR, "partials": SOME_TENSOR, "rows": 40,
        "feature_units": 192, "stride_x": 192, "stride_out": 192, "scale": 0.7, "each": 1,
    })  # fmt: skip
    down, down_bias, up, up_bias = gradients
    check(total, adapter._sum_kernel, (1549,), 128, {
        "partials": SOME_TENSOR, "d_down": down, "d_down_bias": down_bias, "d_up": up,
        "d_up_bias": up_bias, "parts": 2, "feature_units": 192,
    })  # fmt: skip


def test_activation():
    u, d_a = torch.zeros(2, 3, 1000, dtype=BF16)
    with stub_driver.recorded() as launches:
        a = activation.forward(u, "silu")
        d_u = activation.backward(d_a, u, "silu", into_d_a=True)
    assert d_u is d_a
    forward, backward = launches
    # 3,000 elements in units of 8, 1,024 a program.
    check(forward, activation._forward_kernel, (3,), 128, {"u": u, "a": a, "units": 375})
    check(
        backward, activation._backward_kernel, (3,), 128,
        {"d_a": d_a, "u": u, "d_u": d_a, "units": 375},
    )  # fmt: skip


@pytest.mark.parametrize(("width", "chunks"), [(1000, 1), (2728, 3)])
def test_gated_activation(width, chunks):
    u, d_hidden = torch.zeros(3, 2 * width, dtype=BF16), torch.zeros(3, width, dtype=BF16)
    with stub_driver.recorded() as launches:
        hidden = activation.gated_forward(u, "silu")
        d_u = activation.gated_backward(d_hidden, u, "silu")
    forward, backward = launches
    # Units of 8 columns, 1,024 columns of one row a program.
    sizes = {"units": width // 8, "chunks": chunks}
    check(
        forward, activation._gated_forward_kernel, (3 * chunks,), 128,
        {"u": u, "hidden": hidden, **sizes},
    )  # fmt: skip
    check(
        backward, activation._gated_backward_kernel, (3 * chunks,), 128,
        {"d_hidden": d_hidden, "u": u, "d_u": d_u, **sizes},
    )  # fmt: skip


# ---- attention ----


@pytest.mark.parametrize(
    ("tokens", "threads", "padded"), [(50, 128, False), (198, 256, False), (50, 128, True)]
)
def test_attention(tokens, threads, padded):
    """10 queries of 2 images and 2 heads of 64, all of a head in one program; strides in units
    of 16. Lengths are passed on where they lie: the host reads none."""
    lengths = torch.tensor([30, 5]) if padded else None
    last = {"lengths": lengths} if padded else {}
    qkv, d_qkv = torch.zeros(2, 2, tokens, 384, dtype=BF16)
    q, k, v = qkv.chunk(3, dim=-1)
    d_q, d_k, d_v = d_qkv.chunk(3, dim=-1)
    q, d_q = q[:, :10], d_q[:, :10]
    d_out = torch.zeros(2, 10, 128, dtype=BF16)
    with stub_driver.recorded() as launches:
        assert attention.serves(q, k, 2)
        out, lse = attention.forward(q, k, v, 2, 0.125, lengths=lengths)
        attention.backward(d_out, q, k, v, lse, 2, 0.125, d_q, d_k, d_v, lengths=lengths)
    forward, backward = launches
    sizes = {"queries": 10, "keys": tokens, "heads": 2}
    packed = {
        f"{name}_{kind}": tokens * 24 if kind == "batch" else 24
        for name in ("q", "k", "v")
        for kind in ("batch", "row")
    }
    check(forward, attention._forward_kernel, (4,), threads, {
        "q": q, "k": k, "v": v, "out": out, "lse": lse, **sizes, **packed, "out_batch": 80,
        "out_row": 8, "scale": 0.125, "parts": 1, "each": 1, **last,
    })  # fmt: skip
    check(backward, attention._backward_kernel, (4,), threads, {
        "d_out": d_out, "q": q, "k": k, "v": v, "lse": lse, "d_q": d_q, "d_k": d_k, "d_v": d_v,
        **sizes, "d_out_batch": 80, "d_out_row": 8, **packed,
        **{f"d_{name}": value for name, value in packed.items()}, "scale": 0.125, **last,
    })  # fmt: skip
    tile = attention._tile(q, k, 2)
    operands = 2 * 2 * tokens * 64  # keys and values
    assert operands < backward.shared <= tile.shared_memory()


@pytest.mark.parametrize("padded", [False, True])
def test_attention_by_tiles(padded):
    """As above, of more keys than a program can hold: a program per 64 queries, then one per head,
    which has scratch memory for its queries' means."""
    lengths = torch.tensor([258, 5]) if padded else None
    last = {"lengths": lengths} if padded else {}
    qkv, d_qkv = torch.zeros(2, 2, 258, 384, dtype=BF16)
    q, k, v = qkv.chunk(3, dim=-1)
    d_q, d_k, d_v = d_qkv.chunk(3, dim=-1)
    d_out = torch.zeros(2, 258, 128, dtype=BF16)
    with stub_driver.recorded() as launches:
        assert attention.serves(q, k, 2)
        out, lse = attention.forward(q, k, v, 2, 0.125, lengths=lengths)
        attention.backward(d_out, q, k, v, lse, 2, 0.125, d_q, d_k, d_v, lengths=lengths)
    forward, backward = launches
    sizes = {"queries": 258, "keys": 258, "heads": 2}
    packed = {
        f"{name}_{kind}": 258 * 24 if kind == "batch" else 24
        for name in ("q", "k", "v")
        for kind in ("batch", "row")
    }
    kernels = attention.attention_tiles
    check(forward, kernels._forward_tiles_kernel, (4 * 5,), 128, {
        "q": q, "k": k, "v": v, "out": out, "lse": lse, **sizes, **packed, "out_batch": 258 * 8,
        "out_row": 8, "scale": 0.125, **last,
    })  # fmt: skip
    check(backward, kernels._backward_tiles_kernel, (4,), 128, {
        "d_out": d_out, "q": q, "k": k, "v": v, "lse": lse, "means": SOME_TENSOR, "d_q": d_q,
        "d_k": d_k, "d_v": d_v, **sizes, "d_out_batch": 258 * 8, "d_out_row": 8, **packed,
        **{f"d_{name}": value for name, value in packed.items()}, "scale": 0.125, **last,
    })  # fmt: skip


# ---- limits ----


def test_a_launch_beyond_the_cards_limits_is_refused():
    with pytest.raises(RuntimeError, match="the stub refuses a value"):
        activation._forward_kernel[(1, 70_000)](
            *torch.zeros(2, 16), 4, "relu", 4, 1024, num_warps=4
        )
