"""Sources that are read from the front: what they give, and webdataset's tar shards."""

from __future__ import annotations

import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.request import urlopen

from memfilter.config import ConfigError
from memfilter.data.saved import CAPTIONS
from memfilter.data.shards import (
    IMAGE_SUFFIXES,
    MAX_BYTES,
    MAX_CAPTION,
    MAX_FACTS,
    ShardError,
    Tar,
    TooLarge,
    as_caption,
    as_key,
)
from memfilter.text import printable

SECONDS = 60  # that a server may be silent
_META = re.compile(r"__[^/]*__($|/)")  # what webdataset has for itself in shards


@dataclass(frozen=True)
class Found:
    """What came: a sample, its picture not yet decoded, or why there is none.

    ``where`` is for messages.
    """

    key: str
    where: str = ""
    picture: bytes = b""
    caption: str = ""
    bad: str | None = None


class Stream(ABC):
    """A source, open."""

    @abstractmethod
    def read(self, seed: int, number: int, rank: int, processes: int) -> Iterator[Found]:
        """The part of pass ``number`` that is this reader's, shuffled; what cannot be read comes as bad."""

    def caption(self, key: str) -> NoReturn:
        """Raises ShardError: samples come, and are not looked up."""
        raise ShardError(f"sample {key!r} came in a stream, which is not read again")

    image = caption


def require_parts(parts: str, count: int, processes: int, workers: int) -> None:
    """Raises ConfigError where a reader would have nothing to read, which is more likely a mistake than meant."""
    if count < processes * max(workers, 1):
        most = count // processes
        way = f"set data.workers to {most} at most" if most else "start fewer processes"
        raise ConfigError(f"data.streaming: {count} {parts} are too few for {processes} processes x {max(workers, 1)} "
                          f"readers, some would have none: {way}, or write more")  # fmt: skip


def caption_in(facts, names: Iterable[str] = CAPTIONS) -> str:
    """Under the first of the names that has one.

    Raises:
        ShardError: it is no text.
    """
    caption = next((facts[name] for name in names if facts.get(name)), "") if isinstance(facts, dict) else ""
    if not isinstance(caption, str):
        raise ShardError(f"its caption is no text but {caption!r:.60}")
    return as_caption(caption.encode("utf-8", "replace"))


class TarStream(Stream):
    """Tar shards, in webdataset's order and its samples: every reader has shards of its own.

    Args:
        path: directory of ``*.tar``, one of them, a brace pattern, or one or a pattern of them as http(s) addresses.
        buffer: samples to draw from.
    """

    def __init__(self, path: str, buffer: int, processes: int = 1, workers: int = 0):
        self._path, self._buffer, self._urls = path, buffer, _shards_of(path)
        require_parts("shards", len(self._urls), processes, workers)
        broken: dict[str, str] = {}
        if not any(True for sample in self._samples(iter(self._urls), broken) if _picture_in(sample)):
            reasons = "\n".join(broken.values()) or f"no picture ({', '.join(IMAGE_SUFFIXES)}) in the shards of {path}"
            raise ShardError(reasons)

    def read(self, seed: int, number: int, rank: int, processes: int) -> Iterator[Found]:
        # their order alone is shuffled by it; webdataset itself looks which rank and worker this is
        import webdataset as wds

        broken: dict[str, str] = {}
        told: set[str] = set()
        samples = wds.DataPipeline(
            wds.SimpleShardList(self._urls),
            wds.split_by_node,
            wds.split_by_worker,
            wds.detshuffle(len(self._urls), len(self._urls), seed=seed, epoch=number - 1),
            lambda shards: self._samples((shard["url"] for shard in shards), broken),
            lambda samples: filter(_picture_in, samples),
            wds.detshuffle(self._buffer, self._buffer, seed=seed + rank, epoch=number - 1),
        )
        for sample in itertools.chain(samples, [None]):
            for name in sorted(broken.keys() - told):
                yield Found(name, bad=broken[name])
            told = set(broken)
            if sample is not None:
                yield _found_in(sample)

    def _samples(self, urls: Iterator[str], broken: dict[str, str]) -> Iterator[dict]:
        """webdataset's samples, whole ones only; why a shard is not whole goes into ``broken``."""
        from webdataset.tariterators import group_by_keys

        def twice(error: Exception) -> bool:
            broken[str(error.args[0])] = f"a file stands twice in a shard: {error.args[0]}"
            return True

        for sample in group_by_keys(self._files(urls, broken), handler=twice):
            if sample["__url__"] not in broken:  # else it is the one at the break
                yield sample

    def _files(self, urls: Iterator[str], broken: dict[str, str]) -> Iterator[dict]:
        """webdataset's files. In place of what one has too much of stands the error that says so: it may not be needed."""
        for url in urls:
            try:
                with urlopen(url, timeout=SECONDS) if _is_remote(url) else open(url, "rb") as stream:
                    for name, size, is_file in (tar := Tar(stream)):
                        if not (is_file and (limit := _limit(name))):
                            continue
                        if size > limit and not name.lower().endswith(".txt"):
                            data = TooLarge(f"{name!r}: {size:,} bytes are more than {limit:,}")
                        else:
                            data = tar.read(min(size, limit))
                        yield {"fname": name, "data": data, "__url__": url}
            except Exception as error:  # noqa: BLE001  the system's, HTTP's and TLS's
                reason = " ".join(str(error).split())
                broken[url] = f"shard {printable(url)} cannot be read ({reason}): fetch or write it again"
            yield {}  # what was begun in this shard does not go on in the next


def _is_remote(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _shards_of(path: str) -> list[str]:
    """Files or addresses, each of them a shard."""
    from braceexpand import braceexpand

    if Path(path).is_dir():
        urls = [str(shard) for shard in sorted(Path(path).glob("[!.]*.tar"))]
    elif Path(path).is_file():
        urls = [path]
    elif "://" in path and not _is_remote(path):
        raise ConfigError(f"data.path: {path} is no address to stream from: expected http:// or https://")
    else:
        try:
            urls = list(braceexpand(path))
        except ValueError as error:
            raise ConfigError(f"data.path: {path} is no pattern: {error}") from error
    if missing := [url for url in urls if not _is_remote(url) and not Path(url).is_file()]:
        raise ShardError(f"nothing to stream: {missing[0]} does not exist, of {len(missing)} shards that are missing")
    if not urls:
        raise ShardError(f"nothing to stream: no *.tar in {path}")
    return urls


def _limit(name: str) -> int:
    """So many bytes are read of a file of that name; 0 of what is not wanted."""
    if _META.match(name):
        return 0
    suffix = name.rpartition("/")[2].partition(".")[2].lower()
    return MAX_BYTES if suffix in IMAGE_SUFFIXES else {"txt": MAX_CAPTION, "json": MAX_FACTS}.get(suffix, 0)


def _picture_in(sample: dict) -> bool:
    return any(suffix in sample for suffix in IMAGE_SUFFIXES)


def _found_in(sample: dict) -> Found:
    key, where = as_key(sample["__key__"]), sample["__url__"]
    try:
        picture = _whole(next(sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample))
        if "txt" in sample or "json" not in sample:
            return Found(key, where, picture, as_caption(sample.get("txt", b"")))
        return Found(key, where, picture, caption_in(json.loads(_whole(sample["json"]))))
    except (ValueError, RecursionError) as error:
        return Found(key, bad=f"sample {key!r} in {where}: {error}")


def _whole(data: bytes | TooLarge) -> bytes:
    if isinstance(data, TooLarge):
        raise data
    return data
