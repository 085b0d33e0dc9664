"""The patch embedding as a product against timm's own forward."""

from __future__ import annotations

import pytest
import torch
from timm.layers import PatchEmbed
from torch import nn

from gist.fusion import patch_embedding
from gist.fusion.patch_embedding import embed_patches

PLAIN = {"img_size": 24, "patch_size": 8, "embed_dim": 20}


@pytest.fixture
def products(monkeypatch):
    """How often the product ran."""
    linear = pytest.importorskip("gist_kernels.kernels.cpu.linear")
    counted = []

    def counting(*arguments, by=linear.linear):
        counted.append(arguments)
        return by(*arguments)

    monkeypatch.setattr(linear, "linear", counting)
    return counted


def pixels(*size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (24, 24)),
        ({"bias": False}, (24, 24)),
        ({"norm_layer": nn.LayerNorm}, (24, 24)),
        ({"patch_size": (4, 8)}, (24, 24)),
        ({"img_size": None}, (16, 40)),
        ({"strict_img_size": False}, (16, 40)),
        ({"strict_img_size": False, "output_fmt": "NHWC"}, (16, 40)),
    ],
)
def test_a_plain_embedding_is_one_product(options, size, products):
    module = PatchEmbed(**{**PLAIN, **options}).requires_grad_(False)
    images = pixels(*size).transpose(0, 1).contiguous().transpose(0, 1)  # strided
    with torch.no_grad():
        found, by_timm = embed_patches(module, images), module(images)
        exact = module.double()(images.double())
    assert len(products) == 1
    assert found.shape == by_timm.shape
    error = (found - exact).abs().max()
    assert error <= 2 * (by_timm - exact).abs().max() + 4e-7


@pytest.mark.parametrize(
    ("options", "size", "dtype"),
    [
        ({"dynamic_img_pad": True, "strict_img_size": False}, (20, 20), torch.float32),
        ({"output_fmt": "NCHW", "flatten": False}, (24, 24), torch.float32),
        ({}, (24, 24), torch.bfloat16),
        ({}, (24, 24), torch.float64),
    ],
)
def test_others_run_by_their_own_forward(options, size, dtype, products):
    module = PatchEmbed(**{**PLAIN, **options}).to(dtype).requires_grad_(False)
    images = pixels(*size, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(embed_patches(module, images), module(images))
    assert not products


def test_a_trained_or_hooked_embedding_runs_by_its_own_forward(products):
    module, images = PatchEmbed(**PLAIN), pixels(24, 24)
    embed_patches(module, images).sum().backward()
    assert module.proj.weight.grad is not None
    seen = []
    module.proj.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        embed_patches(module, images)
    assert seen
    assert not products


@pytest.mark.parametrize("size", [(24, 32), (20, 20)])
def test_a_wrong_size_gets_timms_error(size):
    module = PatchEmbed(**PLAIN)
    with torch.no_grad(), pytest.raises(AssertionError, match="doesn't match model"):
        embed_patches(module, pixels(*size))


def test_the_model_embeds_by_it(products, monkeypatch):
    from models import images, wrapped

    model = wrapped().eval()
    calls = []
    monkeypatch.setattr(
        "gist.fusion.timm_vit.embed_patches",
        lambda *a: calls.append(1) or patch_embedding.embed_patches(*a),
    )
    model(images())
    assert calls
    assert products


def test_a_compiled_plain_embedding_is_one_product_too():
    module, images = PatchEmbed(**PLAIN).requires_grad_(False), pixels(24, 24)
    called = []

    def note(graph, _):
        called.extend(getattr(node.target, "__name__", "") for node in graph.graph.nodes)
        return graph.forward

    call = torch.compile(embed_patches, fullgraph=True, backend=note)
    with torch.no_grad():
        found, by_timm = call(module, images), module(images)
        exact = module.double()(images.double())
    assert "linear" in called
    assert "conv2d" not in called
    assert (found - exact).abs().max() <= 2 * (by_timm - exact).abs().max() + 4e-7
