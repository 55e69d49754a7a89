"""Hugging Face datasets on disk, written by the library itself."""

import io
import json
import shutil
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pictures

from memfilter.config import Config, DataConfig, MitigationConfig
from memfilter.data.experiment import Experiment
from memfilter.data.saved import SavedDataset, is_saved_dataset
from memfilter.data.shards import MAX_CAPTION, ShardError
from memfilter.data.sources import open_data
from memfilter.data.streaming.rows import RowStream
from memfilter.train.checkpoint import CheckpointError, require_same

COLOURS = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
CAPTIONS = ["red", "  green\n", None]


def png(colour, size=(8, 6)) -> dict:
    buffer = io.BytesIO()
    Pictures.new("RGB", size, colour).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def save(out, pictures, captions, column="text"):
    features = Features({"image": Image(), column: Value("string")})
    Dataset.from_dict({"image": pictures, column: captions}, features=features).save_to_disk(out)
    return out


@pytest.mark.parametrize("column", ["text", "caption", "TEXT", "prompt"])
def test_rows_are_found_by_their_number(tmp_path, column):
    saved = SavedDataset(save(tmp_path / "d", [png(c) for c in COLOURS], CAPTIONS, column))
    assert saved.keys() == ["000000000", "000000001", "000000002"]
    assert [saved.caption(key) for key in saved.keys()] == ["red", "green", ""]
    for key, colour in zip(saved.keys(), COLOURS, strict=True):
        picture = saved.image(key)
        assert picture.size == (8, 6) and (np.asarray(picture) == colour).all()
    experiment = Experiment.of_shards(saved)
    experiment.require(saved)
    assert experiment.repeats.tolist() == [1, 1, 1]


def test_saved_dataset_is_told_from_other_directories(tmp_path, scenes_dir):
    assert is_saved_dataset(save(tmp_path / "d", [png(COLOURS[0])], ["a"]))
    assert not is_saved_dataset(scenes_dir)


def test_long_captions_are_cut_between_characters(tmp_path):
    saved = SavedDataset(save(tmp_path / "d", [png(COLOURS[0])], ["é" * 2**20]))
    assert saved.caption("000000000") == "é" * (MAX_CAPTION // 2)


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    bomb = io.BytesIO()
    Pictures.new("1", (20_000, 20_000)).save(bomb, "png")
    pictures = [{"bytes": b"no picture", "path": None}, {"bytes": bomb.getvalue(), "path": None}, None]
    saved = SavedDataset(save(tmp_path / "d", pictures, ["a", "b", "c"]))
    for key, reason in zip(saved.keys(), ["no picture of a known kind", "400000000 pixels", "no bytes"], strict=True):
        with pytest.raises(ShardError, match=f"row {int(key)} .*{reason}"):
            saved.image(key)


def test_dataset_that_points_to_files_elsewhere_does_not_have_them_read(tmp_path):
    Pictures.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    saved = SavedDataset(save(tmp_path / "d", [{"bytes": None, "path": str(tmp_path / "outside.png")}], ["a"]))
    try:
        picture = saved.image("000000000")
    except ShardError:
        return
    assert picture.size == (4, 4)  # saved by the library with its bytes


def test_column_of_several_captions_a_picture_is_refused_by_name(tmp_path):
    features = Features({"image": Image(), "caption": List(Value("string"))})
    rows = Dataset.from_dict({"image": [png(COLOURS[0])], "caption": [["a man", "two men"]]}, features=features)
    rows.save_to_disk(tmp_path / "d")
    with pytest.raises(ShardError, match="no texts in the column caption but List"):
        SavedDataset(tmp_path / "d")
    with pytest.raises(ShardError, match="no texts in the column caption but List"):
        RowStream(str(tmp_path / "d"), 10)


def test_splits_and_missing_columns_are_told(tmp_path):
    rows = Dataset.from_dict({"text": ["a"]})
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ShardError, match="splits train, test"):
        SavedDataset(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "rows")
    with pytest.raises(ShardError, match="one column of pictures, found 0"):
        SavedDataset(tmp_path / "rows")
    with pytest.raises(ShardError, match="cannot be read"):
        SavedDataset(tmp_path)


def test_fingerprint_is_of_the_contents_wherever_they_are(tmp_path):
    first = SavedDataset(save(tmp_path / "a", [png(c) for c in COLOURS], CAPTIONS)).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    (tmp_path / "moved" / "cache-0123.arrow").write_bytes(b"of a map that somebody made of it")
    assert SavedDataset(tmp_path / "moved").fingerprint == first
    save(tmp_path / "b", [png(c) for c in COLOURS[::-1]], CAPTIONS)
    save(tmp_path / "c", [png(c) for c in COLOURS], ["red", "green", "blue"])
    found = {SavedDataset(tmp_path / name).fingerprint for name in "abc"}
    assert len(found) == 3 and first in found


def test_fingerprint_is_another_where_the_library_only_knows_what_made_it(tmp_path):
    for name, number in (("a", 3), ("b", 2)):
        save(tmp_path / name, [png(c) for c in COLOURS[:number]], CAPTIONS[:number])
    shutil.copy(tmp_path / "a" / "state.json", tmp_path / "b")
    assert SavedDataset(tmp_path / "a").fingerprint != SavedDataset(tmp_path / "b").fingerprint


@pytest.mark.parametrize(("index", "deduplicate"), [(False, False), (True, False), (True, True)])
def test_run_does_not_go_on_with_another_of_as_many_rows(tmp_path, index, deduplicate):
    save(tmp_path / "a", [png(c) for c in COLOURS], CAPTIONS)
    save(tmp_path / "b", [png(c) for c in COLOURS[::-1]], CAPTIONS)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    keys = SavedDataset(tmp_path / "a").keys()
    columns = {"key": keys, "role": ["distinct"] * 3, "repeats": [1, 2, 3], "group": ["x", "x", "y"]}
    pq.write_table(pa.table(columns), tmp_path / "index.parquet")

    def opened(name) -> tuple[Config, str]:
        data = DataConfig(path=str(tmp_path / name), index=str(tmp_path / "index.parquet") if index else None)
        config = Config(run_dir="run", data=data, mitigation=MitigationConfig(deduplicate=deduplicate))
        return config, open_data(config)[1].fingerprint()

    config, found = opened("a")
    state = {"config": json.loads(json.dumps(asdict(config))), "data": found}
    require_same(tmp_path, state, *opened("moved"))
    with pytest.raises(CheckpointError, match="the samples of data.path and data.index are others"):
        require_same(tmp_path, state, *opened("b"))
