"""Streams from real tar files, a real web server and datasets that the library itself has written."""

import copy
import io
import json
import os
import shutil
import tarfile
import threading
import tracemalloc
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import launching
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pictures
from torch.utils.data import DataLoader

from memfilter.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    FilterConfig,
    LogConfig,
    TrainConfig,
    check,
)
from memfilter.data.experiment import Experiment
from memfilter.data.sampler import (
    SampleDataset,
    SampleStream,
    View,
    collate,
    crop_place,
    flipped,
    timestep,
    to_pixels,
)
from memfilter.data.shards import MAX_CAPTION, ShardError, Shards
from memfilter.data.streaming import StreamingDataset
from memfilter.data.streaming import rows as rows_module
from memfilter.data.streaming import tars as streams
from memfilter.data.streaming.rows import RowStream
from memfilter.data.streaming.tars import TarStream
from memfilter.train import loop
from memfilter.train.checkpoint import CheckpointError
from memfilter.train.interruption import Interrupted, Interruption

COUNT, FILES = 24, 4
KEYS = [f"{number:04d}" for number in range(COUNT)]
CAPTIONS = {f"picture {number}" for number in range(COUNT)}


def picture(number: int, size=(20, 16)) -> Pictures.Image:
    made = Pictures.linear_gradient("L").resize(size)
    return Pictures.merge("RGB", (made, made.transpose(Pictures.Transpose.ROTATE_180), Pictures.new("L", size, number)))


