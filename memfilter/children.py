"""Processes that end with the one that started them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import psutil


@contextmanager
def children() -> Iterator[Children]:
    """SIGTERM, SIGHUP (the terminal was closed) and Ctrl-C end the children too; what is ignored, as by nohup, stays so.

    The first of them is what counts: a second would cut short the wait for the checkpoints.
    """
    started = Children()

    def on_signal(number, frame):
        if not started.stopped:
            started.stop()
            raise KeyboardInterrupt

    heard = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in heard}
    try:
        yield started
    finally:
        started.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


class Children:
    """What `children` gives; its methods may be called in several threads."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._told: list[psutil.Process] = []
        self._lock = threading.Lock()
        self.stopped = False

    def call(self, command: list[str], log: Path, environment: Mapping[str, str] = MappingProxyType({})) -> int:
        """Exit code; what it prints goes to the end of the log.

        Args:
            environment: beside that of this process.
        """
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            with self._lock:
                if self.stopped:
                    return 1
                # torchrun would kill what has not written its checkpoint in 30 seconds
                whole = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300", **os.environ, **environment}
                try:
                    child = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=whole)
                except OSError as error:
                    file.write(f"{error}\n".encode())
                    return 127  # as shells have it
                self._running.add(child)
            try:
                return child.wait()
            finally:
                with self._lock:
                    self._running.discard(child)

    def stop(self) -> None:
        """They are told to end, which makes a checkpoint of a run."""
        self.stopped = True  # before the lock: a signal in the midst of this would wait for itself
        with self._lock:
            for child in self._running:
                with suppress(psutil.NoSuchProcess):  # it has just ended, and what it started may live
                    self._told += psutil.Process(child.pid).children(recursive=True)
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGTERM)

    def wait(self) -> None:
        """Until those that were told to end have: accelerate's launcher ends at once, and the run is making its checkpoint."""
        while any(map(_lives, self._told)):
            time.sleep(0.1)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
