"""The kernel for Hugging Face's Hub: it keeps to the rules and computes what gist_kernels does."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gist_kernels as gk
from gist_kernels.kernels.triton import INTERPRETED
from release.hub import export

DEVICE = "cpu" if INTERPRETED else "cuda"  # of the tests marked triton
REPO_ID = "someone/gist-kernels"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, under an id of its own: a process can register its operators once."""
    out = tmp_path_factory.mktemp("kernel")
    export.export(out, REPO_ID, unique_id="tests")
    return out


@pytest.fixture(scope="module")
def loaded(folder: Path) -> ModuleType:
    """The export as the kernels package loads it."""
    kernels = pytest.importorskip("kernels", reason="needs pip install kernels")
    module: ModuleType = kernels.get_local_kernel(folder)
    return module


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Another export, imported as a plain package from outside sys.path."""
    out = tmp_path_factory.mktemp("plain")
    export.export(out, unique_id="plain")
    return import_file("_gist_kernels_cpu_plain", out / "build" / "torch-cpu" / "__init__.py")


@pytest.fixture(params=["imported", "loaded"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.getfixturevalue(request.param)
    return module


def import_file(name: str, path: Path) -> Any:
    spec: Any = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the rules


@pytest.mark.parametrize(
    ("path", "check", "triton"),
    [
        ("weights.py", ".check", ".kernels.triton"),
        ("__init__.py", ".check", ".kernels.triton"),
        ("kernels/protocols.py", "..check", ".triton"),
        ("kernels/triton/head.py", "...check", "."),
        ("kernels/triton/__init__.py", "...check", "."),
        ("autograd/loss.py", "..check", "..kernels.triton"),
    ],
)
def test_imports_become_relative_to_the_file(path, check, triton):
    text = "from gist_kernels.{} import a\n    # b\nfrom gist_kernels.{} import c, d\n"
    text, wanted = text.format("check", "kernels.triton"), text.replace("gist_kernels.", "")
    assert export.with_relative_imports(PurePosixPath(path), text) == wanted.format(check, triton)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("import numpy", "imports numpy"),
        ("def f():\n    from gist_kernels.check import floating", "imports gist_kernels.check"),
        ("from .missing import name", "imports .missing"),
        ("from ..check import floating", "imports ..check"),
        ("import importlib\nimportlib.import_module('timm')", "imports by import_module"),
        ("__import__('timm')", "imports by __import__"),
        ("name = f'gist_kernels::{3}'", "without the namespace"),
        ("import torch\ntorch.ops.gist_kernels.cpu_loss", "without the namespace"),
        ("match 1:\n    case 1: pass", "not Python 3.9"),
    ],
)
def test_what_the_hub_forbids_is_found(text, fault):
    (found,) = export.faults_of({PurePosixPath("file.py"): text})
    assert fault in found


def test_what_the_hub_allows_is_not_found():
    files = {
        "__init__.py": "",
        "a.py": "import math, torch, triton.language",
        "b/__init__.py": "from torch import nn",
        "b/c.py": "from ..a import math\nfrom .. import a\nfrom . import d\nfrom .._ops import ops",
    }
    assert [*export.faults_of({PurePosixPath(path): text for path, text in files.items()})] == []


def test_no_kernel_is_written_twice():
    """What a file has and gist_kernels' own has not is imports and the operators' namespace."""
    own, module = export.texts(export.PACKAGE), export.module_files()
    assert {*map(str, module)} - {*map(str, own)} == {"layers.py", "kernels/cpu.py"}
    assert len(module) > 45
    for path in {*module} & {*own}:
        allowed = r" *from \."
        if path == export.START:
            allowed += r'|    "layers",$|$'
        if path.parts[0] == "autograd":
            allowed += r'|.*add_op_namespace_prefix\(f"|    return getattr\(ops, '
        new = Counter(module[path].splitlines()) - Counter(own[path].splitlines())
        assert [line for line in new if not re.match(allowed, line)] == [], path


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "module_files", dict)
    other, out = tmp_path / "other", tmp_path / "new" / "kernel"
    mine, stale, kept = other / "tests" / "mine.py", out / "torch-ext" / "stale.py", out / ".git"
    for path in (other / "build.toml", mine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(ValueError, match="something other than an export"):
        export.export(other)
    assert mine.exists()

    export.export(out)
    stale.parent.mkdir()
    stale.touch()
    kept.touch()
    export.export(out)
    assert not stale.exists()
    assert kept.exists()


def test_an_export_that_breaks_a_rule_is_not_written(tmp_path, monkeypatch):
    files = {PurePosixPath("a.py"): "import timm", PurePosixPath("b.py"): "import math"}
    monkeypatch.setattr(export, "module_files", lambda: files)
    with pytest.raises(ValueError, match=r"a\.py, line 1: imports timm$"):
        export.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_an_export_or_says_why_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "module_files", dict)
    export.main([str(tmp_path / "out"), "--repo-id", REPO_ID])
    assert "get_local_kernel" in capsys.readouterr().out
    assert REPO_ID in (tmp_path / "out" / "CARD.md").read_text()
    with pytest.raises(SystemExit, match="something other"):
        export.main([str(tmp_path)])


def test_other_files_have_another_namespace():
    files = {PurePosixPath("a.py"): "1", PurePosixPath("b.py"): "2"}
    assert export.digest_of(files) == export.digest_of(dict(reversed(files.items())))
    assert export.digest_of(files) != export.digest_of({**files, PurePosixPath("b.py"): "3"})


# ---- the kernel, beside gist_kernels in one process


def losses(a: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[Any], torch.Tensor]]:
    """Calls of (5, 11) inputs, for either module."""
    target = torch.arange(5, device=a.device)
    return {
        "gist_loss": lambda k: k.gist_loss(a, b, target, label_smoothing=0.1),
        "bidirectional_kl": lambda k: k.bidirectional_kl(a, b, temperature=2.0, mask=target > 1),
        "jensen_shannon": lambda k: k.jensen_shannon(a, b, beta=0.3),
        "adapter": lambda k: k.adapter(a, b[:2], None, b[:2].t().contiguous(), None).square().sum(),
    }


def draw(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(5, 11, device=device).requires_grad_() for _ in range(2))


def assert_same_bits(kernel: ModuleType, backend: str, device: str) -> None:
    sides = draw(device)
    for name, loss in losses(*sides).items():
        with gk.use_backend(backend), kernel.use_backend(backend):
            values = loss(kernel), loss(gk)
            gradients = [torch.autograd.grad(value, sides) for value in values]
        assert torch.equal(*values), name
        for found, expected in zip(*gradients, strict=True):
            assert expected.any(), name
            assert torch.equal(found, expected), name


def skip_without_triton(kernel: ModuleType) -> None:
    if not kernel.backends()["triton"].available:  # as in make test-ptx
        pytest.skip("the kernel's Triton needs a GPU or TRITON_INTERPRET=1")


def test_the_reference_computes_the_same_bits(kernel):
    assert_same_bits(kernel, "reference", "cpu")


@pytest.mark.triton
def test_triton_computes_the_same_bits(kernel):
    skip_without_triton(kernel)
    assert_same_bits(kernel, "triton", DEVICE)


@pytest.mark.triton
def test_operators_are_in_the_kernels_own_namespace(imported):
    skip_without_triton(imported)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.add(func.namespace)
            return func(*args, **(kwargs or {}))

    sides = draw(DEVICE)
    with Watch(), imported.use_backend("triton"):
        for loss in losses(*sides).values():
            loss(imported).backward()
    assert {name for name in seen if "gist" in name} == {imported.__name__}


def test_the_missing_backend_says_why_and_the_reference_serves(kernel):
    info = kernel.backends()["cpu"]
    assert not info.available
    assert "no C++ kernels" in info.detail
    with kernel.use_backend("cpu"), pytest.raises(RuntimeError, match=r"no C\+\+ kernels"):
        kernel.bidirectional_kl(*draw())
    if not INTERPRETED:
        serving = sys.modules[f"{kernel.__name__}.backend"].serving
        assert serving("loss", "cpu", torch.float32) == "reference"


def test_the_api_is_the_packages_and_the_layers(kernel):
    assert {*kernel.__all__} == {*gk.__all__, "layers"}
    assert all(hasattr(kernel, name) for name in kernel.__all__)
    for name in ("gist_loss", "bidirectional_kl", "adapter_mlp"):
        assert inspect.signature(getattr(kernel, name)) == inspect.signature(getattr(gk, name))


@pytest.mark.slow
@pytest.mark.triton
def test_a_layer_compiles_into_the_kernels_operators(imported):
    skip_without_triton(imported)
    assert_compiles(imported.layers.GistLoss(), DEVICE)


@pytest.mark.slow
def test_a_layer_compiles_without_a_graph_break(imported):
    assert_compiles(imported.layers.GistLoss(), "cpu")


def assert_compiles(layer: nn.Module, device: str) -> None:
    sides = draw(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    target = torch.arange(5, device=device)
    values = [call(*sides, target) for call in (compiled, layer)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, sides) for value in values))


# ---- as the kernels package sees it


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)
        self.scale, self.activation = 0.5, "gelu"

    def forward(self, x):
        return self.scale * self.up(nn.functional.gelu(self.down(x)))


class Loss(nn.Module):
    def forward(self, cls_logits, gist_logits, target):
        raise NotImplementedError


class Divergence(nn.Module):
    def forward(self, logits_a, logits_b):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Loss, "GistLoss"),
        (Divergence, "BidirectionalKL"),
        (Divergence, "JensenShannon"),
        (Bottleneck, "Adapter"),
    ],
)
def test_kernelize_puts_a_layer_into_a_model(folder, loaded, model, name):
    """kernels checks that a layer has no state, and a forward of the same signature."""
    import kernels

    layer = getattr(loaded.layers, name)
    adopting = kernels.use_kernel_forward_from_hub(name)(type(name, (model,), {}))()
    given = [torch.randn(3, 6), torch.randn(3, 6), torch.arange(3)]
    given = given[: len(inspect.signature(layer.forward).parameters) - 1]
    expected = adopting(*given) if model is Bottleneck else layer()(*given)
    repository = kernels.LocalLayerRepository(folder, layer_name=name)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({name: {"cpu": repository}}, inherit_mapping=False):
        kernels.kernelize(adopting, mode=mode, device="cpu", use_fallback=False)
    assert adopting.forward.__func__ is layer.forward
    torch.testing.assert_close(adopting(*given), expected)


def test_kernels_reads_the_metadata_and_its_digest(folder, loaded, tmp_path):
    from kernels import Metadata

    def check(build: Path) -> None:
        metadata = Metadata.read_from_file(build / "metadata.json")
        assert metadata.id == f"_gist_kernels_{build.name.removeprefix('torch-')}_tests"
        assert metadata.version == export.VERSION
        digest = metadata.digest
        digest.validate(type(digest).hash_variant(digest.algorithm, build))

    for backend in export.BACKENDS:
        check(folder / "build" / f"torch-{backend}")
    changed = shutil.copytree(folder / "build" / "torch-rocm", tmp_path / "torch-rocm")
    (changed / "layers.py").write_text("")
    with pytest.raises(Exception, match=r"mismatch for layers\.py"):
        check(changed)


def test_kernels_reads_the_build_file(folder, loaded):
    from kernels._rust import Build

    assert len(Build.open(folder).general.backends) == len(export.BACKENDS)
    text = (folder / "build.toml").read_text()
    for line in (
        f'name = "{export.NAME}"',
        f"version = {export.VERSION}",
        f'license = "{export.LICENSE}"',
        f"backends = {[*export.BACKENDS]}".replace("'", '"'),
        f'repo-id = "{REPO_ID}"',
    ):
        assert f"\n{line}\n" in text


def test_the_kernels_own_tests_and_benchmark_pass(folder, loaded, monkeypatch, pytestconfig):
    pytestconfig.addinivalue_line("markers", "kernels_ci: declared by kernel-builder")
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO_ID}={folder}")
    tests = import_file("hub_tests", folder / "tests" / "test_gist_kernels.py")
    assert tests.gist_kernels is loaded
    ran = [
        test(torch.device("cpu"))
        for name, test in vars(tests).items()
        if name.startswith("test_") and "gpu" not in name
    ]
    assert len(ran) == 3

    benchmark = import_file("hub_benchmark", folder / "benchmarks" / "benchmark.py").LossBenchmark()
    benchmark.kernel = loaded
    benchmark._draw(4, 9)
    for name in ("gist_loss", "bidirectional_kl"):
        getattr(benchmark, f"benchmark_{name}")()
        torch.testing.assert_close(benchmark.out, getattr(benchmark, f"verify_{name}")())
