"""The commands ``memfilter prepare laion select`` and ``download``; see docs/laion.md."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def select(
    metadata: str,
    out: str,
    where: str = "",
    samples: int | None = None,
    seed: int = 0,
    captions: str | None = None,
    url_column: str | None = None,
    caption_column: str | None = None,
    max_caption: int = 16_384,
    memory: float = 2.0,
    threads: int | None = None,
) -> None:
    """Choose from LAION-style metadata what to download.

    Args:
        metadata: a Parquet file, a directory of them or a pattern in quotes.
        out: directory to make.
        where: SQL condition on the columns, such as "width >= 512 and punsafe < 0.1".
        samples: rows to draw; all of them by default.
        seed: of the draw.
        captions: only rows with a caption of this list (.jsonl, .json, or text with one a line).
        url_column: where it is none of the usual names.
        caption_column: the same.
        max_caption: bytes; rows with longer ones are left out.
        memory: GB to get along with; the rest goes to disk.
        threads: all cores by default.
    """
    from memfilter.data.laion.select import select

    header = select(
        metadata, Path(out), where, samples, seed, captions and Path(captions), url_column, caption_column, max_caption,
        memory, threads,
    )  # fmt: skip
    for name, count in header["counts"].items():
        print(f"{count:15,} {name}")
    if header["columns left out"]:
        print(f"columns left out for their names: {', '.join(map(repr, header['columns left out']))}")
    print(out)


def download(
    selection: str,
    out: str,
    img2dataset: str | None = None,
    image_size: int = 512,
    resize_mode: Literal["keep_ratio", "center_crop", "keep_ratio_largest", "border", "no"] = "keep_ratio",
    encode_format: Literal["jpg", "png", "webp"] = "jpg",
    encode_quality: int | None = None,
    samples_per_shard: int = 10_000,
    processes: int | None = None,
    threads: int = 64,
    timeout: int = 10,
    retries: int = 1,
    max_seconds: float = 60,
    max_megabytes: float = 64,
    private_addresses: bool = False,
    distributor: Literal["multiprocessing", "ray", "pyspark"] = "multiprocessing",
    options: dict[str, int | float | bool | str] | None = None,
) -> None:
    """Download a selection with img2dataset, as shards to train on; the same command goes on after an interruption.

    Args:
        selection: what `select` made.
        out: directory of the shards.
        img2dataset: its command; by default that of launch/img2dataset.sh, or the one on PATH.
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
    from memfilter.data.laion.download import download

    report = download(
        Path(selection), Path(out), img2dataset, image_size, resize_mode, encode_format, encode_quality,
        samples_per_shard, processes, threads, timeout, retries, max_seconds, max_megabytes, private_addresses,
        distributor, options,
    )  # fmt: skip
    print(f"{report['rows']:15,} selected\n{report['downloaded']:15,} downloaded")
    for name, count in report["lost"].items():
        print(f"{count:15,} lost: {name}")
    print(out)
