"""Export gist_kernels as a kernel for Hugging Face's ``kernels`` package.

    python release/hub/export.py build/hub --repo-id OWNER/gist-kernels

Writes the sources that kernel-builder takes, and the builds that it makes of a kernel without
compiled code. docs/install.md describes both.

The Python files are those of gist_kernels. Four things differ: imports are relative, operators are
in the namespace that ``_ops.py`` of a build names, files of ``kernel/torch-ext`` are added, and
``kernels/cpu`` is one of them, for there is no C++ module.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "gist_kernels"
KERNEL = ROOT / "release" / "hub" / "kernel"

NAME = "gist-kernels"
VERSION = 0  # by the Hub's convention a kernel whose API may still change
LICENSE = "Apache-2.0"
BACKENDS = ("cpu", "cuda", "rocm")
REPO_ID = f"OWNER/{NAME}"

# Beside the standard library, the kernel's own files and _ops.py, which a build adds.
MAY_IMPORT = ("torch", "triton")
OPS = PurePosixPath("_ops.py")
START = PurePosixPath("__init__.py")  # imports some of its own modules when they are asked for
# Of a kernel the Hub asks for this syntax. The standard library is that of PyTorch's oldest Python.
SYNTAX = (3, 9)

Files = dict[PurePosixPath, str]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Export gist_kernels as a kernel for the Hub.")
    parser.add_argument("out", type=Path, help="a new folder, or one of an earlier export")
    parser.add_argument("--repo-id", default=REPO_ID, help="the kernel's repository on the Hub")
    options = parser.parse_args(arguments)
    try:
        export(options.out, options.repo_id)
    except ValueError as error:
        sys.exit(str(error))
    print(f"kernels.get_local_kernel(Path({str(options.out)!r})) loads the export")


def export(out: Path, repo_id: str = REPO_ID, unique_id: str | None = None) -> None:
    """Write sources and builds into a folder.

    Args:
        out: a new or empty folder, or one of an earlier export, whose files are replaced. Others,
            such as ``.git``, stay.
        repo_id: the repository on the Hub that tests, benchmarks and the card name.
        unique_id: end of the operators' namespace; default: a digest of the files.

    Raises:
        ValueError: ``out`` holds something else, or the files break a rule of the Hub.
    """
    build_file = out / "build.toml"
    earlier = build_file.is_file() and f'name = "{NAME}"' in build_file.read_text(encoding="utf-8")
    if out.exists() and any(out.iterdir()) and not earlier:
        raise ValueError(f"{out} holds something other than an export; name a new folder")
    module = module_files()
    if faults := [*faults_of(module)]:
        raise ValueError("the export breaks rules of the Hub:\n" + "\n".join(faults))
    unique_id = unique_id or digest_of(module)

    project = {
        path: text.replace(REPO_ID, repo_id)
        for path, text in texts(KERNEL).items()
        if path.parts[0] != "torch-ext"
    }
    project[PurePosixPath("LICENSE")] = (ROOT / "LICENSE").read_text(encoding="utf-8")
    project[PurePosixPath("build/CARD.md")] = project[PurePosixPath("CARD.md")]
    for folder in ("benchmarks", "build", "tests", "torch-ext"):
        shutil.rmtree(out / folder, ignore_errors=True)
    write(out, project)
    write(out / "torch-ext" / python_name(), module)
    for backend in BACKENDS:
        name = f"_{python_name()}_{backend}_{unique_id}"
        files = {**module, OPS: ops_module(name)}
        metadata = PurePosixPath("metadata.json")
        write(
            out / "build" / f"torch-{backend}", {**files, metadata: as_json(name, backend, files)}
        )


def python_name() -> str:
    return NAME.replace("-", "_")


# ---- the module


def module_files() -> Files:
    """The kernel's Python files, by their paths in it."""
    package = {
        path: with_relative_imports(path, with_own_operators(text))
        for path, text in texts(PACKAGE).items()
        if path.suffix == ".py" and path.parts[:2] != ("kernels", "cpu")
    }
    package[START] = with_layers(package[START])
    return package | texts(KERNEL / "torch-ext")


