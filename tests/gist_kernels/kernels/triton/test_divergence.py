"""The Triton kernels of the Jensen-Shannon divergence: what they move, and rows of every length.
The public function's own tests hold their values to float64."""

from __future__ import annotations

import importlib

import oracles
import pytest
import torch

from gist_kernels.kernels import triton as gpu

pytest.importorskip("triton.language")
divergence = importlib.import_module("gist_kernels.kernels.triton.divergence")

DEVICE = gpu.DEVICE_TYPES[0]
pytestmark = pytest.mark.triton
interpreter_only = pytest.mark.skipif(not gpu.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@interpreter_only
@pytest.mark.parametrize(("classes", "sides"), [(100, 2), (1000, 3), (4096, 2), (9000, 2)])
def test_traffic(classes, sides):
    """Forward reads each logit once, or twice where a row is too long; backward reads it once and
    writes its gradient. Of masked rows the gradient alone is touched."""
    traffic = importlib.import_module("bench.traffic")
    long = classes > 4096
    found = traffic.measure_divergence(4, classes, sides)
    assert found["forward"][0] == sides * (2 if long else 1)
    assert found["backward"][0] == 2 * sides
    if classes >= 1000:
        assert found["forward"][1] <= 1.05 * found["forward"][0]
        assert found["backward"][1] <= 1.05 * found["backward"][0]
    masked = traffic.measure_divergence(4, classes, sides, torch.tensor([0.0, 1.0, 0.0, 2.0]))
    assert masked["forward"][0] == sides * (1 if long else 0.5)
    assert masked["backward"][0] == 1.5 * sides
    # As a linear head's loss calls it: nothing is moved on top.
    assert traffic.measure_divergence(4, classes, sides, in_place=True) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 17, 4096, 4097, 9000])
def test_rows_of_every_length(classes, dtype):
    sides = [(3 * torch.randn(2, classes)).to(DEVICE, dtype) for _ in range(3)]
    settings = (0.2, 0.3, 0.5), (1.0, 2.0, 0.7)
    scale = torch.tensor([0.5, 2.0], device=DEVICE)
    rows, stats = divergence.forward(sides, *settings, scale)
    grad = torch.tensor([1.0, -3.0], device=DEVICE)
    needs = (True, False, True)
    found = divergence.backward(grad, sides, *settings, stats, needs, scale)
    exact = [side.double().requires_grad_() for side in sides]
    truth = oracles.jensen_shannon_rows(exact, *settings) * scale
    gradients = torch.autograd.grad(truth, exact, grad.double())
    torch.testing.assert_close(rows.double(), truth.detach(), rtol=1e-5, atol=1e-6)
    assert found[1] is None
    for x, y in ((found[0], gradients[0]), (found[2], gradients[2])):
        torch.testing.assert_close(x, y.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@interpreter_only
def test_a_nan_and_masked_classes_of_a_long_row():
    sides = [torch.randn(3, 9000) for _ in range(2)]
    sides[0][0, 8000] = torch.nan
    sides[0][1, :5000] = sides[1][1, 4000:] = -torch.inf  # blocks that one side masks whole
    settings = (0.5, 0.5), (1.0, 1.0)
    rows, stats = divergence.forward(sides, *settings, None)
    assert rows[0].isnan()
    low = [side[1:2].clamp_min(-1e4).double() for side in sides]
    exact = oracles.jensen_shannon_rows(low, *settings)
    torch.testing.assert_close(rows[1:2].double(), exact, rtol=1e-5, atol=0)
    gradients = divergence.backward(torch.ones(3), sides, *settings, stats, (True, True), None)
    assert all(d[1:].isfinite().all() for d in gradients)
