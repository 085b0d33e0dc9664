"""Models made for their structure only."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gist.backbones.meta import structure_only


class InPlace(TorchDispatchMode):
    """Counts operators that write to a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.is_mutable
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_the_structure_is_there_and_nothing_is_initialised(name):
    with torch.device("meta"):
        plain = timm.create_model(name)
    torch.manual_seed(3)
    with InPlace() as writes, structure_only():
        model = timm.create_model(name)
    drawn = torch.rand(4)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))
    assert writes.count == 0
    assert repr(model) == repr(plain)
    expected, found = plain.state_dict(), model.state_dict()
    assert list(found) == list(expected)
    for key, tensor in found.items():
        assert tensor.is_meta, key
        assert (tensor.shape, tensor.dtype) == (expected[key].shape, expected[key].dtype), key


def test_what_is_no_meta_tensor_is_written_to():
    with structure_only():
        tensor = torch.ones(3, device="cpu").mul_(2)
        torch.nn.init.zeros_(tensor[1:])
    assert tensor.tolist() == [2, 0, 0]
