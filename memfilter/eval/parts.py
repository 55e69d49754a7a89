"""Work that is shared by processes and survives being killed: numbered jobs, each of which leaves a file."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from memfilter.files import atomic, held
from memfilter.processes import from_main

log = logging.getLogger(__name__)

# what numpy says of a .npz of which a part is missing, as a disk that was full or a machine that crashed may leave it
CUT = (EOFError, ValueError, zipfile.BadZipFile)


def fingerprint(facts: dict) -> str:
    """sha256 of what decides some results."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Parts:
    """Results of one kind, in a directory that is named for what decides them, so that no others get between.

    Every process of a call makes it and runs it. No other call, in processes of its own, can have it as long as it is there.

    Args:
        directory: for all kinds; what was left there of the same kind, made otherwise, is removed.
        kind: of results.
        facts: what decides them, as the main process sees it.

    Raises:
        BlockingIOError: another call is at work on this kind in this directory.
    """

    def __init__(self, directory: Path, kind: str, facts: dict, state: PartialState):
        self._state, self._kind, self._held = state, kind, ExitStack()

        def begin() -> str:
            own = f"{kind}-{fingerprint(facts)[:16]}"
            directory.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(held(directory / f".{kind}.lock"))
            for other in directory.glob(f"{kind}-*"):
                if other.name != own:
                    shutil.rmtree(other)
            (directory / own).mkdir(exist_ok=True)
            for partial in (directory / own).glob(".*.partial"):
                partial.unlink()
            return own

        self._directory = directory / from_main(state, begin)

    def run(self, count: int, work: Callable[[int], dict[str, np.ndarray]], progress: bool) -> list[dict]:
        """What ``work`` gives for each of the numbers 0 ... count - 1; what has a whole file is not done again.

        Args:
            work: called in the process whose turn it is.
            progress: whether the main process shows how far its own share is.
        """
        state = self._state
        for number in tqdm(self.due(count), desc=self._kind, disable=not (progress and state.is_main_process)):
            with atomic(self._path(number)) as partial, partial.open("wb") as file:
                np.savez(file, **work(number))
        state.wait_for_everyone()
        found = [dict(np.load(self._path(number))) for number in range(count)]
        state.wait_for_everyone()  # or the main process may be done with them before others have read them
        return found

    def remove(self) -> None:
        """Once nobody needs them any more."""
        if self._state.is_main_process:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._held.close()
            with suppress(OSError):
                self._directory.parent.rmdir()

    def due(self, count: int) -> list[int]:
        """Which of so many jobs this process has still to do."""
        own = range(self._state.process_index, count, self._state.num_processes)
        return [number for number in own if not self._is_whole(self._path(number))]

    def _is_whole(self, path: Path) -> bool:
        try:
            dict(np.load(path))
        except FileNotFoundError:
            return False
        except CUT as error:
            log.warning("%s is made again: it cannot be read (%s)", path, error)
            return False
        return True

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:06d}.npz"
