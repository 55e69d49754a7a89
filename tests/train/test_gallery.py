"""The page of what was dropped most: counted right, and harmless whatever captions and keys say."""

import base64
import io
import random
from collections import defaultdict
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, TrainConfig
from memfilter.data.experiment import Experiment
from memfilter.data.sampler import SampleDataset, SampleStream, View
from memfilter.data.shards import Shards
from memfilter.train.gallery import most_dropped, write_gallery
from memfilter.train.loop import train

EVIL = """</bdi><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} & "quoted" 'é'"""
KEY = """a"b'<i>&amp;"""


class Page(HTMLParser):
    """Elements, attributes and the text of every list item."""

    def __init__(self, content: str):
        super().__init__()
        self.elements, self.images, self.items, self.text, self._open = set(), [], [], "", []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        self._open.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "li":
            self.items.append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if "li" in self._open:
            self.items[-1] += data


def write_audit(run_dir, rows):
    """rows: (key, duplicate, text_norm, keep) and perhaps why there was no check"""
    run_dir.mkdir(exist_ok=True)
    columns = [list(column) for column in zip(*((*row, None)[:5] for row in rows), strict=True)]
    table = pa.table({
        "position": pa.array(range(len(rows)), pa.int64()),
        "key": pa.array(columns[0], pa.string()),
        "duplicate": pa.array(columns[1], pa.bool_()),
        "timestep": pa.array([1] * len(rows), pa.int32()),
        "text_norm": pa.array(columns[2], pa.float32()),
        "keep": pa.array(columns[3], pa.bool_()),
        "skipped": pa.array(columns[4], pa.string()),
    })  # fmt: skip
    pq.write_table(table, run_dir / "audit.parquet")
    return run_dir / "audit.parquet"


@pytest.fixture
def dataset(tmp_path):
    """A large picture, one with a dangerous name and caption, and one that is none."""
    folder = tmp_path / "folder"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "large.png")
    Image.new("RGB", (20, 10), (255, 0, 51)).save(folder / f"{KEY}.png")
    (folder / f"{KEY}.txt").write_text(EVIL)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a caption all the same")
    shards = Shards.open(folder)
    experiment = Experiment.of_shards(shards)
    return SampleDataset(shards, experiment, SampleStream(experiment.virtual(), 0), View(16))


def test_counts_are_those_of_a_recount_in_plain_python(tmp_path):
    draw = random.Random(0)
    rows = []
    for _ in range(400):
        key = draw.randrange(12)
        keep = key == 11 or draw.random() < key / 12
        rows.append((f"k{key}", None if key > 8 else key % 2 == 0, draw.uniform(0, 9), keep))
    by_key = defaultdict(list)
    for row in rows:
        by_key[row[0]].append(row)
    expected = []
    for key, seen in by_key.items():
        dropped = sum(not keep for *_, keep in seen)
        expected += [(-dropped, key, seen[0][1], len(seen), sum(norm for _, _, norm, _ in seen) / len(seen))]
    expected = [row for row in sorted(expected, key=lambda row: row[:2]) if row[0] < 0]
    found = most_dropped(write_audit(tmp_path / "run", rows), 100)
    assert len(found) == 11  # what is always kept does not stand on the page
    for row, (dropped, key, duplicate, checked, norm) in zip(found, expected, strict=True):
        assert (row["key"], row["dropped"], row["encounters"], row["duplicate"]) == (key, -dropped, checked, duplicate)
        assert row["mean_norm"] == pytest.approx(norm, rel=1e-5)
    assert most_dropped(tmp_path / "run" / "audit.parquet", 3) == found[:3]


def test_what_was_excluded_was_not_dropped(tmp_path):
    rows = [("a", True, None, False, "excluded")] * 3 + [("a", True, None, False, "flagged"), ("b", True, None, False, "excluded")]
    (found,) = most_dropped(write_audit(tmp_path / "run", rows), 10)
    assert (found["key"], found["encounters"], found["dropped"]) == ("a", 1, 1)


def test_what_captions_and_keys_say_is_shown_and_not_obeyed(tmp_path, dataset):
    run = tmp_path / "<b>run"
    write_audit(run, [(KEY, True, 5.0, False)])
    (row,) = write_gallery(run, dataset, 10)
    assert (row["key"], row["caption"]) == (KEY, EVIL)
    page = Page((run / "dropped.html").read_text())
    assert not page.elements & {"script", "i", "b"}
    (item,) = page.items
    assert EVIL in item and KEY in item and "<b>run" in page.text
    (image,) = page.images
    assert image["alt"] == f"training picture {KEY}"


def test_pictures_lie_in_the_page_itself_no_larger_than_they_are_shown(tmp_path, dataset):
    write_audit(tmp_path / "run", [("large", False, 5.0, False), (KEY, False, 5.0, True), (KEY, False, 5.0, False)])
    write_gallery(tmp_path / "run", dataset, 10)
    images = Page((tmp_path / "run" / "dropped.html").read_text()).images
    sizes = []
    for image in images:
        head, _, data = image["src"].partition(",")
        assert head == "data:image/png;base64"
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
    assert sizes == [(20, 10), (192, 144)]


def test_items_say_how_often_and_which_are_known(tmp_path, dataset):
    rows = [("large", True, 5.0, False), ("large", True, 2.0, True), ("broken", None, 7.0, False)]
    write_audit(tmp_path / "run", [*rows, ("broken", None, 8.0, False)])
    found = write_gallery(tmp_path / "run", dataset, 10)
    unreadable, known = Page((tmp_path / "run" / "dropped.html").read_text()).items
    assert "dropped 1 of 2" in known and "known duplicate" in known and "mean norm 3.5" in known
    assert "(no caption)" in known and "cannot be read" not in known
    assert "dropped 2 of 2" in unreadable and "known duplicate" not in unreadable
    assert "cannot be read" in unreadable and "a caption all the same" in unreadable
    assert [row["picture"] is None for row in found] == [True, False]


def test_sample_whose_file_vanished_meanwhile_stands_there_as_unreadable(tmp_path, dataset):
    write_audit(tmp_path / "run", [(KEY, True, 5.0, False)])
    for file in (tmp_path / "folder").iterdir():
        file.unlink()
    write_gallery(tmp_path / "run", dataset, 10)
    (item,) = Page((tmp_path / "run" / "dropped.html").read_text()).items
    assert "cannot be read" in item and KEY in item


def test_run_that_drops_nothing_says_so(tmp_path, scenes_dir):
    config = Config(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(path=str(scenes_dir)),
        filter=FilterConfig(tau=float("inf")),
        train=TrainConfig(samples=8, batch_size=4),
        log=LogConfig(gallery=5),
    )
    train(config, progress=False)
    page = Page((tmp_path / "run" / "dropped.html").read_text())
    assert "No sample was dropped." in page.text
    assert not page.items and not page.images


def test_no_page_is_written_where_none_is_wanted_or_nothing_was_checked(tmp_path, scenes_dir):
    for name, tau, gallery in (("unwanted", float("inf"), 0), ("unchecked", None, 5)):
        config = Config(
            run_dir=str(tmp_path / name),
            data=DataConfig(path=str(scenes_dir)),
            filter=FilterConfig(tau=tau),
            train=TrainConfig(samples=8, batch_size=8),
            log=LogConfig(gallery=gallery),
        )
        train(config, progress=False)
        assert not (tmp_path / name / "dropped.html").exists()
