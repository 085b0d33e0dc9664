"""Losses of a linear head: values and gradients against float64, what is left out, and memory."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import gist_kernels as gk
from gist_kernels.kernels.cpu import head as cpu_head
from gist_kernels.kernels.cpu import loss as cpu_loss

pytestmark = pytest.mark.usefixtures("served_by")

OPERATIONS = ("gist_loss", "bidirectional_kl", "jensen_shannon")
SHAPES = ((9,), (2, 4), (1, 3, 2), (1,), (0,))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """An operation, its tensors in float64 and its options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    operation = draw(st.sampled_from(OPERATIONS))
    shape = draw(st.sampled_from(SHAPES))
    classes, width = draw(st.sampled_from((1, 2, 5, 17))), draw(st.sampled_from((1, 6)))
    separate = draw(st.booleans())
    other_width = draw(st.sampled_from((width, 3))) if separate else width
    bias = draw(st.booleans())
    tensors = {
        "cls": normal(*shape, width),
        "gist": normal(*shape, other_width),
        "weight": normal(classes, width),
        "bias": normal(classes) if bias else None,
        "gist_weight": normal(classes, other_width) if separate else None,
        "gist_bias": normal(classes) if separate and bias else None,
    }
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.5, 1.0)))
        tensors["cls"][~mask] = tensors["gist"][~mask] = math.nan
    reduction = draw(st.sampled_from(("mean", "batchmean", "sum", "none")))
    divisor = draw(st.sampled_from((None, 2.5, torch.tensor(4)))) if "mean" in reduction else None
    options = {
        "temperature": draw(st.sampled_from((1.0, 3.0, (1.0, 2.0)))),
        "reduction": reduction,
        "mask": mask,
        "row_weight": normal(*shape).relu() if draw(st.booleans()) else None,
        "divisor": divisor,
        "scale_by_temperature_squared": draw(st.booleans()),
        "logit_softcap": draw(st.sampled_from((None, 2.0))),
        "chunk_rows": draw(st.sampled_from((None, 1, 4))),
    }
    target = None
    if operation == "gist_loss":
        target = torch.randint(classes, shape, generator=generator)
        if draw(st.booleans()):
            target[torch.rand(shape, generator=generator) < 0.3] = -100
        if draw(st.booleans()):
            target = normal(*shape, classes).softmax(-1)
        options |= {
            "label_smoothing": draw(st.sampled_from((0.0, 0.1))),
            "cls_weight": draw(st.sampled_from((1.0, 0.0))),
            "gist_weight": 0.5,
        }
    if operation == "jensen_shannon":
        options["beta"] = draw(st.sampled_from((0.5, 0.1)))
    else:
        name = "kl_weights" if operation == "gist_loss" else "weights"
        options[name] = draw(st.sampled_from(((0.75, 0.5), (1.0, 0.0), (0.0, 0.0))))
        options["stop_gradient"] = draw(st.sampled_from((None, "a", "b", "targets")))
    trained = {
        name: tensor is not None and draw(st.integers(0, 3)) > 0 for name, tensor in tensors.items()
    }
    upstream = normal(*shape) if reduction == "none" else normal()
    return {
        "operation": operation,
        "tensors": tensors,
        "target": target,
        "options": options,
        "trained": trained,
        "upstream": upstream,
    }


def with_gradients(call, dtype, evaluate):
    """The loss, and the gradients of the tensors that are trained, None for the others'."""
    tensors = {
        name: None if t is None else t.detach().to(dtype).requires_grad_(call["trained"][name])
        for name, t in call["tensors"].items()
    }
    loss = evaluate(tensors, call["target"], dict(call["options"]))
    inputs = [t for t in tensors.values() if t is not None and t.requires_grad]
    gradients: tuple[torch.Tensor, ...] = tuple(map(torch.zeros_like, inputs))
    if loss.requires_grad:
        gradients = torch.autograd.grad(
            (loss * call["upstream"].to(loss.dtype)).sum(), inputs, materialize_grads=True
        )
    return [loss.detach(), *gradients]


