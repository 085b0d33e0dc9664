"""The entry point of the ``gist`` command, and its parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import gist_kernels
from gist.cli import results, suites, train
from gist.cli.common import console, to_stderr
from gist.training.evaluation import processes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 for input that can't be used, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "threads", None):
        torch.set_num_threads(arguments.threads)
    try:
        if "device" in arguments and processes(arguments.device).num_processes > 1:
            console.quiet = not processes(arguments.device).is_main_process
        arguments.command(arguments)
    except KeyboardInterrupt:
        console.print("Interrupted. What was finished is kept.", style="yellow")
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if arguments.traceback:
            raise
        to_stderr.print(
            "error:", str(error), style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gist", description="Fine-tune vision transformers with PEFT methods and a Gist token."
    )
    parser.add_argument(
        "--version", action="version", version=f"gist-kernels {gist_kernels.__version__}"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (train, suites, results):
        module.register(commands)
    return parser
