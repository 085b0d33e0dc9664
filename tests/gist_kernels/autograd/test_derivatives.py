"""Further derivatives of every operation: right by the reference, refused by the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import oracles
import pytest
import torch
from sublayer_cases import (
    DROPPED,
    MLPS,
    arguments,
    exact_attention,
    exact_mlp,
    folded,
    normal,
    update,
)
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import gist_kernels as gk
from gist_kernels.kernels.triton import DEVICE_TYPES

REFUSED = r'no second derivative .*use_backend\("reference"\)'
Function = Callable[..., torch.Tensor]


class Case(NamedTuple):
    operation: Function
    equations: Function
    """The same in elementary operators."""
    inputs: dict[str, torch.Tensor]
    """All that the operation is differentiable in."""


def loss_case(name: str) -> Case:
    cls, gist = normal(2, 4, 7, spread=1.0)
    target = {
        "index": torch.tensor([0, 5, 6, 2]),
        "probability": normal(4, 7, spread=1.0).softmax(1),
        "kl": None,
    }[name]
    if target is None:
        return Case(
            lambda a, b: gk.bidirectional_kl(a, b, temperature=2.0, weights=(0.7, 0.4)),
            lambda a, b: _mean((0, 0, 0.7, 0.4), oracles.log_softmax_terms(a, b, None, 2.0)),
            {"a": cls, "b": gist},
        )
    return Case(
        lambda a, b: gk.gist_loss(a, b, target),
        lambda a, b: _mean((1, 0.5, 0.75, 0.75), oracles.log_softmax_terms(a, b, target, 3.0)),
        {"a": cls, "b": gist},
    )


def _mean(weights, terms):
    return sum(weight * term for weight, term in zip(weights, terms, strict=True)).mean()


def adapter_case(onto_x: bool) -> Case:
    *_, weights = arguments(torch.float64, width=6, rank=3)
    inputs = {"x": normal(5, 6, spread=1.0), **dict(zip("dbuc", weights[:4], strict=True))}

    def operation(x, d, b, u, c, residual=None):
        residual = x if onto_x else residual
        return gk.adapter(x, d, b, u, c, scale=0.7, activation="gelu", residual=residual)

    def equations(x, d, b, u, c, residual=None):
        return (x if onto_x else residual) + oracles.bottleneck(x, d, b, u, c, 0.7, "gelu")[0]

    return Case(
        operation, equations, inputs if onto_x else inputs | {"residual": normal(5, 6, spread=1.0)}
    )


def prefix_case(num_queries: int | None) -> Case:
    def equations(qkv):
        q, k, v = qkv.chunk(3, dim=-1)
        return oracles.attention(q[:, :num_queries], k, v, 2, 4**-0.5)[0]

    return Case(
        lambda qkv: gk.prefix_attention(qkv, 2, num_queries=num_queries),
        equations,
        {"qkv": normal(2, 5, 24, spread=1.0)},
    )


def padded_case() -> Case:
    lengths = torch.tensor([5, 2])

    def equations(qkv):
        rows = []
        for row, length in zip(qkv, lengths.tolist(), strict=True):
            q, k, v = row[None, :length].chunk(3, dim=-1)
            out = oracles.attention(q[:, :3], k, v, 2, 4**-0.5)[0][0]
            rows.append(torch.nn.functional.pad(out, (0, 0, 0, 3 - out.shape[0])))
        return torch.stack(rows)

    return Case(
        lambda qkv: gk.prefix_attention(qkv, 2, num_queries=3, lengths=lengths),
        equations,
        {"qkv": normal(2, 5, 24, spread=1.0)},
    )


def sublayer_case(name: str, updated: bool, **options: Any) -> Case:
    x, norm, attention, mlp, adapter = arguments(
        torch.float64, tokens=5, width=8, heads=2, rank=2, hidden=6, layer_scale=True,
        **MLPS.get(name, {}),
    )  # fmt: skip
    weights: Any = attention if name == "attention" else mlp
    fields = weights._fields
    changes = [
        update(*weights[at].shape, torch.float64, "cpu", rank=2, scale=True) for at in (0, 2)
    ]
    groups = {
        "norm": norm[:2],
        "adapter": adapter[:4],
        "bias": weights[1:4:2],
        **({"first": changes[0], "last": changes[1]} if updated else {}),
    }
    inputs = {"x": x} | {f"{g}{i}": t for g, ts in groups.items() for i, t in enumerate(ts)}

    def given(leaves):
        """The arguments after x, with the updates apart."""
        of = {group: [leaves[f"{group}{i}"] for i in range(len(groups[group]))] for group in groups}
        own = weights._replace(**dict(zip(fields[1:4:2], of["bias"], strict=True)))
        found = [gk.LinearUpdate(*of[group]) for group in ("first", "last") if group in of]
        return (
            gk.NormWeights(*of["norm"], norm.eps), own,
            gk.AdapterWeights(*of["adapter"], *adapter[4:]), found,
        )  # fmt: skip

    public = gk.adapter_attention if name == "attention" else gk.adapter_mlp
    plain = exact_attention if name == "attention" else exact_mlp

    def operation(x, **leaves):
        own_norm, own, own_adapter, found = given(leaves)
        names = [field for field in fields if field.endswith("_update")]
        own = own._replace(**dict(zip(names, found, strict=False)))
        return public(x, own_norm, own, own_adapter, **options)

    def equations(x, **leaves):
        own_norm, own, own_adapter, found = given(leaves)
        for at, change in zip((0, 2), found, strict=False):
            own = own._replace(**{fields[at]: folded(own[at], change)})
        known = dict(options)
        if "grad_tokens" in known:
            start, count = known.pop("grad_tokens")
            fixed = x.detach().clone()
            fixed[:, start : start + count] = 0
            x = fixed + torch.nn.functional.pad(
                x[:, start : start + count], (0, 0, start, x.shape[1] - start - count)
            )
        return plain(x, own_norm, own, own_adapter, **known)

    return Case(operation, equations, inputs)


CASES = {
    "gist_loss of classes": lambda: loss_case("index"),
    "gist_loss of probabilities": lambda: loss_case("probability"),
    "bidirectional_kl": lambda: loss_case("kl"),
    "adapter": lambda: adapter_case(False),
    "adapter onto x": lambda: adapter_case(True),
    "prefix_attention": lambda: prefix_case(2),
    "prefix_attention of all": lambda: prefix_case(None),
    "prefix_attention of padded rows": padded_case,
    "adapter_attention": lambda: sublayer_case("attention", False),
    "adapter_attention with updates": lambda: sublayer_case("attention", True),
    "adapter_attention of some": lambda: sublayer_case("attention", True, num_queries=2),
    "adapter_attention of a token": lambda: sublayer_case("attention", False, grad_tokens=(1, 1)),
    "adapter_mlp": lambda: sublayer_case("mlp", False, drop_path=DROPPED),
    "adapter_mlp with updates": lambda: sublayer_case("mlp", True),
    "adapter_mlp, gated": lambda: sublayer_case("gated mlp", True, drop_path=DROPPED),
    "adapter_mlp, gated, normed": lambda: sublayer_case("gated, normed mlp", False),
}
every_case = pytest.mark.parametrize("name", CASES)


def required(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone().requires_grad_() for key, value in inputs.items()}


def scalar(function: Function, inputs: dict[str, torch.Tensor], squared: bool) -> torch.Tensor:
    """With a cubic of each input, whose second derivatives hide a dropped term. The gradient
    upstream of the operation requires a gradient where its result is squared."""
    out = function(**inputs)
    out = out.square() if squared else out
    return out.sum() + sum((value**3).sum() for value in inputs.values())


def hessian_product(function: Function, inputs: dict[str, torch.Tensor], squared: bool):
    inputs = required(inputs)
    first = torch.autograd.grad(
        scalar(function, inputs, squared), list(inputs.values()), create_graph=True
    )
    weighted = sum((g * torch.cos(torch.arange(g.numel())).view_as(g)).sum() for g in first)
    return dict(zip(inputs, torch.autograd.grad(weighted, list(inputs.values())), strict=True))


def assert_alike(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@every_case
@pytest.mark.parametrize("squared", [False, True], ids=["upstream constant", "upstream varying"])
def test_second_derivatives_of_the_reference_are_the_equations(name, squared):
    case = CASES[name]()
    with gk.use_backend("reference"):
        found = hessian_product(case.operation, case.inputs, squared)
    assert_alike(found, hessian_product(case.equations, case.inputs, squared))


@every_case
@pytest.mark.parametrize("squared", [False, True], ids=["upstream constant", "upstream varying"])
def test_second_derivatives_of_the_kernels_are_refused(name, squared):
    case = CASES[name]()
    with gk.use_backend("cpu"), pytest.raises(NotImplementedError, match=REFUSED):
        hessian_product(case.operation, case.inputs, squared)


@every_case
def test_a_second_derivative_in_one_input_alone_is_right_or_refused(name):
    """Whichever input: none of the gradients leaves the graph."""
    case = CASES[name]()
    for key in case.inputs:
        fixed = {k: v for k, v in case.inputs.items() if k != key}

        def product(function, key=key, fixed=fixed):
            return hessian_product(
                lambda **own: function(**fixed, **own), {key: case.inputs[key]}, False
            )

        try:
            with gk.use_backend("cpu"):
                found = product(case.operation)
        except NotImplementedError:
            continue
        assert_alike(found, product(case.equations))


@every_case
def test_functional_hvp_is_right_or_refused(name):
    case = CASES[name]()
    keys, values = list(case.inputs), tuple(case.inputs.values())

    def product(function):
        return torch.autograd.functional.hvp(
            lambda *v: scalar(function, dict(zip(keys, v, strict=True)), False),
            values,
            tuple(map(torch.ones_like, values)),
        )[1]

    with gk.use_backend("cpu"), pytest.raises(NotImplementedError, match=REFUSED):
        product(case.operation)
    with gk.use_backend("reference"):
        assert_alike(product(case.operation), product(case.equations))


@every_case
def test_transforms_have_every_derivative(name):
    case = CASES[name]()
    key, value = next(iter(case.inputs.items()))
    others = {k: v for k, v in case.inputs.items() if k != key}

    def of(function):
        return lambda v: scalar(function, {key: v} | others, True)

    direction = torch.cos(torch.arange(value.numel(), dtype=value.dtype)).view_as(value)
    ours, exact = of(case.operation), of(case.equations)
    grad, jvp, vjp = torch.func.grad, torch.func.jvp, torch.func.vjp
    expected = jvp(grad(exact), (value,), (direction,))[1]
    assert expected.abs().max() > 0
    assert_alike(jvp(grad(ours), (value,), (direction,))[1], expected)
    assert_alike(vjp(grad(ours), value)[1](direction)[0], expected)
    assert_alike(grad(lambda v: (grad(ours)(v) * direction).sum())(value), expected)
    several = torch.stack((value, value + 0.1 * direction))
    products = torch.vmap(lambda v: jvp(grad(ours), (v,), (direction,))[1])(several)
    assert_alike(products[0], expected)
    assert_alike(products[1], jvp(grad(exact), (several[1],), (direction,))[1])


@every_case
def test_upstream_gradients_of_a_transform_are_right_or_refused(name):
    """Batched ones, and those with a tangent, of a graph made outside the transform."""
    case = CASES[name]()

    def calls(function):
        inputs = required(case.inputs)
        out = function(**inputs)
        upstream = torch.stack((torch.ones_like(out), torch.cos(out.detach())))

        def back(v, **how):
            return torch.autograd.grad(out, list(inputs.values()), v, retain_graph=True, **how)

        def tangents():
            with forward_ad.dual_level():
                found = back(forward_ad.make_dual(upstream[0], upstream[1]))
                return tuple(forward_ad.unpack_dual(g).tangent for g in found)

        return (
            lambda: back(upstream, is_grads_batched=True),
            lambda: torch.vmap(back)(upstream),
            lambda: torch.func.jvp(back, (upstream[0],), (upstream[1],))[1],
            tangents,
        )

    with gk.use_backend("cpu"):
        by_kernels = calls(case.operation)
    with gk.use_backend("reference"):
        by_reference = calls(case.operation)
    for refused, ours, exact in zip(by_kernels, by_reference, calls(case.equations), strict=True):
        with pytest.raises(NotImplementedError, match=REFUSED):
            refused()
        assert_alike(ours(), exact())


@every_case
def test_first_derivatives_with_a_graph_are_those_without(name):
    case = CASES[name]()
    inputs = required(case.inputs)
    leaves = list(inputs.values())
    for backend in ("cpu", "reference"):
        with gk.use_backend(backend):
            direct = scalar(case.operation, inputs, False)
            # Checkpointing recomputes what a node saves, and gives it out only once.
            again = checkpoint(lambda: scalar(case.operation, inputs, False), use_reentrant=False)
            plain = torch.autograd.grad(direct, leaves, retain_graph=True)
            graph = torch.autograd.grad(direct, leaves, create_graph=True)
            checkpointed = torch.autograd.grad(again, leaves, create_graph=True)
        assert_alike(graph, plain)
        assert_alike(checkpointed, plain)


@pytest.mark.triton
@pytest.mark.parametrize("squared", [False, True])
def test_second_derivatives_of_triton_kernels_are_refused(squared):
    device = DEVICE_TYPES[0]
    x, norm, attention, mlp, adapter = arguments(
        torch.float32, tokens=5, width=16, heads=1, rank=2, hidden=8, device=device
    )
    logits = normal(4, 7, dtype=torch.float32, device=device)
    calls = {
        "gist_loss": (lambda t: gk.bidirectional_kl(t, logits), -logits),
        "adapter": (lambda t: gk.adapter(t, *adapter[:4]), x),
        "prefix_attention": (lambda t: gk.prefix_attention(t, 1), torch.cat((x, x, x), -1).half()),
        "adapter_attention": (lambda t: gk.adapter_attention(t, norm, attention, adapter), x),
        "adapter_mlp": (lambda t: gk.adapter_mlp(t, norm, mlp, adapter), x),
    }
    gated = arguments(torch.float32, width=16, hidden=8, gated=True, device=device)[3]
    calls["gated mlp"] = (lambda t: gk.adapter_mlp(t, norm, gated, adapter), x)
    for function, value in calls.values():
        with gk.use_backend("triton"), pytest.raises(NotImplementedError, match=REFUSED):
            hessian_product(lambda t, function=function: function(t), {"t": value}, squared)
