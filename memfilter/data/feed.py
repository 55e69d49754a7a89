"""Which positions of the stream go into the next batch: those that come, but for samples that are passed over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np


@dataclass
class MicroBatch:
    """Positions of one micro-batch on all ranks, and what was passed over to get them.

    Args:
        positions: in the order of the stream; ranks take neighbouring slices.
        passed_over: positions in whose place others were taken; of a whole step, told with its last micro-batch.
        ends_step: whether it is the last of an optimizer step.
    """

    positions: list[int]
    passed_over: list[int]
    ends_step: bool


class Feed:
    """A batch sampler, one epoch of which is the rest of the budget.

    Every rank draws for all of them, so that all agree without a word. Whom to pass over is asked when a batch is drawn:
    with worker processes, which read ahead, some steps before it is trained on. ``pending`` holds what was drawn and not
    yet trained on, always to the end of a step.

    Args:
        first: position to begin with.
        end: of the budget; a rest too short for a step is left.
        forward_samples: of one micro-batch on all ranks.
        micro_batches: of an optimizer step.
        rank, processes: which slice is this rank's.
        passes_over: positions -> which of them need not be shown, bool [n]; None: none.
        patience: so many positions passed over for one step end the iteration, as if the budget were spent.
        pending: what an earlier feed had drawn, see `state`.
    """

    def __init__(
        self,
        first: int,
        end: int,
        forward_samples: int,
        micro_batches: int = 1,
        rank: int = 0,
        processes: int = 1,
        passes_over: Callable[[np.ndarray], np.ndarray] | None = None,
        patience: int | None = None,
        pending: list[dict] = (),
    ):
        self._end, self._patience = end, patience
        self._forward, self._micro_batches = forward_samples, micro_batches
        size = forward_samples // processes
        self._mine = slice(rank * size, (rank + 1) * size)
        self._passes_over = passes_over
        self.pending = deque(MicroBatch(**drawn) for drawn in pending)
        gone = [p for drawn in self.pending for p in (*drawn.positions, *drawn.passed_over)]
        self._next = max([first, *(p + 1 for p in gone)])
        self._ended = bool(self.pending) and not self.pending[-1].positions
        self.rest: list[int] = []  # positions passed over on the way to a step that never filled up
        if self._ended:
            self.rest = self.pending.pop().passed_over

    @property
    def out_of_patience(self) -> bool:
        return self._patience is not None and len(self.rest) > self._patience

    def __iter__(self) -> Iterator[list[int]]:
        handed_out = list(self.pending)
        while True:
            for drawn in handed_out:
                yield drawn.positions[self._mine]
            if self._ended or not (handed_out := self._draw()):
                return
            self.pending.extend(handed_out)

    def _draw(self) -> list[MicroBatch]:
        """Those of the next step; none at the end."""
        wanted: list[int] = []
        passed_over: list[int] = []
        missing = size = self._forward * self._micro_batches
        while missing:
            impatient = self._patience is not None and len(passed_over) > self._patience
            if impatient or missing > self._end - self._next:
                self.rest, self._ended = passed_over, True
                return []
            asked = np.arange(self._next, self._next + missing)
            skip = np.zeros(missing, bool) if self._passes_over is None else np.asarray(self._passes_over(asked))
            wanted += asked[~skip].tolist()
            passed_over += asked[skip].tolist()
            self._next, missing = self._next + missing, size - len(wanted)
        parts = [wanted[start : start + self._forward] for start in range(0, size, self._forward)]
        return [*(MicroBatch(part, [], False) for part in parts[:-1]), MicroBatch(parts[-1], passed_over, True)]

    def taken(self) -> MicroBatch:
        """What the batch that is trained on now was drawn as; call once for each."""
        return self.pending.popleft()

    def state(self) -> list[dict]:
        """From which another feed goes on exactly, in the same layout of ranks and micro-batches and with the same end. A last
        entry without positions says that there is no other step to come."""
        return [asdict(drawn) for drawn in (*self.pending, *([MicroBatch([], self.rest, True)] if self.rest else []))]
