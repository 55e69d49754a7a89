"""The manifest of an experiment: which pictures, where their bytes are, what they hash to, how often each is shown."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from memfilter.data.experiment import HEADER, ROLES
from memfilter.data.shards import MAX_BYTES, MAX_CAPTION, ShardError, decode, read_bytes
from memfilter.files import atomic
from memfilter.text import printable

MANIFEST = "manifest.parquet"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # unique: the sample's name in audits
        ("shard", pa.string()),  # path relative to the data directory, with "/"
        ("offset", pa.int64()),  # of the picture's first byte in the shard
        ("size", pa.int64()),  # bytes
        ("sha256", pa.binary(32)),  # of those bytes
        ("caption", pa.string()),
        ("repeats", pa.int32()),  # so often it is shown in an epoch
        ("role", pa.string()),  # distinct or duplicate
    ]
)


def write_manifest(path: Path, table: pa.Table, header: dict) -> None:
    """Writes a table of `SCHEMA` with a JSON header; same input, same bytes.

    Args:
        header: what the experiment was made from: seed, versions, conditions, counts. The fingerprint of the rows is
            added as ``data``.

    Raises:
        ShardError: rows that `ManifestShards` would refuse.
    """
    _require_sense(path, table)
    text = json.dumps(header | {"data": fingerprint(table)})
    with atomic(path) as partial:
        pq.write_table(table.replace_schema_metadata({HEADER: text.encode()}), partial, compression="zstd")


def read_manifest(path: str | os.PathLike) -> tuple[pa.Table, dict]:
    """Rows and header.

    Raises:
        ShardError: the file is no manifest, or its rows make no sense.
    """
    try:
        table = pq.read_table(path, partitioning=None)
        header = json.loads((table.schema.metadata or {})[HEADER])
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        table = table.select(SCHEMA.names).cast(SCHEMA).combine_chunks()
        table.validate(full=True)  # strings that are no UTF-8, for one
    except (OSError, KeyError, ValueError, RecursionError, pa.ArrowException) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ShardError(f"manifest {path} cannot be read ({reason}): make it again") from error
    _require_sense(path, table)
    return table, header


def is_manifest(path: str | os.PathLike) -> bool:
    """Whether a file says where pictures stand; an index of keys, roles and repeats does not."""
    try:
        return "offset" in pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return False


def fingerprint(table: pa.Table) -> str:
    """sha256 of what is shown: keys, pictures, captions, repeats and roles, wherever the bytes stand."""
    digest = hashlib.sha256()
    columns = [table[name].to_pylist() for name in ("key", "caption", "repeats", "role", "sha256")]
    for *facts, sha256 in zip(*columns, strict=True):
        digest.update(json.dumps(facts).encode() + sha256)
    return digest.hexdigest()


class ManifestShards:
    """The samples of a manifest by key, as `Shards` gives them. Opening it looks at no shard but for its size.

    Args:
        manifest: the Parquet file.
        data: the directory that its shards' names are relative to.

    Raises:
        ShardError: the manifest makes no sense, or shards are missing or too short for it.
    """

    def __init__(self, manifest: str | os.PathLike, data: str | os.PathLike):
        table, self.header = read_manifest(manifest)
        names = table["shard"].combine_chunks().dictionary_encode()
        self._shards = [Path(data, name) for name in names.dictionary.to_pylist()]
        self._shard = names.indices.to_numpy()
        self._offset, self._size = table["offset"].to_numpy(), table["size"].to_numpy()
        self._captions = table["caption"]
        self._rows = dict(zip(table["key"].to_pylist(), range(len(table)), strict=True))
        _require_shards(manifest, table, Path(data))

    def keys(self) -> list[str]:
        """Keys of the samples, in order."""
        return sorted(self._rows)

    def image(self, key: str) -> Image.Image:
        """The picture of a sample, RGB.

        Raises:
            ShardError: it cannot be read or decoded, or has too many pixels.
        """
        row = self._rows[key]
        shard = self._shards[self._shard[row]]
        try:
            content = read_bytes(shard, int(self._offset[row]), int(self._size[row]))
        except OSError as error:
            raise ShardError(f"shard {printable(shard)} cannot be read ({error}): fetch or write it again") from error
        return decode(content, f"sample {key!r} in {printable(shard)}")

    def caption(self, key: str) -> str:
        """The caption of a sample; what follows `MAX_CAPTION` characters is left out."""
        return self._captions[self._rows[key]].as_py()[:MAX_CAPTION]

    def facts(self, key: str) -> dict:
        """Nothing: a manifest does not say where the metadata stand."""
        return {}


def require_unchanged(manifest: str | os.PathLike, data: str | os.PathLike, shown: int = 20) -> int:
    """Reads every picture of a manifest again; returns how many samples it has.

    Raises:
        ShardError: the manifest makes no sense; or pictures or rows are not as they were, with a line for each of the
            first ``shown``.
    """
    table, header = read_manifest(manifest)
    if found := list(_differences(table, header, Path(data))):
        all_shown = "" if len(found) <= shown else f", of which the first {shown} are shown"
        raise ShardError("\n".join([*found[:shown], f"{len(found):,} differences from {manifest}{all_shown}"]))
    return len(table)


def _differences(table: pa.Table, header: dict, data: Path) -> Iterator[str]:
    if header.get("data") != fingerprint(table):
        yield "the rows are not those that the header was written for"
    table = table.sort_by([("shard", "ascending"), ("offset", "ascending")])
    columns = [table[name].to_pylist() for name in ("key", "shard", "offset", "size", "sha256")]
    last, found = None, None
    rows = tqdm(zip(*columns, strict=True), total=len(table), desc="verify", unit="sample")
    for key, shard, offset, size, sha256 in rows:
        if (shard, offset, size) != last:  # else the same picture with another caption
            last, found = (shard, offset, size), _sha256(Path(data, shard), offset, size)
        if found != sha256:
            what = found if isinstance(found, str) else f"sha256 is {found.hex()}, expected {sha256.hex()}"
            yield f"sample {key!r} in {printable(shard)}: {what}"


def _sha256(path: Path, offset: int, size: int) -> bytes | str:
    """Of a part of a file; or why it cannot be told."""
    try:
        content = read_bytes(path, offset, size)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return hashlib.sha256(content).digest() if len(content) == size else "ends before the picture does"


def _require_sense(path: str | os.PathLike, table: pa.Table) -> None:
    """Raises ShardError with one line for everything that no manifest may hold."""
    errors = []

    def refuse(wrong: pa.Array | pa.ChunkedArray, what: str) -> None:
        if count := pc.sum(wrong).as_py():
            at = pc.index(wrong, True).as_py()
            errors.append(f"manifest {path}: {count} rows {what}, the first is {str(table['key'][at].as_py())[:100]!r}")

    if not table.schema.equals(SCHEMA, check_metadata=False):
        raise ShardError(f"manifest {path} has columns other than {', '.join(SCHEMA.names)}: make it again")
    if empty := [name for name in SCHEMA.names if table[name].null_count]:
        raise ShardError(f"manifest {path} has rows without {', '.join(empty)}: make it again")
    offset, size, repeats = table["offset"], table["size"], table["repeats"]
    refuse(pc.less(repeats, 1), "repeat less than once")
    refuse(pc.invert(pc.is_in(table["role"], pa.array(ROLES))), f"have a role other than {' or '.join(ROLES)}")
    refuse(pc.or_(pc.less(size, 1), pc.greater(size, MAX_BYTES)), f"have a size outside 1 to {MAX_BYTES:,} bytes")
    refuse(pc.or_(pc.less(offset, 0), pc.greater(offset, 2**62)), "have an offset that no file has")
    outside = [name for name in pc.unique(table["shard"]).to_pylist() if not _is_inside(name)]
    refuse(pc.is_in(table["shard"], pa.array(outside, pa.string())), "have a shard outside the data directory")
    keys = pc.value_counts(table["key"])
    again = pc.filter(keys.field("values"), pc.greater(keys.field("counts"), 1))
    refuse(pc.is_in(table["key"], again), "share a key with another")
    if errors:
        raise ShardError("\n".join(errors))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and bool(path.parts) and ".." not in path.parts and "\0" not in name


def _require_shards(manifest: str | os.PathLike, table: pa.Table, data: Path) -> None:
    """Raises ShardError if shards are missing or end before their last sample."""
    places = table.append_column("end", pc.add(table["offset"], table["size"]))
    ends = places.group_by("shard").aggregate([("end", "max")])
    bad = []
    for name, end in zip(ends["shard"].to_pylist(), ends["end_max"].to_pylist(), strict=True):
        try:
            if os.stat(data / name).st_size < end:
                bad.append(f"{printable(name)} (too short)")
        except OSError as error:
            bad.append(f"{printable(name)} ({error.strerror})")
    if bad:
        raise ShardError(f"{len(bad)} shards of manifest {manifest} are not as it says in {data}, such as "
                         f"{', '.join(bad[:3])}: name the directory they are in, or fetch them again")  # fmt: skip
