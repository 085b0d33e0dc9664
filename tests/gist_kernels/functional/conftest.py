"""Fixtures of the public operations' tests."""

from __future__ import annotations

import backends
import pytest
import torch

import gist_kernels as gk


# For tensors on a GPU, the Triton kernels' own tests ask the same.
@pytest.fixture(params=backends.serving("loss", device="cpu", reference=True))
def served_by(request):
    """Serve every call by one backend, the reference included."""
    wide = request.node.get_closest_marker("float64")
    if wide and not backends.takes(request.param, torch.float64):
        pytest.skip(f"{request.param} takes no float64")
    with gk.use_backend(request.param):
        yield request.param