def with_relative_imports(path: PurePosixPath, text: str) -> str:
    """The file's text with ``from gist_kernels.a.b import c`` relative to it."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
            continue
        first, *target = node.module.split(".")
        if first != PACKAGE.name:
            continue
        line, absolute = lines[node.lineno - 1], f"from {node.module} import"
        assert line[node.col_offset :].startswith(absolute), line
        here = path.parent.parts
        same = [a == b for a, b in zip(here, target, strict=False)]
        shared = [*same, False].index(False)
        relative = "." * (len(here) - shared + 1) + ".".join(target[shared:])
        lines[node.lineno - 1] = line.replace(absolute, f"from {relative} import", 1)
    return "".join(lines)


def with_own_operators(text: str) -> str:
    """The file's text with every ``gist_kernels::operator`` in the namespace of ``_ops.py``."""
    text, names = re.subn(r'f"gist_kernels::([^"]+)"', r'add_op_namespace_prefix(f"\1")', text)
    text, spaces = re.subn(r"\btorch\.ops\.gist_kernels\b", "ops", text)
    used = ["add_op_namespace_prefix"] * bool(names) + ["ops"] * bool(spaces)
    if not used:
        return text
    imports = f"from gist_kernels._ops import {', '.join(used)}\n"
    return re.sub(r"^(?=from gist_kernels\.)", imports, text, count=1, flags=re.MULTILINE)


def with_layers(text: str) -> str:
    """The package's ``__init__`` with the layers among its public names."""
    for old, new in (
        ("\nif TYPE_CHECKING:\n", "\nfrom . import layers\n\nif TYPE_CHECKING:\n"),
        ("\n__all__ = [\n", '\n__all__ = [\n    "layers",\n'),
    ):
        if text.count(old) != 1:
            raise ValueError(f"gist_kernels/__init__.py no longer has one {old.strip()!r}")
        text = text.replace(old, new)
    return text


def ops_module(name: str) -> str:
    """What kernel-builder generates as ``_ops.py``, for one backend."""
    return f'''import torch

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    """An operator's name as ``torch.library`` takes it."""
    return f"{name}::{{op_name}}"
'''


# ---- the Hub's rules


def faults_of(module: Files) -> Iterator[str]:
    """What breaks the Hub's rules for Python code, a sentence each."""
    known = {path.with_suffix("").parts for path in (*module, OPS)}
    known |= {path.parent.parts for path in module if path.name == "__init__.py"}
    for path, text in module.items():
        try:
            tree = ast.parse(text, feature_version=SYNTAX)
        except SyntaxError as error:
            yield f"{path}, line {error.lineno}: not Python {SYNTAX[0]}.{SYNTAX[1]}: {error.msg}"
            continue
        for node in ast.walk(tree):
            fault = import_fault(path, node, known) or namespace_fault(node)
            if fault:
                yield f"{path}, line {getattr(node, 'lineno', 0)}: {fault}"


def import_fault(path: PurePosixPath, node: ast.AST, known: set[tuple[str, ...]]) -> str | None:
    """An import other than of the kernel's own files, the standard library, torch and triton."""
    if isinstance(node, ast.ImportFrom) and node.level:
        package = path.parent.parts
        parts = node.module.split(".") if node.module else []
        target = (*package[: len(package) - node.level + 1], *parts)
        if node.level > len(package) + 1 or target not in known:
            return f"imports {'.' * node.level}{node.module or ''}, which is no file of the kernel"
    elif isinstance(node, ast.Import | ast.ImportFrom):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        for name in names:
            first = str(name).partition(".")[0]
            if first not in sys.stdlib_module_names and first not in MAY_IMPORT:
                return f"imports {name}"
    elif isinstance(node, ast.Name | ast.Attribute):
        function = node.id if isinstance(node, ast.Name) else node.attr
        if function == "__import__" or (function == "import_module" and path != START):
            return f"imports by {function}"
    return None


def namespace_fault(node: ast.AST) -> str | None:
    """An operator in the namespace of the package gist_kernels."""
    named = isinstance(node, ast.Constant) and str(node.value).startswith("gist_kernels::")
    if named or (isinstance(node, ast.Attribute) and node.attr == "gist_kernels"):
        return "an operator without the namespace of _ops.py"
    return None


# ---- files


def texts(folder: Path) -> Files:
    return {
        PurePosixPath(path.relative_to(folder).as_posix()): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in {".md", ".nix", ".py", ".toml"}
    }


def write(folder: Path, files: Files) -> None:
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8", newline="\n")


def digest_of(files: Files) -> str:
    """Seven hexadecimal digits, as kernel-builder takes them from a commit."""
    digest = hashlib.sha256()
    for path, text in sorted(files.items()):
        digest.update(f"{path}\0{text}\0".encode())
    return digest.hexdigest()[:7]


def as_json(name: str, backend: str, files: Files) -> str:
    """``metadata.json`` of one build."""
    hashes = {
        str(path): base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for path, text in sorted(files.items())
    }
    found = {
        "id": name,
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    return json.dumps(found, indent=2) + "\n"


if __name__ == "__main__":
    main()
