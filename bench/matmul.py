"""Matmuls with frozen weights on a CPU, by each library that could compute them.

The rule of :mod:`gist_kernels.kernels.cpu.linear` rests on these figures. They are processor time:
measure with --threads 1. "ours" is the rule's choice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.measure import Case, mismatch
from gist_kernels.kernels.cpu import linear as kernels

# Rows, inputs and outputs of each layer: ViT-S with 8 images, ViT-B with 4, the two tokens that are
# read of the last block, and low-rank updates.
SHAPES = (
    (1584, 384, 1152),
    (1584, 384, 384),
    (1584, 384, 1536),
    (1584, 1536, 384),
    (792, 768, 2304),
    (792, 768, 768),
    (792, 768, 3072),
    (792, 3072, 768),
    (16, 384, 1536),
    (16, 1536, 384),
    (1584, 384, 4),
    (1584, 4, 384),
    (1584, 384, 16),
    (1584, 16, 1536),
)


def absent(device: torch.device) -> dict[str, str]:
    return {}


def cases(device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    if device.type != "cpu" or dtype not in (None, torch.float32):
        sys.exit("matmul measures float32 on a CPU: take --device cpu, and no other --dtype")
    for sizes in SHAPES:
        for backward in (False, True):
            for adds in (False, True):
                yield case(*sizes, backward, adds)


def case(rows: int, inputs: int, outputs: int, backward: bool, adds: bool) -> Case:
    """A layer of (M, I) rows and an (O, I) weight, or the gradient of its input; onto a new tensor,
    or added to one."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs)
    if backward:
        weight = weight.t()
    x, to = torch.randn(rows, weight.shape[1]), torch.zeros(rows, weight.shape[0])
    if adds:
        calls = {
            "ours": lambda: kernels.add_linear(to, x, weight),
            "PyTorch": lambda: to.addmm_(x, weight.t()),
            "oneDNN": lambda: kernels.add_by_onednn(to, x, weight),
        }
    else:
        calls = {
            "ours": lambda: kernels.linear(x, weight, None),
            "PyTorch": lambda: F.linear(x, weight),
            "oneDNN": lambda: kernels.by_onednn(x, weight, None),
        }

    def parity() -> str | None:
        to.zero_()
        found = calls["ours"]().clone()
        return mismatch({"out": (found, x.double() @ weight.double().t())}, relative=1e-5)

    return Case(
        sizes={"M": rows, "I": inputs, "O": outputs, "backward": backward, "adds": adds},
        dtype=torch.float32,
        calls=calls,
        parity=parity,
        clock=time.process_time,
    )
