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
    yet trained on.

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
        self.pending: deque[MicroBatch] = deque()
        self._replayed = [MicroBatch(**drawn) for drawn in pending]
        gone = [p for drawn in self._replayed for p in (*drawn.positions, *drawn.passed_over)]
        self._next = max([first, *(p + 1 for p in gone)])
        self.rest: list[int] = []  # positions passed over on the way to a step that never filled up
        self.out_of_patience = False

    @property
    def replaces(self) -> bool:
        """Whether anything may be passed over."""
        return self._passes_over is not None

    def __iter__(self) -> Iterator[list[int]]:
        for drawn in self._replayed:
            self.pending.append(drawn)
            yield drawn.positions[self._mine]
        while (step := self._draw()) is not None:
            positions, passed_over = step
            for micro_batch in range(self._micro_batches):
                part = positions[micro_batch * self._forward : (micro_batch + 1) * self._forward]
                last = micro_batch == self._micro_batches - 1
                self.pending.append(MicroBatch(part, passed_over if last else [], last))
                yield part[self._mine]

    def _draw(self) -> tuple[list[int], list[int]] | None:
        wanted: list[int] = []
        passed_over: list[int] = []
        missing = size = self._forward * self._micro_batches
        while missing:
            if missing > self._end - self._next or self.out_of_patience:
                self.rest = passed_over
                return None
            asked = np.arange(self._next, self._next + missing)
            skip = np.zeros(missing, bool) if self._passes_over is None else np.asarray(self._passes_over(asked))
            wanted += asked[~skip].tolist()
            passed_over += asked[skip].tolist()
            self._next, missing = self._next + missing, size - len(wanted)
            self.out_of_patience = self._patience is not None and len(passed_over) > self._patience
        return wanted, passed_over

    def taken(self) -> MicroBatch:
        """What the batch that is trained on now was drawn as; call once for each."""
        return self.pending.popleft()

    def state(self) -> list[dict]:
        """From which another feed goes on exactly, in the same layout of ranks and micro-batches."""
        return [asdict(drawn) for drawn in self.pending]
