import hashlib
import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clouds import cloud, encoded, sample, write_clouds, write_tar
from torch.utils.data import DataLoader

from memfilter.cli import main
from memfilter.data.experiment import Experiment
from memfilter.data.manifest import (
    MANIFEST,
    MAX_BYTES,
    SCHEMA,
    ManifestShards,
    fingerprint,
    is_manifest,
    read_manifest,
    require_unchanged,
    write_manifest,
)  # fmt: skip
from memfilter.data.sampler import SampleDataset, SampleStream, View, collate
from memfilter.data.shards import MAX_CAPTION, ShardError, Shards

HEADER = {"seed": 3, "versions": {"pillow": "1"}, "conditions": {"distinct": 20}, "counts": {"chosen": 23}}


def rows_of(data) -> list[dict]:
    """A manifest's rows for shards, made with nothing but tarfile: the first three samples are duplicates."""
    rows = []
    for path in sorted(data.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {info.name: info for info in tar}
            for name, info in members.items():
                if name.endswith(".png"):
                    key, content = name.removesuffix(".png"), tar.extractfile(info).read()
                    caption = tar.extractfile(members[f"{key}.txt"]).read().decode()
                    duplicate = len(rows) < 3
                    rows.append({"key": key, "shard": path.name, "offset": info.offset_data, "size": info.size,
                                 "sha256": hashlib.sha256(content).digest(), "caption": caption,
                                 "repeats": 5 if duplicate else 1,
                                 "role": "duplicate" if duplicate else "distinct"})  # fmt: skip
    return rows


@pytest.fixture
def data(tmp_path):
    return write_clouds(tmp_path / "data", range(23))


@pytest.fixture
def manifest(data):
    write_manifest(data / MANIFEST, pa.Table.from_pylist(rows_of(data), SCHEMA), HEADER)
    return data / MANIFEST


def write_anyhow(path, rows: list[dict], schema=SCHEMA, header: bytes | None = b"{}"):
    """What `write_manifest` would refuse."""
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table.replace_schema_metadata({b"memfilter": header} if header is not None else None), path)
    return path


def test_samples_are_those_of_the_shards(data, manifest):
    shards, found = Shards.open(data), ManifestShards(manifest, data)
    assert found.keys() == shards.keys() and len(found.keys()) == 23
    for key in reversed(found.keys()):
        assert found.caption(key) == shards.caption(key) == f"cloud {int(key)}"
        np.testing.assert_array_equal(np.asarray(found.image(key)), np.asarray(cloud(int(key))))
        assert found.image(key).mode == "RGB" and found.facts(key) == {}


def test_training_sees_the_same_samples_by_manifest_and_by_shards(data, manifest):
    experiment = Experiment.read(manifest)
    batches = []
    for shards in (Shards.open(data), ManifestShards(manifest, data)):
        experiment.require(shards)
        stream = SampleStream(experiment.virtual(), seed=1)
        dataset = SampleDataset(shards, experiment, stream, View(16, random_crop=True, random_flip=True))
        batches.append(next(iter(DataLoader(dataset, 35, sampler=range(35), collate_fn=collate, num_workers=1))))
    assert len(batches[0]["key"]) == 35 and batches[0]["bad"] == [None] * 35
    pixels = [torch.stack(batch.pop("pixels")) for batch in batches]
    assert torch.equal(*pixels) and batches[0] == batches[1]


def test_experiment_is_read_from_a_manifest(manifest):
    experiment = Experiment.read(manifest)
    assert experiment.keys == [f"{number:05d}" for number in range(23)]
    assert experiment.duplicate.tolist() == [True] * 3 + [False] * 20
    assert experiment.repeats.tolist() == [5] * 3 + [1] * 20 and len(experiment.virtual()) == 35


def test_experiments_with_other_pictures_or_captions_are_told_apart(tmp_path, manifest):
    table, header = read_manifest(manifest)
    found = {Experiment.read(manifest).fingerprint()}
    for name, value in (("caption", "another"), ("sha256", bytes(32)), ("repeats", 6), ("key", "x")):
        rows = table.to_pylist()
        rows[4][name] = value
        write_manifest(tmp_path / "other.parquet", pa.Table.from_pylist(rows, SCHEMA), HEADER)
        found.add(Experiment.read(tmp_path / "other.parquet").fingerprint())
    assert len(found) == 5
    elsewhere = [row | {"shard": "sub/" + row["shard"], "offset": 5} for row in table.to_pylist()]
    write_manifest(tmp_path / "other.parquet", pa.Table.from_pylist(elsewhere, SCHEMA), HEADER | {"seed": 9})
    assert Experiment.read(tmp_path / "other.parquet").fingerprint() in found


