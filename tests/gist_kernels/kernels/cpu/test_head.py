"""A linear head's matmuls on a CPU: into memory that chunks share; what a process then takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip(
    "gist_kernels.kernels.cpu._native",
    reason="the native module was not built",
)
head = pytest.importorskip("gist_kernels.kernels.cpu.head")
linear = pytest.importorskip("gist_kernels.kernels.cpu.linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_logits_in_given_memory_have_the_bits_of_new_ones(monkeypatch, dtype, biased):
    monkeypatch.setattr(linear, "_rule", linear.rule_of("pytorch"))
    rows, weight = torch.randn(20, 30).to(dtype), torch.randn(500, 30).to(dtype)
    bias = torch.randn(500).to(dtype) if biased else None
    out = head.buffer(rows, weight)
    found = head.logits(rows, weight, bias, out)
    assert found is out
    assert torch.equal(found, head.logits(rows, weight, bias))


def test_onednn_allocates_its_own(monkeypatch):
    monkeypatch.setattr(linear, "_rule", linear.Rule(everything=True))
    monkeypatch.setattr(linear, "_has_onednn", lambda: True)
    assert head.buffer(torch.randn(20, 30), torch.randn(500, 30)) is None
    monkeypatch.setattr(linear, "_rule", linear.Rule())
    assert head.buffer(torch.randn(20, 30), torch.randn(500, 30)).shape == (20, 500)


# In a process of its own, whose heap holds nothing of other tests.
RESIDENT = """
import torch
import gist_kernels as gk
from bench.measure import peak_bytes

torch.set_num_threads(1)
rows, width, classes, chunk = 300, 96, 20000, 32
f, g = torch.randn(2, rows, width).unbind()
head = gk.HeadWeights(torch.randn(classes, width), torch.randn(classes))
target = torch.randint(classes, (rows,))
f.requires_grad_(), g.requires_grad_()

def step():
    loss = gk.linear_gist_loss(f, g, target, head, chunk_rows=chunk)
    return torch.autograd.grad(loss, (f, g))

step()
logits = 2 * chunk * classes * 4
features = 2 * rows * width * 4  # twice: the gradients and, scaled, those returned
print(max(peak_bytes(step, f.device) for _ in range(4)) / (logits + 2 * features))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_a_process_takes_the_memory_of_one_chunk():
    """The tensors' sizes do not show it: the C library may leave a freed chunk unused."""
    if linear.detail() == "float32 matmuls by oneDNN (GIST_KERNELS_MATMUL)" or linear._rule.large:
        pytest.skip("oneDNN allocates each chunk's logits")
    command = [sys.executable, "-c", RESIDENT]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.8 < float(result.stdout) <= 1.1
