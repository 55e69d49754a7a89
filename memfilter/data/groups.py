"""Which samples are near duplicates of each other, so that they can share evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memfilter.data.candidates import candidates
from memfilter.data.duplicates import HASH_BYTES, NEAR_BITS, near_pairs
from memfilter.data.experiment import PLACE, index_beside
from memfilter.data.manifest import is_manifest
from memfilter.data.shards import Shards
from memfilter.files import atomic


def prepare_groups(data: Path, index: Path | None = None, max_bits: int = NEAR_BITS, processes: int | None = None) -> int:
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
    found = candidates(data, data / "hashes", processes)
    if index.is_file():
        table = pq.read_table(index, partitioning=None)
    else:
        keys = Shards.open(data).keys()
        table = pa.table({"key": keys, "role": pa.nulls(len(keys), pa.string()), "repeats": [1] * len(keys)})  # nobody knows roles
    found = found.filter(pc.is_valid(found["hash"]))
    keys = found["key"].to_pylist()
    hashes = np.frombuffer(b"".join(found["hash"].to_pylist()), np.uint8).reshape(len(keys), HASH_BYTES)
    # pictures with one hash are near each other, and there may be many of them: pairs are looked for among hashes
    hashes, first, same = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))  # hashes by their first pictures, for whom groups are called
    pairs = order[near_pairs(hashes, max_bits)]
    names = [keys[row] for row in np.sort(first)[_connected(len(hashes), pairs)[order[same.ravel()]]].tolist()]
    columns = PLACE if is_manifest(index) else ["key"]  # a picture of a manifest may have several keys
    group = dict(zip(_rows(found, columns), names, strict=True))
    # a sample that cannot be read has a group of its own
    names = [group.get(row, key) for row, key in zip(_rows(table, columns), table["key"].to_pylist(), strict=True)]
    if "group" in table.column_names:
        table = table.drop_columns(["group"])
    table = table.append_column("group", pa.array(names, pa.string()))
    with atomic(index) as partial:
        pq.write_table(table, partial)
    _, counts = np.unique(names, return_counts=True)
    return int((counts > 1).sum())


def _rows(table: pa.Table, columns: Sequence[str]) -> Iterator[tuple]:
    return zip(*(table[name].to_pylist() for name in columns), strict=True)


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
