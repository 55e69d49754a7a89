"""Every picture that could go into an experiment: where it stands, what it hashes to, or why it is of no use.

Shards are hashed side by side by several processes. What was found in one is kept in a file named for the shard's name,
size and date, so that an interrupted search goes on, and one with other conditions need not read the pictures again.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import UnidentifiedImageError
from tqdm import tqdm

from memfilter.data.duplicates import HASH_BYTES, perceptual_hashes
from memfilter.data.shards import (
    IMAGE_SUFFIXES,
    MAX_BYTES,
    ShardError,
    Shards,
    TooLarge,
    as_key,
    decode,
    may_pass,
    read_bytes,
)  # fmt: skip
from memfilter.files import atomic
from memfilter.text import printable

BROKEN_SHARD, UNREADABLE, TOO_LARGE, NO_CAPTION = "broken shard", "unreadable", "too large", "without caption"
FOLDER_CHUNK = 1000  # pictures of a folder that count as one shard
NARROW = 10_000  # times as long as wide: to shrink a longer one takes gigabytes
AGAIN = b"again"  # in the metadata of what was found where a read failed that may succeed another time
LEFT_FOR = 86_400  # seconds, after which nobody is writing a half-written file any more
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.binary(32)),
        ("hash", pa.binary(HASH_BYTES)),
        ("mirrored", pa.binary(HASH_BYTES)),  # hash of the mirror image
        ("caption", pa.string()),
        ("url", pa.string()),  # null where the metadata have none
        ("lost", pa.string()),  # why it is of no use; null for candidates
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Unit:
    """What is hashed in one go: a tar file, or some pictures of a folder. Its keys are led by the folder's name."""

    name: str  # of the tar file; of the folder and the first picture
    folder: str
    stamp: str  # another one when name, size or date of a file changes
    shards: Shards | None  # None: the tar file is still to be listed


def candidates(data: Path, kept: Path, processes: int | None = None) -> pa.Table:
    """Everything under a directory, in order of shards: rows of `SCHEMA`.

    Args:
        data: directory of tar files or pictures, or of directories of them, in img2dataset's layout. Links are followed;
            a directory counts once, under the first of its names.
        kept: directory for what is found, shard by shard.
        processes: that read and hash; by default one for each core.

    Raises:
        ShardError: nothing is there, or a folder holds both tar files and pictures, or one key twice.
    """
    units = list(_units(data))
    if not units:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise ShardError(f"nothing to read: {data} has neither tar files nor pictures ({kinds}) in it")
    kept.mkdir(parents=True, exist_ok=True)
    for partial_file in kept.glob(".*.partial"):  # a killed search's; the directory may be that of another one at work
        with suppress(FileNotFoundError):
            if time.time() - partial_file.stat().st_mtime > LEFT_FOR:
                partial_file.unlink()
    results = {unit.name: kept / f"{unit.stamp}.parquet" for unit in units}
    todo = [unit for unit in units if not _is_whole(results[unit.name])]
    work = partial(_hash_unit, data, kept)
    with tqdm(total=len(units), initial=len(units) - len(todo), desc="hash", unit="shard") as bar:
        if processes == 1 or len(todo) < 2:
            for unit in todo:
                work(unit)
                bar.update()
        else:
            # forked children would inherit the threads' locks of libraries
            pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
            try:
                for _ in pool.map(work, todo):
                    bar.update()
            except BrokenProcessPool as error:
                raise ShardError("a process that reads shards was killed, perhaps for want of memory: run it again "
                                 "with fewer --processes; what is finished is kept") from error  # fmt: skip
            finally:
                pool.shutdown(cancel_futures=True)
    return pa.concat_tables(pq.read_table(path, partitioning=None).replace_schema_metadata() for path in results.values())


def versions() -> dict[str, str]:
    """Of the libraries on which a perceptual hash depends."""
    import imagehash
    import numpy
    import PIL
    import scipy

    return {module.__name__: module.__version__ for module in (imagehash, numpy, PIL, scipy)}


