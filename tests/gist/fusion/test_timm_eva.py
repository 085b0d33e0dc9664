"""timm's Eva as fused sublayers against its own forward."""

from __future__ import annotations

import pytest
import torch
from fused_cases import CONFIGS, compare_with_own_forward, results
from models import EVAS, backbone, images, wrapped

import gist

# timm reads the weight of a packed layer with separate biases, so that no hook of it would run.
UNHOOKED = [
    name for name in EVAS if getattr(backbone(name).blocks[0].attn, "q_bias", None) is not None
]
OF_LAYERS = ("lora", "ssf", "fact", "fact, tk", "biases, norms, adapter, keys")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        (name, config)
        for name in EVAS
        for config in ("gist", "lora")
        if not (config in OF_LAYERS and name in UNHOOKED)
    ],
)
def test_gives_what_the_backbones_own_forward_gives(name, config, dtype, own_forward):
    compare_with_own_forward(name, config, dtype, own_forward)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (name, config)
        for name in EVAS
        for config in CONFIGS
        if "prompts" not in config
        and not (config in OF_LAYERS and name in UNHOOKED)
        and not (config == "difffit" and "inner norm" in name)  # which it trains
    ],
)
def test_is_the_same_function_in_float64(name, config, own_forward):
    """Whatever the kernels round, blocks are read right: weights, order, positions, scales."""
    model = wrapped(name, CONFIGS[config]).double()
    pixels = images(2).double()
    for training in (True, False):
        model.train(training)
        assert "own forward" not in gist.explain(model)
        fused = results(model, pixels)
        with own_forward():
            assert "fused" not in gist.explain(model)
            plain = results(model, pixels)
        assert fused[1].keys() == plain[1].keys()
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)
