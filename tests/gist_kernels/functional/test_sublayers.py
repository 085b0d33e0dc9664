"""Sublayers as one node each: every backend against the equations in float64."""

from __future__ import annotations

import backends
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sublayer_cases import (
    DROPPED,
    EPS,
    MLPS,
    arguments,
    check,
    compare,
    converted,
    differentiated,
    exact_attention,
    exact_mlp,
    normal,
    rotation_of,
    update,
)

import gist_kernels as gk

CASES = [
    ("attention", {}),
    ("attention", {"num_queries": 2}),
    ("attention", {"num_queries": 19}),
    ("attention", {"grad_tokens": (1, 1)}),
    ("attention", {"grad_tokens": (0, 3)}),
    ("attention", {"num_queries": 2, "grad_tokens": (1, 1)}),
    ("attention", {"drop_path": DROPPED}),
    ("attention", {"drop_path": DROPPED, "num_queries": 1}),
    ("attention", {"drop_path": DROPPED, "grad_tokens": (1, 1)}),
    ("mlp", {}),
    ("mlp", {"drop_path": DROPPED}),
    ("gated mlp", {}),
    ("gated mlp", {"drop_path": DROPPED}),
    ("normed mlp", {}),
    ("gated, normed mlp", {"drop_path": DROPPED}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_adapter", [True, False])
@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_value_and_every_gradient(name, options, layer_scale, with_adapter, dtype):
    draws = 1 if dtype is torch.float64 else 16
    compare(name, dtype, options, draws=draws, layer_scale=layer_scale, with_adapter=with_adapter)


@pytest.mark.parametrize("backend", backends.serving("sublayers"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("half", "per_head", "span"), [
    (True, False, (2, 17)), (False, True, (1, 14)),
])  # fmt: skip
@pytest.mark.parametrize("options", [options for name, options in CASES if name == "attention"])
def test_rotated_value_and_every_gradient(options, half, per_head, span, dtype, backend):
    device = backends.device_of(backend)
    if not backends.takes(backend, dtype):
        backend = "auto"  # what serves such a call
    rotation = rotation_of(span, 16, half=half, heads=3 if per_head else None, device=device)
    interpreted = backend == "triton" and device == "cpu"  # which takes a second a draw
    draws = 1 if dtype is torch.float64 else 4 if interpreted else 16
    compare("attention", dtype, options, backend, draws, device=device, rotation=rotation)


@pytest.mark.parametrize("backend", backends.besides_the_default("sublayers"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_adapter", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_value_and_every_gradient_by_name(name, options, with_adapter, dtype, backend):
    device = backends.device_of(backend)
    compare(name, dtype, options, backend=backend, with_adapter=with_adapter, device=device)


@pytest.mark.parametrize("backend", backends.serving("sublayers", reference=True))
@pytest.mark.parametrize(("name", "options"), [*CASES[:2], *((name, {}) for name in MLPS)])
def test_norms_and_biases_may_be_float32_beside_bfloat16(name, options, backend):
    device, kind = backends.device_of(backend), MLPS.get(name, {})
    x, norm, attention, mlp, adapter = arguments(torch.bfloat16, device=device, **kind)
    weights = attention if name == "attention" else mlp
    function = gk.adapter_attention if name == "attention" else gk.adapter_mlp
    upstream = torch.randn_like(x[:, : options.get("num_queries")])

    def gradients(dtype):
        trained = {
            key: value.to(dtype).requires_grad_()
            for key, value in (norm._asdict() | weights._asdict()).items()
            if isinstance(value, torch.Tensor) and value.ndim == 1
        }
        own_norm = norm._replace(weight=trained["weight"], bias=trained["bias"])
        own = weights._replace(**{k: t for k, t in trained.items() if k not in ("weight", "bias")})
        if kind.get("inner_norm"):
            own = own._replace(norm=converted(own.norm, dtype))
        with gk.use_backend(backend):
            out = function(x, own_norm, own, adapter, **options)
        found = torch.autograd.grad(out, list(trained.values()), upstream)
        return out, dict(zip(trained, found, strict=True))

    out, found = gradients(torch.float32)
    same, halves = gradients(torch.bfloat16)
    torch.testing.assert_close(out, same, rtol=0, atol=0)
    assert {g.dtype for g in found.values()} == {torch.float32}
    for key, gradient in found.items():
        torch.testing.assert_close(gradient.bfloat16(), halves[key], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "identity"])
@pytest.mark.parametrize("name", ["attention", *MLPS])
def test_activations_and_missing_biases(name, activation):
    compare(name, torch.float32, {}, draws=16, activation=activation, biases=False)
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
    compare("gated mlp", torch.float64, {}, **shape)
    # The norm of few features may divide by next to nothing.
    compare("gated, normed mlp", torch.float64, {}, **(shape | {"hidden": hidden + 7}))


@pytest.mark.parametrize("options", [{}, {"num_queries": 2}, {"grad_tokens": (1, 1)}])
def test_an_empty_batch(options):
    x, norm, attention, mlp, adapter = arguments(torch.float32, batch=0)
    x.requires_grad_()
    adapter.up_weight.requires_grad_()
    attended = gk.adapter_attention(x, norm, attention, adapter, **options)
    assert attended.shape == (0, options.get("num_queries", 19), 48)
    mlps = mlp, *(arguments(torch.float32, **kind)[3] for kind in MLPS.values())
    for out in (attended, *(gk.adapter_mlp(x, norm, each, adapter) for each in mlps)):
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

    gated = arguments(torch.float64, width=6, heads=2, hidden=5, gated=True, inner_norm=True)[3]
    gated = gated._replace(
        fc1_update=update(10, 6, torch.float64, "cpu", rank=2, scale=True),
        fc2_update=update(6, 5, torch.float64, "cpu", rank=2, scale=True),
    )
    trained = [gated.fc1_bias, gated.fc2_bias, *gated.fc1_update, *gated.fc2_update]

    def gated_one(x, first_bias, last_bias, *updates):
        own = gated._replace(
            fc1_bias=first_bias, fc2_bias=last_bias, fc1_update=gk.LinearUpdate(*updates[:3]),
            fc2_update=gk.LinearUpdate(*updates[3:]),
        )  # fmt: skip
        return gk.adapter_mlp(x, norm, own, adapter, drop_path=DROPPED)

    assert torch.autograd.gradcheck(attended, leaves)
    assert torch.autograd.gradcheck(perceived, leaves)
    assert torch.autograd.gradcheck(gated_one, (x, *(t.requires_grad_() for t in trained)))
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
    adapter.down_weight.requires_grad_()  # whose gradient needs the other weight
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
        (lambda a: a | {"norm": torch.ones(48)}, TypeError, "norm must be a gist_kernels.Norm"),
        (lambda a: a | {"adapter": 4}, TypeError, "adapter must be a gist_kernels.AdapterWeights"),
        (lambda a: a | {"drop_path": torch.ones(2)}, ValueError, "drop_path"),
        (
            lambda a: a | {"attention": a["attention"]._replace(rotation=rotation_of((1, 19), 16))},
            ValueError, "attention.rotation must be of 1 or more of x's 19 tokens",
        ),
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
            lambda a: a | {"norm": a["norm"]._replace(weight=torch.ones(48).int())},
            TypeError, "norm.weight must be float32, .* it is torch.int32",
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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gated": 1}, TypeError, "mlp.gated must be True or False; it is 1"),
        (
            {"fc1_weight": torch.ones(159, 48)}, ValueError,
            r"as many rows for the gate as for the value; it has shape \(159, 48\)",
        ),
        ({"gated": False}, ValueError, r"mlp.fc2_weight must have .*here \(48, 160\)"),
        (
            {"fc2_weight": torch.ones(48, 160)},
            ValueError, r"mlp.fc2_weight must have .*here \(48, 80\)",
        ),
        ({"fc1_bias": torch.ones(80)}, ValueError, r"mlp.fc1_bias must have .*here \(160\)"),
        (
            {"fc1_update": gk.LinearUpdate(scale=torch.ones(80))},
            ValueError, r"mlp.fc1_update.scale must have .*here \(160\)",
        ),
        ({"activation": "swiglu"}, ValueError, "mlp.activation"),
        ({"norm": torch.ones(80)}, TypeError, "mlp.norm must be a gist_kernels.NormWeights"),
        ({"norm": gk.NormWeights(None, None, 0.0)}, ValueError, "mlp.norm.eps"),
        (
            {"norm": gk.NormWeights(torch.ones(160), None, 1e-6)},
            ValueError, r"mlp.norm.weight must have .*here \(80\)",
        ),
        (
            {"norm": gk.NormWeights(None, torch.ones(80, requires_grad=True), 1e-6)},
            ValueError, "mlp.norm.bias requires a gradient, but is frozen here",
        ),
    ],
)  # fmt: skip
def test_bad_weights_of_a_gated_mlp_are_named(change, error, message):
    x, norm, _, mlp, adapter = arguments(torch.float32, gated=True)
    with pytest.raises(error, match=message):
        gk.adapter_mlp(x, norm, mlp._replace(**change), adapter)


@pytest.mark.parametrize("backend", backends.serving("sublayers", reference=True))
def test_a_gated_mlp_is_two_layers_and_a_product(backend):
    """SwiGLU with a layer each for gate and value, as arXiv:2002.05202 writes it."""
    x, norm, _, mlp, _ = arguments(
        torch.float32, gated=True, activation="silu", biases=False,
        device=backends.device_of(backend),
    )  # fmt: skip
    normed = oracles.layer_norm(x, *norm)
    gate, value = (normed @ mlp.fc1_weight[half].T for half in (slice(0, 80), slice(80, None)))
    expected = x + (gate * torch.sigmoid(gate) * value) @ mlp.fc2_weight.T
    with gk.use_backend(backend):
        found = gk.adapter_mlp(x, norm, mlp)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def spaced(tensor):
    """The same numbers among nan, last dimension contiguous but rows apart."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan, dtype=tensor.dtype)
    wide[..., 2:-3] = tensor
    return wide[..., 2:-3]


def interleaved(tensor):
    """The same numbers, nan between any two of them."""
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), dim=-1)[..., 0]


def reversed_strides(tensor):
    axes = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(axes).contiguous().permute(axes)


def negated(tensor):
    """The same numbers, those in memory being of the other sign."""
    return torch._neg_view(-tensor)


LAYOUTS = {
    "dense": lambda t: t, "spaced": spaced, "interleaved": interleaved,
    "reversed": reversed_strides, "negated": negated,
}  # fmt: skip


def in_layout(layout, weights, dims=(1, 2, 3)):
    """Those with so many dimensions."""
    if not isinstance(weights, tuple):
        return layout(weights) if weights.ndim in dims else weights
    return weights._make(
        layout(w) if isinstance(w, torch.Tensor) and w.ndim in dims else w for w in weights
    )


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
@pytest.mark.parametrize("options", [{}, {"num_queries": 2}, {"grad_tokens": (1, 1)}])
def test_weights_inputs_and_gradients_in_any_layout(layout, options):
    dense = arguments(torch.float32)
    upstream = torch.randn(2, options.get("num_queries", 19), 48)

    def results(arguments, upstream):
        x, norm, attention, mlp, adapter = arguments
        leaves = [t.detach().requires_grad_() for t in (x, *adapter[:4])]
        adapter = adapter._make((*leaves[1:], *adapter[4:]))
        out = gk.adapter_attention(leaves[0], norm, attention, adapter, **options)
        out = gk.adapter_mlp(out, norm, mlp, adapter)
        out = gk.adapter(out, *leaves[1:], residual=out)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    expected = results(dense, upstream)
    laid_out = [in_layout(LAYOUTS[layout], part) for part in dense]
    for found in (
        results(laid_out, upstream),
        results([laid_out[0], *dense[1:]], upstream),
        results([in_layout(LAYOUTS[layout], part, dims=(1,)) for part in dense], upstream),
        results([in_layout(LAYOUTS[layout], part, dims=(2,)) for part in dense], upstream),
        results(dense, LAYOUTS[layout](upstream)),
    ):
        for ours, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


def test_an_upstream_gradient_without_memory():
    x, norm, attention, mlp, adapter = arguments(torch.float32)
    x.requires_grad_()
    for out in (
        gk.adapter_attention(x, norm, attention, adapter),
        gk.adapter_mlp(x, norm, mlp, adapter),
        gk.adapter(x, *adapter[:4]),
    ):
        (gradient,) = torch.autograd.grad(out, x, torch._efficientzerotensor(out.shape))
        assert torch.equal(gradient, torch.zeros_like(x))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 70),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 70),
    layout=st.sampled_from(list(LAYOUTS)),
    of_upstream=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    data=st.data(),
)
def test_prefix_attention_of_any_shape_and_layout(
    batch, tokens, heads, head_dim, layout, of_upstream, dtype, data
):
    queries = data.draw(st.none() | st.integers(1, tokens))
    packed = normal(batch, tokens, 3 * heads * head_dim, dtype=dtype, spread=1.0)
    exact = packed.double().requires_grad_()
    truth, _ = oracles.attention(*exact.chunk(3, dim=-1), heads, head_dim**-0.5)
    truth = truth[:, :queries]
    upstream = normal(*truth.shape, dtype=dtype, spread=1.0)
    (d_truth,) = torch.autograd.grad(truth, exact, upstream.double())
    qkv = LAYOUTS[layout](packed).detach().requires_grad_()
    out = gk.prefix_attention(qkv, heads, num_queries=queries)
    (d_qkv,) = torch.autograd.grad(out, qkv, LAYOUTS[of_upstream](upstream))
    # bfloat16 rounds the result once before backward reads it; sums have at most 70 terms of 1.
    few = 16 * EPS[dtype]
    for ours, exact_one in ((out, truth), (d_qkv, d_truth)):
        size = max(1.0, exact_one.abs().max().item())
        assert ours.isfinite().all()
        assert (ours.double() - exact_one).abs().max().item() <= few * size


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 40),
    rank=st.integers(1, 140),
    hidden=st.integers(1, 100),
    layout=st.sampled_from(list(LAYOUTS)),
    data=st.data(),
)
def test_float32_of_any_shape_and_layout(
    batch, tokens, heads, head_dim, rank, hidden, layout, data
):
    """Where float64 takes PyTorch's attention, float32 takes the kernels' own."""
    width = heads * head_dim
    x, norm, attention, mlp, adapter = arguments(
        torch.float64, batch=batch, tokens=tokens, width=width, heads=heads, rank=rank,
        hidden=hidden,
    )  # fmt: skip
    # Scores and updates of about 1, whatever the width: no rounding is blown up on its way.
    attention, mlp, adapter = (
        weights._make(
            w / w.shape[-1] ** 0.5 if isinstance(w, torch.Tensor) and w.ndim == 2 else w
            for w in weights
        )
        for weights in (attention, mlp, adapter)
    )
    queries = data.draw(st.none() | st.integers(1, tokens))
    rounded = [converted(part, torch.float32) for part in (norm, attention, mlp, adapter)]
    low_x, low = x.float(), [in_layout(LAYOUTS[layout], part) for part in rounded]
    norm, attention, mlp, adapter = (converted(part, torch.float64) for part in rounded)
    for ours, theirs, options in (
        (
            lambda x, a, **few: gk.adapter_attention(x, low[0], low[1], a, **few),
            lambda x, a, **few: exact_attention(x, norm, attention, a, **few),
            {"num_queries": queries},
        ),
        (
            lambda x, a: gk.adapter_mlp(x, low[0], low[2], a),
            lambda x, a: exact_mlp(x, norm, mlp, a),
            {},
        ),
    ):
        truth = theirs(low_x.double(), adapter, **options)
        upstream = normal(*truth.shape, dtype=torch.float32, spread=1.0)
        exact = differentiated(theirs, low_x.double(), adapter, upstream, **options)
        found = differentiated(ours, LAYOUTS[layout](low_x), low[3], upstream, **options)
        spread = low_x.double().var(dim=-1, correction=0).min().sqrt().item() + 1e-3
        for name, true in exact.items():
            size = max(1.0, true.abs().max().item()) / min(1.0, spread)
            error = (found[name].double() - true).abs().max().item()
            assert error <= 64 * EPS[torch.float32] * size, (name, error, size)


def every_operation(x, norm, attention, mlp, adapter):
    factors = torch.ones(2, 1, 1)
    scaled = attention._replace(layer_scale=torch.ones(48))
    return {
        "attention": gk.adapter_attention(x, norm, attention, adapter),
        "prefix": gk.adapter_attention(x, norm, attention, adapter, num_queries=2),
        "token": gk.adapter_attention(x, norm, attention, adapter, grad_tokens=(1, 1)),
        "drop-path": gk.adapter_attention(x, norm, attention, adapter, drop_path=factors),
        "layer scale, no adapter": gk.adapter_attention(x, norm, scaled),
        "no adapter": gk.adapter_attention(x, norm, attention),
        "mlp": gk.adapter_mlp(x, norm, mlp, adapter),
        "mlp, no adapter": gk.adapter_mlp(x, norm, mlp),
        "adapter": gk.adapter(x, *adapter[:4]),
        "adapter onto x": gk.adapter(x, *adapter[:4], residual=x),
    }


def test_results_may_be_written_to():
    given_ones = arguments(torch.float32)
    x = given_ones[0].requires_grad_()
    untouched = every_operation(*given_ones)
    for name, out in every_operation(*given_ones).items():
        (expected,) = torch.autograd.grad(3 * untouched[name].sum(), x)
        out.mul_(3).add_(1)
        (found,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_a_frozen_inner_norm_changed_after_forward_is_noticed():
    x, norm, _, mlp, adapter = arguments(torch.float32, inner_norm=True)
    out = gk.adapter_mlp(x.requires_grad_(), norm, mlp, adapter)
    mlp.norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("which", ["norm.weight", "attention.proj_weight", "mlp.fc2_weight"])
def test_frozen_weights_changed_after_forward_are_noticed(which):
    x, norm, attention, mlp, adapter = arguments(torch.float32)
    x.requires_grad_()
    group, name = which.split(".")
    weight = getattr({"norm": norm, "attention": attention, "mlp": mlp}[group], name)
    for of, call in {
        "attention": lambda: gk.adapter_attention(x, norm, attention, adapter),
        "mlp": lambda: gk.adapter_mlp(x, norm, mlp, adapter),
        "prefix": lambda: gk.adapter_attention(x, norm, attention, num_queries=1),
    }.items():
        out = call()
        weight.mul_(2)
        if group == "norm" or (group == "mlp") == (of == "mlp"):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
        else:
            out.sum().backward()


def test_weights_that_are_inference_tensors():
    with torch.inference_mode():
        x, norm, attention, mlp, adapter = arguments(torch.float32)
    with torch.no_grad():
        assert gk.adapter_attention(x, norm, attention, adapter).isfinite().all()
        assert gk.adapter_mlp(x, norm, mlp, adapter).isfinite().all()
