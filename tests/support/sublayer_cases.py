"""Sublayers' equations in float64, arguments for them, and what an error may be."""

from __future__ import annotations

import oracles
import torch
from draws import geometric_mean

import gist_kernels as gk

DROPPED = torch.tensor([0.0, 1.25], dtype=torch.float64).view(2, 1, 1)
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float64: 2**-52}


MLPS = {
    "mlp": {}, "gated mlp": {"gated": True}, "normed mlp": {"inner_norm": True},
    "gated, normed mlp": {"gated": True, "inner_norm": True},
}  # fmt: skip
"""The arguments' options, by name of the kind."""


def exact_attention(
    x, norm, attention, adapter, num_queries=None, drop_path=None, lengths=None
):  # fmt: skip
    q, k, v = (
        normed(x, norm) @ attention.qkv_weight.T
        + (0 if attention.qkv_bias is None else attention.qkv_bias)
    ).chunk(3, dim=-1)
    heads = attention.num_heads
    if attention.rotation is not None:
        q, k = (oracles.rotated(t, heads, attention.rotation) for t in (q, k))
    scale = (q.shape[-1] // heads) ** -0.5 if attention.scale is None else attention.scale
    rows = []
    for row, length in enumerate([x.shape[1]] * len(x) if lengths is None else lengths):
        known = (t[row : row + 1, :length] for t in (q, k, v))
        rows.append(oracles.attention(*known, heads, scale)[0][0])
    out = torch.nn.utils.rnn.pad_sequence([*rows, q[0]], batch_first=True)[:-1]
    out = out if attention.norm is None else oracles.layer_norm(out, *attention.norm)
    out = out @ attention.proj_weight.T
    out = out if attention.proj_bias is None else out + attention.proj_bias
    return joined(x, out, attention.layer_scale, adapter, drop_path)[:, :num_queries]


def exact_mlp(x, norm, mlp, adapter, drop_path=None):
    hidden = normed(x, norm) @ mlp.fc1_weight.T
    hidden = hidden if mlp.fc1_bias is None else hidden + mlp.fc1_bias
    if mlp.gated:
        features = mlp.fc2_weight.shape[1]
        gate, value = hidden[..., :features], hidden[..., features:]
        hidden = oracles.ACTIVATIONS[mlp.activation](gate) * value
    else:
        hidden = oracles.ACTIVATIONS[mlp.activation](hidden)
    hidden = hidden if mlp.norm is None else oracles.layer_norm(hidden, *mlp.norm)
    out = hidden @ mlp.fc2_weight.T
    out = out if mlp.fc2_bias is None else out + mlp.fc2_bias
    return joined(x, out, mlp.layer_scale, adapter, drop_path)


def normed(x, norm):
    return x if norm is None else oracles.layer_norm(x, *norm)


def joined(x, out, layer_scale, adapter, drop_path):
    for factor in (layer_scale, drop_path):
        out = out if factor is None else out * factor
    return x + out if adapter is None else x + out + oracles.bottleneck(x, *adapter)[0]


def normal(*shape, dtype=torch.float64, spread=0.3, device="cpu"):
    return (spread * torch.randn(*shape, dtype=torch.float64)).to(device, dtype)


def rotation_of(
    span, head_dim, *, half=True, heads=None, dtype=torch.float32, device="cpu",
):  # fmt: skip
    """Rotary positions of tokens ``span[0]`` and the ``span[1]`` - 1 after it, with a table per
    head for ``heads``. The features of a pair have different entries."""
    start, rows = span
    shape = (rows, head_dim) if heads is None else (heads, rows, head_dim)
    angles = 3 * torch.randn(shape, dtype=torch.float64)
    factors = 1 + 0.2 * torch.randn(shape, dtype=torch.float64)
    tables = (factors * angles.sin(), factors * angles.cos())
    return gk.Rotation(*(t.to(device, dtype) for t in tables), start, half)


def arguments(
    dtype, *, batch=2, tokens=19, width=48, heads=3, rank=4, hidden=80,
    with_adapter=True, layer_scale=False, biases=True, activation="gelu",
    gated=False, inner_norm=False, device="cpu", rotation=None, with_norm=True,
    attention_norm=False,
):  # fmt: skip
    """x and the three groups of weights, rounded to ``dtype``."""

    def of(*shape, optional=False):
        return normal(*shape, dtype=dtype, device=device) if biases or not optional else None

    norm = gk.NormWeights(1 + of(width), of(width, optional=True), 1e-6)
    scale = of(width) if layer_scale else None
    attention = gk.AttentionWeights(
        of(3 * width, width), of(3 * width, optional=True), of(width, width),
        of(width, optional=True), heads, layer_scale=scale, rotation=rotation,
    )  # fmt: skip
    if attention_norm:
        of_attention = gk.NormWeights(1 + of(width), of(width, optional=True), 1e-5)
        attention = attention._replace(norm=of_attention)
    inner = 2 * hidden if gated else hidden
    mlp = gk.MlpWeights(
        of(inner, width), of(inner, optional=True), of(width, hidden),
        of(width, optional=True), activation, scale, gated=gated,
    )  # fmt: skip
    if inner_norm:
        inner_norm = gk.NormWeights(1 + of(hidden), of(hidden, optional=True), 1e-5)
        mlp = mlp._replace(norm=inner_norm)
    adapter = gk.AdapterWeights(
        of(rank, width), of(rank, optional=True), of(width, rank), of(width, optional=True),
        0.7, activation,
    )  # fmt: skip
    x = normal(batch, tokens, width, dtype=dtype, spread=1.0, device=device)
    return x, norm if with_norm else None, attention, mlp, adapter if with_adapter else None


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


def converted(weights, dtype):
    if weights is None:
        return None
    return type(weights)(*(w.to(dtype) if isinstance(w, torch.Tensor) else w for w in weights))


def check(ours, pytorch, exact, dtype, eps=None):
    """Our error may exceed that of the composition of PyTorch's operators by half and two ulps, as
    root mean squares.

    Each argument is one dict of tensors, or a list of them, one a draw: of a dozen chained
    operations which error is larger is a matter of luck in one draw, so of several it is the
    geometric mean of the errors, in units of what they may be, that is held to 1.
    """
    draws = (ours, pytorch, exact) if isinstance(ours, list) else ([ours], [pytorch], [exact])
    shares = [_shares(*draw, eps or EPS[dtype]) for draw in zip(*draws, strict=True)]
    for name in shares[0]:
        mean = geometric_mean(torch.tensor([share[name] for share in shares]))
        assert mean <= 1, (name, mean, shares)


def _shares(ours, pytorch, exact, eps):
    """Our error of each tensor, as a share of what it may be."""
    assert ours.keys() == exact.keys()
    shares = {}
    for name, truth in exact.items():
        assert ours[name].dtype == pytorch[name].dtype, name
        size, own, theirs = (
            t.double().square().mean().sqrt().item()
            for t in (truth, ours[name] - truth, pytorch[name] - truth)
        )
        allowed = 1.5 * theirs + 2 * eps * size
        # A draw without any error, or with next to none, does not make up for bad ones.
        shares[name] = max(own / allowed if allowed else torch.inf if own else 0.0, 0.1)
    return shares


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


def compare(name, dtype, options, backend="auto", draws=1, **shape):
    found = [draw(name, dtype, options, backend, **shape) for _ in range(draws)]
    if dtype is not torch.float64:
        check(*map(list, zip(*found, strict=True)), dtype)
        return
    for ours, reference, exact in found:
        for result in (ours, reference):
            for key, truth in exact.items():
                torch.testing.assert_close(result[key], truth, rtol=1e-11, atol=1e-11)


def draw(name, dtype, options, backend, **shape):
    """Value and gradients of ours, of the reference and of the equations."""
    x, norm, attention, mlp, adapter = arguments(dtype, **MLPS.get(name, {}), **shape)
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

    tokens, lengths = options.get("grad_tokens"), options.get("lengths")
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()
            if k not in ("grad_tokens", "lengths")}  # fmt: skip
    exact = differentiated(
        lambda x, adapter, **o: equations(
            x, converted(norm, torch.float64), converted(weights, torch.float64), adapter, **o
        ),
        x.double(), converted(adapter, torch.float64), upstream, **wide,
        **({} if lengths is None else {"lengths": lengths.tolist()}),
    )  # fmt: skip
    if tokens is not None:
        kept = torch.zeros_like(exact["d_x"])
        kept[:, tokens[0] : sum(tokens)] = exact["d_x"][:, tokens[0] : sum(tokens)]
        exact["d_x"] = kept
    found = differentiated(ours, x, adapter, upstream, **options)
    reference = differentiated(theirs, x, adapter, upstream, **options)
    return found, reference, exact
