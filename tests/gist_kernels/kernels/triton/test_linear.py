"""Matmuls with frozen weights on a GPU: what PyTorch is asked for, on tensors without memory."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gist_kernels.kernels.triton import linear

VIEWS = ("aten::t", "aten::detach", "prim::device")


class Recorded(TorchDispatchMode):
    """The operators that launch something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.name() not in VIEWS:
            self.found.append(operator)
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("onto", "dtype", "operator"),
    [
        (torch.float32, torch.float32, torch.ops.aten.addmm_.default),
        (torch.bfloat16, torch.bfloat16, torch.ops.aten.addmm_.default),
        (torch.float32, torch.bfloat16, torch.ops.aten.addmm.dtype_out),
        (torch.float32, torch.float16, torch.ops.aten.addmm.dtype_out),
    ],
)
def test_a_product_is_added_by_its_own_kernel(onto, dtype, operator):
    with FakeTensorMode():
        out = torch.empty(6, 5, dtype=onto, device="cuda")
        x, weight = (torch.empty(n, 4, dtype=dtype, device="cuda") for n in (6, 5))
        with Recorded() as recorded:
            assert linear.add_linear(out, x, weight) is out
    assert recorded.found == [operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_it_is_the_same_sum(dtype):
    out, x, weight = torch.randn(6, 5), torch.randn(6, 4), torch.randn(5, 4)
    exact = out.double() + x.to(dtype).double() @ weight.to(dtype).double().t()
    found = linear.add_linear(out, x.to(dtype), weight.to(dtype))
    assert found is out
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
