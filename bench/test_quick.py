"""The small, stable cases under pytest-benchmark, to compare one state of the code with another.

make bench-quick                            # saves its figures under runs/bench-quick
make bench-quick ARGS=--benchmark-compare   # and shows them beside the last saved ones
"""

from __future__ import annotations

import pytest
import torch

import gist_kernels as gk
from bench import loss

DEVICE = torch.device("cpu")
SHAPES = ((32, 100), (64, 1000), (256, 21843))


@pytest.mark.parametrize("contender", ["ours", "ours, no autograd", "log-softmax"])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_loss(benchmark, rows, classes, contender):
    peers = {"log-softmax": loss.log_softmax_form}
    case = loss.case(rows, classes, torch.float32, DEVICE, peers)
    assert case.parity() is None
    benchmark.group = f"loss {rows} x {classes}"
    benchmark(case.calls[contender])


@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_bidirectional_kl(benchmark, rows, classes):
    a, b = torch.randn(2, rows, classes).unbind()
    a.requires_grad_(), b.requires_grad_()
    benchmark.group = f"loss {rows} x {classes}"
    benchmark(lambda: torch.autograd.grad(gk.bidirectional_kl(a, b, temperature=3.0), (a, b)))


def test_adapter(benchmark):
    x = torch.randn(8, 198, 384, requires_grad=True)
    weights = [torch.randn(*shape) * 0.02 for shape in ((4, 384), (4,), (384, 4), (384,))]
    for weight in weights:
        weight.requires_grad_()
    benchmark.group = "adapter 8 x 198 x 384"
    benchmark(lambda: torch.autograd.grad(gk.adapter(x, *weights).sum(), (x, *weights)))