def ours(operation):
    def evaluate(tensors, target, options):
        cls, gist, weight, bias, gist_weight, gist_bias = tensors.values()
        second = None if gist_weight is None else gk.HeadWeights(gist_weight, gist_bias)
        arguments = (cls, gist) if target is None else (cls, gist, target)
        function = getattr(gk, f"linear_{operation}")
        return function(*arguments, gk.HeadWeights(weight, bias), second, **options)

    return evaluate


def by_definition(operation):
    """The head, then the equations; rows that don't count are taken as 0."""

    def evaluate(tensors, target, options):
        cls, gist, weight, bias, gist_weight, gist_bias = tensors.values()
        counts = torch.ones(cls.shape[:-1], dtype=torch.bool)
        counts = counts if options["mask"] is None else options["mask"]
        if target is not None and not target.is_floating_point():
            counts = counts & (target != -100)
        cls, gist = (torch.where(counts[..., None], side, 0.0) for side in (cls, gist))
        if gist_weight is None:
            gist_weight, gist_bias = weight, bias
        sides = [F.linear(cls, weight, bias), F.linear(gist, gist_weight, gist_bias)]
        cap = options["logit_softcap"]
        if cap is not None:
            sides = [cap * torch.tanh(side / cap) for side in sides]
        t = options["temperature"]
        pair = t if isinstance(t, tuple) else (t, t)
        if operation == "jensen_shannon":
            shares = options["beta"], 1 - options["beta"]
            rows = oracles.jensen_shannon_rows(sides, shares, pair)
        else:
            weights = options["kl_weights" if operation == "gist_loss" else "weights"]
            rows = oracles.kl_rows(*sides, pair, weights, options["stop_gradient"])
        rows = rows * (pair[0] * pair[1] if options["scale_by_temperature_squared"] else 1.0)
        if target is not None:
            classes = sides[0].shape[-1]
            indices = not target.is_floating_point()
            goal = (target.clamp(min=0) if indices else target.to(rows.dtype)).flatten(0, -1)
            goal = goal if indices else goal.view(-1, classes)
            for side, factor in zip(sides, (options["cls_weight"], 0.5), strict=True):
                entropies = F.cross_entropy(
                    side.reshape(-1, classes),
                    goal,
                    reduction="none",
                    label_smoothing=options["label_smoothing"],
                )
                rows = rows + factor * entropies.reshape(rows.shape)
        mask = None if bool(counts.all()) and options["mask"] is None else counts
        row_weight, divisor = options["row_weight"], options["divisor"]
        loss = oracles.reduced(rows, options["reduction"], mask, row_weight, divisor)
        plain = options["mask"] is None and row_weight is None and divisor is None
        if "mean" in options["reduction"] and plain and not counts.any():
            return loss + math.nan
        return loss

    return evaluate


def test_every_option_follows_the_equations(served_by):
    dtype = torch.float32 if served_by == "triton" else torch.float64
    relative = 1e-11 if dtype is torch.float64 else 2e-5
    examples = 15 if served_by == "triton" else 100

    def check(call):
        operation = call["operation"]
        exact = with_gradients(call, torch.float64, by_definition(operation))
        found = with_gradients(call, dtype, ours(operation))
        # Where nothing counts, the loss is nan and teaches nothing.
        nothing = exact[0].isnan().any()
        for index, (x, y) in enumerate(zip(found, exact, strict=True)):
            y = torch.zeros_like(y) if nothing and index else y
            allowed = relative * (1 + y.nan_to_num().abs().max().item() if y.numel() else 1)
            torch.testing.assert_close(x.double(), y, rtol=0, atol=allowed, equal_nan=True)

    settings(deadline=None, max_examples=examples)(given(call=calls())(check))()


