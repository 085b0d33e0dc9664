"""How much a training step launches: test_stub_driver.py runs this in a process of its own, on the
stub driver.

Each launch costs a GPU's host some microseconds, which bound the step of a small batch. So these
numbers may fall, and must not grow. PyTorch's operators are counted as it runs them on a CPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from models import backbone, images
from torch.profiler import ProfilerActivity, profile

import gist
import gist_kernels as gk
import stub_driver

# They launch nothing themselves: they allocate, view, or call others.
PASSED_OVER = {
    f"aten::{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "new_empty", "resize_", "set_", "result_type"),
        *("alias", "as_strided", "detach", "detach_", "expand", "expand_as", "flatten", "permute"),
        *("_unsafe_view", "_reshape_alias", "reshape", "select", "slice", "split", "chunk", "t"),
        *("split_with_sizes", "squeeze", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
        *("view_as", "narrow", "mT", "numpy_T", "lift_fresh", "is_neg", "resolve_neg"),
        *("resolve_conj", "linear", "matmul", "to", "dropout", "conv2d", "layer_norm"),
        *(
            "contiguous",
            "type_as",
            "native_dropout",
            "_nnpack_available",
            "ones_like",
            "zeros_like",
        ),
        *("zeros", "ones", "new_zeros", "new_ones", "new_full", "full", "full_like", "item"),
    )
}


def launched(event: Any) -> list[str]:
    """The operators under a profiler's event, itself included, that a GPU would launch."""
    if event.name.startswith("aten::") and event.name not in PASSED_OVER:
        return [event.name]
    return [name for child in event.cpu_children for name in launched(child)]


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Not here: it would add operators."""


@pytest.mark.parametrize(
    ("dtype", "autocast", "triton", "pytorch"),
    [(torch.bfloat16, False, 125, 198), (torch.float32, True, 125, 255)],
    ids=["bf16", "autocast"],
)
def test_a_step_of_12_blocks(dtype, autocast, triton, pytorch):
    config = gist.GistConfig(gist.Adapter(rank=4), token_dropout=0.0)
    model = gist.wrap(backbone(depth=12), config).to(dtype).train()
    pixels, target = images(4).to(dtype), torch.arange(4)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = gist.GistLoss()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(model(pixels), target)
        return torch.autograd.grad(value, trained)

    with gk.use_backend("triton"), gk.cached_casts():
        step()
        with (
            stub_driver.recorded() as launches,
            profile(activities=[ProfilerActivity.CPU]) as trace,
        ):
            step()
    tops = [event for event in trace.events() if event.cpu_parent is None]
    operators = Counter(name for event in tops for name in launched(event))
    assert len(launches) == triton, Counter(launch.name for launch in launches)
    if torch.__version__ >= "2.14":  # older ones call other operators
        assert operators.total() <= pytorch, operators.most_common()
