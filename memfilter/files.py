"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Where to write what shall stand at ``path`` once all of it is there; what fails leaves ``path`` as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def is_full(error: Exception) -> bool:
    """Whether it says that a disk, or somebody's share of one, is full."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, SafetensorError):  # has no errno
        return any(f"(os error {code})" in str(error) for code in codes)
    return isinstance(error, OSError) and error.errno in codes
