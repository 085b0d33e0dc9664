"""The Triton loss kernels, in Triton's interpreter on CPU tensors or for real on a device.

Under ``TRITON_INTERPRET=1`` everything runs in the interpreter. Without it everything needs a
device: one process can't do both.
"""

from __future__ import annotations

import importlib
import math
import mmap

import oracles
import pytest
import torch

from gist_kernels.kernels import triton as gpu
from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.kernels.triton import heuristics
from gist_kernels.reference import loss as reference

tl = pytest.importorskip("triton.language")
loss = importlib.import_module("gist_kernels.kernels.triton.loss")

INTERPRETED = gpu.INTERPRETED
DEVICE = gpu.DEVICE_TYPES[0]
pytestmark = pytest.mark.triton
interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
device_only = pytest.mark.skipif(DEVICE == "cpu", reason="needs a device, not an interpreter")

CLASSES = (1, 2, 5, 10, 45, 100, 397, 1000, 1023, 1024, 1025, 4096, 8192, 21843, 65537)
# One of each regime: many rows a program, a row a program, a row in chunks.
REGIMES = (10, 600, 8200)
KINDS = ("random", "equal", "close", "peaked", "gap", "offset")
TEMPERATURES = (3.0, 1.0, 0.5, 2.0, 4.7)
OPTIONS = LossOptions(3.0, 1.0, 0.5, 0.75, 0.6, 0.0, -100, "mean")
NAMES = ("loss", "cls CE", "gist CE", "KL(cls || gist)", "KL(gist || cls)", "d_cls", "d_gist")


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    if not INTERPRETED:
        yield
        return
    import numpy as np

    loss._counters.clear()  # of a kernel that an error stopped half-way
    # numpy warns where a GPU silently makes the inf or nan that the kernels then leave out.
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=REGIMES)
def classes(request, monkeypatch):
    """A number of classes of each regime. In an interpreter, smaller chunks save time."""
    if request.param <= 1024 or DEVICE != "cpu":
        yield request.param
        return
    for name in ("_LONGEST", "_LONGEST_KEPT", "_FORWARD_CHUNK", "_BACKWARD_CHUNK"):
        monkeypatch.setattr(heuristics, name, 1024)
    shapes = heuristics.forward, heuristics.backward, heuristics.kept
    for shape in shapes:
        shape.cache_clear()
    yield 2100
    for shape in shapes:
        shape.cache_clear()