def test_manifest_is_told_from_an_index(data, manifest):
    pq.write_table(pa.table({"key": ["a"], "role": ["distinct"], "repeats": [1]}), data / "index.parquet")
    assert is_manifest(manifest) and not is_manifest(data / "index.parquet")
    for content in (b"", b"hello"):
        (data / "bad.parquet").write_bytes(content)
        assert not is_manifest(data / "bad.parquet")
    assert not is_manifest(data / "nothing.parquet")


def test_header_is_read_as_written_with_the_fingerprint_of_the_rows(manifest):
    table, header = read_manifest(manifest)
    assert header == HEADER | {"data": fingerprint(table)}
    assert table.schema.equals(SCHEMA) and len(table) == 23
    assert json.loads(pq.read_schema(manifest).metadata[b"memfilter"]) == header


def test_same_rows_give_the_same_bytes(tmp_path, manifest):
    table, _ = read_manifest(manifest)
    write_manifest(tmp_path / "again.parquet", table, HEADER)
    assert (tmp_path / "again.parquet").read_bytes() == manifest.read_bytes()


def test_opening_and_reading_need_no_header_of_a_tar_file(data, manifest):
    before = {key: ManifestShards(manifest, data).image(key).tobytes() for key in ("00000", "00022")}
    pictures = {(row["shard"], row["offset"], row["size"]) for row in rows_of(data)}
    for path in data.glob("*.tar"):
        content, kept = path.read_bytes(), bytearray(path.stat().st_size)
        for shard, offset, size in pictures:
            if shard == path.name:
                kept[offset : offset + size] = content[offset : offset + size]
        path.write_bytes(kept)
    shards = ManifestShards(manifest, data)
    assert {key: shards.image(key).tobytes() for key in before} == before
    assert shards.caption("00022") == "cloud 22"


def test_one_picture_may_have_several_captions(data):
    row = rows_of(data)[0]
    rows = [row | {"key": f"{row['key']}#{n}", "caption": f"caption {n}", "repeats": 1} for n in range(4)]
    write_manifest(data / MANIFEST, pa.Table.from_pylist(rows, SCHEMA), HEADER)
    shards = ManifestShards(data / MANIFEST, data)
    assert [shards.caption(key) for key in shards.keys()] == [f"caption {number}" for number in range(4)]
    assert len({shards.image(key).tobytes() for key in shards.keys()}) == 1


def test_pictures_of_a_folder_are_shards_of_their_own(tmp_path):
    (tmp_path / "a" / "ü").mkdir(parents=True)
    content = encoded(5, "webp", lossless=True)
    (tmp_path / "a" / "ü" / "5.webp").write_bytes(content)
    row = {"key": "5", "shard": "a/ü/5.webp", "offset": 0, "size": len(content), "caption": "x", "repeats": 1,
           "sha256": hashlib.sha256(content).digest(), "role": "distinct"}  # fmt: skip
    write_manifest(tmp_path / MANIFEST, pa.Table.from_pylist([row], SCHEMA), {})
    assert ManifestShards(tmp_path / MANIFEST, tmp_path).image("5").tobytes() == cloud(5).tobytes()
    assert require_unchanged(tmp_path / MANIFEST, tmp_path) == 1


def test_manifest_of_nothing_is_opened(tmp_path):
    write_manifest(tmp_path / MANIFEST, SCHEMA.empty_table(), {})
    assert ManifestShards(tmp_path / MANIFEST, tmp_path).keys() == []
    assert require_unchanged(tmp_path / MANIFEST, tmp_path) == 0


def test_it_goes_to_other_processes(data, manifest):
    shards = pickle.loads(pickle.dumps(ManifestShards(manifest, data)))
    assert shards.image("00007").tobytes() == cloud(7).tobytes() and shards.caption("00007") == "cloud 7"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks into /proc")
def test_reading_leaves_no_file_open(data, manifest):
    shards = ManifestShards(manifest, data)
    for key in shards.keys():
        shards.image(key)
    require_unchanged(manifest, data)
    targets = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
               if os.path.islink(f"/proc/self/fd/{number}")]  # fmt: skip
    assert targets and not [target for target in targets if target.startswith(str(data)) and target.endswith(".tar")]


