"""The backend that serves a test of the public functions."""

from __future__ import annotations

import pytest

import gist_kernels as gk
from gist_kernels.kernels.triton import INTERPRETED


@pytest.fixture(
    params=[
        "reference",
        "cpu",
        pytest.param(
            "triton",
            marks=[
                pytest.mark.triton,
                # On a device, the Triton kernels' own test asks the same.
                pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"),
            ],
        ),
    ]
)
def served_by(request):
    if request.param == "triton" and request.node.get_closest_marker("float64"):
        pytest.skip("the Triton kernels take no float64")
    with gk.use_backend(request.param):
        yield request.param
