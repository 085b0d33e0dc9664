"""Sublayers without a norm before them, and over padded rows, as post-norm blocks use them."""

from __future__ import annotations

import backends
import pytest
import torch
import torch.nn.functional as F
from sublayer_cases import DROPPED, arguments, compare, normal, update

import gist_kernels as gk

LENGTHS = torch.tensor([7, 19])
CASES = [
    ("attention", {}),
    ("attention", {"num_queries": 2}),
    ("attention", {"grad_tokens": (1, 2), "drop_path": DROPPED}),
    ("attention", {"lengths": LENGTHS}),
    ("attention", {"lengths": LENGTHS, "num_queries": 9}),
    ("attention", {"lengths": LENGTHS, "grad_tokens": (6, 2)}),
    ("mlp", {}),
    ("gated, normed mlp", {"drop_path": DROPPED}),
]


@pytest.mark.parametrize("backend", backends.serving("sublayers"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_adapter", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_value_and_every_gradient(name, options, with_adapter, dtype, backend):
    device = backends.device_of(backend)
    if not backends.takes(backend, dtype):
        backend = "auto"  # what serves such a call
    interpreted = backend == "triton" and device == "cpu"  # which takes a second a draw
    draws = 1 if dtype is torch.float64 else 2 if interpreted else 16
    if "lengths" in options:
        options = options | {"lengths": LENGTHS.to(device)}
    compare(
        name, dtype, options, backend, draws, device=device, with_norm=False,
        with_adapter=with_adapter, layer_scale=not with_adapter,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [o for _, o in CASES if "lengths" in o])
def test_lengths_behind_a_norm(options, dtype):
    compare("attention", dtype, options, draws=16)


def everything_trained(name, options):
    """A sublayer's result and all gradients, with updates and biases trained, in float64."""
    torch.manual_seed(4)
    x, norm, attention, mlp, adapter = arguments(torch.float64, with_norm=False, hidden=80)
    of_first, of_last = (144, 48), (48, 48 if name == "attention" else 80)
    if name == "mlp":
        of_first = (80, 48)
    first, last = (update(*shape, torch.float64, "cpu", 3, True) for shape in (of_first, of_last))
    weights = attention if name == "attention" else mlp
    names = ("qkv", "proj") if name == "attention" else ("fc1", "fc2")
    weights = weights._replace(
        **{f"{n}_update": u for n, u in zip(names, (first, last), strict=True)}
    )
    biases = [getattr(weights, f"{n}_bias") for n in names]
    leaves = [x, *adapter[:4], *first, *last, *biases]
    for leaf in leaves:
        leaf.requires_grad_()
    call = gk.adapter_attention if name == "attention" else gk.adapter_mlp
    out = call(x, norm, weights, adapter, **options)
    upstream = normal(*out.shape)
    return out.detach(), torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize(
    ("name", "options"), [case for case in CASES if case[0] in ("attention", "mlp")]
)
def test_all_that_may_be_trained(name, options):
    with gk.use_backend("reference"):
        expected = everything_trained(name, options)
    torch.testing.assert_close(everything_trained(name, options), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"num_queries": 3}])
def test_full_lengths_give_the_bits_of_none(options):
    x, norm, attention, _, adapter = arguments(torch.float32)
    expected = gk.adapter_attention(x, norm, attention, adapter, **options)
    found = gk.adapter_attention(
        x, norm, attention, adapter, lengths=torch.tensor([19, 19]), **options
    )
    assert torch.equal(found, expected)


def test_another_rows_padding_changes_nothing():
    x, _, attention, _, adapter = arguments(torch.float32)
    padded = x.clone()
    padded[0, 7:] = 100 * torch.randn(12, 48)
    found, expected = (
        gk.adapter_attention(t, None, attention, adapter, lengths=LENGTHS) for t in (padded, x)
    )
    torch.testing.assert_close(found[0, :7], expected[0, :7], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_is_eager(autocast):
    x, _, attention, mlp, adapter = arguments(torch.float32)
    x.requires_grad_()

    def block(x, lengths):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            x = gk.adapter_attention(x, None, attention, adapter, lengths=lengths)
            x = gk.adapter_mlp(F.layer_norm(x, (48,)), None, mlp, adapter)
            return gk.adapter_attention(x, None, attention, num_queries=2, lengths=lengths)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found, expected = (
        (out := call(x, LENGTHS), torch.autograd.grad(out.float().square().sum(), x)[0])
        for call in (compiled, block)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_lengths_are_checked():
    x, norm, attention, *_ = arguments(torch.float32)
    for wrong, message in (
        (torch.tensor([7.0, 19.0]), "lengths must be int32 or int64"),
        (torch.tensor([7]), r"lengths must have shape .* of x"),
        (torch.tensor([0, 19]), r"lengths\[0\] is 0; it must be in \[1, 19\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            gk.adapter_attention(x, norm, attention, lengths=wrong)


def test_lengths_that_change_before_backward_are_noticed():
    x, norm, attention, *_ = arguments(torch.float32)
    if gk.backend.serving("sublayers", "cpu", torch.float32) == "reference":
        pytest.skip("no backend serves the sublayers here")
    lengths = LENGTHS.clone()
    out = gk.adapter_attention(x.requires_grad_(), norm, attention, lengths=lengths)
    lengths += 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation after forward"):
        out.sum().backward()


def test_they_make_up_a_layer_of_bert():
    """Its output and the gradient of its input, over padded rows, in float64."""
    modeling = pytest.importorskip("transformers.models.bert.modeling_bert")
    config = modeling.BertConfig(
        hidden_size=48, num_attention_heads=3, intermediate_size=80, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    layer = modeling.BertLayer(config).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    attention, output = layer.attention.self, layer.attention.output
    qkv = [attention.query, attention.key, attention.value]
    weights = gk.AttentionWeights(
        torch.cat([x.weight for x in qkv]), torch.cat([x.bias for x in qkv]),
        output.dense.weight, output.dense.bias, 3,
    )  # fmt: skip
    first, last = layer.intermediate.dense, layer.output.dense
    mlp = gk.MlpWeights(first.weight, first.bias, last.weight, last.bias)

    def normed(x, norm):
        return F.layer_norm(x, (48,), norm.weight, norm.bias, norm.eps)

    def ours(x):
        x = normed(gk.adapter_attention(x, None, weights, lengths=LENGTHS), output.LayerNorm)
        return normed(gk.adapter_mlp(x, None, mlp), layer.output.LayerNorm)

    def theirs(x):
        mask = (torch.arange(19) < LENGTHS[:, None]).double()
        found = layer(x, (1 - mask[:, None, None]) * torch.finfo(torch.float64).min)
        return found[0] if isinstance(found, tuple) else found

    x = normal(2, 19, 48, spread=1.0).requires_grad_()
    upstream = normal(2, 19, 48)
    upstream[0, 7:] = 0
    results = []
    for call in (ours, theirs):
        out = call(x)
        (gradient,) = torch.autograd.grad(out, x, upstream)
        results.append((out[0, :7], out[1], gradient[0, :7], gradient[1]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
