"""A selection of each family's kernels, compiled and executed, held to float64.

``make test-ptx`` runs every test of the Triton kernels so.
"""

from __future__ import annotations

import importlib

import adapter_cases
import attention_cases
import oracles
import pytest
import torch

from gist_kernels.activations import ACTIVATIONS
from gist_kernels.kernels import triton as gpu
from gist_kernels.kernels.protocols import LossOptions

pytest.importorskip("triton.backends.nvidia", exc_type=ImportError)
from ptx import UnsupportedError
from ptx.driver import executed

loss, divergence, adapter, activation, attention = (
    importlib.import_module(f"gist_kernels.kernels.triton.{name}")
    for name in ("loss", "divergence", "adapter", "activation", "attention")
)
pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="TRITON_INTERPRET=1 compiles nothing")
OPTIONS = LossOptions(3.0, 1.0, 0.5, 0.75, 0.6, 0.0, -100, "mean")
ARCHITECTURES = (80, 90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
# Many rows a program, a row a program, a row in chunks.
@pytest.mark.parametrize(("rows", "classes"), [(40, 10), (3, 600), (1, 8200)])
def test_loss(rows, classes, arch, dtype):
    a, b = (3 * torch.randn(2, rows, classes)).to(dtype)
    target = torch.randint(classes, (rows,))
    exact = [x.double().requires_grad_() for x in (a, b)]
    terms = [each.mean() for each in oracles.log_softmax_terms(*exact, target, 3.0)]
    total = sum(w * t for w, t in zip(OPTIONS[1:5], terms, strict=True))
    gradients = torch.autograd.grad(total, exact)
    with executed(arch, seed=rows):
        value, found, stats = loss.forward(a, b, target, OPTIONS)
        apart = loss.backward(None, a, b, target, stats, OPTIONS, True, True)
        at_once = loss.forward_backward(a, b, target, OPTIONS)
        over_them = loss.forward_backward(a.clone(), b.clone(), target, OPTIONS, in_place=True)
    torch.testing.assert_close(value.double(), total.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.double(), torch.stack(terms).detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(at_once[0].double(), total.detach(), rtol=2e-6, atol=2e-6)
    assert all(torch.equal(x, y) for x, y in zip(at_once, over_them, strict=True))
    for pair in (apart, at_once[1:]):
        for x, y in zip(pair, gradients, strict=True):
            torch.testing.assert_close(x, y.to(dtype), rtol=torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("classes", [17, 9000])
def test_divergence(classes, arch):
    sides = [3 * torch.randn(2, classes) for _ in range(3)]
    settings = (0.2, 0.3, 0.5), (1.0, 2.0, 0.7)
    grad = torch.tensor([1.0, -3.0])
    exact = [side.double().requires_grad_() for side in sides]
    truth = oracles.jensen_shannon_rows(exact, *settings)
    gradients = torch.autograd.grad(truth, exact, grad.double())
    with executed(arch, seed=1):
        rows, stats = divergence.forward(sides, *settings, None)
        found = divergence.backward(grad, sides, *settings, stats, (True,) * 3, None)
        over = [side.clone() for side in sides]
        over = divergence.backward(grad, over, *settings, stats, (True,) * 3, None, in_place=True)
    assert all(torch.equal(x, y) for x, y in zip(found, over, strict=True))
    torch.testing.assert_close(rows.double(), truth.detach(), rtol=1e-5, atol=1e-6)
    for x, y in zip(found, gradients, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("rows", "width", "rank", "dtype"),
    # Summed in registers, of several rows a program; by tensor cores.
    [(40, 24, 4, torch.float32), (9, 100, 8, torch.bfloat16), (33, 48, 33, torch.float32)],
)
def test_adapter(rows, width, rank, dtype, monkeypatch):
    monkeypatch.setattr(adapter.launch, "multiprocessors", lambda device: 1)
    case = adapter_cases.make(rows, width, rank, dtype=dtype)
    with executed(80, seed=0):
        adapter_cases.assert_close(case, adapter_cases.computed(adapter, case))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation(kind):
    u, d_a = torch.randn(2, 1100)
    exact = u.double().requires_grad_()
    truth = ACTIVATIONS[kind](exact)
    (gradient,) = torch.autograd.grad(truth, exact, d_a.double())
    with executed(80):
        found, back = activation.forward(u, kind), activation.backward(d_a, u, kind)
    torch.testing.assert_close(found.double(), truth.detach(), rtol=5e-7, atol=2e-6)
    torch.testing.assert_close(back.double(), gradient, rtol=5e-7, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(3, 1100), (40, 9)])
def test_gated_activation(rows, width, dtype):
    u, d_hidden = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    exact = u.double().requires_grad_()
    gate, value = exact.chunk(2, dim=1)
    truth = ACTIVATIONS["silu"](gate) * value
    (gradient,) = torch.autograd.grad(truth, exact, d_hidden.double())
    with executed(80):
        found = activation.gated_forward(u, "silu")
        back = activation.gated_backward(d_hidden, u, "silu")
    rtol = max(1e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(found.double(), truth.detach(), rtol=rtol, atol=1e-5)
    torch.testing.assert_close(back.double(), gradient, rtol=rtol, atol=4e-5)


def test_attention():
    with executed(80, seed=0):
        shape = attention_cases.Shape(1, 2, 40, 50, 32)
        attention_cases.check(attention, shape, "random", torch.bfloat16, "cpu")


def test_attention_by_tiles(monkeypatch):
    """As on sm_80, where copies into shared memory are asynchronous."""
    tiles = attention.heuristics.AttentionTiles(columns=16, stages=2)
    monkeypatch.setattr(attention, "_tile", lambda *sizes: tiles)
    with executed(80, seed=0):
        shape = attention_cases.Shape(1, 1, 33, 40, 16)
        attention_cases.check(attention, shape, "random", torch.bfloat16, "cpu")


def test_what_needs_instructions_of_sm_90_alone_is_refused():
    shape = attention_cases.Shape(1, 1, 64, 64, 64)
    with pytest.raises(UnsupportedError, match="fence.proxy.async|wgmma"), executed(90):
        attention_cases.check(attention, shape, "random", torch.bfloat16, "cpu")
