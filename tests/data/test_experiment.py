import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memfilter.data import experiment as module
from memfilter.data import scenes
from memfilter.data.experiment import Experiment, prepare_scenes
from memfilter.data.shards import Shards
from memfilter.eval.copies import copy_similarity

PLAN = {"seed": 3, "duplicates": 6, "repeats": 5, "distinct": 14}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_scenes(tmp_path_factory.mktemp("prepared") / "scenes", **PLAN)


def write_index(path, **columns):
    table = {"key": ["a", "b", "c"], "role": ["duplicate", "distinct", "distinct"], "repeats": [3, 1, 2]} | columns
    pq.write_table(pa.table({name: column for name, column in table.items() if column is not None}), path)
    return path


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_preparing_twice_writes_identical_bytes(prepared, tmp_path):
    again = contents(prepare_scenes(tmp_path / "again", **PLAN))
    assert again == contents(prepared)
    other = contents(prepare_scenes(tmp_path / "other", **PLAN | {"seed": 4}))
    assert other.keys() == again.keys() and other["00000.tar"] != again["00000.tar"]


def test_index_says_which_scenes_repeat(prepared):
    table = pq.read_table(prepared / module.INDEX).to_pydict()
    assert table["role"] == ["duplicate"] * 6 + ["distinct"] * 14
    assert table["repeats"] == [5] * 6 + [1] * 14
    assert table["key"] == Shards.open(prepared).keys() and len(set(table["key"])) == 20


def test_half_of_both_roles_captions_carry_the_poster_template(prepared):
    index, shards = Experiment.read(prepared / module.INDEX), Shards.open(prepared)
    poster = np.array([bool(re.search(r", limited edition poster no \d+$", shards.caption(k))) for k in index.keys])
    assert poster[index.duplicate].sum() == 3 and poster[~index.duplicate].sum() == 7


def test_pictures_captions_and_facts_belong_together(prepared):
    shards = Shards.open(prepared)
    for key in shards.keys()[::3]:
        facts = shards.facts(key)
        assert facts.pop("key") == key
        scene = scenes.Scene(**facts | {"colours": tuple(facts["colours"])})
        assert shards.caption(key) == scene.caption
        np.testing.assert_array_equal(np.asarray(shards.image(key)), np.asarray(scenes.render(scene)))


def test_no_scene_stands_in_both_roles(prepared):
    shards = Shards.open(prepared)
    assert len({shards.image(key).tobytes() for key in shards.keys()}) == 20


def test_distinct_scenes_may_come_again(tmp_path):
    out = prepare_scenes(tmp_path / "scenes", **PLAN, distinct_repeats=3)
    assert pq.read_table(out / module.INDEX)["repeats"].to_pylist() == [5] * 6 + [3] * 14


def test_near_copies_share_repeats_under_keys_captions_and_pictures_of_their_own(prepared, tmp_path):
    shards = Shards.open(prepare_scenes(tmp_path / "scenes", **PLAN | {"repeats": 20}, near_copies=5))
    index = Experiment.read(tmp_path / "scenes" / module.INDEX)
    assert index.repeats.tolist() == [4] * 30 + [1] * 14 and index.duplicate.sum() == 30
    pictures = np.stack([np.asarray(shards.image(key)) for key in index.keys[:30]]).reshape(6, 5, 32, 32, 3)
    originals = np.stack([np.asarray(Shards.open(prepared).image(key)) for key in index.keys[:6]])
    alike = copy_similarity(pictures, originals[:, None])
    others = copy_similarity(pictures, originals[[1, 2, 3, 4, 5, 0]][:, None])
    assert 0.8 < alike.min() and (alike < 0.9999).mean() > 0.8 and alike.min() > others.max()
    captions = [shards.caption(key) for key in index.keys[:30]]
    assert len(set(captions)) > 25
    assert {re.sub(r", limited.*", "", caption) for caption in captions} == {
        re.sub(r", limited.*", "", Shards.open(prepared).caption(key)) for key in index.keys[:6]
    }


def test_repeats_that_cannot_be_shared_are_refused(tmp_path):
    with pytest.raises(ValueError, match="near_copies: 5 repeats cannot be shared by 2 keys"):
        prepare_scenes(tmp_path / "scenes", **PLAN, near_copies=2)


def test_existing_directory_is_never_written_to(prepared):
    before = contents(prepared)
    with pytest.raises(FileExistsError, match=f"{prepared} exists"):
        prepare_scenes(prepared, seed=9, duplicates=1, repeats=2, distinct=1)
    assert contents(prepared) == before


def test_interrupted_preparation_leaves_no_directory_and_can_be_repeated(prepared, tmp_path, monkeypatch):
    render, calls = scenes.render, []

    def interrupted(scene):
        calls.append(scene)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return render(scene)

    monkeypatch.setattr(scenes, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_scenes(tmp_path / "scenes", **PLAN)
    assert not (tmp_path / "scenes").exists()
    (tmp_path / ".scenes.partial" / "00007.tar").write_text("left behind")
    assert contents(prepare_scenes(tmp_path / "scenes", **PLAN)) == contents(prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_index_is_read_as_written_and_repeats_count_as_virtual_samples(tmp_path):
    index = Experiment.read(write_index(tmp_path / "i.parquet"))
    assert index.keys == ["a", "b", "c"]
    assert index.duplicate.tolist() == [True, False, False]
    assert index.virtual().tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    "columns, message",
    [({"role": None}, "lacks the columns role"), ({"role": None, "repeats": None}, "lacks the columns repeats, role"),
     ({"role": ["duplicate", "twin", "distinct"]}, "twin.*expected distinct or duplicate"),
     ({"repeats": [1, 0, 2]}, "repeats 0 times"), ({"repeats": [1, -4, 2]}, "repeats -4 times"),
     ({"repeats": [1, None, 2]}, "lacks some"), ({"repeats": [1, 1.5, 2]}, "no whole numbers"),
     ({"repeats": [1, float("inf"), 2]}, "no whole numbers"), ({"repeats": ["1", "1", "2"]}, "no whole numbers"),
     ({"key": ["a", None, "c"]}, "key None: expected text"), ({"key": [1, 2, 3]}, "key 1: expected text")],
)  # fmt: skip
def test_index_that_makes_no_sense_is_refused_by_name(tmp_path, columns, message):
    with pytest.raises(ValueError, match=f"i.parquet.*{message}"):
        Experiment.read(write_index(tmp_path / "i.parquet", **columns))


def test_whole_numbers_may_be_floats_and_a_sample_without_a_group_is_alone_in_one(tmp_path):
    index = Experiment.read(write_index(tmp_path / "i.parquet", repeats=[3.0, 1.0, 2.0], group=["b", None, "b"]))
    assert index.virtual().tolist() == [0, 0, 0, 1, 2, 2]
    assert index.groups[0] == index.groups[2] != index.groups[1] is not None
    assert Experiment.read(write_index(tmp_path / "j.parquet", group=[None, None, None])).deduplicated().keys == ["a", "b", "c"]


def test_shards_without_index_count_every_sample_once(prepared):
    shards = Shards.open(prepared)
    index = Experiment.of_shards(shards)
    assert index.keys == shards.keys()
    assert index.duplicate is None and index.virtual().tolist() == list(range(20))


def test_sample_that_is_not_in_the_shards_is_refused_by_name(prepared, tmp_path):
    shards = Shards.open(prepared)
    Experiment.read(prepared / module.INDEX).require(shards)
    with pytest.raises(ValueError, match="3 samples.*'a'"):
        Experiment.read(write_index(tmp_path / "i.parquet")).require(shards)
