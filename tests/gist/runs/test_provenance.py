"""The versions and the state of the code that a result records."""

from __future__ import annotations

import subprocess
import sys

from gist.runs.provenance import git_revision, versions


def test_the_repositorys_state(tmp_path):
    def git(*arguments: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *name, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_revision(tmp_path) is None
    git("init", "--quiet")
    assert git_revision(tmp_path) is None  # without a commit
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    assert git_revision(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("two")
    assert git_revision(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_versions_name_every_package():
    found = versions()
    assert list(found) == [
        "python", "gist-kernels", "torch", "timm", "triton", "accelerate", "transformers",
        "tokenizers",
    ]  # fmt: skip
    assert found["python"] == sys.version.split()[0]
