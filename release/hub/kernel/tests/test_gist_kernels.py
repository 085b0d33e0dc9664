"""The kernel as it is loaded: by its repository's name, or ``LOCAL_KERNELS=REPO=FOLDER``."""

import kernels
import pytest
import torch
import torch.nn.functional as F

gist_kernels = kernels.get_kernel("OWNER/gist-kernels", version=0, trust_remote_code=True)


def draw(device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [(3 * torch.randn(33, 101, device=device)).requires_grad_() for _ in range(2)]


def both_ways(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    log_p, log_q = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def assert_same(logits: list[torch.Tensor], loss: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(loss, expected)
    values = loss, expected
    gradients = [torch.autograd.grad(value, logits, retain_graph=True) for value in values]
    torch.testing.assert_close(*gradients)


@pytest.mark.kernels_ci
def test_gist_loss(device: torch.device) -> None:
    cls, gist = logits = draw(device)
    target = torch.randint(101, (33,), device=device)
    kl = both_ways(cls / 3, gist / 3).mean()
    expected = F.cross_entropy(cls, target) + 0.5 * F.cross_entropy(gist, target) + 0.75 * kl
    assert_same(logits, gist_kernels.gist_loss(cls, gist, target), expected)
    assert_same(logits, gist_kernels.layers.GistLoss()(cls, gist, target), expected)


@pytest.mark.kernels_ci
def test_bidirectional_kl(device: torch.device) -> None:
    logits = draw(device)
    expected = both_ways(*logits).mean()
    assert_same(logits, gist_kernels.bidirectional_kl(*logits), expected)
    assert_same(logits, gist_kernels.layers.BidirectionalKL()(*logits), expected)


@pytest.mark.kernels_ci
def test_jensen_shannon(device: torch.device) -> None:
    logits = draw(device)
    p, q = (side.softmax(-1) for side in logits)
    mixture = ((p + q) / 2).log()
    expected = sum((side * (side.log() - mixture)).sum(-1).mean() / 2 for side in (p, q))
    assert_same(logits, gist_kernels.jensen_shannon(*logits), expected)
    assert_same(logits, gist_kernels.layers.JensenShannon()(*logits), expected)


@pytest.mark.kernels_ci
def test_triton_serves_a_gpu(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("no CUDA or ROCm device")
    assert gist_kernels.backends()["triton"].available
