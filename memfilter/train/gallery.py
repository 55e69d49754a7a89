"""What was dropped most: one page to look at, made from the audit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import jinja2
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memfilter.data.sampler import SampleDataset
from memfilter.data.shards import ShardError
from memfilter.files import atomic
from memfilter.pictures import data_url
from memfilter.text import printable

PAGE = "dropped.html"
THUMBNAIL = 192  # pixels


def write_gallery(run_dir: Path, dataset: SampleDataset, count: int) -> list[dict]:
    """Writes ``dropped.html``: the samples that were dropped most often, with their pictures and captions.

    Returns:
        What is on the page: picture (PIL, None if it cannot be read), key, caption, duplicate (None: unknown), encounters,
        dropped, mean_norm.
    """
    rows = [row | _sample(dataset, row["key"]) for row in most_dropped(run_dir / "audit.parquet", count)]
    environment = jinja2.Environment(loader=jinja2.PackageLoader("memfilter.train", "."), autoescape=True)
    shown = [row | {"picture": row["picture"] and data_url(row["picture"]), "key": printable(row["key"])}
             for row in rows]  # fmt: skip
    page = environment.get_template("dropped.html.jinja").render(rows=shown, run=run_dir.name)
    with atomic(run_dir / PAGE) as partial:
        partial.write_text(page, encoding="utf-8")
    return rows


def most_dropped(audit: Path, count: int) -> list[dict]:
    """Key, duplicate, encounters, dropped and mean_norm of the samples that were dropped most often, at least once."""
    table = pq.read_table(audit, columns=["key", "duplicate", "text_norm", "keep", "skipped"])
    table = table.filter(pc.fill_null(pc.not_equal(table["skipped"], "excluded"), True))  # what cannot be read is not dropped
    table = table.append_column("drop", pc.cast(pc.invert(table["keep"]), "int64"))
    table = table.group_by("key").aggregate([("duplicate", "max"), ("drop", "count"), ("drop", "sum"), ("text_norm", "mean")])
    table = table.rename_columns(["key", "duplicate", "encounters", "dropped", "mean_norm"])
    table = table.filter(pc.field("dropped") > 0).sort_by([("dropped", "descending"), ("key", "ascending")])
    return table.slice(0, count).to_pylist()


def _sample(dataset: SampleDataset, key: str) -> dict:
    sample = {"caption": "", "picture": None}
    with suppress(ShardError):  # the page says that it cannot be read
        sample["caption"] = dataset.shards.caption(key)
        sample["picture"] = dataset.shards.image(key)
        sample["picture"].thumbnail((THUMBNAIL, THUMBNAIL))
    return sample
