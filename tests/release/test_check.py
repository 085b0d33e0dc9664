"""A release is refused where its tag, changelog or files do not agree."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gist_kernels
from release import check

ROOT = Path(__file__).parents[2]
CHANGELOG = """# Changelog

## 1.3.0 (unreleased)

- More.

## 1.2.0 (2026-11-30)

### Added

- Things.

## 1.1.0 (2026-01-01)
"""


def test_the_repository_can_be_released_but_for_its_date():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert check.version() == gist_kernels.__version__
    check.check_version(None, check.version(), changelog)


def test_a_section_ends_where_the_next_version_begins():
    assert check.section(CHANGELOG, "1.2.0") == ("2026-11-30", "### Added\n\n- Things.")
    check.check_version("v1.2.0", "1.2.0", CHANGELOG)


@pytest.mark.parametrize(
    ("tag", "version", "said"),
    [
        ("v1.2.1", "1.2.0", "the tag v1.2.1 is not v1.2.0"),
        ("v1.3.0", "1.3.0", r"1\.3\.0 \(unreleased\): write the date"),
        ("v1.4.0", "1.4.0", "no section '## 1.4.0"),
        (None, "1.1.0", "section of 1.1.0 in CHANGELOG.md is empty"),
        (None, "1.2", "no section '## 1.2 "),
    ],
)
def test_what_does_not_agree_is_refused(tag, version, said):
    with pytest.raises(SystemExit, match=said):
        check.check_version(tag, version, CHANGELOG)


def test_the_files_of_a_release_are_those_of_its_tag(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet")
    (tmp_path / ".gitignore").write_text("build\n")
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    with pytest.raises(SystemExit, match=r"HEAD does not have the tag v1\.2\.0"):
        check.check_tree("v1.2.0", tmp_path)
    git("tag", "v1.2.0")
    (tmp_path / "build").touch()
    check.check_tree("v1.2.0", tmp_path)
    (tmp_path / "new.py").touch()
    with pytest.raises(SystemExit, match=r"1 files differ from HEAD, of which new\.py"):
        check.check_tree("v1.2.0", tmp_path)
    git("add", ".")
    with pytest.raises(SystemExit, match=r"1 files differ from HEAD, of which new\.py"):
        check.check_tree("v1.2.0", tmp_path)
    git("commit", "--quiet", "--message=second")
    with pytest.raises(SystemExit, match=r"HEAD does not have the tag v1\.2\.0"):
        check.check_tree("v1.2.0", tmp_path)


def test_a_source_distribution_lacks_no_file(tmp_path):
    path = tmp_path / "a-1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("a-1/x.py", "a-1/tests/y.py", "a-1/PKG-INFO"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    check.check_source(path, {"x.py", "tests/y.py"})
    with pytest.raises(SystemExit, match=r"lacks 1 files, of which tests/z\.py"):
        check.check_source(path, {"x.py", "tests/y.py", "tests/z.py"})


def test_a_command_that_fails_ends_the_release():
    assert check.run("echo", "done").strip() == "done"
    with pytest.raises(SystemExit, match="failed with 1: false"):
        check.run("false")


def test_every_package_that_users_install_has_its_licence_on_the_page():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "install.md").read_text().partition("## Licences")[2]
    rows = dict(re.findall(r"^\| `?(\w+)`? \| (.+) \|$", page, re.MULTILINE))
    extras = project["optional-dependencies"]
    wanted = {
        "none": project["dependencies"],
        **{n: extras[n] for n in ("models", "train", "tune", "export", "hf")},
    }
    for extra, requirements in wanted.items():
        names = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
        listed = set(re.findall(r"([\w-]+)(?= \(|, )", rows[extra]))
        assert names - {"gist-kernels"} <= listed, extra


def test_the_versions_of_the_workflows_cover_what_the_tests_install():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    locked = {
        line.partition("==")[0]
        for line in (ROOT / ".github" / "constraints.txt").read_text().splitlines()
    }
    needed = {
        re.match(r"[\w-]+", requirement)[0]
        for extra in ("models", "train", "hf", "test", "dev", "docs")
        for requirement in extras[extra]
    }
    missing = needed - locked - {"gist-kernels"}
    assert not missing, "run: make lock"


def test_a_wheel_without_a_compiler_fits_everywhere(tmp_path):
    pytest.importorskip("scikit_build_core")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "GIST_KERNELS_NATIVE": "0"}
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(ROOT)], env=environment, check=True)
    (wheel,) = tmp_path.iterdir()
    assert wheel.name == f"gist_kernels-{gist_kernels.__version__}-py3-none-any.whl"
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {"gist/report/style.css", "gist/export/classify.py", "gist/py.typed"} <= held
    assert not any(name.endswith((".so", ".cpp", ".h")) for name in held)
