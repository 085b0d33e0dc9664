"""Wrapped models under torch.func, forward-mode differentiation and second derivatives."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from models import images, wrapped
from torch.autograd import forward_ad

import gist
import gist_kernels as gk

TARGET = torch.tensor([3, 5])
STEP = 1e-6


def differences(function, at, direction):
    """The derivative along a direction by central differences, in float64."""
    return (function(at + STEP * direction) - function(at - STEP * direction)) / (2 * STEP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("no_grad", [False, True])
def test_tangents_of_images_go_through_the_frozen_embedding(dtype, no_grad):
    pixels, direction = images().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    exact = wrapped().eval().double()
    with torch.no_grad():
        expected = differences(exact, pixels, direction).to(dtype)
    model, pixels, direction = exact.to(dtype), pixels.to(dtype), direction.to(dtype)
    tolerance = (
        {"rtol": 1e-6, "atol": 1e-6} if dtype is torch.float64 else {"rtol": 0, "atol": 1e-3}
    )
    with torch.no_grad() if no_grad else nullcontext():
        found = torch.func.jvp(model, (pixels,), (direction,))[1]
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(pixels, direction))
            tangent = forward_ad.unpack_dual(out).tangent
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(tangent, expected, **tolerance)


def test_images_one_by_one_in_vmap_are_the_batch():
    model = wrapped().eval()
    with torch.no_grad():
        found = torch.vmap(lambda one: model(one[None])[0])(images())
        torch.testing.assert_close(found, model(images()), rtol=0, atol=1e-5)


def test_hessian_products_are_right_or_refused():
    model, pixels = wrapped().train().double(), images().double()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in trained.items()}
    directions = {name: torch.randn_like(p) for name, p in fixed.items()}

    def loss(parameters):
        return gist.GistLoss()(torch.func.functional_call(model, parameters, (pixels,)), TARGET)

    gradient = torch.func.grad(loss)
    after, before = (
        gradient({name: p + sign * STEP * directions[name] for name, p in fixed.items()})
        for sign in (1, -1)
    )
    expected = {name: (after[name] - before[name]) / (2 * STEP) for name in fixed}
    found = torch.func.jvp(gradient, (fixed,), (directions,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    def by_autograd(backend):
        with gk.use_backend(backend):
            value = gist.GistLoss()(model(pixels), TARGET)
        first = torch.autograd.grad(value, list(trained.values()), create_graph=True)
        along = sum((g * d).sum() for g, d in zip(first, directions.values(), strict=True))
        return torch.autograd.grad(along, list(trained.values()))

    for ours, name in zip(by_autograd("reference"), trained, strict=True):
        torch.testing.assert_close(ours, expected[name], rtol=1e-6, atol=1e-6)
    if gk.backend.serving("sublayers", "cpu", torch.float64) != "reference":
        with pytest.raises(NotImplementedError, match=r'use_backend\("reference"\)'):
            by_autograd("auto")
