"""img2dataset-style webdataset shards: written by webdataset, read by random access without unpacking."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")


class ShardError(ValueError):
    """A shard is missing, truncated, or holds something that cannot be read."""


@dataclass(frozen=True)
class Member:
    """Where a file stands: which shard, first byte, number of bytes."""

    shard: Path
    offset: int
    size: int


@dataclass
class Shards:
    """The samples of some tar files, found by key.

    Members are only ever read by offset; nothing is unpacked, so their names cannot lead outside.
    """

    members: dict[str, dict[str, Member]]  # key -> suffix -> where

    @classmethod
    def open(cls, source: str | os.PathLike) -> Shards:
        """Lists the members of ``source``: a directory of ``*.tar``, or one tar file.

        Raises:
            ShardError: no shard there, one of them is not a whole tar file, or two samples share a key.
        """
        source = Path(source)
        paths = [source] if source.is_file() else sorted(source.glob("*.tar"))
        if not paths:
            raise ShardError(f"no shard found: {source} is neither a tar file nor a directory with *.tar in it")
        members: dict[str, dict[str, Member]] = {}
        for path in paths:
            for name, member in _scan(path):
                key, _, suffix = Path(name).name.partition(".")
                if not key:  # hidden files, such as macOS leaves behind
                    continue
                suffix = suffix.lower()
                place = members.setdefault(key, {})
                if suffix in place:
                    raise ShardError(f"sample {key!r} stands twice: in {place[suffix].shard} and in {path}")
                place[suffix] = member
        return cls(members)

    def keys(self) -> list[str]:
        """Keys of the samples that have an image, in order."""
        return sorted(key for key, files in self.members.items() if not files.keys().isdisjoint(IMAGE_SUFFIXES))

    def image(self, key: str) -> Image.Image:
        """The picture of a sample, RGB.

        Raises:
            ShardError: it cannot be decoded.
        """
        suffix = next(s for s in IMAGE_SUFFIXES if s in self.members[key])
        try:
            return Image.open(io.BytesIO(self._bytes(key, suffix))).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ShardError(f"sample {key!r} in {self.members[key][suffix].shard}: {error}") from error

    def caption(self, key: str) -> str:
        """The caption of a sample; empty where it has none."""
        return self._bytes(key, "txt").decode("utf-8", "replace").strip() if "txt" in self.members[key] else ""

    def facts(self, key: str) -> dict:
        """The metadata of a sample; empty where it has none."""
        if "json" not in self.members[key]:
            return {}
        try:
            return json.loads(self._bytes(key, "json"))
        except ValueError as error:
            raise ShardError(f"sample {key!r} in {self.members[key]['json'].shard}: {error}") from error

    def _bytes(self, key: str, suffix: str) -> bytes:
        member = self.members[key][suffix]
        try:
            with member.shard.open("rb") as file:
                file.seek(member.offset)
                return file.read(member.size)
        except OSError as error:
            raise ShardError(f"shard {member.shard} cannot be read ({error}): fetch or write it again") from error


def _scan(path: Path) -> Iterable[tuple[str, Member]]:
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isfile():
                    yield info.name, Member(path, info.offset_data, info.size)
            # tarfile takes a cut or broken header behind the first member for the end of the archive
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("unexpected end of file")
    except (OSError, tarfile.TarError) as error:
        raise ShardError(f"shard {path} cannot be read ({error}): fetch or write it again") from error


def write_shards(samples: Iterable[tuple[str, Image.Image, str, Mapping]], out: Path, per_shard: int = 1000) -> None:
    """Writes (key, picture, caption, facts) as ``00000.tar``, ... with ``.png .txt .json``; same input, same bytes."""
    import webdataset

    out.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=per_shard, mtime=0, verbose=0) as writer:
        for key, picture, caption, facts in samples:
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            writer.write({"__key__": key, "png": buffer.getvalue(), "txt": caption, "json": {"key": key, **facts}})