def draw(rows=23, width=6, classes=41, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    target = torch.randint(classes, (rows,), generator=generator)
    f, g, weight, bias = (
        normal(rows, width), normal(rows, width), normal(classes, width), normal(classes),
    )  # fmt: skip
    return [x.requires_grad_() for x in (f, g, weight, bias)], target


def gist_loss(tensors, target, **options):
    f, g, weight, bias = tensors
    return gk.linear_gist_loss(f, g, target, gk.HeadWeights(weight, bias), **options)


def unfused(tensors, target, **options):
    f, g, weight, bias = tensors
    return gk.gist_loss(F.linear(f, weight, bias), F.linear(g, weight, bias), target, **options)


def of_every_operation(f, g, weight, bias, target, **options):
    head = gk.HeadWeights(weight, bias)
    return (
        gk.linear_gist_loss(f, g, target, head, **options),
        gk.linear_bidirectional_kl(f, g, head, temperature=2.0, **options),
        gk.linear_jensen_shannon(f, g, head, beta=0.3, **options),
    )


@pytest.mark.float64
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction, softcap):
    tensors, target = draw(5, 3, 4, torch.float64)
    target[2] = -100
    mask = torch.tensor([True, False, True, True, True])
    for k in range(3):
        assert torch.autograd.gradcheck(
            lambda *t, k=k: of_every_operation(
                *t, target, reduction=reduction, mask=mask, logit_softcap=softcap, chunk_rows=2
            )[k],
            tensors,
        )


