"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Where to write what shall stand at ``path`` once all of it is there; what fails leaves ``path`` as it was."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    os.replace(partial, path)
