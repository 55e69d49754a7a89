"""Hugging Face datasets, read from the front."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from hashlib import blake2b
from inspect import signature
from pathlib import Path

from memfilter.data.saved import CAPTIONS, is_saved_dataset, require_texts
from memfilter.data.shards import MAX_BYTES, NO_FILE, ShardError, as_key, read_bytes
from memfilter.data.streaming.tars import Found, Stream, caption_in, require_parts

PARTS = 16  # into which a saved dataset is split for each reader, so that their order can be shuffled


class RowStream(Stream):
    """Hugging Face datasets. Each rank has files of its own where their number allows it, else takes every n-th row.

    Args:
        path: folder or hub id for ``load_dataset``, what ``save_to_disk`` has written, or ``*.parquet``; of several
            splits, train.
        buffer: samples to draw from.
    """

    def __init__(self, path: str, buffer: int, processes: int = 1, workers: int = 0):
        from datasets import Image

        self._path, self._buffer = path, buffer
        try:
            rows = _rows_of(path, processes * max(workers, 1))
        except Exception as error:  # noqa: BLE001  datasets, pyarrow and the file system each have their own
            raise ShardError(f"{path} cannot be read as a dataset: {' '.join(str(error).split())}") from error
        features = rows.features or {}
        pictures = [name for name, kind in features.items() if isinstance(kind, Image)]
        if len(pictures) != 1:
            raise ShardError(f"{path} needs one column of pictures, found {len(pictures)} among {', '.join(features)}")
        self._picture = pictures[0]
        texts = [name for name in (*CAPTIONS, "txt") if name in features]
        require_texts(path, features, texts)
        columns = [self._picture, *(["__key__"] if "__key__" in features else []), *texts]
        # datasets would decode whatever PIL knows, of any size
        self._rows = rows.select_columns(columns).cast_column(self._picture, Image(decode=False))
        # newer ones read several at once, in threads, and sleep for some seconds when these end
        one_file = {"max_buffer_input_shards": 1}
        self._one_file = {name: n for name, n in one_file.items() if name in signature(self._rows.shuffle).parameters}
        if rows.num_shards % processes:  # every process reads all files and takes its rows of them
            require_parts("files", rows.num_shards, 1, workers)
        else:
            require_parts("files", rows.num_shards, processes, workers)
        _require_rows(self._rows, path)

    def read(self, seed: int, number: int, rank: int, processes: int) -> Iterator[Found]:
        from datasets.distributed import split_dataset_by_node

        # made for each pass: a dataset shares its epoch with all workers, who do not come to the next pass together
        rows = self._rows.shuffle(seed=seed, buffer_size=self._buffer, **self._one_file)
        rows = split_dataset_by_node(rows, rank, processes)
        rows.set_epoch(number)
        try:
            for row in rows:
                yield self._found_in(row)
        except Exception as error:  # noqa: BLE001  datasets, pyarrow and the file system each have their own
            reason = " ".join(str(error).split())
            yield Found("", bad=f"{self._path}: {reason}; the rest of the pass is lost to this reader (rank {rank})")

    def _found_in(self, row: dict) -> Found:
        picture, caption = row[self._picture] or {}, caption_in(row, (*CAPTIONS, "txt"))
        data, place = picture.get("bytes"), str(picture.get("path") or "")
        inside, address = self._inside(place)
        try:
            if not data:
                data = _fetch(address) if inside else b""
        except Exception as error:  # noqa: BLE001  the file system's
            return Found(inside, bad=f"{place} cannot be read ({error})")
        key = str(row.get("__key__") or inside or blake2b(data, digest_size=8).hexdigest())
        if not data:
            return Found(place, bad=f"a row of {self._path} has no picture, or only one from elsewhere: {place!r}")
        if len(data) > MAX_BYTES:
            return Found(as_key(key), bad=f"the picture {key!r} of {self._path} has more than {MAX_BYTES:,} bytes")
        return Found(as_key(key), self._path, data, caption)

    def _inside(self, place: str) -> tuple[str, str]:
        """Where a file stands in the source, and the address to open; both empty where it does not stand there: a row may
        name any file there is.

        Of fsspec's chains, each of which opens what stands first in it, those count that name a member of a zip file, as
        datasets does.
        """
        member, chained, archive = place.rpartition("::")
        kind, _, name = member.partition("://")
        nowhere = "", ""
        if chained and (kind != "zip" or "::" in name or "://" in name):
            return nowhere
        hub = f"hf://datasets/{self._path}"
        if archive.startswith((f"{hub}@", f"{hub}/")) and ".." not in archive.split("/"):
            return place, place
        # what is opened is what was looked at: behind a link, ".." leads elsewhere
        root, path = os.path.abspath(self._path), os.path.abspath(archive)
        if os.path.isabs(archive) and os.path.commonpath([root, path]) == root:
            return member + chained + os.path.relpath(path, root), member + chained + path
        return nowhere


def _rows_of(path: str, readers: int):
    """datasets' IterableDataset."""
    from datasets import Dataset, load_dataset, load_from_disk

    saved = is_saved_dataset(Path(path))
    given = {"path": "parquet", "data_files": path} if path.endswith(".parquet") else {"path": path}
    rows = load_from_disk(path) if saved else load_dataset(**given, streaming=True)
    if isinstance(rows, dict):
        if "train" not in rows and len(rows) > 1:
            raise ValueError(f"it has the splits {', '.join(rows)}, and none is called train")
        rows = rows.get("train", next(iter(rows.values())))
    if isinstance(rows, Dataset):
        parts = readers * max(1, min(PARTS, len(rows) // readers))
        return rows.to_iterable_dataset(num_shards=max(1, min(parts, len(rows))))
    return rows


def _require_rows(rows, path: str) -> None:
    """Raises ShardError where no file has a row that can be read."""
    reasons = []
    for file in range(rows.num_shards):
        try:
            if next(iter(rows.shard(rows.num_shards, file)), None) is not None:
                return
        except Exception as error:  # noqa: BLE001  datasets, pyarrow and the file system each have their own
            reasons.append(f": {' '.join(str(error).split())}")
    raise ShardError(f"{path} has no rows{reasons[0] if reasons else ''}")


def _fetch(address: str) -> bytes:
    """What stands there, `MAX_BYTES` + 1 at most.

    Raises:
        OSError: it cannot be read, or is no file: to open a pipe would wait for somebody to write.
    """
    import fsspec

    _, chained, file = address.rpartition("::")
    if os.path.isabs(file):
        facts = os.stat(file)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(NO_FILE)
        if not chained:
            return read_bytes(Path(file), 0, min(facts.st_size, MAX_BYTES + 1))
    with fsspec.open(address, "rb") as opened:
        return opened.read(MAX_BYTES + 1)  # a member of a zip file may be of any size
