"""Memory for large gradients: kept when unused, never shared by two tensors."""

from __future__ import annotations

import gc
import os
import pickle
import platform
import subprocess
import sys

import pytest
import torch

import gist_kernels as gk
from gist_kernels.kernels.cpu import memory


@pytest.fixture(autouse=True)
def _small_blocks_count(monkeypatch):
    monkeypatch.setattr(memory, "_LEAST_BYTES", 4096)
    memory._unused.clear()
    yield
    memory._unused.clear()


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_a_block_is_used_again_once_nothing_refers_to_it():
    tensor = memory.empty((32, 100), torch.float32)
    assert tensor.shape == (32, 100)
    assert tensor.is_contiguous()
    first = address(tensor)
    view = tensor[3:].t()
    del tensor
    assert address(memory.empty((32, 100), torch.float32)) != first  # the view is still there
    array = view.numpy()
    del view
    assert address(memory.empty((32, 100), torch.float32)) != first  # and numpy's
    del array
    gc.collect()
    again = [memory.empty((30, 50), torch.float64) for _ in range(2)]
    assert first in map(address, again)
    assert address(again[0]) != address(again[1])
    assert memory._unused == []


def test_what_suits_no_request_is_given_back():
    del_me = memory.empty((1024, 100), torch.float32)
    del del_me
    assert len(memory._unused) == 1
    memory.empty((32, 100), torch.float32)  # less than half of it
    assert [len(block) for block in memory._unused] == [32 * 100 * 4]
    assert memory.empty((33, 100), torch.float32).shape == (33, 100)  # a little more than it
    assert [len(block) for block in memory._unused] == [33 * 100 * 4]
    small = memory.empty((10, 10), torch.float32)
    assert len(memory._unused) == 1
    assert address(small) % 64 == 0


def test_tensors_are_like_any_other():
    tensor = memory.empty((32, 100), torch.bfloat16).fill_(3)
    tensor.mul_(2)
    assert (pickle.loads(pickle.dumps(tensor)) == 6).all()
    assert (tensor.clone() == 6).all()


@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_in_kept_blocks(stacked):
    target = torch.arange(64) % 100
    pair = torch.randn(64, 2, 100, requires_grad=True)

    def gradient():
        cls, gist = gk.split_heads(pair) if stacked else pair.unbind(1)
        (found,) = torch.autograd.grad(gk.gist_loss(cls, gist, target), pair)
        return found

    with gk.use_backend("reference"):
        expected = gradient()
    with gk.use_backend("cpu"):
        steps = [gradient() for _ in range(3)]  # all alive at once
        for found in steps:
            torch.testing.assert_close(found, expected)
        accumulated = [torch.zeros_like(pair) for _ in range(2)]
        for _ in range(5):
            for total in accumulated:
                total += gradient()
        for total in accumulated:
            torch.testing.assert_close(total, 5 * expected)


def test_no_more_than_a_pair_is_kept():
    alive = [memory.empty((32, 100), torch.float32) for _ in range(10)]
    del alive
    assert len(memory._unused) == 2


def test_streamed_gradients_whose_cache_lines_do_not_line_up():
    rows, classes = 4500, 1001  # more than what is written past the cache
    both = torch.randn(rows, 2, classes)
    target = torch.arange(rows) % classes
    apart = [half.contiguous() for half in both.unbind(1)]
    expected = gk.gist_loss_and_grad(*apart, target)
    for x, y in zip(gk.gist_loss_and_grad(*both.unbind(1), target), expected, strict=True):
        assert torch.equal(x, y)


# Frees 160 MB in blocks of 8 MB, as the end of a training step does, and takes them again.
STEPS = """
import resource, torch
from gist_kernels.kernels.cpu import memory
kept = memory.keep_freed()
def step():
    blocks = [torch.zeros(2_000_000) for _ in range(20)]
    while blocks:
        blocks.pop()
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run_steps(**variables: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in memory._SETTINGS}
    return subprocess.run(
        [sys.executable, "-c", STEPS], env=inherited | variables, capture_output=True, text=True
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of GNU's C library")
def test_the_heap_keeps_what_a_step_frees():
    pages = 20 * 2_000_000 * 4 // os.sysconf("SC_PAGE_SIZE")
    kept, faults = run_steps(GIST_KERNELS_KEEP_MIB="1024").stdout.split()
    assert kept == "True"
    assert int(faults) < pages / 10  # a small allocation may take the place of one block of the 20


# How many pages the C library then gives back depends on what lies at the heap's top.
@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{"GIST_KERNELS_KEEP_MIB": "0"}, {"MALLOC_TRIM_THRESHOLD_": "65536"}]
)
def test_the_heap_is_left_alone_where_a_variable_says_so(variables):
    assert run_steps(**variables).stdout.split()[0] == "False"


@pytest.mark.slow
@pytest.mark.parametrize("value", ["-1", "2048", "much"])
def test_a_wrong_number_of_mib_is_an_error(value):
    error = run_steps(GIST_KERNELS_KEEP_MIB=value).stderr
    assert (
        f"ValueError: GIST_KERNELS_KEEP_MIB must be a number from 0 to 2047, not '{value}'" in error
    )