def png(number: int) -> bytes:
    picture(number).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def write_tar(path, files: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def files_of(number: int) -> dict[str, bytes]:
    return {f"{KEYS[number]}.png": png(number), f"{KEYS[number]}.txt": f"picture {number}\n".encode()}


def rows(numbers) -> Dataset:
    numbers = list(numbers)
    features = Features({"image": Image(), "text": Value("string"), "other": Value("int64")})
    columns = {
        "image": [{"bytes": png(n), "path": None} for n in numbers],
        "text": [f"picture {n}" for n in numbers],
        "other": numbers,
    }
    return Dataset.from_dict(columns, features=features)


def parquet(out, files=FILES):
    out.mkdir()
    for file in range(files):
        rows(range(file, COUNT, files)).to_parquet(out / f"{file}.parquet")
    return out


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    out = tmp_path_factory.mktemp("tars")
    for shard in range(FILES):
        numbers = range(shard * COUNT // FILES, (shard + 1) * COUNT // FILES)
        write_tar(out / f"{shard:05d}.tar", {name: c for n in numbers for name, c in files_of(n).items()})
    return out


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tars):
    """kind -> (class, path)"""
    out = tmp_path_factory.mktemp("sources")
    rows(range(COUNT)).save_to_disk(out / "saved")
    DatasetDict({"train": rows(range(COUNT)), "test": rows(range(2))}).save_to_disk(out / "splits")
    (out / "folder" / "sub").mkdir(parents=True)
    for number in range(COUNT):
        picture(number).save(out / "folder" / "sub" / f"{KEYS[number]}.png")
    facts = [{"file_name": f"sub/{KEYS[n]}.png", "text": f"picture {n}"} for n in range(COUNT)]
    (out / "folder" / "metadata.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return {
        "tars": (TarStream, str(tars)),
        "pattern": (TarStream, f"{tars}/{{00000..0000{FILES - 1}}}.tar"),
        "parquet": (RowStream, str(parquet(out / "parquet"))),
        "three": (RowStream, str(parquet(out / "three", 3))),
        "saved": (RowStream, str(out / "saved")),
        "splits": (RowStream, str(out / "splits")),
        "folder": (RowStream, str(out / "folder")),
    }


@pytest.fixture
def stream(sources, monkeypatch):
    """stream(kind, samples, ...) gives the batches of all ranks, one after another."""

    def make(kind, samples=2 * COUNT, processes=1, workers=0, size=3, seed=0, first=0, view=View(16), buffer=10):
        ranks = []
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            source, path = sources.get(kind) or (TarStream, str(kind))
            opened = source(path, buffer, processes, workers)
            train = TrainConfig(samples=samples, batch_size=size, seed=seed)
            dataset = StreamingDataset(opened, view, train, rank, processes, first)
            ranks.append(list(DataLoader(dataset, batch_size=size, collate_fn=collate, num_workers=workers)))
        return ranks

    return make


def flat(ranks, name) -> list:
    """By position."""
    batches = [batch for batches in ranks for batch in batches]
    found = {p: value for batch in batches for p, value in zip(batch["position"], batch[name], strict=True)}
    return [found[position] for position in sorted(found)]


@pytest.mark.parametrize(
    ("kind", "processes", "workers"),
    [
        *(("tars", p, w) for p in (1, 2) for w in (0, 2)), ("pattern", 1, 0), ("parquet", 1, 2), ("parquet", 2, 0),
        ("parquet", 2, 2), ("saved", 2, 2), ("saved", 1, 0), ("splits", 1, 0), ("folder", 1, 0), ("folder", 2, 0),
        ("three", 2, 0),
    ],
)  # fmt: skip
def test_every_pass_has_every_sample_once_at_the_positions_of_its_rank(stream, kind, processes, workers):
    ranks = stream(kind, processes=processes, workers=workers)
    for rank, batches in enumerate(ranks):
        expected = [list(range(s, s + 3)) for s in range(3 * rank, 2 * COUNT, 3 * processes)]
        assert [batch["position"] for batch in batches] == expected
    captions, again = flat(ranks, "caption"), flat(ranks, "repeats")
    assert not any(flat(ranks, "bad"))
    assert set(captions[:COUNT]) == set(captions[COUNT:]) == CAPTIONS
    assert captions[:COUNT] != captions[COUNT:]
    assert again == [False] * COUNT + [True] * COUNT
    assert len(set(flat(ranks, "key"))) == len({view[0] for view in flat(ranks, "view")}) == COUNT
    if processes * workers == 1:
        assert captions[:COUNT] != sorted(CAPTIONS)


def test_order_depends_on_the_seed_and_on_where_it_begins(stream):
    for kind in ("tars", "parquet"):
        first, same, other = (flat(stream(kind, workers=2, seed=seed), "key") for seed in (1, 1, 2))
        later = flat(stream(kind, workers=2, seed=1, samples=3 * COUNT, first=COUNT), "key")
        assert first == same != other
        assert first != later and set(first) == set(later)


def test_samples_are_those_of_random_access(stream, tars, sources):
    view, shards = View(16, random_crop=True, random_flip=True), Shards.open(tars)
    experiment = Experiment.of_shards(shards)
    known = SampleDataset(shards, experiment, SampleStream(experiment.virtual(), 3), view)[0]
    for kind in sources:
        for sample in (stream(kind, seed=3, view=view))[0]:
            assert sample.keys() == known.keys()
            for row, position in enumerate(sample["position"]):
                key = KEYS[int(sample["caption"][row].split()[1])]
                place, flip = crop_place(3, position), flipped(3, position)
                pixels, corner = to_pixels(shards.image(key), 16, place, flip)
                assert torch.equal(sample["pixels"][row], pixels)
                assert (sample["original_size"][row], sample["crop_top_left"][row]) == ((16, 20), corner)
                assert sample["duplicate"][row] is None and sample["view"][row][1:] == (place, flip)
                if sources[kind][0] is TarStream:
                    assert sample["key"][row] == key
    assert len({corner for batch in stream("tars", view=view)[0] for corner in batch["crop_top_left"]}) > 1


def test_keys_of_rows_are_places_in_the_folder_or_digests_of_the_pictures(stream):
    assert set(flat(stream("folder"), "key")) == {f"sub/{key}.png" for key in KEYS}
    assert set(flat(stream("parquet"), "key")) == set(flat(stream("saved"), "key"))


def test_what_is_remembered_is_not_decoded(sources):
    source, path = sources["tars"]
    dataset = StreamingDataset(source(path, 5), View(16), TrainConfig(samples=COUNT, batch_size=4))
    dataset.remembered = {next(iter(dataset))["view"]}
    assert [sample["pixels"] is None for sample in dataset] == [True] + [False] * (COUNT - 1)


# what cannot be read


def test_unreadable_samples_are_named_and_captions_cut(stream, tmp_path):
    whole = png(1)
    files = {
        "cut.png": whole[: len(whole) // 2], "cut.txt": b"x",
        "long.png": png(2), "long.txt": b"a" * 2**20,
        "bare.png": png(3),
        "json.jpg": png(4), "json.json": json.dumps({"caption": " said \n", "width": 3}).encode(),
        "both.png": png(5), "both.txt": b"text", "both.json": b"{}",
        "list.png": png(6), "list.json": b"[1]",
        "none.png": png(7), "none.json": b'{"text": null}',
        "bad.png": png(8), "bad.json": b"{",
        "several.png": png(10), "several.json": b'{"caption": ["a", "b"]}',
        "d/deep.png": png(9),
        "odd\n.PNG": png(9),
        "alone.txt": b"no picture", "film.mp4": bytes(10), "._long.png": b"of macOS",
    }  # fmt: skip
    write_tar(tmp_path / "0.tar", files)
    ranks = stream(tmp_path, samples=11, size=1, view=View(8))
    captions = dict(zip(flat(ranks, "key"), flat(ranks, "caption"), strict=True))
    assert captions == {"cut": "", "long": "a" * MAX_CAPTION, "bare": "", "json": "said", "both": "text", "list": "",
                        "none": "", "bad": "", "several": "", "d/deep": "", "odd\n": ""}  # fmt: skip
    reasons = {key: reason for key, reason in zip(flat(ranks, "key"), flat(ranks, "bad"), strict=True) if reason}
    assert reasons.keys() == {"cut", "bad", "several"} and "no text" in reasons["several"]
    assert all(f"sample {key!r} in {tmp_path / '0.tar'}" in reason for key, reason in reasons.items())
    for batch in ranks[0]:
        for row, key in enumerate(batch["key"]):
            assert (batch["pixels"][row].any() == 0) == (key in reasons)
            assert (batch["view"][row] == ("bad", batch["position"][row])) == (key in reasons)


def test_files_that_are_too_large_cost_the_samples_that_need_them(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_BYTES", 5_000)
    monkeypatch.setattr(streams, "MAX_FACTS", 1_000)
    long = json.dumps({"text": "x" * 1_000}).encode()
    files = {
        "a.png": png(0) + bytes(5_000), "a.txt": b"a",
        "b.png": png(1), "b.json": long,
        "c.png": png(2), "c.json": long, "c.txt": b"c" * 2**20,
        "__meta__/m.png": png(3),
        "d.jpg": png(3), "d.txt": b"d",
    }  # fmt: skip
    write_tar(tmp_path / "0.tar", files)
    ranks = stream(tmp_path, samples=4, size=1)
    found = dict(zip(flat(ranks, "key"), zip(flat(ranks, "caption"), flat(ranks, "bad"), strict=True), strict=True))
    assert found["c"] == ("c" * MAX_CAPTION, None) and found["d"] == ("d", None) and found.keys() == set("abcd")
    assert f"'a.png': {len(png(0)) + 5_000:,} bytes are more than 5,000" in found["a"][1]
    assert f"'b.json': {len(long):,} bytes are more than 1,000" in found["b"][1]


def broken(tmp_path, how):
    """Two whole shards around one of three samples, broken in the second; keys are the same in all."""
    for shard, numbers in enumerate([(0, 1), (2, 3, 4), (5, 6)]):
        named = {f"{i}.{suffix}": c for i, n in enumerate(numbers)
                 for suffix, c in (("png", png(n)), ("txt", f"picture {n}".encode()))}  # fmt: skip
        path = write_tar(tmp_path / f"{shard}.tar", named)
    path = tmp_path / "1.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        place = tar.getmember("1.png" if how == "member" else "1.txt")
    if how == "missing":
        path.unlink()
    elif how == "garbage":
        header = slice(place.offset, place.offset + 512)
        path.write_bytes(data[: header.start] + b"\xaa" * 512 + data[header.stop :] + bytes(10_240) + b"x")
    else:
        at = {"empty": 0, "between": place.offset, "header": place.offset + 100, "member": place.offset_data + 30}
        path.write_bytes(data[: at[how]])
    return path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["member", "header", "between", "empty", "garbage"])
def test_broken_shard_costs_what_is_behind_the_break_and_is_named_once_a_pass(stream, tmp_path, how, workers):
    path = broken(tmp_path, how)
    # where a file is cut, the sample before it is left out too: who knows whether it was whole
    intact = {0, 1, 5, 6} | (set() if how in ("member", "empty") else {2})
    ranks = stream(tmp_path, samples=60, size=1, workers=workers)
    found = [(key, bad) for key, bad in zip(flat(ranks, "key"), flat(ranks, "bad"), strict=True) if bad]
    assert {key for key, _ in found} == {str(path)}
    assert all(reason.startswith(f"shard {path} cannot be read (") for _, reason in found)
    captions = {c for c, bad in zip(flat(ranks, "caption"), flat(ranks, "bad"), strict=True) if not bad}
    assert captions == {f"picture {n}" for n in intact}
    if not workers:
        assert len(found) == pytest.approx(60 / (len(intact) + 1), abs=1)


def test_file_that_stands_twice_is_told_and_the_first_counts(stream, tmp_path):
    write_tar(tmp_path / "0.tar", files_of(0) | files_of(1))
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        tar.addfile(tar.getmember(f"{KEYS[1]}.txt"), io.BytesIO(b"another\n" + bytes(3)))
    ranks = stream(tmp_path, samples=3)
    assert sorted(flat(ranks, "caption")) == ["", "picture 0", "picture 1"]
    assert [bad for bad in flat(ranks, "bad") if bad and "twice" in bad and KEYS[1] in bad]


def test_reader_whose_shards_are_empty_is_counted_and_does_not_turn_for_ever(stream, tmp_path):
    write_tar(tmp_path / "0.tar", files_of(0))
    write_tar(tmp_path / "1.tar", {})
    ranks = stream(tmp_path, samples=4, size=1, workers=2)
    assert flat(ranks, "caption") == ["picture 0", "", "picture 0", ""]
    assert all("no sample" in bad for bad in flat(ranks, "bad")[1::2])


def test_source_without_samples_is_refused(tmp_path, sources):
    write_tar(tmp_path / "none" / "0.tar", {"a.txt": b"text"})
    with pytest.raises(ShardError, match="no picture"):
        TarStream(str(tmp_path / "none"), 5)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(ShardError, match="0.tar cannot be read"):
        TarStream(str(tmp_path / "broken"), 5)
    with pytest.raises(ShardError, match="no \\*.tar in"):
        TarStream(sources["folder"][1], 5)
    tars = sources["tars"][1]
    with pytest.raises(ShardError, match="00004.tar does not exist, of 2 shards"):
        TarStream(f"{tars}/{{00000..00005}}.tar", 5)
    for path in ("gs://bucket/0.tar", "pipe:cat x://", "shards/{0..1.tar"):
        with pytest.raises((ConfigError, ShardError), match="no address|does not exist|no pattern"):
            TarStream(path, 5)
    schema = Features({"image": Image()}).arrow_schema
    pq.write_table(pa.Table.from_pylist([], schema=schema), tmp_path / "empty.parquet")
    with pytest.raises(ShardError, match="has no rows"):
        RowStream(str(tmp_path / "empty.parquet"), 5)
    rows([]).save_to_disk(tmp_path / "nothing")
    with pytest.raises(ShardError, match="cannot be read|has no rows"):
        RowStream(str(tmp_path / "nothing"), 5)
    with pytest.raises(ShardError, match="cannot be read as a dataset"):
        RowStream(str(tmp_path / "nowhere"), 5)
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(ShardError, match="one column of pictures, found 0 among text"):
        RowStream(str(tmp_path / "text.parquet"), 5)
    DatasetDict({"a": rows([1]), "b": rows([2])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ShardError, match="the splits a, b"):
        RowStream(str(tmp_path / "splits"), 5)


def test_too_few_shards_for_the_readers_are_refused(sources):
    for kind, processes, workers, way in [
        ("tars", 5, 0, "start fewer"), ("tars", 1, 5, "workers to 4"), ("tars", 2, 3, "workers to 2"),
        ("parquet", 2, 3, "workers to 2"), ("three", 2, 4, "workers to 3"), ("folder", 1, 2, "workers to 1"),
    ]:  # fmt: skip
        source, path = sources[kind]
        with pytest.raises(ConfigError, match=way):
            source(path, 5, processes, workers)
    RowStream(sources["three"][1], 5, 2, 3)


def test_rows_that_cannot_be_read_are_named_and_files_elsewhere_not_opened(stream, sources, tmp_path):
    out = tmp_path / "rows"
    out.mkdir()
    (tmp_path / "outside.png").write_bytes(png(0))
    (out / "inside.bin").write_bytes(png(1))
    pictures = [
        {"bytes": None, "path": str(tmp_path / "outside.png")},
        {"bytes": None, "path": f"{out}/../outside.png"},
        {"bytes": None, "path": "hf://datasets/another/dataset/x.png"},
        {"bytes": None, "path": f"{out}/missing.png"},
        {"bytes": b"no picture", "path": None},
        None,
        {"bytes": None, "path": f"{out}/inside.bin"},
        {"bytes": png(2), "path": f"{out}/../outside.png"},
    ]
    captions = ["", "", "", "", "", "", "é" * 2**20, None]
    schema = Features({"image": Image(), "caption": Value("string")}).arrow_schema
    table = [{"image": picture, "caption": caption} for picture, caption in zip(pictures, captions, strict=True)]
    pq.write_table(pa.Table.from_pylist(table, schema=schema), out / "0.parquet")
    sources["rows"] = RowStream, str(out)
    ranks = stream("rows", samples=8, size=1)
    reasons = sorted(bad for bad in flat(ranks, "bad") if bad)
    assert len(reasons) == 6 and sum("only one from elsewhere" in reason for reason in reasons) == 4
    assert any(f"{out}/missing.png cannot be read" in reason for reason in reasons)
    assert any("no picture of a known kind" in reason for reason in reasons)
    found = zip(flat(ranks, "key"), flat(ranks, "caption"), flat(ranks, "bad"), strict=True)
    good = {key: caption for key, caption, bad in found if not bad}
    assert sorted(good.values()) == ["", "é" * (MAX_CAPTION // 2)] and good["inside.bin"]
    # rows of that file alone have nothing beside them
    sources["file"] = RowStream, str(out / "*.parquet")
    assert sum(bad is None for bad in flat(stream("file", samples=8, size=1), "bad")) == 1


def read_rows(stream, sources, out, pictures: list[dict]) -> dict[str, str | None]:
    """key -> why it could not be read, of rows in a file in ``out``."""
    table = pa.Table.from_pylist([{"image": p} for p in pictures], schema=Features({"image": Image()}).arrow_schema)
    pq.write_table(table, out / "0.parquet")
    sources["rows"] = RowStream, str(out)
    ranks = stream("rows", samples=len(pictures), size=1)
    return dict(zip(flat(ranks, "key"), flat(ranks, "bad"), strict=True))


def test_chains_of_addresses_lead_into_zip_files_of_the_source_and_nowhere_else(stream, sources, tmp_path):
    (out := tmp_path / "rows").mkdir()
    (outside := tmp_path / "outside.png").write_bytes(png(0))
    for place in (out / "inside.bin", tmp_path / "outside.zip"):
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("a/b.png", png(1))
    wrong = [
        *(f"{first}::{last}" for last in (f"{out}/inside.bin", f"hf://datasets/{out}@x/y", f"hf://datasets/{out}/y")
          for first in (f"file://{outside}", f"local://{outside}", outside, f"filecache://{outside}",
                        f"zip://b.png::file://{outside}", f"zip://file://{outside}")),
        f"zip://a/b.png::{tmp_path}/outside.zip", f"hf://datasets/{out}/../x/y.png",
    ]  # fmt: skip
    found = read_rows(stream, sources, out, [{"bytes": None, "path": path} for path in wrong])
    assert found.keys() == set(wrong) and all("only one from elsewhere" in (bad or "") for bad in found.values()), found
    named = f"zip://a/b.png::{out}/inside.bin"
    assert read_rows(stream, sources, out, [{"bytes": None, "path": named}]) == {"zip://a/b.png::inside.bin": None}


def test_files_that_rows_name_are_files_of_the_source_whatever_links_stand_before(stream, sources, tmp_path):
    out, elsewhere = tmp_path / "rows", tmp_path / "elsewhere"
    (elsewhere / "sub").mkdir(parents=True)
    (out / "deep").mkdir(parents=True)
    for name in ("private.png", "sub/a.png"):
        (elsewhere / name).write_bytes(png(0))
    (out / "link").symlink_to(elsewhere / "sub")
    (out / "null.png").symlink_to("/dev/null")
    for name in ("pipe.png", "pipe.bin"):
        os.mkfifo(out / name)
        # whoever waits for the pipe gets a picture
        threading.Thread(target=(out / name).write_bytes, args=(png(1),), daemon=True).start()
    names = ["link/a.png", "link/../private.png", "null.png", "pipe.png", "deep/../link/a.png", "deep"]
    addresses = [*(f"{out}/{name}" for name in names), f"zip://a.png::{out}/pipe.bin"]
    found = read_rows(stream, sources, out, [{"bytes": None, "path": address} for address in addresses])
    assert found.pop("link/a.png") is None
    assert "No such file" in found.pop("private.png")
    assert found.keys() == {"null.png", "pipe.png", "deep", "zip://a.png::pipe.bin"}
    assert all("it is no file but a link, a pipe or a device" in bad for bad in found.values())


def test_no_more_of_a_picture_is_read_than_its_file_may_have(stream, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_BYTES", 100_000)
    (out := tmp_path / "rows").mkdir()
    with zipfile.ZipFile(out / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png(0) + bytes(50_000_000))
        archive.writestr("b.png", png(1))
    (out / "large.png").write_bytes(png(2))
    os.truncate(out / "large.png", 2**32)  # a hole, which takes no room
    places = [f"{out}/large.png", f"zip://a.png::{out}/bomb.bin", f"zip://b.png::{out}/bomb.bin"]
    pictures = [{"bytes": None, "path": place} for place in places]
    found = read_rows(stream, sources, out, [*pictures, {"bytes": png(3) + bytes(100_000), "path": None}])
    assert found.pop("zip://b.png::bomb.bin") is None
    assert len(found) == 3 and all("has more than 100,000 bytes" in bad for bad in found.values())
    tracemalloc.start()
    try:
        assert len(rows_module._fetch(f"zip://a.png::{out}/bomb.bin")) == 100_001
        assert len(rows_module._fetch(f"{out}/large.png")) == 100_001
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_broken_parquet_file_is_named_and_the_others_come_all_the_same(stream, sources, tmp_path):
    path = parquet(tmp_path / "rows")
    data = (path / "2.parquet").read_bytes()
    (path / "2.parquet").write_bytes(data[:100] + b"\xff" * 200 + data[300:])
    sources["broken"] = RowStream, str(path)
    ranks = stream("broken", samples=120)
    bad = [bad for bad in flat(ranks, "bad") if bad]
    assert bad and all("lost to this reader" in reason for reason in bad)
    assert {f"picture {n}" for n in range(COUNT) if n % FILES != 2} <= set(flat(ranks, "caption"))


# addresses


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        if "short" in self.path or "silent" in self.path:
            data = (self.server.root / "00001.tar").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:2000])
            if "silent" in self.path:
                self.server.released.wait(20)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tars):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tars))) as served:
        served.root, served.released = tars, threading.Event()
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.released.set()
        served.shutdown()
        thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_come_from_a_web_server(stream, server, workers):
    ranks = stream(f"{server}/{{00000..0000{FILES - 1}}}.tar", workers=workers)
    captions = flat(ranks, "caption")
    assert set(captions[:COUNT]) == set(captions[COUNT:]) == CAPTIONS and not any(flat(ranks, "bad"))


