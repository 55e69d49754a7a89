"""What a run writes down, read back from every place that it is written to."""

import json
import struct
import time
from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, TrainConfig
from memfilter.data.shards import ShardError
from memfilter.filter import EmptySteps
from memfilter.stats import HISTOGRAM_EDGES
from memfilter.train.loop import train
from memfilter.train.tracking import BadSamples

EVERY = 16


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """A run sets WANDB_MODE for its process."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def config_of(run_dir, data, **log):
    return Config(
        run_dir=str(run_dir),
        data=DataConfig(path=str(data)),
        filter=FilterConfig(tau=2.5),
        train=TrainConfig(samples=48, batch_size=4, learning_rate=1e-4, ema_half_life=0),
        log=LogConfig(every=EVERY, validation_prompts=1, validation_steps=1, **log),
    )


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, scenes_dir):
    """A run with everything on, in an environment that would turn W&B off."""
    run_dir = tmp_path_factory.mktemp("runs") / "tracked"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MODE": "disabled", "DISABLED": "true", "PROJECT": "other", "NAME": "other"}.items():
            patch.setenv(f"WANDB_{name}", value)
        train(config_of(run_dir, scenes_dir, wandb="offline", tensorboard=True, validation_every=24), progress=False)
    return run_dir


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def records(run_dir):
    """What W&B has written down, by kind."""
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    for _ in range(300):  # a process of its own writes the file, and may lag behind
        found = defaultdict(list)
        for record in parse(path.read_bytes()):
            kind = record.WhichOneof("record_type")
            found[kind].append(getattr(record, kind))
        if "exit" in found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def parse(content):
    """Records of a LevelDB log (blocks of 32 KiB, records whole or in parts) behind 7 bytes."""
    assert struct.unpack("<4sHB", content[:7])[:2] == (b":W&B", 0xBEE1)
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no header fits: padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(content):
            yield Record.FromString(parts)
            parts = b""


@pytest.fixture(scope="module")
def history(tracked):
    """samples -> what W&B knows of them, pictures, tables and histograms as dicts"""
    steps = {}
    for record in records(tracked)["history"]:
        found = {}
        for item in record.item:
            name, *part = item.nested_key
            if part:
                found.setdefault(name, {})[part[0]] = json.loads(item.value_json)
            else:
                found[name] = json.loads(item.value_json)
        steps[found.pop("_step")] = found
    return steps


def test_wandb_offline_holds_what_stands_in_the_metrics(tracked, history):
    rows = metrics_of(tracked)
    assert [row["samples"] for row in rows] == [16, 32, 48]
    for row in rows:
        shown = history[row.pop("samples")]
        drawn = {name for name, value in row.items() if isinstance(value, dict)}
        assert "filter/drop_rate" in row and "loss" in row and "filter/norm_histogram" in drawn
        for name, value in row.items():
            if name not in drawn:
                assert shown[name] == pytest.approx(value), name
        for name in drawn:
            assert shown[name]["_type"] == "histogram"
            pairs = zip(shown[name]["bins"], shown[name]["values"], strict=False)
            assert {f"{edge:.4g}": count for edge, count in pairs if count} == row[name]


def test_wandb_offline_holds_the_validation_pictures_and_the_table_of_what_was_dropped(tracked, history):
    (folder,) = tracked.glob("wandb/offline-run-*/files")
    assert {step for step, items in history.items() if "validation" in items} == {24, 48}
    for step in (24, 48):
        pictures = history[step]["validation"]
        assert pictures["count"] == 2
        assert pictures["captions"] == (tracked / "validation" / "prompts.txt").read_text().splitlines()
        assert all((folder / name).is_file() for name in pictures["filenames"])
    shown = history[48]["filter/dropped_most"]
    assert shown["_type"] == "table-file"
    table = json.loads((folder / shown["path"]).read_text())
    audit = pq.read_table(tracked / "audit.parquet").to_pylist()
    dropped = defaultdict(int)
    for row in audit:
        dropped[row["key"]] += not row["keep"]
    found = {row[table["columns"].index("key")]: row[table["columns"].index("dropped")] for row in table["data"]}
    assert found == {key: count for key, count in dropped.items() if count}


def test_configuration_name_and_outcome_reach_wandb(tracked):
    found = records(tracked)
    (run,), (end,) = found["run"], found["exit"]
    assert (run.display_name, run.project, end.exit_code) == ("tracked", "memfilter", 0)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["filter"]["tau"] == 2.5


def test_tensorboard_holds_what_stands_in_the_metrics(tracked):
    events = EventAccumulator(str(tracked / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0, "images": 0})
    events.Reload()
    curves, drawn = defaultdict(dict), defaultdict(dict)
    for row in metrics_of(tracked):
        samples = row.pop("samples")
        for name, value in row.items():
            (drawn if isinstance(value, dict) else curves)[name][samples] = value
    tags = events.Tags()
    assert set(tags["scalars"]) == curves.keys() and set(tags["histograms"]) == drawn.keys()
    for name, curve in curves.items():
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(curve, rel=1e-5), name
    for name, curve in drawn.items():
        for event in events.Histograms(name):
            found, counts = event.histogram_value, curve[event.step]
            assert found.num == sum(found.bucket) == sum(counts.values())
            lower = [float(edge) for edge in counts]
            assert found.min == pytest.approx(min(lower), rel=1e-3)
            assert sum(count * edge for count, edge in zip(counts.values(), lower, strict=True)) < found.sum
    assert len(events.Images("validation/0")) == len(events.Images("validation/1")) == 2


def test_histograms_hold_every_norm_of_the_audit_once(tracked):
    rows, audit = metrics_of(tracked), pq.read_table(tracked / "audit.parquet").to_pydict()
    edges = [*HISTOGRAM_EDGES, np.inf]
    for row in rows:
        inside = [row["samples"] - EVERY <= position < row["samples"] for position in audit["position"]]
        norms = np.array(audit["text_norm"])[inside]
        counts = {f"{edge:.4g}": int(n) for edge, n in zip(edges, np.histogram(norms, edges)[0], strict=False) if n}
        assert row["filter/norm_histogram"] == counts
        assert sum(counts.values()) == row["filter/checked"]
        by_bin = sum(sum(row.get(f"filter/norm_histogram/bin{b}", {}).values()) for b in range(10))
        by_role = sum(sum(row.get(f"filter/norm_histogram_{role}", {}).values()) for role in ("duplicates", "distinct"))
        assert by_bin == by_role == row["filter/checked"]


@pytest.mark.parametrize("environment", ["online", "offline", "dryrun"])
def test_environment_does_not_turn_wandb_on(tmp_path, scenes_dir, monkeypatch, environment):
    monkeypatch.setenv("WANDB_MODE", environment)
    config = config_of(tmp_path / "run", scenes_dir, wandb="disabled")
    config.train.samples = 4
    train(config, progress=False)
    assert not (tmp_path / "run" / "wandb").exists()


def test_run_that_fails_leaves_what_it_knows_in_files_that_can_be_read(tmp_path, scenes_dir):
    config = config_of(tmp_path / "run", scenes_dir, tensorboard=True, wandb="offline")
    config.filter = FilterConfig(tau=1e-6, max_empty_steps=4)
    config.data.caption_dropout, config.log.every = 0.0, 8
    with pytest.raises(EmptySteps):
        train(config, progress=False)
    rows, audit = metrics_of(tmp_path / "run"), pq.read_table(tmp_path / "run" / "audit.parquet")
    assert [row["samples"] for row in rows] == [8]
    assert audit["position"].to_pylist() == list(range(16))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "audit.parquet", "config.yaml", "metrics.jsonl", "tensorboard", "wandb"
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [8]
    assert [end.exit_code for end in records(tmp_path / "run")["exit"]] == [1]


def batch(*reasons, start=0):
    count = len(reasons)
    return {"position": list(range(start, start + count)), "key": [f"k{i}" for i in range(count)], "bad": list(reasons)}


def test_bad_samples_are_listed_as_they_come_and_one_more_than_allowed_ends_the_run(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    bad = BadSamples(path, allowed=2.5)
    bad.add(batch(None, None))
    assert not path.exists()
    bad.add(batch(None, "sample 'k1' is broken", "sample 'k2' is broken"))
    with pytest.raises(ShardError) as error:
        bad.add(batch("sample 'k0' is broken", None, start=3))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["position"], row["key"], row["bad"]) for row in rows] == [
        (1, "k1", "sample 'k1' is broken"), (2, "k2", "sample 'k2' is broken"), (3, "k0", "sample 'k0' is broken")
    ]  # fmt: skip
    first, *listed = str(error.value).splitlines()
    assert first.startswith("3 samples") and "data.max_bad_share" in first
    assert listed == [row["bad"] for row in rows]


def test_list_of_bad_samples_is_cut_and_names_each_once(tmp_path):
    bad = BadSamples(tmp_path / "bad_samples.jsonl", allowed=11)
    bad.add(batch(*["sample 'a' is broken"] * 4))
    with pytest.raises(ShardError) as error:
        bad.add(batch(*(f"sample {i} is broken" for i in range(14))))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("18 samples") and len(lines) == 12
    assert lines[1] == "sample 'a' is broken" and "and 5 more" in lines[-1] and "bad_samples.jsonl" in lines[-1]
