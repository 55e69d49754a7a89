import itertools
from collections import Counter

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clouds import cloud, sample, write_clouds, write_tar
from PIL import Image

from memfilter.data import groups
from memfilter.data.builder import prepare_experiment
from memfilter.data.duplicates import near_pairs
from memfilter.data.experiment import INDEX, Experiment, prepare_scenes
from memfilter.data.groups import prepare_groups
from memfilter.data.manifest import MANIFEST
from memfilter.data.plan import Plan
from memfilter.data.shards import ShardError, Shards

COPIES = 4


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """10 scenes under 4 keys each, and 100 others."""
    out = tmp_path_factory.mktemp("groups") / "scenes"
    return prepare_scenes(out, seed=1, duplicates=10, repeats=8, distinct=100, near_copies=COPIES)


def components(count: int, near) -> list[int]:
    """The smallest number that every number is connected with, found by walking."""
    found = list(range(count))
    for start in range(count):
        todo = [start] if found[start] == start else []
        while todo:
            here = todo.pop()
            for there in range(start + 1, count):
                if found[there] == there and near(here, there):
                    found[there] = start
                    todo.append(there)
    return found


def partition(names) -> set[tuple[int, ...]]:
    return {tuple(i for i, other in enumerate(names) if other == name) for name in set(names)}


