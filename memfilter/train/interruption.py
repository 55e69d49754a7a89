"""Signals that ask a run to stop: they are heard at the end of the optimizer step, by all ranks at the same one."""

from __future__ import annotations

import signal
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later


class Interrupted(Exception):
    """A signal ended the run; a checkpoint of where it was is there."""


class Interruption:
    """Whether one of `SIGNALS` arrived, at this rank or another."""

    def __init__(self, device: torch.device):
        self._device, self._name = device, None

    @contextmanager
    def heard(self):
        """Signals are noted, and do nothing else, for as long as this lasts. Only in the main thread; elsewhere they do
        what they do."""
        before = {}
        with suppress(ValueError):
            for number in SIGNALS:
                before[number] = signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self._name = signal.Signals(number).name

    def agreed(self) -> str | None:
        """What asks to stop, once some rank heard it; every rank calls, and all get an answer or none does."""
        heard = self._name is not None  # once: a signal may come at any moment, and ranks must not part over it
        if dist.is_available() and dist.is_initialized():
            anywhere = torch.tensor(heard, dtype=torch.int32, device=self._device)
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
            heard = bool(anywhere)
        return (self._name or "another rank's signal") if heard else None


def leave_to_parent(_worker: int) -> None:
    """For a process that reads data: torchrun, Slurm and a terminal signal it too, and the step to come needs it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
