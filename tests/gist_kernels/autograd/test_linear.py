"""What is trained beside a sublayer's frozen matrices: biases, norms, scales, low-rank updates."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter

import backends
import pytest
import torch
from marks import slow_where
from sublayer_cases import (
    DROPPED,
    MLPS,
    arguments,
    check,
    converted,
    exact_attention,
    exact_mlp,
    folded,
    normal,
    update,
)
from torch import nn
from torch.profiler import ProfilerActivity, profile

import gist_kernels as gk
from gist_kernels.autograd import casts
from gist_kernels.backend import select
from gist_kernels.functional.sublayers import PreparedMlp

KINDS = {
    "biases and norm": {},
    "low rank": {"rank": 3},
    "scale": {"scale": True},
    "scale and low rank": {"rank": 2, "scale": True},
}
CASES = [
    ("attention", {}),
    ("attention", {"num_queries": 2}),
    ("attention", {"grad_tokens": (1, 1)}),
    ("attention", {"drop_path": DROPPED}),
    ("mlp", {}),
    ("mlp", {"drop_path": DROPPED}),
    ("gated mlp", {"drop_path": DROPPED}),
    ("gated, normed mlp", {}),
]


def compare(name, kind, options, dtype, draws=None, eps=None, **how):
    torch.manual_seed(0)
    draws = draws or (6 if dtype is torch.float64 else 16)
    found = [draw(name, kind, options, dtype, **how) for _ in range(draws)]
    if dtype is not torch.float64:
        check(*map(list, zip(*found, strict=True)), dtype, eps)
        return
    for ours, reference, truth in found:
        for key, value in truth.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-10, atol=1e-10, msg=key)
            torch.testing.assert_close(reference[key], value, rtol=1e-10, atol=1e-10, msg=key)


def draw(name, kind, options, dtype, backend="auto", device="cpu", **shape):
    """Results and gradients of ours, of the reference and of the equations."""
    kind_of_mlp = MLPS.get(name, {})
    x, norm, attention, mlp, adapter = arguments(dtype, device=device, **kind_of_mlp, **shape)
    weights = attention if name == "attention" else mlp
    matrices, fields = (weights[0], weights[2]), weights._fields
    names = [field for field in fields if field.endswith("_update")]
    changes = [update(*m.shape, dtype, device, **KINDS[kind]) for m in matrices]
    groups = [norm[:2], weights[1:4:2], *changes, adapter[:4] if adapter else ()]
    leaves = {f"{i}.{j}": t for i, g in enumerate(groups) for j, t in enumerate(g) if t is not None}
    leaves["x"] = x
    options = {k: v.to(x) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    upstream = normal(
        len(x), options.get("num_queries") or x.shape[1], x.shape[2], dtype=dtype, spread=1.0
    ).to(x.device)

    def results(call, dtype):
        given = {k: t.detach().to(dtype).requires_grad_() for k, t in leaves.items()}

        def group(i, old):
            return type(old)._make(
                (*(given.get(f"{i}.{j}") for j in range(len(groups[i]))), *old[len(groups[i]) :])
            )

        changed = converted(weights, dtype)._replace(
            **{fields[1]: given.get("1.0"), fields[3]: given.get("1.1")}
        )
        out = call(
            given["x"], group(0, norm), changed, [group(i, changes[i - 2]) for i in (2, 3)],
            group(4, adapter) if adapter else None,
        )  # fmt: skip
        found = torch.autograd.grad(out, list(given.values()), upstream.to(out.dtype))
        return {"out": out.detach()} | dict(zip(given, found, strict=True))

    def public(backend):
        operation = gk.adapter_attention if name == "attention" else gk.adapter_mlp

        def call(x, norm, weights, changes, adapter):
            weights = weights._replace(**dict(zip(names, changes, strict=True)))
            with gk.use_backend(backend):
                return operation(x, norm, weights, adapter, **options)

        return call

    def exact(x, norm, weights, changes, adapter):
        first, last = (folded(m, c) for m, c in zip((weights[0], weights[2]), changes, strict=True))
        weights = weights._replace(**{fields[0]: first, fields[2]: last})
        wide = {k: v for k, v in options.items() if k != "grad_tokens"}
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in wide.items()}
        equations = exact_attention if name == "attention" else exact_mlp
        return equations(x, norm, weights, adapter, **wide)

    truth = results(exact, torch.float64)
    if "grad_tokens" in options:
        start, count = options["grad_tokens"]
        truth["x"][:, :start] = 0
        truth["x"][:, start + count :] = 0
    return results(public(backend), dtype), results(public("reference"), dtype), truth


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    slow_where(  # whatever is rounded, float64 shows that each kind is computed
        lambda kind, shape, dtype: (
            dtype is not torch.float64 and bool(shape) and kind != "scale and low rank"
        ),
        itertools.product(
            KINDS,
            [{}, {"layer_scale": True, "with_adapter": False}],
            [torch.float32, torch.bfloat16, torch.float64],
        ),
    ),
)
def test_value_and_every_gradient(name, options, kind, shape, dtype):
    compare(name, kind, options, dtype, **shape)


@pytest.mark.parametrize("shape", [{}, {"layer_scale": True}, {"with_adapter": False}])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_under_autocast(name, options, shape):
    with torch.autocast("cpu", torch.bfloat16):
        compare(name, "scale and low rank", options, torch.float32, draws=16, eps=2**-8, **shape)


def by_data_copy(weight, value):
    weight.data.copy_(value)


def by_data(weight, value):
    weight.data = value.clone()


def by_set(weight, value):
    with torch.no_grad():
        weight.set_(value.clone())


def by_numpy(weight, value):
    weight.detach().numpy()[:] = value.numpy()


def in_place(weight, value):
    with torch.no_grad():
        weight.copy_(value)


@pytest.mark.parametrize("replace", [by_data_copy, by_data, by_set, by_numpy, in_place])
@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_replaced_weights_are_used_under_autocast(name, replace):
    """However they are replaced: a version counter does not count all of it."""
    x, norm, attention, mlp, adapter = arguments(torch.float32)
    weights = attention if name == "attention" else mlp
    function = gk.adapter_attention if name == "attention" else gk.adapter_mlp
    given = weights._replace(**{weights._fields[i]: weights[i].clone() for i in (0, 2)})
    with torch.autocast("cpu", torch.bfloat16):
        before = function(x, norm, given, adapter)
        for i in (0, 2):
            replace(given[i], 2 * weights[i])
        twice = weights._replace(**{weights._fields[i]: 2 * weights[i] for i in (0, 2)})
        found, fresh = (function(x, norm, by, adapter) for by in (given, twice))
        assert torch.equal(found, fresh)
        assert not torch.equal(found, before)


def conversions(call):
    """The shapes of the tensors that a call converts to another dtype, with their number."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        call()
    return Counter(
        tuple(event.input_shapes[0]) for event in trace.events() if event.name == "aten::_to_copy"
    )


