"""Files: the cache folder, and writes that never leave half a file."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TextIO

LOCK_FILE = ".lock"
_replacing = threading.Lock()


def cache_dir() -> Path:
    """``$GIST_CACHE``, or ``~/.cache/gist``."""
    return Path(os.environ.get("GIST_CACHE") or Path.home() / ".cache" / "gist")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, and its folder if missing. An error leaves the earlier file whole.

    Raises:
        OSError: the file could not be written; the text names it.
    """
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write files, and their folders if missing. None is replaced before all are on the disk.

    Raises:
        OSError: a file could not be written, so that all are as before; the text names it.
    """
    # Threads, processes and machines may write at once.
    beside = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}.new") for path in files}
    try:
        for path, temporary in beside.items():
            with naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(files[path])
        with _replacing:  # so that files of two threads don't mix
            for path, temporary in beside.items():
                with naming(path):
                    temporary.replace(path)
    finally:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with an indent of two, by :func:`write_atomically`."""
    write_atomically(path, to_json(value))


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


class CsvTable:
    """Rows of CSV that end in a line feed, written so that :mod:`csv` reads every field back.

    Args:
        stream: gets the rows; opened with ``newline=""`` if it is a file.
    """

    def __init__(self, stream: TextIO) -> None:
        self._minimal: Any = csv.writer(stream, lineterminator="\n")
        self._all: Any = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def row(self, *cells: str) -> None:
        # Python's writer quotes a carriage return only where its line ends have one.
        (self._all if any("\r" in cell for cell in cells) else self._minimal).writerow(cells)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name ``folder`` where the block ends without an error.

    After an error nothing is left of it. A killed process leaves ``.NAME.new`` beside ``folder``,
    which the next call replaces.

    Raises:
        FileExistsError: there is such a file or folder already; before anything is written.
        OSError: the folder could not be made; the text names it.
    """
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already; choose another --out, or delete it")
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with naming(folder):
            temporary.mkdir(parents=True)
        yield temporary
        with naming(folder):
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path, doing: str, name: str = LOCK_FILE) -> Iterator[None]:
    """Lock a folder, which is made if missing, until the block or this process ends.

    Windows, and file systems without locks, have none: there two processes can clash, and on
    Windows the file stays.

    Args:
        folder: gets a file for the lock, which only a killed process leaves behind.
        doing: what the process does there, for the error.
        name: the file's.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the folder can't be made or written into; the text names it.
    """
    is_new = not folder.exists()
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    while True:
        with path.open("ab") as file:
            _lock(file, folder, doing)
            # Not of a file that its last holder has deleted meanwhile.
            if not _is_at(file, path):
                continue
            try:
                yield
            finally:
                with suppress(PermissionError):  # Windows deletes no open file
                    path.unlink(missing_ok=True)
                if is_new:
                    with suppress(OSError):  # not empty
                        folder.rmdir()
            return


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], folder: Path, doing: str) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        # Unlike flock's, this lock does not pass to loader processes, which may outlive a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(
                error.errno, f"another process is {doing} in this folder", str(folder)
            ) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name into an OSError raised inside: the error of a full disk has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
