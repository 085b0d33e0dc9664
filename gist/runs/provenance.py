"""The origin of a result: the machine, the versions and the state of the code."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("gist-kernels", "torch", "timm", "triton", "accelerate", "transformers", "tokenizers")


def describe_machine(device: str | torch.device) -> dict[str, Any]:
    """The machine of a timing."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor_name(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """The versions of Python and :data:`PACKAGES`; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def git_revision(directory: Path | None = None) -> dict[str, Any] | None:
    """The commit of a folder's repository, and whether tracked files differ from it.

    Args:
        directory: default: the working directory.

    Returns:
        ``{"commit": ..., "dirty": ...}``; None outside a repository, before its first commit, or
        without git.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory or Path.cwd()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
