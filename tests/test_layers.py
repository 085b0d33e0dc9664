"""Imports go down: a layer imports only the layers below it, and no file is part of a circle."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("gist", "gist_kernels", "bench")

# From the top down. A file imports files of its own entry and of those below.
GIST_LAYERS = (
    ("gist.cli",),
    ("gist",),  # the public names
    ("gist.suites", "gist.tuning"),
    ("gist.report", "gist.export"),
    ("gist.runs",),
    ("gist.train", "gist.evaluation"),  # their earlier places
    ("gist.training",),
    ("gist.hf", "gist.timm_task"),
    ("gist.model",),
    ("gist.fusion",),
    ("gist.methods",),
    ("gist.backbones",),
    ("gist.data",),
    ("gist.files", "gist.untouched", "gist.validate"),
)

# As above.
GIST_KERNELS_LAYERS: tuple[tuple[str, ...], ...] = (
    ("gist_kernels",),
    ("gist_kernels.compat",),
    ("gist_kernels.functional",),
    ("gist_kernels.backend",),
    ("gist_kernels.autograd",),
    ("gist_kernels.reference",),
    ("gist_kernels.kernels",),
    (
        "gist_kernels.weights",
        "gist_kernels.activations",
        "gist_kernels.check",
        "gist_kernels.tracing",
    ),
    ("gist_kernels.quantised",),
)

# The benchmarks that measure gist itself: its training step and its data loader. The others
# measure gist_kernels, and they and what all benchmarks share need no gist.
BENCHMARKS_OF_GIST = {"bench.loader", "bench.overhead", "bench.quantised", "bench.step"}


class Import(NamedTuple):
    """One import statement's target, wherever in the file it stands."""

    importer: str
    imported: str
    line: int


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))}


def imports_of(module: str, tree: ast.AST, known: frozenset[str]) -> Iterator[Import]:
    """The modules of ``known`` that a file imports; functions and TYPE_CHECKING blocks count too.

    ``from package import name`` imports the package, unless ``name`` is one of its modules.
    """
    is_package = FILES[module].name == "__init__.py" if module in FILES else False
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, *filter(None, [base])])
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                for alias in node.names
            ]
        for name in dict.fromkeys(names):
            while name and name not in known:  # a name within a module
                name = name.rpartition(".")[0]
            if name and name != module:
                yield Import(module, name, node.lineno)


def parsed(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"), filename=str(FILES[module]))


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {module: parsed(module) for module in FILES}


@pytest.fixture(scope="module")
def imports(trees: dict[str, ast.Module]) -> list[Import]:
    known = frozenset(FILES)
    return [found for module, tree in trees.items() for found in imports_of(module, tree, known)]


def layer_of(module: str, layers: tuple[tuple[str, ...], ...]) -> tuple[int, str]:
    """A module's place from the top, and the entry it belongs to: the longest that fits."""
    fitting = [
        (entry, place)
        for place, entries in enumerate(layers)
        for entry in entries
        if module == entry or (module.startswith(entry + ".") and "." in entry)
    ]
    assert fitting, f"{module} is in no layer: add it to the table"
    entry, place = max(fitting, key=lambda found: len(found[0]))
    return place, entry


def upward(imports: list[Import], package: str, layers: tuple[tuple[str, ...], ...]) -> list[str]:
    """The imports within a package that break the order of its layers."""
    faults = []
    for importer, imported, line in imports:
        if {name.split(".")[0] for name in (importer, imported)} != {package}:
            continue
        (above, own), (below, other) = layer_of(importer, layers), layer_of(imported, layers)
        if not (own == other or above < below):
            faults.append(f"{importer}, line {line}, imports {imported}")
    return faults


def circles(imports: list[Import]) -> list[list[str]]:
    """Every group of files that import each other, directly or through others."""
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for importer, imported, _ in imports:
        graph.setdefault(importer, set()).add(imported)
        graph.setdefault(imported, set())
    reached = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for following in graph[waiting.pop()] - seen:
                seen.add(following)
                waiting.append(following)
        reached[start] = seen
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }
    return [list(group) for group in sorted(groups)]


def test_gist_imports_only_what_is_below(imports):
    assert upward(imports, "gist", GIST_LAYERS) == []


def test_gist_kernels_imports_only_what_is_below(imports):
    assert upward(imports, "gist_kernels", GIST_KERNELS_LAYERS) == []