def test_a_pass_under_autocast_converts_each_frozen_weight_once():
    x, norm, _, mlp, adapter = arguments(torch.float32)
    x.requires_grad_()

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            out = gk.adapter_mlp(x, norm, mlp, adapter)
        out.sum().backward()

    found = conversions(call)
    assert [found[tuple(w.shape)] for w in (mlp.fc1_weight, mlp.fc2_weight)] == [1, 1]


@pytest.mark.parametrize("name", ["attention", "attention of few", "mlp"])
def test_under_autocast_the_last_matmul_adds_onto_the_residual(name, monkeypatch):
    """In float32: its result in a half type is never in memory."""
    kernels = pytest.importorskip("gist_kernels.kernels.cpu.linear")
    plain, found = kernels.add_linear, []

    def add_linear(out, x, weight):
        found.append((out.dtype, x.dtype))
        return plain(out, x, weight)

    monkeypatch.setattr(kernels, "add_linear", add_linear)
    x, norm, attention, mlp, adapter = arguments(torch.float32)
    with gk.use_backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        if name == "mlp":
            gk.adapter_mlp(x, norm, mlp, adapter)
        else:
            few = {"num_queries": 2} if name == "attention of few" else {}
            gk.adapter_attention(x, norm, attention, adapter, **few)
    assert found == [(torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("name", ["attention", "attention of few", "mlp"])
def test_cached_casts_converts_no_frozen_weight_again(name):
    x, norm, attention, mlp, adapter = arguments(torch.float32, layer_scale=True)
    weights = mlp if name == "mlp" else attention
    weights = weights._replace(
        **{n: nn.Parameter(t, requires_grad=False) for n, t in weights._asdict().items()
           if isinstance(t, torch.Tensor)}
    )  # fmt: skip
    function = gk.adapter_mlp if name == "mlp" else gk.adapter_attention
    options = {"num_queries": 2} if name == "attention of few" else {}

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return function(x, norm, weights, adapter, **options)

    plain = call()
    frozen = {tuple(t.shape) for t in weights[:4]}
    assert frozen <= set(conversions(call))
    with gk.cached_casts():
        assert torch.equal(call(), plain)
        with gk.cached_casts():
            pass  # the inner block's end is not the outer one's
        assert not frozen & set(conversions(call))
        assert torch.equal(call(), plain)
        kept = weakref.ref(next(iter(casts._casts.get().values()))[1])
    assert kept() is None
    weights[0].data.mul_(2)
    assert not torch.equal(call(), plain)


def test_cached_casts_converts_what_is_trained_and_what_is_no_parameter():
    x, norm, _, mlp, adapter = arguments(torch.float32)
    bias = nn.Parameter(mlp.fc1_bias.clone())
    given = mlp._replace(fc1_bias=bias)

    def call():
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return gk.adapter_mlp(x, norm, given, adapter)

    with gk.cached_casts():
        before = call()
        bias.data.add_(1)
        mlp.fc2_weight.mul_(2)
        assert not torch.equal(call(), before)
        assert casts._casts.get() == {}


def test_frozen_joined_keeps_what_is_frozen_and_no_other():
    frozen = [nn.Parameter(torch.randn(2, 3), requires_grad=False) for _ in range(3)]
    trained = [*frozen[:2], nn.Parameter(torch.randn(2, 3))]
    plain = [*frozen[:2], torch.randn(2, 3)]
    with gk.cached_casts():
        for weights in (frozen, frozen[::-1], trained, plain):
            kept = weights is not trained and weights is not plain
            for dtype in (torch.float32, torch.bfloat16):
                joined = casts.frozen_joined(weights, dtype)
                assert torch.equal(joined, torch.cat(weights).to(dtype))
                assert not joined.requires_grad
                assert (casts.frozen_joined(weights, dtype) is joined) is kept
    outside = casts.frozen_joined(frozen, torch.float32)
    assert casts.frozen_joined(frozen, torch.float32) is not outside


def test_converted_weights_are_not_kept():
    """A CUDA graph that is being captured would own their memory."""
    x, *weights = arguments(torch.float32)
    norm, _, mlp, adapter = weights
    kernels = select("sublayers", x)
    if kernels is None:
        pytest.skip("the reference converts nothing")
    prepared = PreparedMlp(norm, mlp, adapter)
    prepared.sublayer(kernels, torch.bfloat16)
    assert prepared._kept is None
    prepared.sublayer(kernels, torch.float32)
    assert prepared._kept is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["attention", *MLPS])
def test_layers_without_biases(name, kind):
    compare(name, kind, {}, torch.float64, biases=False)


@pytest.mark.parametrize("backend", backends.besides_the_default("sublayers"))
@pytest.mark.parametrize(("name", "options"), CASES)
def test_value_and_every_gradient_by_name(name, options, backend):
    how = {"backend": backend, "device": backends.device_of(backend), "draws": 3}
    compare(name, "scale and low rank", options, torch.float32, **how)


@pytest.mark.parametrize("trained", ["qkv_bias", "down", "scale", "norm", "proj_bias", "adapter"])
@pytest.mark.parametrize("options", [{}, {"num_queries": 2}, {"grad_tokens": (1, 1)}])
def test_what_needs_no_gradient_gets_none(trained, options):
    x, norm, attention, _, adapter = arguments(torch.float64)
    attention = attention._replace(
        qkv_update=update(144, 48, torch.float64, "cpu", rank=3, scale=True),
        proj_update=update(48, 48, torch.float64, "cpu", rank=3, scale=True),
    )
    leaf = {
        "qkv_bias": attention.qkv_bias, "proj_bias": attention.proj_bias,
        "down": attention.qkv_update.down, "scale": attention.proj_update.scale,
        "norm": norm.weight, "adapter": adapter.up_weight,
    }[trained].requires_grad_()  # fmt: skip
    out = gk.adapter_attention(x, norm, attention, adapter, **options)
    out.square().sum().backward()
    everything = [x, *norm, *attention, *attention.qkv_update, *attention.proj_update, *adapter]
    with_gradient = [t for t in everything if isinstance(t, torch.Tensor) and t.grad is not None]
    assert with_gradient == [leaf]
    found, leaf.grad = leaf.grad, None
    with gk.use_backend("reference"):
        gk.adapter_attention(x, norm, attention, adapter, **options).square().sum().backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (4, TypeError, "attention.qkv_update must be a gist_kernels.LinearUpdate, not int"),
        (gk.LinearUpdate(down=torch.ones(2, 48)), ValueError, "both down and up"),
        (gk.LinearUpdate(scale=torch.ones(48)), ValueError, "qkv_update.scale must have shape"),
        (gk.LinearUpdate(None, torch.ones(2, 48), torch.ones(144, 3)), ValueError, "update.up"),
        (gk.LinearUpdate(None, torch.ones(2, 47), torch.ones(144, 2)), ValueError, "update.down"),
        (gk.LinearUpdate(scale=torch.ones(144).long()), TypeError, "qkv_update.scale"),
    ],
)
def test_bad_updates_are_named(change, error, message):
    x, norm, attention, _, adapter = arguments(torch.float32)
    with pytest.raises(error, match=message):
        gk.adapter_attention(x, norm, attention._replace(qkv_update=change), adapter)
