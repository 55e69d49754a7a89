"""Which samples a run sees, how often, and which are duplicates. Duplication happens here, not on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from memfilter.data import scenes
from memfilter.data.shards import Shards, write_shards

ROLES = ("distinct", "duplicate")
INDEX = "index.parquet"
PLACE = ["shard", "offset"]  # columns of a manifest: where a picture's bytes stand
HEADER = b"memfilter"  # under which a manifest keeps its JSON header in the metadata of its schema


@dataclass(frozen=True)
class Experiment:
    """Samples in the order of the index; one that repeats n times counts as n virtual samples."""

    keys: Sequence[str]
    duplicate: np.ndarray | None  # bool [N]; None where nothing is known
    repeats: np.ndarray  # int [N]
    contents: str = ""  # a manifest's or a saved dataset's fingerprint of pictures and captions
    groups: Sequence[str] | None = None  # of samples whose contents are near duplicates; None where nothing is known
    before: Experiment | None = None  # de-duplication
    pictures: Sequence[str] | None = None  # key of the first sample with the same bytes; None where all differ, or nothing is known

    @classmethod
    def read(cls, path: str | os.PathLike) -> Experiment:
        """From a Parquet file with the columns key, role (distinct or duplicate; null throughout where nothing is known) and
        repeats, and perhaps group: an index or a manifest.

        Raises:
            ValueError: a column or a value in it is missing, a role is unknown, or a sample repeats less than once.
        """
        columns, schema = ["key", "role", "repeats"], pq.read_schema(path)
        if missing := set(columns) - set(schema.names):
            raise ValueError(f"index {path} lacks the columns {', '.join(sorted(missing))}")
        columns += [name for name in ("group", *PLACE) if name in schema.names]
        table = pq.read_table(path, columns=columns, partitioning=None)
        keys, roles, repeats = table["key"].to_pylist(), np.array(table["role"].to_pylist(), object), table["repeats"].to_numpy()
        if bad := [key for key in keys if not isinstance(key, str)]:
            raise ValueError(f"index {path} has the key {bad[0]!r}: expected text")
        # pandas writes integers as floats where one is missing
        if repeats.dtype.kind not in "iuf" or not np.isfinite(repeats).all() or (repeats % 1).any():
            raise ValueError(f"index {path} has repeats that are no whole numbers, or lacks some")
        repeats = repeats.astype(np.int64)
        known = roles != None  # noqa: E711  elementwise
        if unknown := set(roles) - set(ROLES) - ({None} if not known.any() else set()):
            raise ValueError(f"index {path} has the roles {sorted(map(str, unknown))}: expected {' or '.join(ROLES)}")
        if (repeats < 1).any():
            raise ValueError(f"index {path} has a sample that repeats {repeats.min()} times: leave it out instead")
        try:
            contents = str(json.loads(schema.metadata[HEADER])["data"])
        except (KeyError, TypeError, ValueError, RecursionError):  # no manifest; opening it refuses a broken one
            contents = ""
        groups = pictures = None
        if "group" in columns:
            names = zip(keys, table["group"].to_pylist(), strict=True)
            groups = [f"alone: {key}" if name is None else str(name) for key, name in names]
        duplicate = roles == "duplicate" if known.any() or not len(roles) else None
        if set(PLACE) <= set(columns) and len(table.group_by(PLACE).aggregate([])) < len(table):
            first: dict[tuple, str] = {}
            places = zip(*(table[name].to_pylist() for name in PLACE), strict=True)
            pictures = [first.setdefault(place, key) for place, key in zip(places, keys, strict=True)]
        return cls(keys, duplicate, repeats, contents, groups, pictures=pictures)

    @classmethod
    def of_shards(cls, shards: Shards) -> Experiment:
        """Every sample once; nothing is known of duplicates."""
        keys = shards.keys()
        return cls(keys, None, np.ones(len(keys), int))

    def deduplicated(self) -> Experiment:
        """The first sample of each group of near duplicates, once.

        Raises:
            ValueError: no groups are known.
        """
        if self.groups is None:
            raise ValueError("mitigation.deduplicate needs a column group in the index: make one with `memfilter prepare groups`")
        _, rows = np.unique(np.asarray(self.groups, dtype=object), return_index=True)
        rows.sort()
        names = {"keys": self.keys, "groups": self.groups} | ({} if self.pictures is None else {"pictures": self.pictures})
        chosen: dict = {name: [values[row] for row in rows] for name, values in names.items()} | {"before": self}
        if self.duplicate is not None:
            chosen["duplicate"] = self.duplicate[rows]
        return replace(self, **chosen, repeats=np.ones(len(rows), int))

    @property
    def whole(self) -> Experiment:
        """As it was before de-duplication: what a cache is made of, which then serves with it and without."""
        return self.before or self

    @property
    def distinct_left_out(self) -> float | None:
        """Share of the distinct samples that de-duplication took for copies of others; None where there was none, or roles
        are not known."""
        if self.before is None or self.duplicate is None:
            return None
        return 1 - float((~self.duplicate).sum() / max(1, (~self.before.duplicate).sum()))

    def picture(self, row: int) -> str:
        """A name for the picture of a row, the key of a sample that has it: samples with the same bytes have it in common."""
        return self.keys[row] if self.pictures is None else self.pictures[row]

    def virtual(self) -> np.ndarray:
        """Row of every virtual sample, int [sum of repeats]."""
        return np.repeat(np.arange(len(self.keys)), self.repeats)

    def fingerprint(self) -> str:
        """sha256 of keys and repeats, which decide what is shown when, and of the contents where they are known."""
        digest = hashlib.sha256(self.contents.encode() + np.ascontiguousarray(self.repeats, dtype="<i8").tobytes())
        for key in self.keys:
            digest.update(key.encode() + b"\0")
        return digest.hexdigest()

    def require(self, shards: Shards) -> None:
        """Raises ValueError if a sample of the index is not in the shards."""
        present = set(shards.keys())
        if missing := [key for key in self.keys if key not in present]:
            raise ValueError(f"{len(missing)} samples of the index are not in the shards, such as {missing[0]!r}")


def index_beside(source: str | os.PathLike) -> Path:
    """Where the index of some shards is looked for: a directory of them, or one tar file."""
    source = Path(source)
    return (source if source.is_dir() else source.parent) / INDEX


def scene_of(seed: int, stream: int, index: int) -> scenes.Scene:
    """A scene of the experiment. In both streams every second caption carries a poster number: being specific does
    not tell a duplicate."""
    return scenes.draw(seed, stream, index, specific=index % 2)


def prepare_scenes(
    out: Path,
    seed: int = 0,
    duplicates: int = 20,
    repeats: int = 500,
    distinct: int = 6_000,
    distinct_repeats: int = 1,
    near_copies: int = 1,
) -> Path:
    """Writes clipart scenes as shards and an index; the directory appears when it is complete.

    Args:
        duplicates, repeats: so many scenes, each to be shown so often.
        distinct, distinct_repeats: so many others, each to be shown so often.
        near_copies: above 1, a duplicate comes under so many keys, each a `scenes.near_copy` of it; they share its
            repeats.

    Raises:
        ValueError: repeats is no multiple of near_copies.
    """
    if near_copies < 1 or repeats % near_copies:
        raise ValueError(f"near_copies: {repeats} repeats cannot be shared by {near_copies} keys")
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it or choose another directory")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    plan = [(scenes.DUPLICATES, i, copy) for i in range(duplicates) for copy in range(near_copies)]
    plan += [(scenes.DISTINCT, i, 0) for i in range(distinct)]
    keys = [f"{number:09d}" for number in range(len(plan))]

    def samples():
        for key, (stream, index, copy) in zip(tqdm(keys, desc="scenes"), plan, strict=True):
            scene = scene_of(seed, stream, index)
            if stream == scenes.DUPLICATES and near_copies > 1:
                scene = scenes.near_copy(scene, seed, index * near_copies + copy)
            yield key, scenes.render(scene), scene.caption, scene.facts()

    write_shards(samples(), partial)
    table = {
        "key": keys,
        "role": ["duplicate" if stream == scenes.DUPLICATES else "distinct" for stream, *_ in plan],
        "repeats": [repeats // near_copies if stream == scenes.DUPLICATES else distinct_repeats for stream, *_ in plan],
    }
    pq.write_table(pa.table(table), partial / INDEX)
    partial.rename(out)
    return out
