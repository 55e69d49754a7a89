"""What was dropped most: one page to look at, made from the audit."""

from __future__ import annotations

import base64
import os
from io import BytesIO
from pathlib import Path

import jinja2
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from memfilter.data.sampler import SampleDataset
from memfilter.data.shards import ShardError

PAGE = "dropped.html"
THUMBNAIL = 192  # pixels


def write_gallery(run_dir: Path, dataset: SampleDataset, count: int) -> list[dict]:
    """Writes ``dropped.html``: the samples that were dropped most often, with their pictures and captions.

    Returns:
        What is on the page: picture (PIL, None if it cannot be read), key, caption, duplicate (None: unknown), checked,
        dropped, mean_norm.
    """
    rows = [row | _sample(dataset, row["key"]) for row in most_dropped(run_dir / "audit.parquet", count)]
    environment = jinja2.Environment(loader=jinja2.PackageLoader("memfilter.train", "."), autoescape=True)
    shown = [row | {"picture": _data_uri(row["picture"])} for row in rows]
    partial = run_dir / f".{PAGE}.partial"
    partial.write_text(environment.get_template("dropped.html.jinja").render(rows=shown, run=run_dir.name))
    os.replace(partial, run_dir / PAGE)
    return rows


def most_dropped(audit: Path, count: int) -> list[dict]:
    """Key, duplicate, checked, dropped and mean_norm of the samples that were dropped most often, at least once."""
    table = pq.read_table(audit, columns=["key", "duplicate", "text_norm", "keep"])
    table = table.append_column("drop", pc.cast(pc.invert(table["keep"]), "int64"))
    table = table.group_by("key").aggregate([("duplicate", "max"), ("drop", "count"), ("drop", "sum"), ("text_norm", "mean")])
    table = table.rename_columns(["key", "duplicate", "checked", "dropped", "mean_norm"])
    table = table.filter(pc.field("dropped") > 0).sort_by([("dropped", "descending"), ("key", "ascending")])
    return table.slice(0, count).to_pylist()


def _sample(dataset: SampleDataset, key: str) -> dict:
    sample = {"caption": "", "picture": None}
    try:
        sample["caption"] = dataset.shards.caption(key)
        sample["picture"] = dataset.shards.image(key)
        sample["picture"].thumbnail((THUMBNAIL, THUMBNAIL))
    except ShardError:
        pass  # the page says that it cannot be read
    return sample


def _data_uri(picture: Image.Image | None) -> str | None:
    if picture is None:
        return None
    buffer = BytesIO()
    picture.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
