"""The linear losses' benchmark: what its contenders compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import gist_kernels as gk
from bench import linear_loss


@pytest.mark.skipif(not linear_loss.HAS_CROSS_ENTROPY, reason="PyTorch has no such function")
@pytest.mark.parametrize("trained", [True, False])
def test_linear_cross_entropy_is_both_sides_cross_entropy(trained):
    f, g = torch.randn(2, 6, 5).unbind()
    head = gk.HeadWeights(torch.randn(7, 5, requires_grad=trained), torch.randn(7))
    target = torch.randint(7, (6,))
    inputs = [t for t in (f.requires_grad_(), g.requires_grad_(), head.weight) if t.requires_grad]
    found = linear_loss.cross_entropies(4)(f, g, target, head)
    expected = sum(F.cross_entropy(F.linear(x, *head), target) for x in (f, g)) / 2
    torch.testing.assert_close(found, expected)
    for x, y in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("trained", [True, False])
def test_every_contender_runs_and_ours_is_right(trained):
    peers = linear_loss.peers()
    del peers["torch.compile"]
    case = linear_loss.case(256, 5, 30, trained, torch.float32, torch.device("cpu"), peers)
    assert case.parity() is None
    assert len(case.calls) == 2 + len(peers)
    for call in case.calls.values():
        call()
