"""Sublayers as one node each: every backend against the equations in float64."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sublayer_cases import (
    DROPPED,
    arguments,
    check,
    converted,
    exact_attention,
    exact_mlp,
    normal,
)

import gist_kernels as gk
from gist_kernels.gpu import DEVICE_TYPES


def differentiated(function, x, adapter, upstream, **options):
    """Result and gradients of x and of what the adapter has."""
    x = x.clone().requires_grad_()
    if adapter is not None:
        adapter = adapter._replace(
            **{n: w.clone().requires_grad_() for n, w in adapter._asdict().items()
               if isinstance(w, torch.Tensor)}
        )  # fmt: skip
    out = function(x, adapter, **options)
    leaves = {"x": x} | {
        name: w for name, w in (adapter or x.new_zeros(0))._asdict().items()
        if isinstance(w, torch.Tensor)
    } if adapter is not None else {"x": x}  # fmt: skip
    found = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
    return {"out": out.detach()} | {f"d_{n}": g for n, g in zip(leaves, found, strict=True)}


def compare(name, dtype, options, backend="auto", **shape):
    x, norm, attention, mlp, adapter = arguments(dtype, **shape)
    weights = attention if name == "attention" else mlp
    public = gk.adapter_attention if name == "attention" else gk.adapter_mlp
    equations = exact_attention if name == "attention" else exact_mlp
    count = options.get("num_queries") or x.shape[1]
    upstream = normal(x.shape[0], count, x.shape[2], dtype=dtype, spread=1.0).to(x.device)
    if "drop_path" in options:
        options = options | {"drop_path": options["drop_path"].to(x)}

    def ours(x, adapter, **options):
        with gk.use_backend(backend):
            return public(x, norm, weights, adapter, **options)

    def theirs(x, adapter, **options):
        with gk.use_backend("reference"):
            return public(x, norm, weights, adapter, **options)

    tokens = options.get("grad_tokens")
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()
            if k != "grad_tokens"}  # fmt: skip
    exact = differentiated(
        lambda x, adapter, **o: equations(
            x, converted(norm, torch.float64), converted(weights, torch.float64), adapter, **o
        ),
        x.double(), converted(adapter, torch.float64), upstream, **wide,
    )  # fmt: skip
    if tokens is not None:
        kept = torch.zeros_like(exact["d_x"])
        kept[:, tokens[0] : sum(tokens)] = exact["d_x"][:, tokens[0] : sum(tokens)]
        exact["d_x"] = kept
    found = differentiated(ours, x, adapter, upstream, **options)
    reference = differentiated(theirs, x, adapter, upstream, **options)
    if dtype is torch.float64:
        for result in (found, reference):
            for key, truth in exact.items():
                torch.testing.assert_close(result[key], truth, rtol=1e-11, atol=1e-11)
    else:
        check(found, reference, exact, dtype)


CASES = [
    ("attention", {}),
    ("attention", {"num_queries": 2}),
    ("attention", {"num_queries": 19}),
    ("attention", {"grad_tokens": (1, 1)}),
    ("attention", {"grad_tokens": (0, 3)}),
    ("attention", {"drop_path": DROPPED}),
    ("attention", {"drop_path": DROPPED, "num_queries": 1}),
    ("attention", {"drop_path": DROPPED, "grad_tokens": (1, 1)}),
    ("mlp", {}),
    ("mlp", {"drop_path": DROPPED}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_adapter", [True, False])
@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_value_and_every_gradient(name, options, layer_scale, with_adapter, dtype):
    compare(name, dtype, options, layer_scale=layer_scale, with_adapter=with_adapter)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_adapter", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_triton_value_and_every_gradient(name, options, with_adapter, dtype):
    device = DEVICE_TYPES[0]
    compare(name, dtype, options, backend="triton", with_adapter=with_adapter, device=device)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "identity"])
@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_activations_and_missing_biases(name, activation):
    compare(name, torch.float32, {}, activation=activation, biases=False)
    compare(name, torch.float64, {}, activation=activation)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 40),
    rank=st.integers(1, 70),
    hidden=st.integers(1, 100),
    data=st.data(),
)
def test_any_shape(batch, tokens, heads, head_dim, rank, hidden, data):
    shape = {"batch": batch, "tokens": tokens, "width": heads * head_dim, "heads": heads}
    shape |= {"rank": rank, "hidden": hidden}
    queries = data.draw(st.none() | st.integers(1, tokens))
    start = data.draw(st.integers(0, tokens - 1))
    compare("attention", torch.float64, {"num_queries": queries}, **shape)
    compare("attention", torch.float64, {"grad_tokens": (start, tokens - start)}, **shape)
    compare("mlp", torch.float64, {}, **shape)


@pytest.mark.parametrize("options", [{}, {"num_queries": 2}, {"grad_tokens": (1, 1)}])
def test_an_empty_batch(options):
    x, norm, attention, mlp, adapter = arguments(torch.float32, batch=0)
    x.requires_grad_()
    adapter.up_weight.requires_grad_()
    attended = gk.adapter_attention(x, norm, attention, adapter, **options)
    assert attended.shape == (0, options.get("num_queries", 19), 48)
    for out in (attended, gk.adapter_mlp(x, norm, mlp, adapter)):
        d_x, d_up = torch.autograd.grad(out.sum(), (x, adapter.up_weight))
        assert d_x.shape == x.shape
        assert d_up.abs().sum() == 0


def test_inputs_may_be_strided_and_gradients_expanded():
    x, norm, attention, mlp, adapter = arguments(torch.float32)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.randn(*x.shape[:2], 2 * x.shape[2])
    wide[..., : x.shape[2]] = x
    for name, call in {
        "attention": lambda x: gk.adapter_attention(x, norm, attention, adapter),
        "prefix": lambda x: gk.adapter_attention(x, norm, attention, adapter, num_queries=2),
        "mlp": lambda x: gk.adapter_mlp(x, norm, mlp, adapter),
    }.items():
        plain = x.clone().requires_grad_()
        expected = call(plain)
        (gradient,) = torch.autograd.grad(expected.sum(), plain)
        for view in (strided, wide[..., : x.shape[2]]):
            view = view.detach().requires_grad_()
            out = call(view)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, msg=name)
            (found,) = torch.autograd.grad(out.sum(), view)
            torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.float64
@pytest.mark.parametrize("options", [{}, {"num_queries": 2}])
def test_gradcheck(options):
    x, norm, attention, mlp, adapter = arguments(
        torch.float64, batch=2, tokens=3, width=6, heads=2, rank=2, hidden=5
    )
    leaves = [t.requires_grad_() for t in (x, *adapter[:4])]

    def attended(x, *weights):
        return gk.adapter_attention(
            x, norm, attention, gk.AdapterWeights(*weights, 0.7, "gelu"), **options
        )

    def perceived(x, *weights):
        return gk.adapter_mlp(x, norm, mlp, gk.AdapterWeights(*weights, 0.7, "gelu"))

    assert torch.autograd.gradcheck(attended, leaves)
    assert torch.autograd.gradcheck(perceived, leaves)
    qkv = normal(2, 3, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: gk.prefix_attention(t, 2, **options), qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [None, 1, 2, 19])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_prefix_attention(queries, scale, dtype):
    qkv = normal(2, 19, 3 * 48, dtype=dtype, spread=1.0).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    truth, _ = oracles.attention(*exact.chunk(3, dim=-1), 3, 16**-0.5 if scale is None else scale)
    truth = truth[:, :queries]
    upstream = normal(*truth.shape, dtype=dtype)

    def results(qkv, out):
        (gradient,) = torch.autograd.grad(out, qkv, upstream.to(out.dtype))
        return {"out": out.detach(), "d_qkv": gradient}

    with gk.use_backend("reference"):
        plain = results(qkv, gk.prefix_attention(qkv, 3, num_queries=queries, scale=scale))
    ours = results(qkv, gk.prefix_attention(qkv, 3, num_queries=queries, scale=scale))
    check(ours, plain, results(exact, truth), dtype)


def test_prefix_attention_takes_an_expanded_gradient():
    qkv = normal(2, 5, 3 * 8, dtype=torch.float32).requires_grad_()
    out = gk.prefix_attention(qkv, 2)
    (found,) = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    (expected,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert torch.equal(found, expected)


def test_nothing_is_computed_for_what_needs_no_gradient():
    x, norm, attention, mlp, adapter = arguments(torch.float32)
    leaf = adapter.up_weight.requires_grad_()
    for out in (
        gk.adapter_attention(x, norm, attention, adapter),
        gk.adapter_attention(x, norm, attention, adapter, num_queries=2),
        gk.adapter_mlp(x, norm, mlp, adapter),
    ):
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not gk.adapter_mlp(x, norm, mlp, adapter).requires_grad
    assert not gk.adapter_mlp(x, norm, mlp).requires_grad


def test_weights_changed_after_forward_are_noticed():
    x, norm, attention, _, adapter = arguments(torch.float32)
    adapter.up_weight.requires_grad_()
    out = gk.adapter_attention(x, norm, attention, adapter)
    with torch.no_grad():
        adapter.up_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_backward_gives_the_same():
    x, norm, attention, mlp, adapter = arguments(torch.float32)
    x.requires_grad_()
    for out in (
        gk.adapter_attention(x, norm, attention, adapter),
        gk.adapter_attention(x, norm, attention, adapter, num_queries=2),
        gk.adapter_mlp(x, norm, mlp, adapter),
        gk.adapter(x, *adapter[:4], residual=x),
    ):
        first, second = (
            torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for _ in range(2)
        )
        assert torch.equal(first, second)


def test_compiles_without_a_graph_break():
    x, norm, attention, mlp, adapter = arguments(torch.float32)
    x.requires_grad_()

    def both(x):
        x = gk.adapter_attention(x, norm, attention, adapter, num_queries=2)
        return gk.adapter_mlp(x, norm, mlp, adapter)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), both(x), rtol=1e-5, atol=1e-5)
    (a,), (b,) = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, both))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a | {"x": a["x"][0]}, ValueError, "x must have shape"),
        (lambda a: a | {"x": a["x"].long()}, TypeError, "x must be float"),
        (lambda a: a | {"num_queries": 0}, ValueError, r"num_queries must be .* \[1, 19\]"),
        (lambda a: a | {"num_queries": 20}, ValueError, "num_queries"),
        (lambda a: a | {"grad_tokens": (18, 2)}, ValueError, "grad_tokens"),
        (lambda a: a | {"grad_tokens": 1}, TypeError, "grad_tokens must be"),
        (lambda a: a | {"norm": None}, TypeError, "norm must be a gist_kernels.NormWeights"),
        (lambda a: a | {"adapter": 4}, TypeError, "adapter must be a gist_kernels.AdapterWeights"),
        (lambda a: a | {"drop_path": torch.ones(2)}, ValueError, "drop_path"),
        (
            lambda a: a | {"attention": a["attention"]._replace(num_heads=5)},
            ValueError, "num_heads is 5",
        ),
        (
            lambda a: a | {"attention": a["attention"]._replace(proj_weight=torch.ones(48, 47))},
            ValueError, "attention.proj_weight must have shape",
        ),
        (
            lambda a: a | {"attention": a["attention"]._replace(
                proj_weight=torch.ones(48, 48, requires_grad=True))},
            ValueError, "attention.proj_weight requires a gradient",
        ),
        (
            lambda a: a | {"norm": a["norm"]._replace(weight=torch.ones(48).double())},
            TypeError, "norm.weight is torch.float64",
        ),
        (
            lambda a: a | {"adapter": a["adapter"]._replace(activation="tanh")},
            ValueError, "adapter.activation",
        ),
        (
            lambda a: a | {"adapter": a["adapter"]._replace(up_weight=torch.ones(48, 5))},
            ValueError, "adapter.up_weight must have shape",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    x, norm, attention, _, adapter = arguments(torch.float32)
    given = change({"x": x, "norm": norm, "attention": attention, "adapter": adapter})
    with pytest.raises(error, match=message):
        gk.adapter_attention(**given)
