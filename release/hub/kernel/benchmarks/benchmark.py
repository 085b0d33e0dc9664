"""``kernels benchmark``: losses and their gradients, against PyTorch's log-softmax in float32.

What is compared is both sides' gradients. ``kernels benchmark`` checks them to 1e-2, so they are
those of the sum over rows: each is then of the size of a probability.
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class LossBenchmark(Benchmark):
    seed = 0

    def _draw(self, rows: int, classes: int) -> None:
        self.logits = [
            (3 * torch.randn(rows, classes, device=self.device)).requires_grad_() for _ in range(2)
        ]
        self.target = torch.randint(classes, (rows,), device=self.device)

    def _gradients(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.stack(torch.autograd.grad(loss, self.logits))

    def setup_gist_loss(self) -> None:
        self._draw(256, 1000)

    def benchmark_gist_loss(self) -> None:
        loss = self.kernel.gist_loss(*self.logits, self.target, reduction="sum")
        self.out = self._gradients(loss)

    def verify_gist_loss(self) -> torch.Tensor:
        cls, gist = self.logits
        entropy = F.cross_entropy(cls, self.target, reduction="sum")
        entropy = entropy + 0.5 * F.cross_entropy(gist, self.target, reduction="sum")
        return self._gradients(entropy + 0.75 * _both_ways(cls / 3, gist / 3))

    def setup_bidirectional_kl(self) -> None:
        self._draw(1024, 32_000)

    def benchmark_bidirectional_kl(self) -> None:
        self.out = self._gradients(self.kernel.bidirectional_kl(*self.logits, reduction="sum"))

    def verify_bidirectional_kl(self) -> torch.Tensor:
        return self._gradients(_both_ways(*self.logits))


def _both_ways(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    log_p, log_q = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()
