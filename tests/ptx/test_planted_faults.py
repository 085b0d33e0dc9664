"""Faults planted in the kernels: what each is found by.

Most leave every result as it was in Triton's interpreter, and on a GPU most of the time.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import adapter_cases
import oracles
import pytest
import torch

from gist_kernels.kernels import triton as gpu
from gist_kernels.kernels.protocols import LossOptions
from gist_kernels.kernels.triton import heuristics

pytest.importorskip("triton.backends.nvidia", exc_type=ImportError)
from ptx import FaultError
from ptx.driver import executed

loss = importlib.import_module("gist_kernels.kernels.triton.loss")
attention_tiles = importlib.import_module("gist_kernels.kernels.triton.attention_tiles")
pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="TRITON_INTERPRET=1 compiles nothing")

KERNELS = Path(gpu.__file__).parent
OPTIONS = LossOptions(3.0, 1.0, 0.5, 0.75, 0.6, 0.0, -100, "mean")


@pytest.fixture(autouse=True)
def _no_counter_is_kept():
    yield
    loss._counters.clear()  # of a kernel that a fault stopped half-way


def check(loss: ModuleType, classes: int = 45, rows: int = 13) -> None:
    """Three times in a row, on several programs, the last of them with rows to spare."""
    a, b = 3 * torch.randn(2, rows, classes)
    target = torch.randint(classes, (rows,))
    target[3] = -100
    exact = [x[target >= 0].double().requires_grad_() for x in (a, b)]
    terms = oracles.log_softmax_terms(*exact, target[target >= 0], OPTIONS.temperature)
    total = sum(w * t.mean() for w, t in zip(OPTIONS[1:5], terms, strict=True))
    gradients = torch.autograd.grad(total, exact)
    for _ in range(3):
        value, _, stats = loss.forward(a, b, target, OPTIONS)
        found = loss.backward(None, a, b, target, stats, OPTIONS, True, True)
        torch.testing.assert_close(value.double(), total.detach(), rtol=2e-6, atol=2e-6)
        for x, y in zip(found, gradients, strict=True):
            torch.testing.assert_close(x[target >= 0].double(), y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_without_a_fault_nothing_is_found(seed):
    with executed(80, seed=seed):
        check(loss)


def with_fault(
    tmp_path: Path, monkeypatch, old: str, new: str,
    names: tuple[str, ...] = ("loss", "loss_rows", "rows"),
) -> ModuleType:  # fmt: skip
    """The first of ``names``, of a copy of these files in which ``old`` is ``new``."""
    package = "mutant_" + re.sub(r"\W", "", tmp_path.name)
    (tmp_path / package).mkdir()
    found = 0
    for name in names:
        text = (KERNELS / f"{name}.py").read_text()
        found += text.count(old)
        text = text.replace(old, new)
        text = re.sub(
            rf"from gist_kernels\.kernels\.triton\.({'|'.join(names)}) ",
            rf"from {package}.\1 ",
            text,
        )
        (tmp_path / package / f"{name}.py").write_text(text)
    assert found
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(f"{package}.{names[0]}")


IN_THE_SOURCE = {
    "the last program by its number, not by its arrival": (
        'if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1:',
        'tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")\n'
        "    if tl.program_id(0) == programs - 1:",
        "race: .*(sums|counter)|unwritten: byte .* of sums",
    ),
    "logits loaded without the mask of rows": (
        "mask = kept[:, None] & (column < classes)[None, :]",
        "mask = (row >= 0)[:, None] & (column < classes)[None, :]",
        "outside: .* of a, which has",
    ),
    "gradients stored without the mask of columns": (
        "mask = inside[:, None] & (column < classes)[None, :]",
        "mask = inside[:, None] & (column >= 0)[None, :]",
        "race: .*d_a|outside: .* of d_a, which has",
    ),
    "statistics stored without the mask of rows": (
        "tl.store(at + k, row_stats[k], inside)",
        "tl.store(at + k, row_stats[k])",
        "race: .*stats|outside: .* of stats, which has",
    ),
    "sums stored by all programs at one place": (
        "tl.store(sums + program.to(tl.int64) * 5 + k, tl.sum(term))",
        "tl.store(sums + k, tl.sum(term))",
        "race: byte .* of sums is written, and was written by program",
    ),
    "a sum that nobody stores": (
        "tl.store(sums + program.to(tl.int64) * 5 + 4, tl.sum(kept.to(tl.float32)))",
        "pass",
        "unwritten: byte .* of sums",
    ),
    "a gradient stored over its logits": (
        "store_gradients(d_a, d_b, row, d_stride, column, mask, grad_a,",
        "store_gradients(a, d_b, row, d_stride, column, mask, grad_a,",
        "input: a is written to",
    ),
    "the counter not reset": (
        "tl.store(counter, 0)",
        "pass",
        "AssertionError: .*nan",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", IN_THE_SOURCE)
def test_a_fault_in_the_source_is_found(fault, tmp_path, monkeypatch):
    old, new, message = IN_THE_SOURCE[fault]
    mutant = with_fault(tmp_path, monkeypatch, old, new)

    def check_in_several_orders() -> None:
        for seed in range(4):
            with executed(80, seed=seed):
                check(mutant)

    with pytest.raises((FaultError, AssertionError)) as found:
        check_in_several_orders()
    assert re.search(message, f"{found.type.__name__}: {found.value}", re.S)


def replaced(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        return text.replace(old, new)

    return edit


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("weaker", ["cta.acq_rel", "gpu.relaxed", "gpu.release", "gpu.acquire"])
def test_a_weaker_atomic_is_found(weaker, seed):
    with (
        pytest.raises(FaultError, match="race: .*(sums|counter)"),
        executed(80, seed=seed, edit=replaced("atom.global.gpu.acq_rel", f"atom.global.{weaker}")),
    ):
        check(loss)


@pytest.mark.slow
def test_every_barrier_that_is_dropped_is_found():
    with executed(80) as driver:
        check(loss)
    text = driver.texts[0]
    barriers = list(re.finditer(r"bar\.sync\s+0;", text))
    assert len(barriers) > 10
    for barrier in barriers:
        dropped = text[: barrier.start()] + text[barrier.end() :]
        with (
            pytest.raises(FaultError, match="race|unwritten"),
            executed(80, edit=replaced(text, dropped)),
        ):
            check(loss)
        loss._counters.clear()


def tiles_backward(kernels: ModuleType, queries: int = 40, head_dim: int = 16) -> None:
    """One head's, unrolled so little that Triton prefetches nothing."""
    q, k, v, d_out = torch.randn(4, 1, queries, head_dim, dtype=torch.bfloat16)
    gradients = [torch.full_like(each, torch.nan) for each in (q, k, v)]
    lse = torch.randn(1, 1, queries)
    tiles = heuristics.AttentionTiles(head_dim, stages=1)
    kernels.backward(tiles, d_out, q, k, v, lse, 1, 0.25, *gradients, None)


