"""img2dataset-style webdataset shards, read by random access without unpacking, and flat folders, read alike."""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from memfilter.text import printable

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAX_PIXELS = 64_000_000  # of a picture: what claims more is refused before it is decoded
MAX_BYTES = 3 * MAX_PIXELS  # of a picture's file: the most that is ever read, what its pixels take up uncompressed
MAX_SCANNED = 500 * MAX_PIXELS  # of a JPEG's scans, each of which goes over all pixels: what takes some 15 seconds
MAX_CAPTION = 16_384  # bytes: what follows is not read; text encoders take some hundred at most
MAX_FACTS = 1 << 20  # bytes of metadata: more are refused
MAX_HEADER = 1 << 16  # bytes of what a tar file says of a member, most of all its name
NO_FILE = "it is no file but a link, a pipe or a device"
TURNS = {  # EXIF's orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd begin
_CHUNK = 2**20  # bytes
_WITHOUT_BYTES = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE, *_PAX)


class ShardError(ValueError):
    """A shard is missing, truncated, or holds something that cannot be read."""


class TooLarge(ShardError):
    """A picture has more pixels than are ever decoded, or a file more bytes than are ever read."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file stands: which shard, first byte, number of bytes. A file in a folder is a shard of its own."""

    shard: Path
    offset: int
    size: int
    problem: str = ""  # why it cannot be read: what only has the name of a file is listed too, for it to be counted


@dataclass
class Shards:
    """The samples of some tar files or of a folder, found by key.

    Members are only ever read by offset; nothing is unpacked, so their names cannot lead outside. Links in tar files
    are not followed; in folders they are, since there they are the user's own.
    """

    members: dict[str, dict[str, Member]]  # key -> suffix -> where

    @classmethod
    def open(cls, source: str | os.PathLike) -> Shards:
        """Lists the members of ``source``: one tar file, a directory of ``*.tar``, or a flat folder of pictures and
        ``.txt`` files of the same names.

        Raises:
            ShardError: nothing of that is there, a shard is not a whole tar file or has sparse members, or two samples
                share a key.
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
                raise ShardError(f"sample {key!r} stands twice: in {printable(known[0])} and in "
                                 f"{printable(member.shard)}")  # fmt: skip
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
            TooLarge: it has more than `MAX_PIXELS` or `MAX_BYTES`.
            ShardError: it cannot be read or decoded.
        """
        suffix = next(s for s in IMAGE_SUFFIXES if s in self.members[key])
        return decode(self._bytes(key, suffix, MAX_BYTES), self._name(key, suffix))

    def caption(self, key: str) -> str:
        """The caption of a sample, of `MAX_CAPTION` bytes at most; empty where it has none.

        Raises:
            ShardError: it cannot be read.
        """
        if "txt" not in self.members[key]:
            return ""
        return as_caption(self._bytes(key, "txt", MAX_CAPTION, cut=True))

    def facts(self, key: str) -> dict:
        """The metadata of a sample; empty where it has none.

        Raises:
            TooLarge: they have more than `MAX_FACTS`.
            ShardError: they cannot be read, or are no JSON object.
        """
        if "json" not in self.members[key]:
            return {}
        content = self._bytes(key, "json", MAX_FACTS)
        try:
            facts = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{self._name(key, 'json')}: {error}") from error
        if not isinstance(facts, dict):
            raise ShardError(f"{self._name(key, 'json')}: the metadata are no JSON object")
        return facts

    def _name(self, key: str, suffix: str) -> str:
        return f"sample {key!r} in {printable(self.members[key][suffix].shard)}"

    def _bytes(self, key: str, suffix: str, limit: int, cut: bool = False) -> bytes:
        member, name = self.members[key][suffix], self._name(key, suffix)
        if member.size > limit and not cut:
            raise TooLarge(f"{name}: {member.size:,} bytes are more than {limit:,}")
        try:
            if member.problem:
                raise OSError(member.problem)
            return read_bytes(member.shard, member.offset, min(member.size, limit))
        except OSError as error:
            raise ShardError(f"{name} cannot be read ({error}): fetch or write it again") from error


def may_pass(error: BaseException | None) -> bool:
    """Whether it is the file system's, as of a disk or a network that failed, or of a permission; and not PIL's, which has no number,
    or of a file that is not there."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError)


def as_key(name: str) -> str:
    """Keys go into files: bytes that are no UTF-8, which Python keeps as surrogates, are written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def as_caption(text: bytes) -> str:
    """What a file of text says, of `MAX_CAPTION` bytes at most."""
    return text[:MAX_CAPTION].decode("utf-8-sig", "replace").strip()


def read_bytes(path: Path, offset: int, size: int) -> bytes:
    """A part of a file; less than ``size`` where it ends before. Nothing waits: a pipe is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def decode(data: bytes, name: str) -> Image.Image:
    """The picture of a PNG, JPEG or WebP file, RGB, the way it is to be looked at: upright, what is transparent on white (as
    img2dataset has it).

    Args:
        name: of the picture, for errors.

    Raises:
        TooLarge: it has more than `MAX_PIXELS`, or goes over them so often that it would not end.
        ShardError: it cannot be decoded.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS:,}")
        scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 1  # of a JPEG; most have 1 to 10
        if scans * picture.width * picture.height > MAX_SCANNED:
            raise Image.DecompressionBombError(f"{scans:,} scans of {picture.width} x {picture.height} pixels")
        picture.load()
        return _rgb(_upright(picture))
    # decoders raise much more than they say on broken files
    except Exception as error:  # noqa: BLE001
        reason = "this is no picture of a known kind" if isinstance(error, UnidentifiedImageError) else error
        kind = TooLarge if isinstance(error, Image.DecompressionBombError) else ShardError
        raise kind(f"{name}: {reason}") from error


