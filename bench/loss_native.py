"""The native loss against torch.compile of its log-softmax form, forward and backward, on a CPU.

    python bench/loss_native.py [--dtype float32] [--threads 2] [--instruction-set avx2]

Both sides run in turns, so that a busy machine slows both; times are medians in milliseconds, and
the ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import gist_kernels as gk
from gist_kernels.cpu import _native

SHAPES = {(32, 100): 400, (64, 1000): 300, (256, 21843): 15, (1024, 32000): 7}  # turns


def log_softmax_form(cls: torch.Tensor, gist: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    log_p, log_q = F.log_softmax(cls / 3, 1), F.log_softmax(gist / 3, 1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    kl = kl + F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return F.cross_entropy(cls, target) + 0.5 * F.cross_entropy(gist, target) + 0.75 * kl


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--instruction-set", default=_native.instruction_set())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _native.use_instruction_set(arguments.instruction_set)
    compiled = torch.compile(log_softmax_form, dynamic=False)
    print(f"{'B x C':>14} {'compiled':>10} {'ours':>10} {'ratio':>7} {'no autograd':>12}")
    for (rows, classes), turns in SHAPES.items():
        dtype = getattr(torch, arguments.dtype)
        cls = torch.randn(rows, classes).to(dtype).requires_grad_()
        gist = torch.randn(rows, classes).to(dtype).requires_grad_()
        target = torch.randint(classes, (rows,))

        def differentiated(function, inputs=(cls, gist), target=target):
            return lambda: torch.autograd.grad(function(*inputs, target), inputs)

        calls = (
            differentiated(compiled),
            differentiated(gk.gist_loss),
            lambda inputs=(cls, gist, target): gk.gist_loss_and_grad(*inputs),
        )
        for call in calls * 3:
            call()
        times = [[seconds(call) for call in calls] for _ in range(turns)]
        medians = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
        ratio = statistics.median(theirs / ours for theirs, ours, _ in times)
        print(
            f"{f'{rows} x {classes}':>14} {medians[0]:10.3f} {medians[1]:10.3f} {ratio:7.1f}"
            f" {medians[2]:12.3f}"
        )


if __name__ == "__main__":
    main()