def logits(kind: str, rows: int, classes: int, dtype: torch.dtype = torch.float32):
    """Two (rows, classes) tensors of one kind of difficulty, and a target."""
    generator = torch.Generator().manual_seed(classes)
    a, b = (3 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    if kind == "equal":
        b = a.clone()
    elif kind == "close":
        b = a + 1e-3 * b
    elif kind == "peaked":
        a[:, 0] += 60
        b[:, -1] += 60
    elif kind == "gap":
        a[:, 0] += 1e4
        b[:, -1] -= 1e4
    elif kind == "offset":
        a, b = a + 1e6, b - 1e6
    target = torch.randint(classes, (rows,), generator=generator)
    return a.to(DEVICE, dtype), b.to(DEVICE, dtype), target.to(DEVICE)


def both_ways(a, b, target, options, grad=None):
    """[loss, terms, gradients] by forward and backward, and by forward_backward, which leaves
    the terms to forward."""
    value, terms, stats = loss.forward(a, b, target, options)
    assert stats.shape == loss.stats_shape(len(a))
    grad = torch.ones_like(value) if grad is None else grad
    gradients = loss.backward(grad, a, b, target, stats, options, True, True)
    at_once = loss.forward_backward(a, b, target, options)
    return [value, *terms, *gradients], [at_once[0], *terms, *at_once[1:]]


def differentiated(a, b, target, options):
    """The same in PyTorch's log-softmax operators, in the precision of a and b."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    rows = oracles.log_softmax_terms(
        a, b, target, options.temperature, label_smoothing=options.label_smoothing
    )
    if options.reduction != "none":
        rows = [getattr(row, options.reduction)() for row in rows]
    total = sum(w * t for w, t in zip(options[1:5], rows, strict=True))
    return [x.detach() for x in (total, *rows, *torch.autograd.grad(total.sum(), (a, b)))]


def by_reference(a, b, target, options):
    """The same by the reference backend, in float64: it also takes masked classes."""
    a, b = (x.detach().double().requires_grad_() for x in (a, b))
    total, terms = reference.gist_loss(a, b, target, options)
    return [x.detach() for x in (total, *terms, *torch.autograd.grad(total.sum(), (a, b)))]


def assert_as_accurate_as_pytorch(a, b, target, options):
    """Our error against float64 is at most that of PyTorch in float32, 4 ulps, and half of one of
    the largest log-probability, which either form rounds on its way."""
    spread = max((x.amax(1) - x.amin(1)).max().item() for x in (a, b)) / options.temperature
    exact = differentiated(a.double(), b.double(), target, options)
    by_pytorch = differentiated(a.float(), b.float(), target, options)
    ours = both_ways(a, b, target, options)
    for how, values in zip(("apart", "at once"), ours, strict=True):
        for name, value, torchs, truth in zip(NAMES, values, by_pytorch, exact, strict=True):
            scale = max(1.0, truth.abs().max().item())
            allowed = (torchs - truth).abs().max().item() + 2**-23 * (4 * scale + spread / 2)
            if name.startswith("d_") and a.dtype != torch.float32:
                # Rounded to the logits' dtype; the interpreter truncates.
                allowed += torch.finfo(a.dtype).eps * truth.abs().max().item()
            error = (value.double() - truth).abs().max().item()
            assert error <= allowed, f"{name} {how}: error {error:.3g}, allowed {allowed:.3g}"


def assert_close(ours, expected, **tolerances):
    for name, value, truth in zip(NAMES, ours, expected, strict=True):
        torch.testing.assert_close(
            value.double(),
            truth.double(),
            **({"rtol": 2e-6, "atol": 2e-6} | tolerances),
            equal_nan=True,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize(
    ("classes", "kind"),
    [(c, k) for c in CLASSES for k in KINDS if c < 65537 or k in ("random", "gap")],
)
def test_as_accurate_as_pytorch(classes, kind):
    a, b, target = logits(kind, 1 if classes > 2000 else 3, classes)
    other = TEMPERATURES[1 + (CLASSES.index(classes) + KINDS.index(kind)) % 4]
    for temperature in (3.0,) if classes > 2000 else (3.0, other):
        assert_as_accurate_as_pytorch(a, b, target, OPTIONS._replace(temperature=temperature))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_every_temperature(classes, temperature):
    a, b, target = logits("random", 2, classes)
    assert_as_accurate_as_pytorch(a, b, target, OPTIONS._replace(temperature=temperature))


def test_kl_of_close_distributions_keeps_its_digits(classes):
    a, b, _ = logits("close", 2, classes)
    exact = differentiated(a.double(), b.double(), None, OPTIONS)
    for ours in both_ways(a, b, None, OPTIONS):
        for value, truth in zip(ours[3:5], exact[3:5], strict=True):
            assert 0 < truth < 1e-6
            torch.testing.assert_close(value.double(), truth, rtol=1e-3, atol=0)


def test_equal_logits_have_no_kl_and_no_kl_gradient(classes):
    a, b, _ = logits("equal", 2, classes)
    for ours in both_ways(a, b, None, OPTIONS):
        assert all((value == 0).all() for value in ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(classes, dtype):
    a, b, target = logits("random", 3, classes, dtype)
    assert_as_accurate_as_pytorch(a, b, target, OPTIONS)
    value, d_cls, d_gist = loss.forward_backward(a, b, target, OPTIONS)
    assert (value.dtype, d_cls.dtype, d_gist.dtype) == (torch.float32, dtype, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_smoothing_and_reductions(classes, reduction):
    a, b, target = logits("random", 5, classes)
    options = OPTIONS._replace(label_smoothing=0.1, reduction=reduction)
    assert_as_accurate_as_pytorch(a, b, target, options)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_class_probabilities(classes, dtype):
    a, b, _ = logits("random", 3, classes)
    # Not normalised; row 1 one-hot, with a masked class that has probability 0.
    target = torch.rand(3, 2 * classes).to(DEVICE, dtype)[:, :classes]
    target[1] = 0
    target[1, 1] = 1
    a[1, 0] = b[1, 0] = -math.inf
    exact = by_reference(a, b, target, OPTIONS)
    for ours in both_ways(a, b, target, OPTIONS):
        assert_close(ours, exact)
    options = OPTIONS._replace(label_smoothing=0.1)
    exact = differentiated(a[::2].double(), b[::2].double(), target[::2].double(), options)
    for ours in both_ways(a[::2], b[::2], target[::2], options):
        assert_close(ours, exact)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_are_not_looked_at(classes, reduction):
    a, b, target = logits("random", 5, classes)
    kept = torch.tensor([0, 2, 4], device=DEVICE)
    options = OPTIONS._replace(ignore_index=7, reduction=reduction)
    target[kept] %= 7
    target[1] = target[3] = 7
    exact = differentiated(a[kept].double(), b[kept].double(), target[kept], options)
    a[1] = b[3] = math.nan
    for ours in both_ways(a, b, target, options):
        if reduction == "none":
            assert all((rows[[1, 3]] == 0).all() for rows in ours[:5])
            ours[:5] = (rows[kept] for rows in ours[:5])
        assert all((d[[1, 3]] == 0).all() for d in ours[5:])
        assert_close([*ours[:5], ours[5][kept], ours[6][kept]], exact)


def test_all_rows_ignored(classes):
    a, b, target = logits("random", 2, classes)
    target[:] = -100
    for ours in both_ways(a, b, target, OPTIONS):
        assert all(value.isnan() for value in ours[:5])
        assert all((d == 0).all() for d in ours[5:])


@pytest.mark.parametrize("rows", [heuristics.COUNT_INLINE - 1, heuristics.COUNT_INLINE + 44])
def test_mean_of_many_rows_divides_by_those_that_count(rows):
    a, b, target = logits("random", rows, 3)
    target[::3] = -100
    kept = target >= 0
    exact = differentiated(a[kept].double(), b[kept].double(), target[kept], OPTIONS)
    for ours in both_ways(a, b, target, OPTIONS):
        assert_close([*ours[:5], ours[5][kept], ours[6][kept]], exact)


def test_classes_masked_on_both_sides_are_as_if_they_were_not_there(classes):
    a, b, target = logits("random", 3, classes)
    present = torch.rand(classes) < 0.7
    present[2048:] = False  # all of a chunk
    present[:2] = True
    target %= 2
    exact = differentiated(a[:, present].double(), b[:, present].double(), target, OPTIONS)
    a[:, ~present] = b[:, ~present] = -math.inf
    for ours in both_ways(a, b, target, OPTIONS):
        assert all((d[:, ~present] == 0).all() for d in ours[5:])
        assert_close([*ours[:5], ours[5][:, present], ours[6][:, present]], exact)


@pytest.mark.parametrize("masked", ["one class", "the end"])
def test_classes_masked_on_one_side(classes, masked):
    """KL(p || q) is infinite where q is 0 and p is not; a weight of 0 leaves it out."""
    a, b, target = logits("random", 3, classes)
    options = OPTIONS._replace(reduction="none")
    target[:] = 0
    b[1, 3 if masked == "one class" else slice(min(classes - 2, 2048), None)] = -math.inf
    for ours in both_ways(a, b, target, options):
        assert ours[0].tolist()[1] == ours[3].tolist()[1] == math.inf
        assert ours[0][::2].isfinite().all()
        assert ours[4].isfinite().all()
    for direction, (x, y) in (("kl_cls_gist_weight", (a, b)), ("kl_gist_cls_weight", (b, a))):
        one_way = options._replace(**{direction: 0.0})
        exact = by_reference(x, y, target, one_way)
        for ours in both_ways(x, y, target, one_way):
            assert ours[0].isfinite().all()
            assert_close(ours, exact)


def test_a_masked_target_is_an_infinite_cross_entropy_that_a_zero_weight_leaves_out(classes):
    a, b, target = logits("random", 2, classes)
    a[0, target[0]] = -math.inf
    options = OPTIONS._replace(cls_weight=0.0, kl_gist_cls_weight=0.0, reduction="sum")
    exact = by_reference(a, b, target, options)
    assert exact[1] == math.inf
    for ours in both_ways(a, b, target, options):
        assert ours[0].isfinite()
        assert_close(ours, exact)


def test_a_row_of_masked_classes_is_nan_and_alone(classes):
    a, b, target = logits("random", 3, classes)
    a[1] = -math.inf
    options = OPTIONS._replace(reduction="none")
    for ours in both_ways(a, b, target, options):
        for rows in (*ours[:2], *ours[3:]):
            assert rows[1].isnan().all()
        for rows in ours:
            assert rows[::2].isfinite().all()


@pytest.mark.parametrize("index", [-1, "classes", 2**40, -(2**40)])
def test_targets_out_of_range_are_nan_for_their_row(classes, index):
    a, b, target = logits("random", 3, classes)
    exact = differentiated(a.double(), b.double(), target, OPTIONS._replace(reduction="none"))
    target[1] = classes if index == "classes" else index
    for ours in both_ways(a, b, target, OPTIONS._replace(reduction="none")):
        assert all(rows[1].isnan().all() for rows in ours)
        assert_close([rows[::2] for rows in ours], [rows[::2] for rows in exact])
    for ours in both_ways(a, b, target, OPTIONS):
        assert all(value.isnan() for value in ours[:5])


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_and_a_single_row(rows, reduction):
    a, b, target = logits("random", rows, 7)
    options = OPTIONS._replace(reduction=reduction)
    exact = differentiated(a.double(), b.double(), target, options)
    for ours in both_ways(a, b, target, options):
        assert [x.shape for x in ours] == [x.shape for x in exact]
        assert_close(ours, exact)


def test_kl_alone(classes):
    a, b, _ = logits("random", 3, classes)
    exact = differentiated(a.double(), b.double(), None, OPTIONS)
    for ours in both_ways(a, b, None, OPTIONS):
        assert_close(ours, exact)


def test_upstream_gradients(classes):
    a, b, target = logits("random", 3, classes)
    options = OPTIONS._replace(reduction="none")
    _, _, stats = loss.forward(a, b, target, options)
    ones = differentiated(a.double(), b.double(), target, options)[5:]
    for grad in (
        torch.tensor(2.0).expand(3),
        torch.tensor([1.0, -2.0, 0.0]),
        torch.arange(6.0)[::2],
    ):
        grad = grad.to(DEVICE)
        ours = loss.backward(grad, a, b, target, stats, options, True, True)
        for value, one in zip(ours, ones, strict=True):
            torch.testing.assert_close(value.double(), grad[:, None] * one, rtol=2e-6, atol=2e-6)


def test_a_side_alone_gets_the_same_bits(classes):
    a, b, target = logits("random", 3, classes)
    value, _, stats = loss.forward(a, b, target, OPTIONS)
    grad = torch.ones_like(value)
    d_cls, d_gist = loss.backward(grad, a, b, target, stats, OPTIONS, True, True)
    cls_only = loss.backward(grad, a, b, target, stats, OPTIONS, True, False)
    gist_only = loss.backward(grad, a, b, target, stats, OPTIONS, False, True)
    assert cls_only[1] is None
    assert gist_only[0] is None
    assert torch.equal(cls_only[0], d_cls)
    assert torch.equal(gist_only[1], d_gist)
    assert loss.backward(grad, a, b, target, stats, OPTIONS, False, False) == (None, None)


def test_stacked_logits_have_stacked_gradients(classes):
    a, b, target = logits("random", 3, classes)
    stacked = torch.stack((a, b), dim=1)
    exact = differentiated(a.double(), b.double(), target, OPTIONS)
    for ours in both_ways(stacked[:, 0], stacked[:, 1], target, OPTIONS):
        assert_close(ours, exact)
        d_cls, d_gist = ours[5:]
        assert d_cls._base is d_gist._base
        assert torch.equal(d_cls._base, torch.stack((d_cls, d_gist), dim=1))


def test_row_strides_are_taken_as_they_are(classes):
    a, b, target = logits("random", 3, classes)
    wide = torch.full((3, 2 * classes + 1), math.nan, device=DEVICE)
    wide[:, 1 : classes + 1] = a
    every_third = torch.stack((target, -target - 1), dim=1).flatten()[::2]
    exact = differentiated(a.double(), b.double(), target, OPTIONS)
    for ours in both_ways(wide[:, 1 : classes + 1], b, every_third, OPTIONS):
        assert_close(ours, exact)
        assert all(d.is_contiguous() for d in ours[5:])
    row = a[:1].expand(3, classes)
    exact = differentiated(row.double(), b.double(), target, OPTIONS)
    for ours in both_ways(row, b, target, OPTIONS):
        assert_close(ours, exact)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU this would take the memory for real")
def test_offsets_beyond_int32(classes):
    """Two rows 2^31 elements apart, in memory of which no other page is ever touched."""
    a, b, target = logits("random", 2, classes, torch.float16)
    stride = 2**31 + 16
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (stride + classes)), dtype=torch.float16)
    far = memory.as_strided((2, classes), (stride, 1))
    far[0], far[1] = a[0], a[1]
    expected, _ = both_ways(a, b, target, OPTIONS)
    for ours in both_ways(far, b, target, OPTIONS):
        assert_close(ours, expected, rtol=0, atol=0)
    targets = torch.frombuffer(mmap.mmap(-1, 8 * (stride + 1)), dtype=torch.int64)
    far = targets.as_strided((2,), (stride,))
    far[0], far[1] = target[0], target[1]
    for ours in both_ways(a, b, far, OPTIONS):
        assert_close(ours, expected, rtol=0, atol=0)


def test_inputs_are_never_written(classes):
    a, b, target = logits("random", 3, classes)
    before = a.clone(), b.clone(), target.clone()
    both_ways(a, b, target, OPTIONS)
    for now, then in zip((a, b, target), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeats_give_the_same_bits(classes, reduction):
    a, b, target = logits("random", 5, classes)
    options = OPTIONS._replace(reduction=reduction)
    first = both_ways(a, b, target, options)
    for _ in range(2 if DEVICE == "cpu" else 100):
        for once, again in zip(first, both_ways(a, b, target, options), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_a_row_has_the_same_bits_in_any_batch(classes):
    """Of tensors that begin at multiples of 16 bytes: Triton loads others otherwise."""
    rows = 40 if classes == 10 else 4
    a, b, target = logits("random", rows, classes)
    options = OPTIONS._replace(reduction="none")
    order = torch.randperm(rows).to(DEVICE)
    together = both_ways(a, b, target, options)
    shuffled = both_ways(a[order], b[order], target[order], options)
    alone = both_ways(*(x[-1:].clone() for x in (a, b, target)), options)
    for batch, mixed, single in zip(together, shuffled, alone, strict=True):
        for rows_of, rows_mixed, row in zip(batch, mixed, single, strict=True):
            assert torch.equal(rows_of[order], rows_mixed)
            assert torch.equal(rows_of[-1:], row)


@interpreter_only
@pytest.mark.parametrize("classes", [2, 100, 1000, 4096, 8192, 8200, 21843])
def test_traffic(classes):
    """No logit is read twice, or only once more where forward_backward splits rows."""
    rows = 64 if classes <= 100 else 2
    traffic = importlib.import_module("bench.traffic")
    least = {"forward": 2, "backward": 4, "forward_backward": 4}
    if heuristics.kept(classes) is None:
        least["forward_backward"] = 6
    found = traffic.measure(rows, classes, torch.float32)
    for name, (of_logits, everything) in found.items():
        assert of_logits <= 1.05 * least[name], name
        if classes >= 1000:
            assert everything <= 1.05 * least[name], name
    # As a linear head's loss calls it: nothing is moved on top.
    assert traffic.measure(rows, classes, torch.float32, in_place=True) == found


@interpreter_only
@pytest.mark.parametrize("classes", [100, 1000, 8200])
def test_masked_rows_are_not_read(classes):
    """Half the rows masked is half the reads; their gradients are written, as 0."""
    traffic = importlib.import_module("bench.traffic")
    found = traffic.measure(4, classes, torch.float32, torch.tensor([1.0, 0.0, 0.5, 0.0]))
    assert found["forward"][0] <= 1.05 * 1
    assert found["backward"][0] <= 1.05 * (1 + 2)
    assert found["forward_backward"][0] <= 1.05 * (3 if heuristics.kept(classes) else 4)


@device_only
def test_no_recompilation_for_a_new_batch_size():
    def binaries() -> int:
        return sum(
            len(cache[0])
            for kernel in (loss._forward_kernel, loss._backward_kernel)
            for cache in kernel.device_caches.values()
        )

    both_ways(*logits("random", 3, 100), OPTIONS)
    before = binaries()
    for rows in (1, 2, 16, 33, 250):
        both_ways(*logits("random", rows, 100), OPTIONS)
    assert binaries() == before


@device_only
def test_cuda_graphs_and_streams_share_no_counter(classes):
    a, b, target = logits("random", 64, classes)
    expected = both_ways(a, b, target, OPTIONS)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both_ways(a, b, target, OPTIONS)
    torch.cuda.current_stream().wait_stream(side)
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = both_ways(a, b, target, OPTIONS)
        graphs.append((graph, results))
    for _ in range(20):
        with torch.cuda.stream(side):
            graphs[0][0].replay()
        graphs[1][0].replay()
        eager = both_ways(a, b, target, OPTIONS)
    torch.cuda.synchronize()
    for results in (eager, *(results for _, results in graphs)):
        for once, again in zip(expected, results, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@device_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_on_another_than_the_current_device():
    a, b, target = logits("random", 4, 100)
    expected = both_ways(a, b, target, OPTIONS)
    ours = both_ways(a.to("cuda:1"), b.to("cuda:1"), target.to("cuda:1"), OPTIONS)
    for once, again in zip(expected, ours, strict=True):
        assert all(torch.equal(x, y.to(x.device)) for x, y in zip(once, again, strict=True))


def test_availability_is_told():
    assert gpu.BACKEND.unavailable is None
    assert "Triton" in gpu.BACKEND.detail()
    assert torch.float64 not in gpu.DTYPES
    assert gpu.DEVICE_TYPES == (DEVICE,)
