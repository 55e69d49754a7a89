"""Hugging Face datasets that were saved to disk, read by random access like shards."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from memfilter.data.shards import MAX_CAPTION, ShardError, decode

CAPTIONS = ("text", "caption", "TEXT", "prompt")


class SavedDataset:
    """The rows of a dataset by key, which is the number of the row; with the same use as `Shards`.

    Args:
        path: what ``Dataset.save_to_disk`` has written, with a column of pictures and one of captions (text, caption,
            TEXT or prompt; without one they are empty).

    Raises:
        ShardError: it cannot be read, or has no column of pictures, or several.
    """

    def __init__(self, path: str | os.PathLike):
        from datasets import Dataset, DatasetDict, load_from_disk
        from datasets import Image as ImageFeature

        try:
            rows = load_from_disk(str(path))
        except Exception as error:  # noqa: BLE001  datasets, pyarrow and the file system each have their own
            raise ShardError(f"{path} cannot be read as a dataset: {' '.join(str(error).split())}") from error
        if isinstance(rows, DatasetDict):
            raise ShardError(f"{path} holds the splits {', '.join(rows)}: name one, such as {path}/{next(iter(rows))}")
        assert isinstance(rows, Dataset)
        pictures = [name for name, kind in rows.features.items() if isinstance(kind, ImageFeature)]
        if len(pictures) != 1:
            raise ShardError(f"{path} needs one column of pictures, found {len(pictures)} "
                             f"among {', '.join(rows.column_names)}")  # fmt: skip
        self._picture = pictures[0]
        self._caption = next((name for name in CAPTIONS if name in rows.column_names), None)
        # datasets would decode whatever PIL knows, of any size
        self._rows = rows.cast_column(self._picture, ImageFeature(decode=False))
        self._path = path

    def keys(self) -> list[str]:
        return [f"{row:09d}" for row in range(len(self._rows))]

    def image(self, key: str) -> Image.Image:
        """The picture of a row, RGB.

        Raises:
            ShardError: it cannot be decoded, is too large, or is not in the dataset.
        """
        name = f"row {int(key)} of {self._path}"
        found = self._rows[int(key)][self._picture] or {}
        if not found.get("bytes"):
            raise ShardError(f"{name}: the dataset has no bytes of the picture, only where it was ({found.get('path')}): "
                             "save it with embed_external_files")  # fmt: skip
        return decode(found["bytes"], name)

    def caption(self, key: str) -> str:
        """The caption of a row, of `MAX_CAPTION` bytes at most; empty where it has none."""
        if self._caption is None:
            return ""
        caption = self._rows[int(key)][self._caption] or ""
        return str(caption).encode("utf-8", "replace")[:MAX_CAPTION].decode("utf-8", "ignore").strip()


def is_saved_dataset(path: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` has written this directory."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