@pytest.mark.parametrize("package", ["gist", "gist_kernels"])
def test_no_files_import_each_other_in_a_circle(imports, package):
    own = [found for found in imports if {found.importer.split(".")[0], package} == {package}]
    assert circles(own) == []


def test_gist_kernels_never_imports_gist(imports):
    assert [
        found
        for found in imports
        if found.importer.split(".")[0] == "gist_kernels"
        and found.imported.split(".")[0] != "gist_kernels"
    ] == []


def test_only_the_benchmarks_of_gist_import_gist(imports):
    assert {
        found.importer
        for found in imports
        if found.importer.split(".")[0] == "bench" and found.imported.split(".")[0] == "gist"
    } == BENCHMARKS_OF_GIST


def test_no_other_benchmark_imports_those_of_gist(imports):
    assert [
        found
        for found in imports
        if found.importer.split(".")[0] == "bench" and found.imported in BENCHMARKS_OF_GIST
    ] == []


def test_nothing_but_bench_imports_bench(imports):
    assert {
        found.importer
        for found in imports
        if found.imported.split(".")[0] == "bench" and found.importer.split(".")[0] != "bench"
    } == set()


def changes_of_sys_path(tree: ast.AST) -> list[int]:
    """Lines that name ``sys.path`` or import it: nothing here has a reason to."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "path"
            and isinstance(node.value, ast.Name)
            and node.value.id == "sys"
        )
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "sys"
            and any(alias.name == "path" for alias in node.names)
        )
    ]


def test_nothing_changes_sys_path(trees):
    found = {module: changes_of_sys_path(tree) for module, tree in trees.items()}
    assert {module: lines for module, lines in found.items() if lines} == {}


# ---- the checks themselves


def of_text(module: str, text: str, *known: str) -> list[str]:
    tree = ast.parse(textwrap.dedent(text))
    return [found.imported for found in imports_of(module, tree, frozenset((module, *known)))]


def test_imports_within_functions_and_for_types_are_seen():
    text = """
        from typing import TYPE_CHECKING
        import os, gist.model.loss
        if TYPE_CHECKING:
            from gist.model import wrapped, Other
        def function():
            from gist.model.config import GistConfig
            import gist.cli.main as main
    """
    known = ("gist.model", "gist.model.loss", "gist.model.wrapped", "gist.model.config", "gist.cli")
    assert sorted(of_text("gist.data.base", text, *known)) == [
        "gist.cli", "gist.model", "gist.model.config", "gist.model.loss", "gist.model.wrapped",
    ]  # fmt: skip


def test_relative_imports_are_seen():
    text = "from . import wrapped\nfrom ..data import base\nfrom .loss import GistLoss"
    known = ("gist.model.wrapped", "gist.data", "gist.data.base", "gist.model.loss")
    assert of_text("gist.model.token", text, *known) == [
        "gist.model.wrapped", "gist.data.base", "gist.model.loss",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("gist.cli.train", "gist.data.base", True),
        ("gist.model.merge", "gist.model.wrapped", True),
        ("gist.model.merge", "gist.training.loop", False),
        ("gist.fusion.timm_vit", "gist.model.token", False),
        ("gist.methods.base", "gist.backbones.base", True),
        ("gist.files", "gist.validate", False),
        ("gist.runs.run", "gist", False),
    ],
)
def test_the_order_is_what_the_table_says(importer, imported, allowed):
    assert (upward([Import(importer, imported, 1)], "gist", GIST_LAYERS) == []) is allowed


def test_a_circle_through_a_third_file_is_found():
    chain = [Import("gist.a", "gist.b", 1), Import("gist.b", "gist.c", 1)]
    assert circles(chain) == []
    assert circles([*chain, Import("gist.c", "gist.a", 1)]) == [["gist.a", "gist.b", "gist.c"]]


@pytest.mark.parametrize(
    "text", ["import sys\nsys.path.insert(0, '.')", "from sys import path", "sys.path += ['.']"]
)
def test_a_change_of_sys_path_is_found(text):
    assert changes_of_sys_path(ast.parse(text))


def test_no_file_is_longer_than_450_lines_or_700_of_triton():
    long = {
        module: count
        for module, path in FILES.items()
        if module.split(".")[0] in ("gist", "gist_kernels")
        and (count := len(path.read_text(encoding="utf-8").splitlines()))
        > (700 if module.startswith("gist_kernels.kernels.triton.") else 450)
    }
    assert long == {}
