"""All that a machine with a GPU is needed for, in one command: tests, benchmarks, sweep, sanitizer.

    make gpu OUT=results [ARGS="--minutes 8"]

It needs no network and no installation beyond PyTorch, Triton, timm and pytest, and leaves at most
eight files. Parts run one after the other, each with a limit of its own; what one has found is on
disk before the next starts, so that an interruption loses only what was under way.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from bench import report

PYTHON = [sys.executable, "-m"]


def parts(out: Path) -> list[tuple[str, list[str], float]]:
    """Name, command, and the most seconds of each part."""
    install = ["pip", "install", "--no-build-isolation", "--no-index", "--no-deps", "-q", "-e", "."]
    bench = ["bench", "--device", "cuda", "--no-plots", "--out", str(out)]
    short_test = [
        "tests/gist_kernels",
        "-q",
        "-m",
        "gpu",
        "-k",
        "test_every_temperature or test_no_rows",
    ]
    sanitizer = shutil.which("compute-sanitizer")
    tests = ["pytest", "-q", "--tb=short", "-m", "gpu", "tests"]
    if importlib.util.find_spec("xdist"):  # most of their time is Triton's compiler's
        tests += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("hypothesis"):  # the draws for which make gpu-cache has compiled
        tests.append("--hypothesis-seed=0")
    found = [
        ("native module", [*PYTHON, *install], 120.0),
        ("tests", [*PYTHON, *tests], 180.0),
        ("loss", [*PYTHON, *bench, "--seconds", "1.5", "loss"], 120.0),
        ("step", [*PYTHON, *bench, "--seconds", "2", "step"], 120.0),
        ("attention", [*PYTHON, *bench, "--seconds", "1", "attention"], 60.0),
        ("adapter", [*PYTHON, *bench, "--seconds", "1", "adapter"], 60.0),
        ("sweep", [*PYTHON, "bench.sweep", "--out", str(out / "sweep.json")], 90.0),
        ("scaling", [*PYTHON, *bench, "--seconds", "0.5", "scaling"], 60.0),
    ]
    if sanitizer:
        command = [sanitizer, "--error-exitcode", "1", *PYTHON, "pytest", *short_test]
        found.append(("compute-sanitizer", command, 90.0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for what was found")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("make gpu needs a CUDA or ROCm device; there is none here (see make test)")
    given.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes
    lines = []
    with (given.out / "log.txt").open("w") as log:
        for name, command, limit in parts(given.out):
            ended = _run(name, command, min(limit, end - time.monotonic()), log)
            lines.append(f"{name}: {ended}; {_last_line(given.out / 'log.txt')}")
            (given.out / "summary.txt").write_text("\n".join(lines) + "\n")
    with (given.out / "summary.txt").open("a") as summary:
        for path in sorted(given.out.glob("*.json")):
            if path.stem == "sweep":
                continue
            for run in report.load([path]):
                report.print_head(run, summary)
                for case in run["cases"]:
                    report.print_case(case, summary)
    print((given.out / "summary.txt").read_text())


def _last_line(path: Path) -> str:
    return path.read_text(errors="replace").rstrip().rpartition("\n")[2]


def _run(name: str, command: list[str], seconds: float, log: TextIO) -> str:
    """How it ended. A part that fails stops no other."""
    print(f"# {name}", file=log, flush=True)
    if seconds <= 0:
        return "no time left"
    start = time.monotonic()
    try:
        ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    took = f"{time.monotonic() - start:.0f} s"
    return f"done in {took}" if ended.returncode == 0 else f"FAILED in {took} (see log.txt)"


if __name__ == "__main__":
    main()
