"""What is trained beside a sublayer's frozen matrices: biases, norms, scales, low-rank updates."""

from __future__ import annotations

import backends
import pytest
import torch
from sublayer_cases import DROPPED, arguments, check, converted, exact_attention, exact_mlp, normal

import gist_kernels as gk
from gist_kernels.autograd import linear

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
]


def update(outputs, inputs, dtype, device, rank=None, scale=False):
    return gk.LinearUpdate(
        1 + normal(outputs, dtype=dtype, device=device) if scale else None,
        normal(rank, inputs, dtype=dtype, device=device) if rank else None,
        normal(outputs, rank, dtype=dtype, device=device) if rank else None,
    )


def folded(weight, change):
    """The matrix of one plain linear layer that does the same."""
    weight = weight if change.scale is None else change.scale[:, None] * weight
    return weight if change.down is None else weight + change.up @ change.down


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
    x, norm, attention, mlp, adapter = arguments(dtype, device=device, **shape)
    weights = attention if name == "attention" else mlp
    matrices, fields = (weights[0], weights[2]), weights._fields
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
            weights = weights._replace(**dict(zip(fields[-2:], changes, strict=True)))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [{}, {"layer_scale": True, "with_adapter": False}])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_value_and_every_gradient(name, options, kind, shape, dtype):
    compare(name, kind, options, dtype, **shape)


@pytest.mark.parametrize("shape", [{}, {"layer_scale": True}, {"with_adapter": False}])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_under_autocast(name, options, shape):
    with torch.autocast("cpu", torch.bfloat16):
        compare(name, "scale and low rank", options, torch.float32, draws=16, eps=2**-8, **shape)


def test_frozen_weights_are_converted_once_under_autocast(monkeypatch):
    x, norm, _, mlp, adapter = arguments(torch.float32)
    converted = []
    monkeypatch.setattr(
        linear, "in_dtype",
        lambda w, dtype, by=linear.in_dtype: converted.append(by(w, dtype)) or converted[-1],
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        first = gk.adapter_mlp(x, norm, mlp, adapter)
        assert torch.equal(gk.adapter_mlp(x, norm, mlp, adapter), first)
        assert [a is b for a, b in zip(converted[:2], converted[2:], strict=True)] == [True, True]
        assert {w.dtype for w in converted} == {torch.bfloat16}
        mlp.fc1_weight.mul_(2)
        assert not torch.equal(gk.adapter_mlp(x, norm, mlp, adapter), first)
    assert converted[4] is not converted[0]
    assert converted[5] is converted[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["attention", "mlp"])
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
