"""Choosing a backend: by default, by context, by environment; what is said when it can't serve."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import gist_kernels as gk
from gist_kernels import backend
from gist_kernels.autograd import loss as autograd_loss
from gist_kernels.kernels.protocols import OPERATIONS, Backend

A = torch.tensor([[1.0, 2.0]])


@pytest.fixture
def fake(monkeypatch):
    """A first, fastest backend that serves the loss of float32 CPU tensors only."""
    served = "served by fast", None, None
    loss = SimpleNamespace(NAME="fast", forward=lambda *arguments: served)
    fast = Backend("fast", device_types=("cpu",), dtypes=(torch.float32,), loss=lambda: loss)
    broken = Backend("broken", unavailable="it was not built")
    monkeypatch.setattr(backend, "BACKENDS", (fast, broken, *backend.BACKENDS))
    monkeypatch.setitem(autograd_loss._OPERATORS, "fast", (loss.forward, None))
    monkeypatch.setattr(backend, "_DEFAULT", "auto")
    backend._cached_choice.cache_clear()
    yield
    backend._cached_choice.cache_clear()


def test_every_backend_is_reported_with_what_it_serves_or_why_not(fake):
    report = gk.backends()
    assert report["fast"] == (True, "", OPERATIONS["loss"])
    assert report["broken"] == (False, "it was not built", ())
    assert "adapter" in report["reference"].operations


@pytest.mark.usefixtures("fake")
def test_auto_takes_the_first_that_can_and_falls_back_silently():
    assert gk.bidirectional_kl(A, A) == "served by fast"
    assert gk.bidirectional_kl(A.double(), A.double()).item() == 0
    assert gk.adapter(A, A, None, A.T, None).isfinite().all()


@pytest.mark.usefixtures("fake")
def test_context_overrides_and_is_undone_also_after_an_error():
    with gk.use_backend("reference"):
        assert gk.bidirectional_kl(A, A).item() == 0
        with gk.use_backend("auto"):
            assert gk.bidirectional_kl(A, A) == "served by fast"
        assert gk.bidirectional_kl(A, A).item() == 0
    with pytest.raises(KeyError), gk.use_backend("reference"):
        raise KeyError
    assert gk.bidirectional_kl(A, A) == "served by fast"


@pytest.mark.usefixtures("fake")
def test_context_is_one_threads_own():
    seen = []
    with gk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(gk.bidirectional_kl(A, A)))
        thread.start()
        thread.join()
    assert seen == ["served by fast"]


@pytest.mark.skipif(torch.__version__ < "2.15", reason="kept as traced, as its docstring says")
@pytest.mark.usefixtures("fake")
def test_compiled_code_follows_the_context():
    compiled = torch.compile(lambda a: gk.bidirectional_kl(a, a), fullgraph=True, backend="eager")
    assert compiled(A) == "served by fast"
    with gk.use_backend("reference"):
        assert compiled(A).item() == 0
    assert compiled(A) == "served by fast"


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("reference", "the loss of reference"),
        ("", "the loss of cpu"),
        ("referense", "GIST_KERNELS_BACKEND: 'referense' .* did you mean 'reference'"),
    ],
)
def test_environment_variable_chooses_at_import_and_the_context_wins(value, printed):
    script = """
import torch, gist_kernels
from gist_kernels import backend
print("the loss of", backend.serving("loss", "cpu", torch.float32))
with gist_kernels.use_backend("auto"):
    assert backend.select("loss", torch.ones(1, 1)) is not None
"""
    environment = os.environ | {"GIST_KERNELS_BACKEND": value}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert re.search(printed, run.stdout + run.stderr)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        (
            "fast",
            lambda: gk.bidirectional_kl(A.double(), A.double()),
            "does not take torch.float64",
        ),
        ("fast", lambda: gk.adapter(A, A, None, A.T, None), "it has no adapter kernels"),
        ("fast", lambda: gk.bidirectional_kl(A.to("meta"), A.to("meta")), "takes cpu tensors"),
        ("broken", lambda: gk.bidirectional_kl(A, A), "it was not built"),
    ],
)
def test_backend_asked_for_by_name_never_falls_back(name, call, message):
    with gk.use_backend(name), pytest.raises(RuntimeError, match=message):
        call()


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'reference'"), gk.use_backend("referense"):
        pass


def test_missing_native_module_is_explained():
    script = """
import sys
sys.modules["gist_kernels.kernels.cpu._native"] = None
import torch, gist_kernels
print(gist_kernels.backends()["cpu"])
print(gist_kernels.bidirectional_kl(torch.ones(1, 2), torch.ones(1, 2)).item())
"""
    printed = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert "available=False" in printed
    assert "native module is missing" in printed
    assert "C++17 compiler" in printed
    assert printed.endswith("\n0.0\n")
