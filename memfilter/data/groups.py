"""Which samples are near duplicates of each other, so that they can share evidence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memfilter.data.candidates import candidates
from memfilter.data.duplicates import near_pairs
from memfilter.data.experiment import index_beside
from memfilter.files import atomic


def prepare_groups(data: Path, index: Path | None = None, max_bits: int = 6, processes: int | None = None) -> int:
    """Adds the column ``group`` to an index: a name that near duplicates have in common, by perceptual hash.

    Near to near is near: a chain of pictures, each near the next, is one group. Where there is no index one is made, which
    knows no roles.

    Args:
        data: directory of shards or pictures, as `memfilter prepare experiment` takes it.
        index: Parquet file; by default the one beside the data. A manifest keeps its header.
        max_bits: of 64, by which the hashes of near pictures differ. ``docs/results/near_duplicates.md`` has what that
            finds.
        processes: that read and hash; by default one for each core.

    Returns:
        How many groups have more than one sample.

    Raises:
        ValueError: max_bits is out of range.
        ShardError: nothing is there.
    """
    if not 0 <= max_bits <= 31:
        raise ValueError(f"max_bits must be at least 0 and at most 31, found {max_bits}")
    index = index or index_beside(data)
    found = candidates(data, (data if data.is_dir() else data.parent) / "hashes", processes)
    found = found.filter(pc.is_valid(found["hash"]))
    keys = found["key"].to_pylist()
    hashes = np.frombuffer(b"".join(found["hash"].to_pylist()), np.uint8).reshape(len(keys), -1)
    group = dict(zip(keys, _connected(len(keys), near_pairs(hashes, max_bits)).tolist(), strict=True))
    if index.is_file():
        table = pq.read_table(index, partitioning=None)
    else:
        count = len(keys)
        table = pa.table({"key": keys, "role": pa.nulls(count, pa.string()), "repeats": [1] * count})  # nobody knows their roles
    # a sample that cannot be read has a group of its own
    names = [keys[group[key]] if key in group else key for key in table["key"].to_pylist()]
    if "group" in table.column_names:
        table = table.drop_columns(["group"])
    table = table.append_column("group", pa.array(names, pa.string()))
    with atomic(index) as partial:
        pq.write_table(table, partial)
    _, counts = np.unique(names, return_counts=True)
    return int((counts > 1).sum())


def _connected(count: int, pairs: np.ndarray) -> np.ndarray:
    """The smallest number in every number's connected component, int [count]; pairs int [n, 2]."""
    smallest = np.arange(count)
    while True:
        before = smallest.copy()
        low = np.minimum(smallest[pairs[:, 0]], smallest[pairs[:, 1]])
        np.minimum.at(smallest, pairs[:, 0], low)
        np.minimum.at(smallest, pairs[:, 1], low)
        smallest = smallest[smallest]
        if (smallest == before).all():
            return smallest
