"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from pathlib import Path

import torch

from bench import compare, measure, report
from bench.machine import limits, machine

BENCHMARKS = (
    "loss", "divergence", "adapter", "attention", "matmul", "scaling", "step", "overhead", "loader",
    "linear-loss",
)  # fmt: skip
CPU_ONLY = ("matmul",)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gist bench", description=__doc__)
    parser.add_argument(
        "what",
        nargs="*",
        metavar="BENCHMARK",
        help=f"{', '.join(BENCHMARKS)} (default: all), or: report DIR ...",
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, help="on a CPU; default: as PyTorch chooses")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="to spend on a case (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder for JSON files and plots"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLD",
        help="a JSON file of one benchmark, or a folder of them, measured on this machine: "
        "fail where a call of ours has become slower against its peers",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        help="what --compare lets pass beyond the noise, as a fraction (default: %(default)s)",
    )
    parser.add_argument("--no-plots", action="store_true", help="write JSON alone")
    given = parser.parse_args(arguments)
    if given.what[:1] == ["report"]:
        try:
            print(report.markdown(report.load([Path(folder) for folder in given.what[1:]])), end="")
        except FileNotFoundError as error:
            sys.exit(str(error))
        return
    unknown = set(given.what) - set(BENCHMARKS)
    if unknown:
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA or ROCm device")
    dtype = getattr(torch, given.dtype, None) if given.dtype else None
    if given.dtype and not isinstance(dtype, torch.dtype):
        parser.error(f"--dtype {given.dtype}: take float32, bfloat16, float16 or float64")
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.compare and not given.compare.exists():
        parser.error(f"--compare {given.compare}: there is no such file or folder")
    slower = False
    about, ceiling = machine(device), limits(device)
    every = [name for name in BENCHMARKS if device.type == "cpu" or name not in CPU_ONLY]
    for name in given.what or every:
        benchmark = importlib.import_module(f"bench.{name.replace('-', '_')}")
        run: report.Run = {
            "benchmark": name,
            "machine": about,
            "limits": ceiling,
            "absent": benchmark.absent(device),
            "cases": [],
        }
        report.print_head(run)
        for case in benchmark.cases(device, dtype):
            run["cases"].append(measure.run(case, device, seconds=given.seconds))
            report.print_case(run["cases"][-1])
            written = report.save(run, given.out)
        for slope in report.slopes(run):
            print(report.slope_text(slope))
        plots = [] if given.no_plots else report.plot(run, given.out)
        print("wrote", ", ".join(map(str, (written, *plots))))
        if given.compare:
            slower |= _compare(run, given.compare, given.tolerance)
    if slower:
        sys.exit("slower than before")


def _compare(run: report.Run, to: Path, tolerance: float) -> bool:
    """Print the run's changes; tell whether a call of ours has become slower."""
    path = to / f"{run['benchmark']}.json" if to.is_dir() else to
    if not path.exists():
        print(f"{path} does not exist: {run['benchmark']} is not compared")
        return False
    try:
        old = compare.load(path, run)
    except ValueError as error:
        sys.exit(f"--compare: {error}")
    if old["machine"]["torch"] != run["machine"]["torch"]:
        print(f"{path} is of PyTorch {old['machine']['torch']}: peers may have changed too")
    found, without = compare.changes(old, run)
    for change in found:
        print(f"{change.verdict(tolerance)}: {change}")
    for name in without:
        print(f"not compared: {name}: {path} has no such case, no peer in common, or no parity")
    return any(change.verdict(tolerance) == "slower" for change in found)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # ends quietly under | head
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