def test_what_a_web_server_does_not_give_is_named(stream, server, monkeypatch):
    monkeypatch.setattr(streams, "SECONDS", 3)
    ranks = stream(f"{server}/{{00000,short,00009,silent}}.tar", samples=18)
    bad = {key: reason for key, reason in zip(flat(ranks, "key"), flat(ranks, "bad"), strict=True) if reason}
    assert bad.keys() == {f"{server}/{name}.tar" for name in ("short", "silent", "00009")}
    assert "timed out" in bad[f"{server}/silent.tar"]
    assert "404" in bad[f"{server}/00009.tar"] and "unexpected end" in bad[f"{server}/short.tar"]
    assert {f"picture {n}" for n in range(6)} <= set(flat(ranks, "caption"))
    with pytest.raises(ShardError, match="404"):
        TarStream(f"{server}/00009.tar", 5)


# runs


def config(tmp_path, path, **settings) -> Config:
    data = {"streaming": "webdataset", "shuffle_buffer": 8, "resolution": 16} | settings.pop("data", {})
    return Config(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(path=str(path), **data),
        filter=FilterConfig(tau=settings.pop("tau", 2.5)),
        train=TrainConfig(**{"samples": 24, "batch_size": 4, "learning_rate": 1e-4, "ema_half_life": 0} | settings),
        log=LogConfig(every=8),
    )


