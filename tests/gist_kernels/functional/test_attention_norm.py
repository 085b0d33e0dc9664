"""adapter_attention with a frozen norm of what the projection reads (EVA-02's CLIP, BEiT-3)."""

from __future__ import annotations

import backends
import pytest
import torch
from sublayer_cases import arguments, compare, update

import gist_kernels as gk

DROPPED = torch.tensor([[[0.0]], [[2.0]]])
OPTIONS = [
    {},
    {"num_queries": 2},
    {"grad_tokens": (1, 1)},
    {"num_queries": 2, "grad_tokens": (1, 1)},
    {"drop_path": DROPPED.double(), "lengths": torch.tensor([19, 7])},
]


@pytest.mark.parametrize("backend", backends.serving("sublayers", reference=True))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS[:4])
def test_value_and_every_gradient(options, dtype, backend):
    device = backends.device_of(backend)
    if not backends.takes(backend, dtype):
        backend = "auto"  # what serves such a call
    draws = 1 if dtype is torch.float64 else 4
    compare("attention", dtype, options, backend, draws, device=device, attention_norm=True)


@pytest.mark.float64
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_all_that_is_trained(options):
    x, norm, attention, _, adapter = arguments(
        torch.float64, tokens=19, width=6, heads=2, rank=2, attention_norm=True, layer_scale=True
    )
    updates = (
        update(18, 6, torch.float64, "cpu", rank=2, scale=True),
        update(6, 6, torch.float64, "cpu", rank=2, scale=True),
    )
    leaves = [x, norm.weight, norm.bias, attention.qkv_bias, attention.proj_bias, *adapter[:4]]
    leaves += [t for each in updates for t in each]
    upstream = torch.randn_like(x[:, : options.get("num_queries")])

    def found(backend):
        own = attention._replace(qkv_update=updates[0], proj_update=updates[1])
        with gk.use_backend(backend):
            out = gk.adapter_attention(x, norm, own, adapter, **options)
        return out.detach(), torch.autograd.grad(out, leaves, upstream)

    for leaf in leaves:
        leaf.requires_grad_()
    torch.testing.assert_close(found("auto"), found("reference"), rtol=1e-9, atol=1e-10)


def test_it_is_compiled():
    x, norm, attention, _, adapter = arguments(torch.float64, attention_norm=True)
    call = torch.compile(gk.adapter_attention, backend="eager", fullgraph=True)
    expected = gk.adapter_attention(x, norm, attention, adapter)
    torch.testing.assert_close(call(x, norm, attention, adapter), expected, rtol=1e-9, atol=1e-10)


def test_a_norm_that_changes_before_backward_is_noticed():
    x, norm, attention, _, adapter = arguments(torch.float32, attention_norm=True)
    out = gk.adapter_attention(x.requires_grad_(), norm, attention, adapter)
    attention.norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="a frozen weight of a sublayer"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        (torch.ones(48), TypeError, "attention.norm must be a gist_kernels.NormWeights"),
        (gk.NormWeights(None, None, 0.0), ValueError, "attention.norm.eps"),
        (gk.NormWeights(torch.ones(6), None, 1e-6), ValueError, r"attention.norm.weight must have"),
        (
            gk.NormWeights(None, torch.ones(48, requires_grad=True), 1e-6),
            ValueError, "attention.norm.bias requires a gradient, but is frozen here",
        ),
    ],
)  # fmt: skip
def test_a_bad_norm_is_named(norm, error, message):
    x, before, attention, _, adapter = arguments(torch.float32)
    with pytest.raises(error, match=message):
        gk.adapter_attention(x, before, attention._replace(norm=norm), adapter)