NONSENSE = [
    ({"repeats": 0}, "repeat less than once"),
    ({"role": "twin"}, "role other than distinct or duplicate"),
    ({"size": 0}, "size outside"),
    ({"size": MAX_BYTES + 1}, "size outside"),
    ({"size": -5}, "size outside"),
    ({"offset": -1}, "offset that no file has"),
    ({"offset": 2**63 - 1}, "offset that no file has"),
    ({"shard": "/etc/hostname"}, "outside the data directory"),
    ({"shard": "../data/00000.tar"}, "outside the data directory"),
    ({"shard": "a/../../x.tar"}, "outside the data directory"),
    ({"shard": ""}, "outside the data directory"),
    ({"shard": "."}, "outside the data directory"),
    ({"shard": "a\0b"}, "outside the data directory"),
    ({"key": "00004"}, "2 rows share a key"),
]


@pytest.mark.parametrize("change, message", NONSENSE, ids=[f"{list(c)[0]}-{n}" for n, (c, _) in enumerate(NONSENSE)])
def test_rows_that_make_no_sense_are_neither_read_nor_written(data, change, message):
    rows = rows_of(data)
    rows[6] |= change
    path = write_anyhow(data / "bad.parquet", rows)
    for act in (lambda: ManifestShards(path, data),
                lambda: write_manifest(data / MANIFEST, pa.Table.from_pylist(rows, SCHEMA), {})):  # fmt: skip
        with pytest.raises(ShardError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value) and "parquet" in str(caught.value)
    assert not (data / MANIFEST).exists()


def test_everything_that_makes_no_sense_is_told_at_once(data):
    rows = rows_of(data)
    rows[3]["size"], rows[4]["offset"], rows[5]["role"], rows[6]["role"] = 0, -1, "x", "y"
    with pytest.raises(ShardError) as caught:
        ManifestShards(write_anyhow(data / "bad.parquet", rows), data)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and any("2 rows have a role" in line and "'00005'" in line for line in lines)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello" * 100, b"PAR1" + bytes(64) + b"PAR1"])