def _upright(picture: Image.Image) -> Image.Image:
    """As EXIF has it. Pillow's exif_transpose writes all of EXIF anew, and fails on pictures that have an odd entry in it."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001  whatever is wrong with it, the picture may be whole
        return picture
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut to the darkest 256 of them
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _scan(path: Path) -> Iterator[tuple[str, str, Member]]:
    """(key, suffix, where) of every file in a shard; by webdataset's convention the key ends at the first dot."""
    try:
        if not path.is_file():  # to open a pipe would wait for somebody to write
            raise OSError("it is not there, or no file")
        with path.open("rb") as file:
            for name, size, is_file in (tar := Tar(file)):
                key, _, suffix = Path(name).name.partition(".")
                yield as_key(key), suffix.lower(), Member(path, tar.offset, size, "" if is_file else NO_FILE)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise ShardError(f"shard {printable(path)} cannot be read ({error}): fetch or write it again") from error


class Tar:
    """A tar archive from the front: (name, bytes, whether it is a file) of every member but directories. What it holds stands
    at ``offset`` then, and may be read, in part or whole.

    The headers are gone through here, since Python's tarfile reads them whatever their size, keeps them all, and with
    some never ends (CVE-2024-6232, CVE-2025-8194). It would also fill up sparse members and unpack what is compressed: some
    bytes of a shard then become gigabytes.

    Args:
        file: at its beginning; it need not be seekable.

    Raises:
        tarfile.TarError, ValueError: in going through it: it is broken, ends too early, is compressed, or has sparse members.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self.offset = file, 0
        self._total = os.fstat(file.fileno()).st_size if file.seekable() else math.inf

    def __iter__(self) -> Iterator[tuple[str, int, bool]]:
        said: dict[str, str] = {}
        while (block := self.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                if self.offset == len(block) and block.startswith(_COMPRESSED):
                    raise tarfile.ReadError("it is compressed") from None
                raise
            extended, size = header.type in _EXTENDED, header.size
            if header.type in _WITHOUT_BYTES:
                size = 0
            elif not extended:
                size = int(said.get("size", size))
            if not 0 <= size <= self._total - self.offset:
                raise tarfile.ReadError("unexpected end of file")
            end = self.offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if extended:
                if size > MAX_HEADER:
                    raise tarfile.ReadError(f"a header of {size:,} bytes")
                found = _said(header.type, self.read(size))
                if any(name.startswith("GNU.sparse.") for name in found):
                    raise tarfile.ReadError("a sparse member")
                said |= {name: found[name] for name in ("path", "size") if name in found}
            else:
                if header.type == tarfile.GNUTYPE_SPARSE:
                    raise tarfile.ReadError("a sparse member")
                if header.type != tarfile.DIRTYPE:
                    yield said.get("path", header.name), size, header.isfile()
                said = {}
            self._go(end)
        # a broken header looks like the end, and so does the end of the first of two archives that were joined
        while chunk := self._file.read(_CHUNK):
            if chunk.strip(b"\0"):
                raise tarfile.ReadError("a broken header, or several archives in one file")

    def read(self, size: int) -> bytes:
        """So many bytes.

        Raises:
            tarfile.ReadError: there are fewer.
        """
        data = self._file.read(size)
        self.offset += len(data)
        if len(data) < size:
            raise tarfile.ReadError("unexpected end of file")
        return data

    def _go(self, offset: int) -> None:
        if self._file.seekable():
            self.offset = self._file.seek(offset)
        while self.offset < offset:
            self.read(min(offset - self.offset, _CHUNK))


def _said(kind: bytes, content: bytes) -> dict[str, str]:
    """What a header says of the member that follows, by the names that PAX has for it."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    if kind not in _PAX:
        return {}
    found, at = {}, 0
    while at < len(content) and content[at]:
        space = content.index(b" ", at)
        end = at + int(content[at:space])
        if not space < end <= len(content):
            raise tarfile.ReadError("a header that makes no sense")
        name, _, value = content[space + 1 : end - 1].decode("utf-8", "surrogateescape").partition("=")
        found[name] = value
        at = end
    return found


def _list(folder: Path) -> Iterator[tuple[str, str, Member]]:
    """(key, suffix, where) of every picture and text in a folder; the key ends at the last dot."""
    if not folder.is_dir():
        what = "is no file" if folder.exists() else "does not exist"
        raise ShardError(f"nothing to read: {printable(folder)} {what}")
    for path in sorted(folder.iterdir()):
        if _is_visible(path, (*IMAGE_SUFFIXES, "txt", "json")):
            member = Member(path, 0, path.stat().st_size) if path.is_file() else Member(path, 0, 0, NO_FILE)
            yield as_key(path.stem), path.suffix.lower()[1:], member


def _is_visible(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.suffix.lower()[1:] in suffixes and not path.name.startswith(".") and not path.is_dir()


def write_shards(samples: Iterable[tuple[str, Image.Image, str, Mapping]], out: Path, per_shard: int = 1000) -> None:
    """Writes (key, picture, caption, facts) as ``00000.tar``, ... with ``.png .txt .json``; same input, same bytes."""
    import webdataset

    out.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=per_shard, mtime=0, verbose=0) as writer:
        for key, picture, caption, facts in samples:
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            writer.write({"__key__": key, "png": buffer.getvalue(), "txt": caption, "json": {"key": key, **facts}})
