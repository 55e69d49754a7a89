"""The commands ``memfilter prepare laion select`` and ``download``; see docs/laion.md."""

from __future__ import annotations

from pathlib import Path

from memfilter.data.laion.settings import Download, Selection


def select(metadata: str, out: str, **settings) -> None:
    """Choose from LAION-style metadata what to download.

    Args:
        metadata: a Parquet file, a directory of them or a pattern in quotes.
        out: directory to make.
        **settings: see `Selection`.
    """
    selection = Selection(**settings)
    from memfilter.data.laion.select import select

    header = select(metadata, Path(out), selection)
    for name, count in header["counts"].items():
        print(f"{count:15,} {name}")
    if header["columns left out"]:
        print(f"columns left out for their names: {', '.join(map(repr, header['columns left out']))}")
    print(out)


def download(selection: str, out: str, **settings) -> None:
    """Download a selection with img2dataset, as shards to train on; the same command goes on after an interruption.

    Args:
        selection: what `select` made.
        out: directory of the shards.
        **settings: see `Download`.
    """
    how = Download(**settings)
    from memfilter.data.laion.download import download

    report = download(Path(selection), Path(out), how)
    print(f"{report['rows']:15,} selected\n{report['downloaded']:15,} downloaded")
    for name, count in report["lost"].items():
        print(f"{count:15,} lost: {name}")
    print(out)