def test_all_that_needs_random_access_is_refused_at_once(tmp_path):
    wrong = config(tmp_path, "x", data={"index": "i.parquet", "cache": "c", "order": "spread", "shuffle_buffer": 0})
    wrong.log.validation_every = 8
    with pytest.raises(ConfigError) as error:
        check(wrong)
    starts = ["data.shuffle_buffer must be above 0"] + [
        f"data.streaming=webdataset and {name} exclude each other: "
        for name in ("data.index", "data.cache", "data.order=spread", "log.validation_every")
    ]
    for line, start in zip(str(error.value).splitlines(), starts, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(("kind", "workers"), [("tars", 2), ("parquet", 0)])
def test_same_seed_gives_the_same_run_and_dropped_samples_stand_in_the_gallery_without_pictures(
    tmp_path, sources, kind, workers
):
    streaming = "webdataset" if kind == "tars" else "datasets"
    runs = []
    for name in ("a", "b"):
        settings = config(tmp_path / name, sources[kind][1], data={"streaming": streaming, "workers": workers}, tau=1.5)
        summary = loop.train(settings, progress=False)
        runs.append(pq.read_table(tmp_path / name / "run" / "audit.parquet").to_pylist())
    assert runs[0] == runs[1] and [row["position"] for row in runs[0]] == list(range(24))
    assert len({row["key"] for row in runs[0]}) == 24 and 0 < summary["filter/dropped"]
    page = (tmp_path / "a" / "run" / "dropped.html").read_text()
    assert "cannot be read" in page and next(row["key"] for row in runs[0] if not row["keep"]) in page


def test_run_goes_on_with_another_part_of_the_stream_and_says_so(tmp_path, tars, caplog, monkeypatch):
    settings = config(tmp_path, tars, samples=32)
    settings.checkpoint = CheckpointConfig(resume=True)
    calls = iter([None, None, None, "SIGTERM"])
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after 16 samples"):
        patch.setattr(Interruption, "agreed", lambda self: next(calls))
        loop.train(settings, progress=False)
    assert "begins anew" not in caplog.text
    elsewhere = copy.deepcopy(settings)
    elsewhere.data.path = f"{tars}/{{00000..00003}}.tar"
    with pytest.raises(CheckpointError, match="the samples of data.path and data.index are others"):
        loop.train(elsewhere, progress=False)
    settings.data.shuffle_buffer, settings.data.workers = 4, 2
    loop.train(settings, progress=False)
    assert "begins anew" in caplog.text
    rows = pq.read_table(tmp_path / "run" / "audit.parquet").to_pylist()
    assert [row["position"] for row in rows] == list(range(32))
    keys = [row["key"] for row in rows]
    assert keys[:16] != keys[16:] and len(set(keys[:16])) == len(set(keys[16:])) == 16
    # the draws are those of the position
    assert [row["timestep"] for row in rows] == [timestep(0, position, 1000) for position in range(32)]


def test_bad_samples_end_a_run_with_the_list_also_where_all_is_broken(tmp_path, tars):
    shards = shutil.copytree(tars, tmp_path / "shards")
    for shard in (1, 2, 3):
        (shards / f"{shard:05d}.tar").write_bytes(b"")
    with pytest.raises(ShardError) as error:
        loop.train(config(tmp_path, shards, data={"max_bad_share": 0.05}), progress=False)
    assert "more than data.max_bad_share" in str(error.value) and "00001.tar cannot be read" in str(error.value)


def test_index_beside_a_stream_is_left_alone_and_told(tmp_path, scenes_dir, caplog):
    summary = loop.train(config(tmp_path, scenes_dir, samples=8), progress=False)
    assert "index.parquet is left alone" in caplog.text
    assert summary["filter/seen"] == 8 and "filter/drop_rate_duplicates" not in summary


def test_two_processes_share_a_stream(tmp_path, tars):
    base = tiny.save_pipeline(tmp_path / "base", "sd1")
    settings = {"run_dir": tmp_path / "run", "model.path": base, "data.path": tars, "data.streaming": "webdataset",
                "data.workers": 1, "data.shuffle_buffer": 8, "filter.tau": 0.57, "filter.reduction": "kept_global",
                "train.samples": 48, "train.batch_size": 3, "log.every": 24}  # fmt: skip
    launching.run([f"--{name}={value}" for name, value in settings.items()], processes=2)
    rows = pq.read_table(tmp_path / "run" / "audit.parquet").to_pylist()
    assert [row["position"] for row in rows] == list(range(48))
    keys = [row["key"] for row in rows]
    assert set(keys[:24]) == set(keys[24:]) == set(KEYS)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["filter/dropped"] < summary["filter/checked"] == 48
    # each rank has shards of its own
    ranks = [{int(row["key"]) // 6 for row in rows if row["position"] // 3 % 2 == rank} for rank in (0, 1)]
    assert ranks == [{0, 2}, {1, 3}]
