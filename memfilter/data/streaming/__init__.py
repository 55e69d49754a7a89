"""Samples as they come, for sources that are read from the front.

A pass shows every sample of the source once. The ranks, and the worker processes of each, have parts of it to
themselves: they are its readers. Nothing is looked up, so nothing is known of what comes next.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from memfilter.config import DataConfig, TrainConfig
from memfilter.data.experiment import Experiment, index_beside
from memfilter.data.sampler import NOT_NEEDED, View, crop_place, flipped, shown, unreadable
from memfilter.data.shards import ShardError, decode
from memfilter.data.streaming.rows import RowStream
from memfilter.data.streaming.tars import Found, Stream, TarStream

log = logging.getLogger(__name__)


def open_stream(data: DataConfig, processes: int) -> tuple[Stream, Experiment]:
    """What ``data.path`` is by ``data.streaming``, and an experiment that knows nothing but where it comes from.

    Raises:
        ConfigError: the path is nothing to stream from, or has fewer parts than there are readers.
        ShardError: it cannot be read, or has no sample.
    """
    if (beside := index_beside(data.path)).is_file():
        log.warning("data.streaming: %s is left alone, every sample counts once", beside)
    kind = {"webdataset": TarStream, "datasets": RowStream}[data.streaming]
    stream = kind(data.path, data.shuffle_buffer, processes, data.workers)
    return stream, Experiment([], None, np.zeros(0, int), f"{data.streaming} {data.path}")


@dataclass
class StreamingDataset(IterableDataset):
    """A stream -> the same dicts as of `SampleDataset`, one rank's from the first position that is left to the last.

    Batch b of a rank, of all its workers, has the positions ``first + (b * processes + rank) * batch_size`` and on, so
    what is drawn for a sample depends on seed and position alone. repeats is said from the second pass on. Samples of
    the same picture share their view.

    Args:
        train: for seed, samples (the budget) and batch_size.
        rank, processes: which part of the stream is read here.
        first: position to begin at. With another the stream comes in another order.
        remembered: as for `SampleDataset`.
        shared_by: what shares evidence, sample or caption.
    """

    shards: Stream
    view: View
    train: TrainConfig
    rank: int = 0
    processes: int = 1
    first: int = 0
    remembered: Container[tuple] = frozenset()
    shared_by: str = "sample"

    def __iter__(self) -> Iterator[dict]:
        info, size = get_worker_info(), self.train.batch_size
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        found = self._found()
        # DataLoader takes a batch from every worker in turn
        starts = range(self.first + self.rank * size, self.train.samples, self.processes * size)
        for start in starts[worker::workers]:
            for position in range(start, start + size):
                yield self._sample(position, *next(found))

    def _found(self) -> Iterator[tuple[Found, bool]]:
        """(what comes, whether it comes again), without end."""
        seed = int(np.random.default_rng((self.train.seed, self.first)).integers(2**62))
        for number in itertools.count():
            empty = True
            for found in self.shards.read(seed, number, self.rank, self.processes):
                empty = False
                yield found, number > 0
            if empty:  # or this would turn for ever
                yield Found("", bad=f"a reader (rank {self.rank}) found no sample in its part of the stream"), False

    def _sample(self, position: int, found: Found, again: bool) -> dict:
        view, seed = self.view, self.train.seed
        place = crop_place(seed, position) if view.random_crop else None
        flip = view.random_flip and flipped(seed, position)
        name = (blake2b(found.picture, digest_size=16).hexdigest(), place, flip)
        shared_key = found.caption if self.shared_by == "caption" and found.bad is None else found.key
        sample = {"position": position, "key": found.key, "shared_key": shared_key, "duplicate": None, "repeats": again,
                  "view": name}  # fmt: skip
        try:
            if found.bad is not None:
                raise ShardError(found.bad)
            if name in self.remembered:
                return sample | {"caption": found.caption, "bad": None} | NOT_NEEDED
            picture = decode(found.picture, f"sample {found.key!r} in {found.where}")
            facts = shown(picture, found.key, view.resolution, place, flip)
            return sample | {"caption": found.caption, "bad": None} | facts
        except ShardError as error:
            return sample | unreadable(position, view.resolution, str(error))