@pytest.mark.float64
@pytest.mark.parametrize("chunk_rows", [1, 7, 22, 23, 24, 100])
def test_the_chunk_changes_nothing(chunk_rows):
    tensors, target = draw(dtype=torch.float64)
    target[4] = -100
    for whole, cut in zip(
        of_every_operation(*tensors, target),
        of_every_operation(*tensors, target, chunk_rows=chunk_rows),
        strict=True,
    ):
        torch.testing.assert_close(cut, whole, rtol=1e-13, atol=1e-15)
        expected = torch.autograd.grad(whole, tensors)
        for x, y in zip(torch.autograd.grad(cut, tensors), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_as_accurate_as_the_whole_whatever_the_chunk(dtype):
    tensors, target = draw(rows=256, dtype=dtype)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    with gk.use_backend("reference"):  # some kernels take no float64
        exact = torch.autograd.grad(unfused(doubles, target), doubles)
    plain = torch.autograd.grad(unfused(tensors, target), tensors)
    for chunk_rows in (1, 16, 256):
        found = torch.autograd.grad(gist_loss(tensors, target, chunk_rows=chunk_rows), tensors)
        for x, theirs, y in zip(found, plain, exact, strict=True):
            assert x.dtype is dtype
            error, allowed = ((z.double() - y).norm() for z in (x, theirs))
            assert error <= 1.25 * allowed, (chunk_rows, error / y.norm(), allowed / y.norm())


def test_logits_in_float32_keep_a_small_divergence_of_bfloat16_features(served_by):
    (f, g, weight, bias), _ = draw(rows=64, dtype=torch.bfloat16)
    g = (f.float() + 2e-2 * g.float()).bfloat16()
    head = gk.HeadWeights(weight, bias)
    exact = gk.bidirectional_kl(
        *(F.linear(x.double(), weight.double(), bias.double()).float() for x in (f, g))
    )
    wide = gk.linear_bidirectional_kl(f, g, head, logits_dtype=torch.float32)
    narrow = gk.linear_bidirectional_kl(f, g, head)
    torch.testing.assert_close(wide, exact, rtol=1e-3, atol=0)
    assert (narrow - exact).abs() > 5 * (wide - exact).abs()
    gradients = torch.autograd.grad(wide, (f, weight))
    assert [d.dtype for d in gradients] == [torch.bfloat16] * 2


def test_autocast_computes_matmuls_in_its_dtype_and_gives_gradients_in_the_weights_own():
    tensors, target = draw()
    halves = [t.detach().bfloat16().requires_grad_() for t in tensors]
    for reduction in ("mean", "none"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = gist_loss(tensors, target, reduction=reduction)
        expected = gist_loss(halves, target, reduction=reduction)
        assert loss.dtype is torch.float32
        torch.testing.assert_close(loss, expected)
        found = torch.autograd.grad(loss.sum(), tensors)
        for x, y in zip(found, torch.autograd.grad(expected.sum(), halves), strict=True):
            assert x.dtype is torch.float32
            torch.testing.assert_close(x, y.float(), rtol=2e-2, atol=1e-3)


def test_rows_have_upstream_gradients_of_their_own():
    tensors, target = draw()
    target[3] = -100
    upstream = torch.linspace(-2, 3, len(target))
    upstream[0] = 0
    rows = gist_loss(tensors, target, reduction="none", chunk_rows=5)
    expected = unfused(tensors, target, reduction="none")
    torch.testing.assert_close(rows, expected)
    for x, y in zip(
        torch.autograd.grad(rows, tensors, upstream),
        torch.autograd.grad(expected, tensors, upstream),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_pass_is_not_the_first_ones(reduction):
    tensors, target = draw()
    loss = gist_loss(tensors, target, reduction=reduction).sum()
    first = torch.autograd.grad(loss, tensors, torch.tensor(3.0), retain_graph=True)
    kept = [d.clone() for d in first]
    for d in first:
        d.zero_()
    second = torch.autograd.grad(loss, tensors, torch.tensor(-1.0))
    for x, y in zip(kept, second, strict=True):
        torch.testing.assert_close(x, -3 * y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused_by_name(served_by, reduction):
    tensors, target = draw()
    for loss in of_every_operation(*tensors, target, reduction=reduction):
        (gradient,) = torch.autograd.grad(loss.sum(), tensors[:1], create_graph=True)
        if served_by == "reference":
            assert torch.autograd.grad(gradient.square().sum(), tensors[2])[0].isfinite().all()
            continue
        with pytest.raises(NotImplementedError, match=r'use_backend\("reference"\)'):
            gradient.square().sum().backward()


@pytest.mark.parametrize("options", [{}, {"mask": torch.zeros(4, dtype=torch.bool)}])
def test_where_no_row_counts_there_is_no_gradient(options):
    tensors, target = draw(rows=4)
    target[:] = -100
    for reduction, expected in (("mean", 0.0 if options else math.nan), ("sum", 0.0)):
        loss, terms = gist_loss(tensors, target, reduction=reduction, return_terms=True, **options)
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)
        assert all(term.isnan() == loss.isnan() for term in terms)
        assert all((d == 0).all() for d in torch.autograd.grad(loss, tensors))


def test_rows_that_do_not_count_may_hold_nan():
    tensors, target = draw()
    counts = torch.arange(len(target)) % 3 > 0
    f, g, weight, bias = tensors
    expected = gist_loss((f[counts], g[counts], weight, bias), target[counts])
    exact = torch.autograd.grad(expected, tensors)
    bad = [x.detach().clone().masked_fill_(~counts[:, None], math.nan) for x in (f, g)]
    inputs = [*(x.requires_grad_() for x in bad), weight, bias]
    for indices, options in (
        (target, {"mask": counts}),
        (target.masked_fill(~counts, -100), {}),
        (target, {"row_weight": counts.float(), "divisor": counts.sum()}),
    ):
        loss = gist_loss(inputs, indices, chunk_rows=4, **options)
        torch.testing.assert_close(loss, expected)
        for x, y in zip(torch.autograd.grad(loss, inputs), exact, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_terms_are_those_of_the_logits_and_have_no_gradient():
    tensors, target = draw()
    target[1] = -100
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "return_terms": True}
        loss, terms = gist_loss(tensors, target, chunk_rows=5, **options)
        expected, theirs = unfused(tensors, target, **options)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(tuple(terms), tuple(theirs))
        assert not any(term.requires_grad for term in terms)
        found = torch.autograd.grad(loss.sum(), tensors)
        for x, y in zip(found, torch.autograd.grad(expected.sum(), tensors), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_parts_of_a_batch_with_one_divisor_sum_to_its_mean():
    tensors, target = draw()
    f, g, weight, bias = tensors
    parts = [
        gist_loss((f[p], g[p], weight, bias), target[p], divisor=torch.tensor(len(target)))
        for p in (slice(0, 9), slice(9, None))
    ]
    torch.testing.assert_close(sum(parts), gist_loss(tensors, target))


def test_a_bias_of_minus_infinity_masks_a_class():
    tensors, target = draw()
    tensors[3].data[5] = -math.inf
    target[target == 5] = 6
    loss = gist_loss(tensors, target)
    assert loss.isfinite()
    gradients = torch.autograd.grad(loss, tensors)
    assert all(d.isfinite().all() for d in gradients)
    assert (gradients[2][5] == 0).all()
    assert gradients[3][5] == 0


def test_inputs_are_never_written():
    tensors, target = draw()
    before = [t.detach().clone() for t in tensors]
    for loss in of_every_operation(*tensors, target, logit_softcap=2.0):
        loss.backward()
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction):
    tensors, target = draw()
    target[2] = -100
    compiled = torch.compile(of_every_operation, fullgraph=True, backend="aot_eager")
    options = {"reduction": reduction, "chunk_rows": 8}
    for x, y in zip(
        compiled(*tensors, target, **options),
        of_every_operation(*tensors, target, **options),
        strict=True,
    ):
        torch.testing.assert_close(x, y)
        upstream = torch.arange(1.0, 1 + x.numel()).reshape(x.shape)
        found = torch.autograd.grad(x, tensors, upstream, retain_graph=True)
        expected = torch.autograd.grad(y, tensors, upstream)
        for d, e in zip(found, expected, strict=True):
            torch.testing.assert_close(d, e, rtol=1e-5, atol=1e-5)


# ---- what it costs, on a CPU


@pytest.fixture
def matmuls(served_by, monkeypatch):
    """The rows of each matmul, by kind."""
    if served_by != "cpu":
        pytest.skip("counts the CPU kernels' matmuls")
    found: dict[str, list[int]] = {"logits": [], "rows_gradient": [], "add_weight_gradient": []}

    def counting(name, function, argument):
        def counted(*arguments):
            found[name].append(len(arguments[argument]))
            return function(*arguments)

        return counted

    for name, argument in (("logits", 0), ("rows_gradient", 0), ("add_weight_gradient", 1)):
        monkeypatch.setattr(cpu_head, name, counting(name, getattr(cpu_head, name), argument))
    return found


@pytest.mark.parametrize(
    ("trained", "rows_gradient", "weight_gradient"),
    [
        ("f g W b", 46, 46),
        ("f g", 46, 0),
        ("W", 0, 46),
        ("f W", 23, 46),
        ("g", 23, 0),
        ("b", 0, 0),
        ("", 0, 0),
    ],
)
def test_what_needs_no_gradient_has_no_matmul(matmuls, trained, rows_gradient, weight_gradient):
    tensors, target = draw()
    for name, tensor in zip("fgWb", tensors, strict=True):
        tensor.requires_grad_(name in trained.split())
    loss = gist_loss(tensors, target, chunk_rows=10)
    if trained:
        loss.backward()
    assert [t.grad is not None for t in tensors] == [name in trained.split() for name in "fgWb"]
    assert [sum(rows) for rows in matmuls.values()] == [46, rows_gradient, weight_gradient]


def test_a_stopped_side_has_no_matmul(matmuls):
    (f, g, weight, bias), _ = draw()
    head = gk.HeadWeights(weight, bias)
    gk.linear_bidirectional_kl(f, g, head, stop_gradient="a").backward()
    assert matmuls == {"logits": [46], "rows_gradient": [23], "add_weight_gradient": [23]}
    assert (f.grad == 0).all()


def test_rows_that_do_not_count_are_in_no_matmul(matmuls):
    tensors, target = draw()
    target[:8] = -100
    mask = torch.arange(23) != 22
    gist_loss(tensors, target, mask=mask, chunk_rows=10).backward()
    assert set(map(tuple, matmuls.values())) == {(20, 8)}


def peak_bytes(call) -> int:
    """The most that a call's tensors take at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        call()
    events = measured.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("trained", ["f g W b", "f g", "g"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_is_what_the_documentation_says(served_by, reduction, trained):
    if served_by != "cpu":
        pytest.skip("the reference has the logits of all rows")
    rows, width, classes, chunk = 400, 96, 4000, 64
    tensors, target = draw(rows, width, classes)
    for name, tensor in zip("fgWb", tensors, strict=True):
        tensor.requires_grad_(name in trained.split())

    def step():
        loss = gist_loss(tensors, target, reduction=reduction, chunk_rows=chunk).sum()
        return torch.autograd.grad(loss, [t for t in tensors if t.requires_grad])

    features = 4 * rows * width * sum(name in trained for name in "fg")
    head = 4 * classes * width if "W" in trained else 0
    logits = 2 * chunk * classes * 4
    results = features + head
    expected = features + head + max(logits, results)
    step()
    assert 0.8 * (features + head + logits) < peak_bytes(step) <= 1.1 * expected + 20 * 4 * rows


def test_chunks_are_powers_of_two_within_their_limits():
    assert cpu_head.chunk_rows(10, 4) == 256
    assert cpu_head.chunk_rows(128256, 4) == 256
    assert cpu_head.chunk_rows(262144, 4) == 128
    assert cpu_head.chunk_rows(262144, 2) == 256
    assert cpu_head.chunk_rows(2**20, 4) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [1, 7, 1029])
def test_gradients_in_place_have_the_bits_of_those_beside(dtype, classes):
    a, b = (3 * torch.randn(2, 5, classes)).to(dtype)
    target = torch.arange(5) % classes
    options = gk.functional.logits.checked_options(
        3.0, 1.0, 0.5, (0.75, 0.75), 0.1, -100, "sum", False, None
    )
    expected = cpu_loss.forward_backward(a, b, target, options)
    found = cpu_loss.forward_backward(a, b, target, options, in_place=True)
    assert found[1] is a
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


# ---- arguments

X, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 2])
HEAD = gk.HeadWeights(W)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], X, T, HEAD), TypeError, "cls_features must be a torch.Tensor, not list"),
        ((X, X.long(), T, HEAD), TypeError, "gist_features must be float32.*is torch.int64"),
        ((X[0, 0], X, T, HEAD), ValueError, r"cls_features must have shape \(..., D\)"),
        ((X, X[:2], T, HEAD), ValueError, "gist_features must have shape"),
        ((X, X[:, :2], T, HEAD), ValueError, "gist_features must have shape .* with one head"),
        ((X, X, T, W), TypeError, r"head must be gk.HeadWeights\(weight, bias\), not Tensor"),
        ((X, X, T, gk.HeadWeights(W[:, :3])), ValueError, r"head.weight must have shape \(C, D\)"),
        ((X, X, T, gk.HeadWeights(W.half())), TypeError, "head.weight is torch.float16"),
        ((X, X, T, gk.HeadWeights(W, W[0])), ValueError, r"head.bias must have shape \(C,\)"),
        ((X, X, T, gk.HeadWeights(W[:0])), ValueError, "head.weight must have at least one class"),
        ((X, X, T, HEAD, gk.HeadWeights(W[:4])), ValueError, "gist_head.weight must have shape"),
        ((X, X, T[:2], HEAD), ValueError, r"target must have shape \(...\)"),
        ((X, X, torch.rand(3, 4), HEAD), ValueError, "target must have shape .* probabilities"),
        ((X, X, T.int(), HEAD), TypeError, r"target.long\(\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        gk.linear_gist_loss(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature must be greater than 0"),
        ({"reduction": "avg"}, ValueError, "reduction: 'avg' is not known"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be greater than 0"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be an integer above 0, or None; it is 0"),
        ({"chunk_rows": True}, ValueError, "chunk_rows must be an integer"),
        ({"logits_dtype": torch.int64}, ValueError, "logits_dtype must be torch.float32 or a"),
        ({"logits_dtype": torch.bfloat16}, ValueError, "logits_dtype must be torch.float32 or a"),
        ({"mask": T}, TypeError, "mask must be bool"),
        ({"divisor": 2, "reduction": "sum"}, ValueError, "divisor takes the place"),
    ],
)
def test_options_that_do_not_fit_are_named(options, error, message):
    for operation, arguments in (
        (gk.linear_gist_loss, (X, X, T, HEAD)),
        (gk.linear_bidirectional_kl, (X, X, HEAD)),
        (gk.linear_jensen_shannon, (X, X, HEAD)),
    ):
        with pytest.raises(error, match=message):
            operation(*arguments, **options)


def test_a_class_index_out_of_range_is_named_by_its_row_of_the_batch(served_by):
    tensors, target = draw()
    target[2], target[17] = -100, 41
    if served_by == "triton":
        rows = gist_loss(tensors, target, reduction="none")
        assert rows.isnan().nonzero().tolist() == [[17]]
        return
    with pytest.raises(IndexError, match=r"target\[17\] is 41, outside the 41 classes"):
        gist_loss(tensors, target, chunk_rows=4)
