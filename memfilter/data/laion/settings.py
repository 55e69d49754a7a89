"""What may be asked of ``memfilter prepare laion select`` and ``download``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Selection:
    """Which rows of the metadata.

    Args:
        where: SQL condition on the columns, such as "width >= 512 and punsafe < 0.1"; rows for which it is unknown (NULL,
            NaN) are left out.
        samples: rows to draw; all of them by default.
        seed: of the draw.
        captions: only rows with a caption of this list, in upper or lower case (.jsonl, .json, or text with one a line).
        url_column: where it is none of the usual names.
        caption_column: the same.
        max_caption: bytes; rows with longer ones are left out.
        memory: GB to get along with, of the process as a whole; the rest goes to disk.
        threads: all cores by default.
    """

    where: str = ""
    samples: int | None = None
    seed: int = 0
    captions: str | None = None
    url_column: str | None = None
    caption_column: str | None = None
    max_caption: int = 16_384
    memory: float = 2.0
    threads: int | None = None


@dataclass(frozen=True)
class Download:
    """How pictures are fetched and stored.

    Args:
        img2dataset: its command; by default the variable MEMFILTER_IMG2DATASET, that of launch/img2dataset.sh, or the one
            on PATH.
        image_size: pixels of the shorter side; smaller pictures stay as they are.
        resize_mode: as img2dataset has it.
        encode_format: of the pictures in the shards.
        encode_quality: 95 by default, for png the compression 6.
        samples_per_shard: rows, whether they can be had or not.
        processes: one for each core by default.
        threads: of each process.
        timeout: seconds for a connection, and for each read.
        retries: for each picture.
        max_seconds: for a whole picture.
        max_megabytes: of a whole picture.
        private_addresses: ask servers on this machine and in its network too.
        distributor: ray and pyspark go beyond one machine and must be in img2dataset's environment.
        options: more of img2dataset's options, under its names.
    """

    img2dataset: str | None = None
    image_size: int = 512
    resize_mode: Literal["keep_ratio", "center_crop", "keep_ratio_largest", "border", "no"] = "keep_ratio"
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int | None = None
    samples_per_shard: int = 10_000
    processes: int | None = None
    threads: int = 64
    timeout: int = 10
    retries: int = 1
    max_seconds: float = 60
    max_megabytes: float = 64
    private_addresses: bool = False
    distributor: Literal["multiprocessing", "ray", "pyspark"] = "multiprocessing"
    options: dict[str, int | float | bool | str] | None = None