def test_file_that_is_no_parquet_is_refused_by_name(data, content):
    (data / "bad.parquet").write_bytes(content)
    with pytest.raises(ShardError, match=r"manifest .*bad\.parquet cannot be read") as caught:
        ManifestShards(data / "bad.parquet", data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", [None, b"", b"{", b"[" * 100_000, b"\xff", b"[3]"])
def test_header_that_is_missing_or_no_json_is_refused(data, header):
    path = write_anyhow(data / "bad.parquet", rows_of(data), header=header)
    with pytest.raises(ShardError, match="cannot be read"):
        ManifestShards(path, data)
    assert len(Experiment.read(path).keys) == 23  # as an index it will do


def test_manifest_that_does_not_exist_or_lacks_columns_is_refused(data):
    with pytest.raises(ShardError, match=r"nothing\.parquet cannot be read"):
        ManifestShards(data / "nothing.parquet", data)
    schema = SCHEMA.remove(SCHEMA.get_field_index("offset"))
    with pytest.raises(ShardError, match="cannot be read.*offset"):
        ManifestShards(write_anyhow(data / "bad.parquet", rows_of(data), schema), data)


@pytest.mark.parametrize("name", SCHEMA.names)
def test_rows_without_a_value_are_refused(data, name):
    rows = rows_of(data)
    rows[2][name] = None
    with pytest.raises(ShardError, match=f"rows without {name}"):
        ManifestShards(write_anyhow(data / "bad.parquet", rows), data)


def test_columns_of_other_types_are_read_where_they_mean_the_same(data, manifest):
    table, _ = read_manifest(manifest)
    other = table.cast(pa.schema([pa.field(f.name, {"int64": pa.int32(), "string": pa.large_string()}.get(
        str(f.type), f.type)) for f in SCHEMA]))  # fmt: skip
    pq.write_table(other.replace_schema_metadata({b"memfilter": b"{}"}), data / "other.parquet")
    assert read_manifest(data / "other.parquet")[0].equals(table)
    text = table.set_column(2, "offset", pa.array(["x"] * 23))
    pq.write_table(text.replace_schema_metadata({b"memfilter": b"{}"}), data / "other.parquet")
    with pytest.raises(ShardError, match="cannot be read"):
        ManifestShards(data / "other.parquet", data)


def test_captions_that_are_no_utf8_are_refused(data):
    table = pa.Table.from_pylist(rows_of(data), SCHEMA)
    captions = pa.array([b"\xff\xfe"] * 23, pa.binary()).view(pa.string())
    table = table.set_column(5, "caption", captions).replace_schema_metadata({b"memfilter": b"{}"})
    pq.write_table(table, data / "bad.parquet")
    with pytest.raises(ShardError, match="cannot be read.*UTF"):
        ManifestShards(data / "bad.parquet", data)


def test_caption_of_a_megabyte_is_cut(data):
    rows = rows_of(data)
    rows[0]["caption"] = "x" * 2**20
    shards = ManifestShards(write_anyhow(data / "long.parquet", rows), data)
    assert shards.caption("00000") == "x" * MAX_CAPTION and shards.caption("00001") == "cloud 1"


def test_missing_and_cut_shards_are_refused_when_it_is_opened(data, manifest):
    (data / "00001.tar").unlink()
    with pytest.raises(ShardError, match=r"1 shards of manifest .*00001\.tar \(No such file"):
        ManifestShards(manifest, data)
    last = rows_of(data)[-1]
    os.truncate(data / last["shard"], last["offset"] + last["size"] - 1)
    with pytest.raises(ShardError, match=r"2 shards .*00002\.tar \(too short\)"):
        ManifestShards(manifest, data)
    with pytest.raises(ShardError, match="3 shards"):
        ManifestShards(manifest, data / "elsewhere")


@pytest.mark.parametrize("kind", ["pipe", "directory", "gone", "replaced"])
def test_shard_that_is_something_else_by_now_is_an_error_and_not_a_wait(data, manifest, kind):
    shards = ManifestShards(manifest, data)
    path = data / "00001.tar"
    path.unlink()
    {"pipe": lambda: os.mkfifo(path), "directory": path.mkdir, "gone": lambda: None,
     "replaced": lambda: path.write_bytes(b"x" * 10**6)}[kind]()  # fmt: skip
    with pytest.raises(ShardError, match=r"00001\.tar"):
        shards.image("00012")
    assert shards.image("00002").tobytes() == cloud(2).tobytes()
    with pytest.raises(ShardError, match="10 differences"):
        require_unchanged(manifest, data)


def test_sample_that_is_no_picture_is_an_error_that_names_it(data):
    content = write_tar(data / "00009.tar", [("x.png", b"no picture at all"), ("x.txt", b"x")]).read_bytes()
    row = rows_of(data)[-1]
    assert row["offset"] == content.index(b"no picture") and row["size"] == 17
    shards = ManifestShards(write_anyhow(data / "m.parquet", [row]), data)
    with pytest.raises(ShardError, match=r"sample 'x' in .*00009\.tar: this is no picture"):
        shards.image("x")


def flip(path, place: int):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_unchanged_data_are_confirmed(data, manifest, capsys):
    assert require_unchanged(manifest, data) == 23
    assert main(["prepare", "verify", str(manifest)]) == 0
    assert "23 samples are as they were" in capsys.readouterr().out


def test_every_flipped_bit_of_a_picture_is_found_and_named(data, manifest):
    rows = rows_of(data)
    for row, place in ((rows[0], 0), (rows[12], rows[12]["size"] - 1), (rows[22], rows[22]["size"] // 2)):
        flip(data / row["shard"], row["offset"] + place)
    with pytest.raises(ShardError) as caught:
        require_unchanged(manifest, data)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == [
        "sample '00000' in 00000.tar", "sample '00012' in 00001.tar", "sample '00022' in 00002.tar"
    ]  # fmt: skip
    assert rows[0]["sha256"].hex() in lines[0] and lines[3].startswith("3 differences from")
    assert len(lines) == 4


def test_what_lies_between_the_pictures_may_change(data, manifest):
    flip(data / "00000.tar", 140)  # in the first member's header
    assert require_unchanged(manifest, data) == 23


def test_rows_changed_after_they_were_written_are_found(data, manifest):
    table, header = read_manifest(manifest)
    rows = table.to_pylist()
    rows[5]["caption"] = "a lie"
    path = write_anyhow(data / "changed.parquet", rows, header=json.dumps(header).encode())
    with pytest.raises(ShardError, match="^the rows are not those that the header was written for\n1 differences"):
        require_unchanged(path, data)


def test_command_lists_the_first_differences_counts_them_and_exits_with_1(data, manifest, tmp_path, capsys):
    (data / "00000.tar").unlink()
    os.truncate(data / "00001.tar", 600)
    os.truncate(data / "00002.tar", 600)
    assert main(["prepare", "verify", str(manifest)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 21 and "No such file" in lines[0] and "ends before the picture does" in lines[19]
    assert "23 differences" in lines[20] and "the first 20" in lines[20]
    assert main(["prepare", "verify", str(manifest), f"--data={tmp_path}"]) == 1


def test_command_runs_as_a_program_of_its_own(data, manifest):
    command = [sys.executable, "-m", "memfilter.cli", "prepare", "verify", str(manifest), "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "23 samples" in done.stdout
    write_tar(data / "00000.tar", sample("00000", 3))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "error: sample '00000' in 00000.tar" in done.stderr
    assert "Traceback" not in done.stderr
