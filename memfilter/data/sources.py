"""What ``data.path`` and ``data.index`` say: pictures and captions, and which of them are shown how often."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from pathlib import Path

from memfilter.config import Config, ConfigError
from memfilter.data.experiment import Experiment, index_beside
from memfilter.data.manifest import ManifestShards, is_manifest
from memfilter.data.sampler import SampleDataset, SampleStream, View
from memfilter.data.saved import SavedDataset, is_saved_dataset
from memfilter.data.shards import Shards
from memfilter.data.streaming import StreamingDataset, open_stream
from memfilter.data.streaming.tars import Stream

Source = Shards | ManifestShards | SavedDataset | Stream


def open_data(config: Config, processes: int = 1) -> tuple[Source, Experiment]:
    """Pictures and captions, and which of them are shown how often.

    Args:
        processes: that share a stream.

    Raises:
        ConfigError, ShardError: they cannot be read, or do not belong together.
    """
    if config.data.streaming:
        return open_stream(config.data, processes)
    index = Path(config.data.index) if config.data.index else index_beside(config.data.path)
    if config.data.index and not index.is_file():
        raise ConfigError(f"data.index: {index} does not exist")
    if index.is_file() and is_manifest(index):
        shards = ManifestShards(index, config.data.path)
    elif is_saved_dataset(Path(config.data.path)):
        shards = SavedDataset(config.data.path)
    else:
        shards = Shards.open(config.data.path)
    try:
        experiment = Experiment.read(index) if index.is_file() else Experiment.of_shards(shards)
        if isinstance(shards, SavedDataset):  # its keys are numbers, which another one has too
            experiment = replace(experiment, contents=shards.fingerprint)
        experiment.require(shards)
        if config.mitigation.deduplicate:
            experiment = experiment.deduplicated()
    except ValueError as error:
        raise ConfigError(f"data.index: {error}") from error
    if not len(experiment.keys):
        raise ConfigError(f"data.path: {config.data.path} has no sample to train on")
    return shards, experiment


def make_dataset(
    config: Config,
    source: Source,
    experiment: Experiment,
    resolution: int,
    remembered: Container[tuple] = frozenset(),
    rank: int = 0,
    processes: int = 1,
) -> SampleDataset | StreamingDataset:
    """The samples of a run by their position, or as they come.

    Args:
        resolution: pixels.
        remembered: as for `SampleDataset`.
        rank, processes: which part of a stream is read here.
    """
    view = View(resolution, config.data.random_crop, config.data.random_flip)
    if config.data.streaming:
        return StreamingDataset(
            source, view, config.train, rank, processes, remembered=remembered, shared_by=config.filter.key
        )
    stream = SampleStream(experiment.virtual(), config.train.seed, config.data.order == "spread")
    if config.filter.key == "content" and experiment.groups is None:
        raise ConfigError("filter.key=content needs a column group in the index: make one with `memfilter prepare groups`")
    return SampleDataset(source, experiment, stream, view, config.train.samples, remembered, config.filter.key)
