"""The entry point of the ``gist`` command, and its parser."""

from __future__ import annotations

import argparse
import codecs
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import TextIO

import torch

import gist_kernels
from gist.cli import compare, export, report, results, suites, train, tune
from gist.cli.common import console, to_stderr
from gist.training.evaluation import processes

BROKEN_PIPE = 128 + 13  # a shell's status of a command that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for input that can't be used; 130 after Ctrl-C; 141 where the reader of the output has
        gone, as ``| head`` does.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=_ANY_NAME)
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, not at the interpreter's end, which would print a traceback
    except BrokenPipeError as error:
        if _reader_is_gone():
            return BROKEN_PIPE
        return _say(error)


def _run(argv: Sequence[str] | None) -> int:
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
    except BrokenPipeError:
        raise  # whose pipe it is, main tells
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if arguments.traceback:
            raise
        return _say(error)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _say(error: Exception) -> int:
    to_stderr.print("error:", str(error), style="red", highlight=False, soft_wrap=True)
    return 2


def _reader_is_gone() -> bool:
    """Whether standard output or error is a closed pipe. Such a stream then leads nowhere."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        if _is_closed_pipe(stream):
            gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()  # what is left, which the interpreter's end would write
    return gone


def _is_closed_pipe(stream: TextIO) -> bool:
    if not hasattr(select, "poll"):  # Windows
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except OSError:  # not a file of the system's
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _encode_any_name(error: UnicodeError) -> tuple[str | bytes, int]:
    """The bytes of a file's name that is not UTF-8; an escape for what the encoding lacks."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


_ANY_NAME = "gist.any_name"
codecs.register_error(_ANY_NAME, _encode_any_name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gist", description="Fine-tune vision transformers with PEFT methods and a Gist token."
    )
    parser.add_argument(
        "--version", action="version", version=f"gist-kernels {gist_kernels.__version__}"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (train, tune, suites, results, report, compare, export):
        module.register(commands)
    return parser
