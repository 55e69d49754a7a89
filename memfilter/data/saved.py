"""Hugging Face datasets that were saved to disk, read by random access like shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
from PIL import Image

from memfilter.data.shards import MAX_BYTES, MAX_CAPTION, NO_FILE, ShardError, TooLarge, decode
from memfilter.text import printable

CAPTIONS = ("text", "caption", "TEXT", "prompt")


class SavedDataset:
    """The rows of a dataset by key, which is the number of the row; with the same use as `Shards`.

    ``fingerprint`` tells what is in it, which such keys do not: another one when rows, columns or their contents are others.

    Args:
        path: what ``Dataset.save_to_disk`` has written, with a column of pictures and one of captions (text, caption,
            TEXT or prompt; without one they are empty).

    Raises:
        ShardError: it cannot be read, has no column of pictures, or several, or one of captions that are no texts.
    """

    def __init__(self, path: str | os.PathLike):
        from datasets import Dataset, DatasetDict, load_from_disk
        from datasets import Image as ImageFeature

        try:
            for file in Path(path).iterdir():
                if not (file.is_file() or file.is_dir()):  # to open a pipe would wait for somebody to write
                    raise OSError(f"{file.name!r}: {NO_FILE}")
            rows = load_from_disk(str(path))
            self.fingerprint = "" if isinstance(rows, DatasetDict) else _fingerprint(Path(path))
        except Exception as error:  # noqa: BLE001  datasets, pyarrow and the file system each have their own
            raise ShardError(f"{path} cannot be read as a dataset: {' '.join(str(error).split())}") from error
        if isinstance(rows, DatasetDict):
            splits = [printable(split) for split in rows]
            raise ShardError(f"{path} holds the splits {', '.join(splits)}: name one, such as {path}/{splits[0]}")
        assert isinstance(rows, Dataset)
        pictures = [name for name, kind in rows.features.items() if isinstance(kind, ImageFeature)]
        if len(pictures) != 1:
            raise ShardError(f"{path} needs one column of pictures, found {len(pictures)} "
                             f"among {printable(', '.join(rows.column_names))}")  # fmt: skip
        self._picture = pictures[0]
        self._caption = next((name for name in CAPTIONS if name in rows.column_names), None)
        require_texts(path, rows.features, [self._caption] if self._caption else [])
        columns = [self._picture, *([self._caption] if self._caption else [])]
        # as Arrow has them, of which nothing is copied: datasets would decode whatever PIL knows, of any size
        self._rows = rows.cast_column(self._picture, ImageFeature(decode=False)).with_format("arrow", columns)
        self._path = path

    def keys(self) -> list[str]:
        return [f"{row:09d}" for row in range(len(self._rows))]

    def image(self, key: str) -> Image.Image:
        """The picture of a row, RGB.

        Raises:
            TooLarge: it has more than `MAX_PIXELS` or `MAX_BYTES`.
            ShardError: it cannot be read or decoded, or is not in the dataset.
        """
        name, found = self._name(key), self._cell(key, self._picture)
        content = found["bytes"].as_buffer() if found.is_valid else None
        if not content:
            path = found["path"].as_py() if found.is_valid else None
            raise ShardError(f"{name}: the dataset has no bytes of the picture, only where it was ({path!r}): "
                             "save it with embed_external_files")  # fmt: skip
        if content.size > MAX_BYTES:
            raise TooLarge(f"{name}: {content.size:,} bytes are more than {MAX_BYTES:,}")
        return decode(content.to_pybytes(), name)

    def caption(self, key: str) -> str:
        """The caption of a row, of `MAX_CAPTION` bytes at most; empty where it has none.

        Raises:
            ShardError: it cannot be read.
        """
        if self._caption is None:
            return ""
        caption = self._cell(key, self._caption).as_py() or ""
        return caption.encode("utf-8", "replace")[:MAX_CAPTION].decode("utf-8", "ignore").strip()

    def _cell(self, key: str, column: str) -> pa.Scalar:
        row = self._rows[int(key)]
        try:
            row.validate(full=True)  # places of bytes outside of the file, strings that are no UTF-8
        except pa.ArrowException as error:
            raise ShardError(f"{self._name(key)} cannot be read: {printable(error)}") from error
        return row[column][0]

    def _name(self, key: str) -> str:
        return f"row {int(key)} of {self._path}"


def _fingerprint(path: Path) -> str:
    """sha256 of what the library notes of the contents, and of the files: their names and sizes, so that it is the same in
    another place."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    files = [(file["filename"], (path / file["filename"]).stat().st_size) for file in state["_data_files"]]
    # the library tells a dataset that a generator made by the generator's code, whatever came of it: hence the sizes
    return hashlib.sha256(json.dumps([state["_fingerprint"], files]).encode()).hexdigest()


def require_texts(path: object, features: Mapping, columns: Iterable[str]) -> None:
    """Raises ShardError if a column of captions has anything else, such as a list of them for each picture.

    Args:
        features: datasets' types of the columns.
    """
    for name in columns:
        kind = getattr(features[name], "dtype", "")
        if kind not in ("string", "large_string", "null"):
            raise ShardError(f"{path} has no texts in the column {name} but {features[name]}: write one caption a row")


def is_saved_dataset(path: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` has written this directory."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