@pytest.mark.parametrize("seed", [None, 1])
def test_the_barrier_between_the_passes_of_attention_is_needed(seed, tmp_path, monkeypatch):
    """Triton's own barriers, for keys in shared memory, order the passes too, for now."""
    names = "attention_tiles", "attention_rows"
    mutant = with_fault(tmp_path, monkeypatch, "tl.debug_barrier()", "pass", names)
    with executed(80, seed=seed):
        tiles_backward(attention_tiles)
    with (
        pytest.raises(FaultError, match="race: byte .* of means is read, and was written by"),
        executed(80, seed=seed) as driver,
    ):
        tiles_backward(mutant)
    assert "bar.sync" in driver.texts[0]


def test_a_kernel_for_aligned_tensors_on_others_is_found():
    """As by a launcher that keeps one kernel for all pointers."""

    def rows(offset: int) -> torch.Tensor:
        return torch.randn(2, 4 * 48 + 16)[:, offset : offset + 4 * 48].view(2, 4, 48)

    def run(a: torch.Tensor, b: torch.Tensor) -> None:
        loss.forward(a, b, torch.tensor([1, 2, 3, 4]), OPTIONS)

    with executed(80) as driver:
        run(*rows(0))
        run(*rows(1))
    aligned, other = driver.texts
    assert aligned != other
    with (
        pytest.raises(FaultError, match="misaligned access of 16 bytes to a"),
        executed(80, edit=replaced(other, aligned)),
    ):
        run(*rows(1))


def test_a_prefetch_that_is_not_waited_for_is_found(monkeypatch):
    kernels = importlib.import_module("gist_kernels.kernels.triton.adapter")
    monkeypatch.setattr(kernels.launch, "multiprocessors", lambda device: 1)
    case = adapter_cases.make(40, 24, 4)  # several rows a program
    with executed(80):
        kernels.forward(case.x, case.x, case.norm, case.adapter)

    def without_waits(text: str) -> str:
        return re.sub(r"cp\.async\.wait_group\s+\w+;", "cp.async.wait_group 99;", text)

    with (
        pytest.raises(FaultError, match="unwritten: byte .* of shared memory"),
        executed(80, edit=without_waits),
    ):
        kernels.forward(case.x, case.x, case.norm, case.adapter)