def crowd(seed: int, count: int) -> np.ndarray:
    """Hashes [N, 8] around a few centres, some of them equal."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (6, 64), dtype=np.uint8)[rng.integers(6, size=count)]
    for row in bits:
        row[rng.choice(64, rng.integers(8), replace=False)] ^= 1
    return np.packbits(bits, axis=1)


@pytest.mark.parametrize("max_bits", [0, 3, 6, 31])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_near_pairs_are_those_that_counting_bits_finds(max_bits, chunk):
    hashes = crowd(0, 90)
    bits = np.unpackbits(hashes, axis=1).astype(int)
    expected = {(i, j) for i, j in itertools.combinations(range(90), 2) if abs(bits[i] - bits[j]).sum() <= max_bits}
    found = near_pairs(hashes, max_bits, chunk)
    assert found.ndim == 2 and Counter(map(tuple, found.tolist())) == Counter(expected) and expected


@pytest.mark.parametrize("count", [0, 1])
def test_of_one_picture_there_is_no_pair(count):
    assert near_pairs(np.zeros((count, 8), np.uint8), 6).shape == (0, 2)


@pytest.mark.parametrize("max_bits", [0, 6, 10])
def test_group_is_what_is_connected_by_hashes_that_are_near(scenes, tmp_path, max_bits):
    shards, index = Shards.open(scenes), tmp_path / "index.parquet"
    index.write_bytes((scenes / INDEX).read_bytes())
    count = prepare_groups(scenes, index, max_bits, processes=1)
    keys = shards.keys()
    hashes = [imagehash.phash(shards.image(key)) for key in keys]
    oracle = components(len(keys), lambda i, j: hashes[i] - hashes[j] <= max_bits)
    groups = Experiment.read(index).groups
    assert partition(groups) == partition(oracle)
    assert set(groups) <= set(keys)
    assert count == sum(size > 1 for size in Counter(oracle).values())


def test_near_copies_come_together_and_other_scenes_stay_apart(scenes, tmp_path):
    shares = {}
    for max_bits in (6, 10):
        index = tmp_path / f"{max_bits}.parquet"
        index.write_bytes((scenes / INDEX).read_bytes())
        prepare_groups(scenes, index, max_bits, processes=1)
        groups = Experiment.read(index).groups
        copies = [groups[start : start + COPIES] for start in range(0, 10 * COPIES, COPIES)]
        assert all(set(a).isdisjoint(b) for a, b in itertools.combinations(copies, 2))
        assert len(set(groups[10 * COPIES :])) >= 98
        pairs = [a == b for names in copies for a, b in itertools.combinations(names, 2)]
        shares[max_bits] = sum(pairs) / len(pairs)
    # copies are shifted by as much as a whole pixel: few bits find about every second pair of them
    assert shares[6] > 0.4 and shares[10] > 0.7


def test_copies_of_a_picture_in_jpeg_are_in_its_group(tmp_path):
    members = [m for number in range(5) for m in sample(f"{number}", number)]
    members += [m for number in range(3) for m in sample(f"copy-{number}", number, form="jpeg", quality=50)]
    write_tar(tmp_path / "data" / "00000.tar", members)
    assert prepare_groups(tmp_path / "data", processes=1) == 3
    found = Experiment.read(tmp_path / "data" / INDEX)
    assert partition(found.groups) == {(0, 5), (1, 6), (2, 7), (3,), (4,)}


def test_chain_of_pictures_each_near_the_next_is_one_group(tmp_path):
    a, b = (np.asarray(cloud(number), float) for number in (0, 1))
    steps = [Image.fromarray((a + (b - a) * i / 20).round().astype(np.uint8)) for i in range(21)]
    hashes = [imagehash.phash(picture) for picture in steps]
    assert hashes[0] - hashes[-1] > 12 and max(x - y for x, y in itertools.pairwise(hashes)) <= 6
    members = [m for i, picture in enumerate(steps) for m in sample(f"{i:02}", picture)]
    write_tar(tmp_path / "data" / "00000.tar", members)
    assert prepare_groups(tmp_path / "data", processes=1) == 1
    assert set(Experiment.read(tmp_path / "data" / INDEX).groups) == {"00"}


def test_index_keeps_its_rows_its_other_columns_and_its_header(tmp_path):
    data = write_clouds(tmp_path / "data", [3, 1, 2])
    write_tar(data / "copies.tar", [m for n in (1, 2) for m in sample(f"again-{n}", n, form="jpeg")])
    columns = {
        "repeats": pa.array([7, 1, 2, 5], pa.int32()),
        "key": ["again-2", "00001", "00002", "again-1"],
        "note": ["x", None, "z", "é"],
        "role": pa.array(["duplicate", "distinct", "distinct", "duplicate"]).dictionary_encode(),
    }
    before = pa.table(columns).replace_schema_metadata({b"memfilter": b'{"data": "123"}', b"other": b"\xff"})
    pq.write_table(before, tmp_path / "my.parquet")
    assert prepare_groups(data, tmp_path / "my.parquet", processes=1) == 2
    after = pq.read_table(tmp_path / "my.parquet")
    assert after.drop_columns(["group"]).equals(before) and after.column_names == [*before.column_names, "group"]
    assert {k: v for k, v in after.schema.metadata.items() if k != b"ARROW:schema"} == before.schema.metadata
    assert after["group"].type == pa.string()
    assert partition(after["group"].to_pylist()) == {(0, 2), (1, 3)}
    assert Experiment.read(tmp_path / "my.parquet").contents == "123"
    assert not (data / INDEX).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "my.parquet"]


def test_groups_that_are_there_are_made_anew(tmp_path):
    data = write_clouds(tmp_path / "data", range(3))
    prepare_groups(data, processes=1)
    table = pq.read_table(data / INDEX)
    assert table.column_names == ["key", "role", "repeats", "group"]
    pq.write_table(table.set_column(3, "group", pa.array(["one"] * 3)), data / INDEX)
    prepare_groups(data, processes=1)
    assert pq.read_table(data / INDEX).equals(table) and len(set(table["group"].to_pylist())) == 3


def test_index_is_made_where_there_is_none_with_every_sample_once(tmp_path):
    data = write_clouds(tmp_path / "data", range(12), per_shard=5)
    assert prepare_groups(data, processes=1) == 0
    found = Experiment.read(data / INDEX)
    assert found.keys == Shards.open(data).keys() and found.groups == found.keys
    assert found.repeats.tolist() == [1] * 12 and found.duplicate is None  # nobody has told
    found.require(Shards.open(data))


def test_sample_that_cannot_be_read_or_is_not_there_has_a_group_of_its_own(tmp_path):
    members = [m for key, number in (("a", 1), ("b", 1), ("c", 2)) for m in sample(key, number)]
    members += [("broken1.png", b"no picture"), ("broken1.txt", b"x"), ("broken2.png", b"none"), ("broken2.txt", b"x")]
    write_tar(tmp_path / "data" / "00000.tar", members)
    keys = ["broken2", "a", "b", "missing", "broken1", "c"]
    columns = {"key": keys, "role": ["distinct"] * 6, "repeats": [1] * 6}
    pq.write_table(pa.table(columns), tmp_path / "data" / INDEX)
    assert prepare_groups(tmp_path / "data", processes=1) == 1
    assert Experiment.read(tmp_path / "data" / INDEX).groups == ["broken2", "a", "a", "missing", "broken1", "c"]


def test_pictures_without_captions_are_samples_like_others(tmp_path):
    for name, number in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / "data").mkdir(exist_ok=True)
        cloud(number).save(tmp_path / "data" / f"{name}.png")
    (tmp_path / "data" / "c.txt").write_text("said")
    assert prepare_groups(tmp_path / "data", processes=1) == 1
    found = Experiment.read(tmp_path / "data" / INDEX)
    assert found.keys == ["a", "b", "c"] and found.groups == ["a", "a", "c"]


def test_picture_that_a_manifest_has_under_several_keys_is_one_group(tmp_path):
    data = write_clouds(tmp_path / "data", range(20))
    write_tar(data / "copy.tar", sample("copy", 19, form="jpeg"))
    plan = Plan(duplicates=3, repeats=4, distinct=12, variant="other_captions")
    prepare_experiment(data, tmp_path / "out", plan, processes=1)
    manifest = tmp_path / "out" / MANIFEST
    assert prepare_groups(data, manifest, processes=1) == 3
    found = Experiment.read(manifest)
    assert {key: group for key, group in zip(found.keys, found.groups, strict=True) if "#" in key} == {
        key: key.partition("#")[0] for key in found.keys if "#" in key}  # fmt: skip
    assert len(found.deduplicated().keys) == 15


def test_many_equal_pictures_take_no_more_than_their_number(tmp_path, monkeypatch):
    data = write_clouds(tmp_path / "data", [1, 2])
    write_tar(data / "blank.tar", [m for n in range(200) for m in sample(f"blank{n:03}", Image.new("RGB", (8, 8)))])
    sizes = []
    monkeypatch.setattr(groups, "near_pairs", lambda hashes, bits: sizes.append(len(hashes)) or near_pairs(hashes, bits))
    assert prepare_groups(data, processes=1) == 1 and sizes == [3]


@pytest.mark.parametrize("max_bits", [-1, 32])
def test_bits_out_of_range_are_refused_before_anything_is_written(tmp_path, max_bits):
    data = write_clouds(tmp_path / "data", range(2))
    with pytest.raises(ValueError, match=f"max_bits must be at least 0 and at most 31, found {max_bits}"):
        prepare_groups(data, max_bits=max_bits, processes=1)
    assert [path.name for path in data.iterdir()] == ["00000.tar"]


def test_directory_without_samples_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ShardError, match="nothing to read"):
        prepare_groups(tmp_path / "data", processes=1)
    assert not (tmp_path / "data" / INDEX).exists()
