"""Files that are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Where to write what shall stand at ``path`` once all of it is there; what fails leaves ``path`` as it was.

    Processes may write the same file at the same time: that of the last one stands. What a killed one leaves is called
    ``.*.partial``, beside ``path``.
    """
    own = f"{os.getpid()}-{secrets.token_hex(4)}"  # machines may share a disk, and a pid
    partial = path.with_name(f".{path.name}.{own}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or a machine that crashes may keep the name without what it stands for
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A file that no other process can hold as long as this lasts, which removes it; a process that ends, however it ends, holds
    nothing any more. Where the file system knows no locks nothing is held back.

    Raises:
        BlockingIOError: another process holds it.
    """
    while True:
        with path.open("ab") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, and so filelock, not inherited by forks
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise BlockingIOError(f"{path} is held by another process") from error
            if not _stands_at(path, file):
                continue  # who held it has just removed it
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _stands_at(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def is_full(error: Exception) -> bool:
    """Whether it says that a disk, or somebody's share of one, is full."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if type(error).__name__ == "SafetensorError":  # has no errno; this module does without the package
        return any(f"(os error {code})" in str(error) for code in codes)
    return isinstance(error, OSError) and error.errno in codes
