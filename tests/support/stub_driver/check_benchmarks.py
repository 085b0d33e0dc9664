"""What the benchmarks of ``make gpu`` launch, of few rows: no binary depends on their number. For
``make gpu-cache``, which runs this on the stub driver; no result means anything."""

from __future__ import annotations

import pytest
import torch

import gist_kernels as gk
from bench import adapter, attention, loss, scaling, step, sweep
from bench.measure import Case

pytestmark = pytest.mark.gpu
CPU, BF16 = torch.device("cpu"), torch.bfloat16
CLASSES = {classes for _, classes in loss.SHAPES["cuda"]} | {1000, *scaling.CLASSES}
SUBLAYERS = [
    {**scaling.OTHERWISE, varied: size, "B": 2}
    for varied, sizes in scaling.SUBLAYERS.items()
    for size in sizes
]


def launch(case: Case) -> None:
    with gk.use_backend("triton"):
        for name, call in case.calls.items():
            if name.startswith("ours") and "compile" not in name:
                call()


@pytest.mark.parametrize("classes", sorted(CLASSES))
@pytest.mark.parametrize("rows", [64, 300])  # a program counts the rows itself, or another does
def test_loss(rows, classes):
    launch(loss.case(rows, classes, BF16, CPU, {}))


@pytest.mark.parametrize("shape", adapter.SHAPES["cuda"])
def test_adapter(shape):
    launch(adapter.case(64, *shape[1:], BF16, CPU))


@pytest.mark.parametrize("shape", attention.SHAPES["cuda"])
def test_attention(shape):
    launch(attention.case(2, *shape[1:], BF16, CPU))


@pytest.mark.parametrize("sizes", SUBLAYERS, ids=str)
def test_scaling(sizes):
    launch(scaling.sublayers("", sizes, BF16, CPU))


@pytest.mark.parametrize("name", sorted({name for name, _ in step.SIZES["cuda"]}))
def test_step(name):
    launch(step._case(name, 2, BF16, CPU))


@pytest.mark.parametrize("classes", sweep.CLASSES)
@pytest.mark.parametrize("kind", ["forward", "backward", "kept"])
def test_sweep(kind, classes):
    sweep.sweep(kind, classes, CPU, 300 * classes)
