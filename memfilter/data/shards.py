"""img2dataset-style webdataset shards, read by random access without unpacking, and flat folders, read alike."""

from __future__ import annotations

import io
import json
import os
import tarfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAX_PIXELS = 64_000_000  # of a picture: what claims more is refused before it is decoded
MAX_CAPTION = 16_384  # bytes: what follows is not read; text encoders take some hundred at most


class ShardError(ValueError):
    """A shard is missing, truncated, or holds something that cannot be read."""


class TooLarge(ShardError):
    """A picture has more pixels than are ever decoded."""


@dataclass(frozen=True)
class Member:
    """Where a file stands: which shard, first byte, number of bytes. A file in a folder is a shard of its own."""

    shard: Path
    offset: int
    size: int


@dataclass
class Shards:
    """The samples of some tar files or of a folder, found by key.

    Members are only ever read by offset; nothing is unpacked, so their names cannot lead outside.
    """

    members: dict[str, dict[str, Member]]  # key -> suffix -> where

    @classmethod
    def open(cls, source: str | os.PathLike) -> Shards:
        """Lists the members of ``source``: one tar file, a directory of ``*.tar``, or a flat folder of pictures and
        ``.txt`` files of the same names.

        Raises:
            ShardError: nothing of that is there, a shard is not a whole tar file, or two samples share a key.
        """
        source = Path(source)
        tars = [source] if source.is_file() else sorted(source.glob("[!.]*.tar"))
        found = (entry for path in tars for entry in _scan(path)) if tars else _list(source)
        members: dict[str, dict[str, Member]] = {}
        for key, suffix, member in found:
            if not key:  # hidden files, such as macOS leaves behind
                continue
            place = members.setdefault(key, {})
            # in a folder a.png and a.jpg are two pictures; in a shard they are two forms of one sample
            twice = IMAGE_SUFFIXES if not tars and suffix in IMAGE_SUFFIXES else (suffix,)
            if known := [place[s].shard for s in twice if s in place]:
                raise ShardError(f"sample {key!r} stands twice: in {known[0]} and in {member.shard}")
            place[suffix] = member
        shards = cls(members)
        if tars and source.is_dir() and any(_is_visible(path, IMAGE_SUFFIXES) for path in source.iterdir()):
            raise ShardError(f"{source} holds tar files and pictures: which are meant? Move one kind elsewhere")
        if not tars and not shards.keys():
            raise ShardError(f"nothing to read: {source} is neither a tar file nor a directory with *.tar or pictures "
                             f"({', '.join(IMAGE_SUFFIXES)}) in it")  # fmt: skip
        return shards

    def keys(self) -> list[str]:
        """Keys of the samples that have an image, in order."""
        return sorted(key for key, files in self.members.items() if not files.keys().isdisjoint(IMAGE_SUFFIXES))

    def image(self, key: str) -> Image.Image:
        """The picture of a sample, RGB.

        Raises:
            ShardError: it cannot be decoded, or has more than `MAX_PIXELS`.
        """
        suffix = next(s for s in IMAGE_SUFFIXES if s in self.members[key])
        return decode(self._bytes(key, suffix), f"sample {key!r} in {self.members[key][suffix].shard}")

    def caption(self, key: str) -> str:
        """The caption of a sample, of `MAX_CAPTION` bytes at most; empty where it has none."""
        if "txt" not in self.members[key]:
            return ""
        return self._bytes(key, "txt", MAX_CAPTION).decode("utf-8", "replace").strip()

    def facts(self, key: str) -> dict:
        """The metadata of a sample; empty where it has none."""
        if "json" not in self.members[key]:
            return {}
        try:
            return json.loads(self._bytes(key, "json"))
        except ValueError as error:
            raise ShardError(f"sample {key!r} in {self.members[key]['json'].shard}: {error}") from error

    def _bytes(self, key: str, suffix: str, limit: int | None = None) -> bytes:
        member = self.members[key][suffix]
        try:
            with member.shard.open("rb") as file:
                file.seek(member.offset)
                return file.read(member.size if limit is None else min(member.size, limit))
        except OSError as error:
            raise ShardError(f"shard {member.shard} cannot be read ({error}): fetch or write it again") from error


def decode(data: bytes, name: str) -> Image.Image:
    """The picture of a PNG, JPEG or WebP file, RGB, the way it is to be looked at.

    Args:
        name: of the picture, for errors.

    Raises:
        TooLarge: it has more than `MAX_PIXELS`.
        ShardError: it cannot be decoded.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS:,}")
        ImageOps.exif_transpose(picture, in_place=True)
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    # decoders raise much more than they say on broken files
    except Exception as error:  # noqa: BLE001
        reason = "this is no picture of a known kind" if isinstance(error, UnidentifiedImageError) else error
        kind = TooLarge if isinstance(error, Image.DecompressionBombError) else ShardError
        raise kind(f"{name}: {reason}") from error


def _scan(path: Path) -> Iterable[tuple[str, str, Member]]:
    """(key, suffix, where) of every file in a shard; by webdataset's convention the key ends at the first dot."""
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isfile():
                    key, _, suffix = Path(info.name).name.partition(".")
                    yield _printable(key), suffix.lower(), Member(path, info.offset_data, info.size)
            # tarfile takes a cut or broken header behind the first member for the end of the archive
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("unexpected end of file")
    except (OSError, tarfile.TarError) as error:
        raise ShardError(f"shard {path} cannot be read ({error}): fetch or write it again") from error


def _list(folder: Path) -> Iterable[tuple[str, str, Member]]:
    """(key, suffix, where) of every picture and text in a folder; the key ends at the last dot."""
    if not folder.is_dir():
        raise ShardError(f"nothing to read: {folder} does not exist")
    for path in sorted(folder.iterdir()):
        if _is_visible(path, (*IMAGE_SUFFIXES, "txt", "json")):
            yield _printable(path.stem), path.suffix.lower()[1:], Member(path, 0, path.stat().st_size)


def _is_visible(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.suffix.lower()[1:] in suffixes and not path.name.startswith(".") and path.is_file()


def _printable(key: str) -> str:
    """Keys go into files: bytes that are no UTF-8, which Python keeps as surrogates, are written out."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_shards(samples: Iterable[tuple[str, Image.Image, str, Mapping]], out: Path, per_shard: int = 1000) -> None:
    """Writes (key, picture, caption, facts) as ``00000.tar``, ... with ``.png .txt .json``; same input, same bytes."""
    import webdataset

    out.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=per_shard, mtime=0, verbose=0) as writer:
        for key, picture, caption, facts in samples:
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            writer.write({"__key__": key, "png": buffer.getvalue(), "txt": caption, "json": {"key": key, **facts}})