def _units(data: Path) -> Iterator[Unit]:
    seen = set()  # directories: links may lead around, or twice to the same
    for folder, below, names in os.walk(data, onerror=_refuse, followlinks=True):
        facts = os.stat(folder)
        if (number := (facts.st_dev, facts.st_ino)) in seen:
            below.clear()
            continue
        seen.add(number)
        below[:] = sorted(name for name in below if not name.startswith("."))
        place = Path(folder)
        visible = sorted(name for name in names if not name.startswith("."))
        tars = [place / name for name in visible if name.endswith(".tar")]
        pictures = any(Path(name).suffix.lower()[1:] in IMAGE_SUFFIXES for name in visible)
        inside = place.relative_to(data).as_posix()
        prefix = "" if inside == "." else as_key(f"{inside}/")
        if tars and pictures:
            raise ShardError(f"{printable(place)} holds tar files and pictures: which are meant? Move one kind "
                             "elsewhere")  # fmt: skip
        for tar in tars:
            name = tar.relative_to(data).as_posix()
            yield Unit(name, prefix, _stamp(data, [tar]), None)
        if pictures:
            shards = Shards.open(place)
            keys = shards.keys()
            for start in range(0, len(keys), FOLDER_CHUNK):
                some = Shards({key: shards.members[key] for key in keys[start : start + FOLDER_CHUNK]})
                files = [member.shard for members in some.members.values() for _, member in sorted(members.items())]
                yield Unit(f"{inside}/{keys[start]}", prefix, _stamp(data, files), some)


def _refuse(error: OSError) -> None:
    raise ShardError(f"nothing to read: {printable(error.filename)} cannot be listed ({error.strerror})") from error


def _stamp(data: Path, files: list[Path]) -> str:
    digest = hashlib.sha256(repr(versions()).encode())
    for file in files:
        with suppress(OSError):  # a dangling link, which is found out about later
            facts = file.stat()
            digest.update(repr((facts.st_size, facts.st_mtime_ns)).encode())
        digest.update(repr(str(file.relative_to(data))).encode())
    return digest.hexdigest()[:32]


def _is_whole(result: Path) -> bool:
    try:
        schema = pq.read_schema(result)
        return schema.equals(SCHEMA) and AGAIN not in (schema.metadata or {})
    except (OSError, pa.ArrowException):
        return False


def _hash_unit(data: Path, kept: Path, unit: Unit) -> None:
    try:
        shards = unit.shards or Shards.open(data / unit.name)
        rows = [_hash_sample(data, unit, shards, key) for key in shards.keys()]
    except ShardError as error:
        rows = [_lost({"shard": as_key(unit.name)}, BROKEN_SHARD, str(error.__cause__ or error))]
        rows[0]["again"] = may_pass(error.__cause__)
    schema = SCHEMA.with_metadata({AGAIN: b"1"}) if any(row.get("again") for row in rows) else SCHEMA
    with atomic(kept / f"{unit.stamp}.parquet") as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema), partial, compression="zstd")


def _hash_sample(data: Path, unit: Unit, shards: Shards, key: str) -> dict:
    """A row of `SCHEMA`, and whether reading it ``again`` may succeed."""
    members = shards.members[key]
    place = members[next(suffix for suffix in IMAGE_SUFFIXES if suffix in members)]  # the one that is shown
    shard = place.shard.relative_to(data).as_posix()
    row = {"key": f"{unit.folder}{key}", "shard": as_key(shard), "offset": place.offset, "size": place.size}
    if row["shard"] != shard:
        return _lost(row, UNREADABLE, "its file's name is no UTF-8")
    if place.problem:
        return _lost(row, UNREADABLE, place.problem)
    if place.size > MAX_BYTES:
        return _lost(row, TOO_LARGE, f"{place.size:,} bytes are more than {MAX_BYTES:,}")
    try:
        content, caption = read_bytes(place.shard, place.offset, place.size), shards.caption(key)
        picture = decode(content, key)
    except (ShardError, OSError) as error:
        detail = error.__cause__ or error
        row["again"] = may_pass(detail)
        if isinstance(detail, UnidentifiedImageError):  # whose message has an address in memory
            detail = "no picture of a known kind"
        return _lost(row, TOO_LARGE if isinstance(error, TooLarge) else UNREADABLE, str(detail))
    if max(picture.size) > NARROW * min(picture.size):
        return _lost(row, TOO_LARGE, f"{picture.width:,} x {picture.height:,} pixels are more than {NARROW:,} times as long as wide")
    row["hash"], row["mirrored"] = perceptual_hashes(picture)
    if not caption:
        return _lost(row, NO_CAPTION, "")
    return row | {"sha256": hashlib.sha256(content).digest(), "caption": caption, "url": _url(shards, key)}


def _url(shards: Shards, key: str) -> str | None:
    try:
        url = shards.facts(key).get("url")
    except ShardError:
        return None
    return url.encode("utf-8", "backslashreplace").decode() if isinstance(url, str) else None


def _lost(row: dict, reason: str, detail: str) -> dict:
    return row | {"lost": reason, "detail": printable(detail)[:1000]}
