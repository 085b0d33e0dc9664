"""Choosing a backend: by default, by context, by environment; what is said when it can't serve."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import gist_kernels as gk
from gist_kernels import backend
from gist_kernels.backend import Backend

A = torch.tensor([[1.0, 2.0]])


@pytest.fixture
def fake(monkeypatch):
    """A first, fastest backend that serves bidirectional_kl of float32 CPU tensors alone."""
    fast = Backend(
        "fast",
        operations={"bidirectional_kl": lambda *arguments: ("served by fast", None)},
        device_types=("cpu",),
        dtypes=(torch.float32,),
    )
    broken = Backend("broken", operations={}, unavailable="it was not built")
    table = (fast, broken, *backend._BACKENDS)
    monkeypatch.setattr(backend, "_BACKENDS", table)
    monkeypatch.setattr(backend, "_BY_NAME", {b.name: b for b in table})
    monkeypatch.setattr(backend, "_DEFAULT", "auto")
    backend._cached_choice.cache_clear()
    yield
    backend._cached_choice.cache_clear()


def test_every_backend_is_reported_with_what_it_serves_or_why_not(fake):
    report = gk.backends()
    assert report["fast"] == (True, "", ("bidirectional_kl",))
    assert report["broken"] == (False, "it was not built", ())
    assert "adapter" in report["reference"].operations


@pytest.mark.usefixtures("fake")
def test_auto_takes_the_first_that_can_and_falls_back_silently():
    assert gk.bidirectional_kl(A, A) == "served by fast"
    assert gk.bidirectional_kl(A.double(), A.double()).item() == 0
    assert gk.gist_loss(A, A, torch.tensor([0])).isfinite()


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
        ("reference", "bidirectional_kl of reference"),
        ("", "bidirectional_kl of cpu"),
        ("referense", "GIST_KERNELS_BACKEND: 'referense' .* did you mean 'reference'"),
    ],
)
def test_environment_variable_chooses_at_import_and_the_context_wins(value, printed):
    script = """
import torch, gist_kernels
from gist_kernels import backend
chosen = backend.select("bidirectional_kl", torch.ones(1, 1))
for name, table in backend._BY_NAME.items():
    if table.operations.get("bidirectional_kl") is chosen:
        print("bidirectional_kl of", name)
with gist_kernels.use_backend("auto"):
    assert backend.select("bidirectional_kl", torch.ones(1, 1)) is not (
        backend._BY_NAME["reference"].operations["bidirectional_kl"]
    )
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
        ("fast", lambda: gk.gist_loss(A, A, torch.tensor([0])), "it has no gist_loss"),
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
