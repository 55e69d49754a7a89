"""What a run writes down, read back from every place that it is written to."""

import json
import struct
import time
from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, TrainConfig
from memfilter.data.shards import ShardError
from memfilter.filter import EmptySteps, Verdict
from memfilter.stats import HISTOGRAM_EDGES
from memfilter.train.loop import train
from memfilter.train.tracking import Audit, BadSamples, Tracker, keep_lines, require_wandb

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


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(run_dir):
    return lines_of(run_dir / "metrics.jsonl")


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
        "audit", "audit.parquet", "config.yaml", "metrics.jsonl", "tensorboard", "wandb"
    ]  # fmt: skip
    (part,) = (tmp_path / "run" / "audit").iterdir()  # for a run that goes on
    assert pq.read_table(part) == audit
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [8]
    assert [end.exit_code for end in records(tmp_path / "run")["exit"]] == [1]


def test_run_that_fails_lists_the_bad_samples_that_it_met_since_the_last_report(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(48):
        Image.new("RGB", (64, 64), (5 * i, 0, 0)).save(data / f"p{i:02d}.png")
        (data / f"p{i:02d}.txt").write_text("a cat")
        if i % 4 == 0:
            (data / f"p{i:02d}.png").write_bytes(b"broken")
    config = config_of(tmp_path / "run", data)
    config.filter = FilterConfig(tau=1e-6, max_empty_steps=4)
    config.data.max_bad_share, config.data.caption_dropout, config.log.every = 0.5, 0.0, 8
    with pytest.raises(EmptySteps):
        train(config, progress=False)
    audited = pq.read_table(tmp_path / "run" / "audit.parquet")["position"].to_pylist()
    bad = [row["position"] for row in lines_of(tmp_path / "run" / "bad_samples.jsonl")]
    assert sorted(audited + bad) == list(range(16)) and max(bad) >= 8


def batch(*reasons, start=0):
    count = len(reasons)
    return {"position": list(range(start, start + count)), "key": [f"k{i}" for i in range(count)], "bad": list(reasons)}


def test_bad_samples_are_listed_and_one_more_than_allowed_ends_the_run(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    bad = BadSamples(path, allowed=2.5)
    bad.add(batch(None, None))
    assert not path.exists()
    bad.add(batch(None, "sample 'k1' is broken", "sample 'k2' is broken"))
    with pytest.raises(ShardError) as error:
        bad.add(batch("sample 'k0' is broken", None, start=3))
    rows = lines_of(path)
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


def test_bad_samples_go_on_from_a_checkpoint_and_those_before_it_count(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    before = BadSamples(path, allowed=9)
    before.add(batch("a is broken", None, None, "b is broken", "c is broken"))
    before.write(before.take())
    with path.open("a") as file:
        file.write('{"position": 5, "key": "k5", "b')  # killed here
    whole = path.read_text()
    other = BadSamples(path, allowed=2, start=4, writes=False)
    assert path.read_text() == whole
    bad = BadSamples(path, allowed=2, start=4)
    assert [row["bad"] for row in lines_of(path)] == ["a is broken", "b is broken"]
    for each in (other, bad):
        each.add(batch(None, None, start=4))
        assert each.take() == []
        with pytest.raises(ShardError, match="^3 samples"):
            each.add(batch("c is broken", start=6))
    assert [(row["position"], row["bad"]) for row in lines_of(path)] == [
        (0, "a is broken"), (3, "b is broken"), (6, "c is broken")
    ]  # fmt: skip


def test_bad_samples_of_two_ranks_are_listed_by_position_and_count_for_both(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    ranks = [BadSamples(path, allowed=3, writes=writes) for writes in (True, False)]
    for start in (0, 4):
        ranks[0].add(batch(None, f"{start + 1} is broken", start=start))
        ranks[1].add(batch(f"{start + 2} is broken", None, start=start + 2))
    found = [facts for rank in ranks for facts in rank.take()]
    assert not path.exists()
    for rank in ranks:
        with pytest.raises(ShardError, match="^4 samples") as error:
            rank.write(found)
        assert {"1 is broken", "2 is broken", "5 is broken", "6 is broken"} == set(str(error.value).splitlines()[1:])
    assert [row["position"] for row in lines_of(path)] == [1, 2, 5, 6]


CUT_SHORT = ('{"samples": 4, "lo', '{"samples": 4, "loss": 0.5', "{", '{"samples": 1}x', "\0" * 20)


@pytest.mark.parametrize("last", CUT_SHORT)
def test_lines_that_are_wanted_are_kept_and_a_last_one_that_was_cut_short_is_not(tmp_path, last):
    path, lines = tmp_path / "metrics.jsonl", ['{"samples": 1, "loss":0.10}', '{"samples": 2}', '{"samples": 3}']
    content = "\n".join([*lines, last])
    path.write_text(content)

    def wanted(facts):
        return facts["samples"] != 2

    assert keep_lines(path, wanted, writes=False) == [{"samples": 1, "loss": 0.1}, {"samples": 3}]
    assert path.read_text() == content
    assert keep_lines(path, wanted) == [{"samples": 1, "loss": 0.1}, {"samples": 3}]
    assert path.read_text() == f"{lines[0]}\n{lines[2]}\n"
    assert list(tmp_path.iterdir()) == [path]


def test_last_line_that_lacks_no_more_than_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"samples": 1}\n{"samples": 2}')
    assert keep_lines(path, lambda facts: True) == [{"samples": 1}, {"samples": 2}]
    assert path.read_text() == '{"samples": 1}\n{"samples": 2}\n'


def test_lines_of_a_file_that_is_not_there_are_none(tmp_path):
    assert keep_lines(tmp_path / "metrics.jsonl", lambda facts: True) == []
    assert list(tmp_path.iterdir()) == []


def checked(audit, positions, norm=1.0):
    """Adds a forward to the audit, in which every fifth sample of the stream is not checked."""
    count = len(positions)
    check = torch.tensor([position % 5 != 4 for position in positions])
    verdict = Verdict(torch.arange(count), torch.full((count,), norm), torch.ones(count).bool(), check, None)
    audit.add({"position": list(positions), "key": [f"k{p}" for p in positions], "duplicate": [None] * count}, verdict)


def rows_of(path):
    """Position, key and norm of every row."""
    return [(row["position"], row["key"], row["text_norm"]) for row in pq.read_table(path).to_pylist()]


def rows_for(positions, norm=1.0):
    """The same as they must be."""
    return [(position, f"k{position}", norm) for position in positions if position % 5 != 4]


@pytest.fixture
def killed(tmp_path):
    """An audit with checkpoints after 8, 16 and 24 samples that was killed after 32, two reports later."""
    audit = Audit(tmp_path)
    for start in range(0, 32, 4):
        if start in (8, 16, 24):
            audit.cut(start)
        checked(audit, range(start, start + 4))
        audit.write([audit.take()])
    assert sorted(path.name for path in (tmp_path / "audit").iterdir()) == [
        ".000000000024.parquet.partial", "000000000000.parquet", "000000000008.parquet", "000000000016.parquet"
    ]  # fmt: skip
    return audit


@pytest.mark.parametrize("start", [0, 8, 16, 24])
def test_audit_that_goes_on_from_a_checkpoint_has_every_row_once_in_order(killed, tmp_path, start):
    Audit(tmp_path, start, writes=False)
    assert len(list((tmp_path / "audit").iterdir())) == 4
    audit = Audit(tmp_path, start)
    assert sorted(path.name for path in (tmp_path / "audit").iterdir()) == [
        f"{begin:012d}.parquet" for begin in (0, 8, 16) if begin < start
    ]
    for position in range(start, 40, 4):
        checked(audit, range(position, position + 4), norm=2.0)
        if position % 8:
            audit.write([audit.take()])
            audit.cut(position + 4)
    checked(audit, [40, 41], norm=2.0)  # since the last report
    expected = rows_for(range(start)) + rows_for(range(start, 42), norm=2.0)
    for _ in range(2):  # the loop does, before the export and at the end
        audit.close()
        assert rows_of(tmp_path / "audit.parquet") == expected
    assert [rows_of(part) for part in sorted((tmp_path / "audit").iterdir())][0] == expected[:7]
    audit.discard_parts()
    assert [path.name for path in tmp_path.iterdir()] == ["audit.parquet"]


def test_audit_of_a_run_that_checked_nothing_is_a_table_without_rows(tmp_path):
    audit = Audit(tmp_path)
    audit.add({"position": [4], "key": ["k4"], "duplicate": [None]},
              Verdict(*torch.zeros(2, 1), torch.ones(1).bool(), torch.zeros(1).bool(), None))  # fmt: skip
    audit.write([audit.take(), audit.take()])
    audit.cut(8)
    assert list((tmp_path / "audit").iterdir()) == []
    audit.close()
    table = pq.read_table(tmp_path / "audit.parquet")
    assert len(table) == 0 and table.column_names[:2] == ["position", "key"]


def test_tables_of_two_ranks_are_written_in_order_of_position(tmp_path):
    ranks = [Audit(tmp_path), Audit(tmp_path, writes=False)]
    for start in (0, 16):
        for forward in (start, start + 8):
            for rank, audit in enumerate(ranks):
                checked(audit, range(forward + 4 * rank, forward + 4 * rank + 4), norm=float(rank))
        ranks[0].write([audit.take() for audit in reversed(ranks)])
        ranks[0].cut(start + 16)
    ranks[0].close()
    norms = {position: float(position // 4 % 2) for position in range(32)}
    expected = [row for position in range(32) for row in rows_for([position], norms[position])]
    assert rows_of(tmp_path / "audit.parquet") == expected


@pytest.mark.parametrize("checkpoint", [0, 16])
def test_metrics_and_curves_after_the_checkpoint_are_written_again(tmp_path, checkpoint):
    for start, loss in ((0, 1.0), (checkpoint, 2.0)):
        tracker = Tracker(tmp_path, LogConfig(tensorboard=True), {}, start=start)
        for samples in range(start + 8, 33, 8):
            tracker.log(samples, {"loss": loss}, {})
        tracker.close()
    expected = [(samples, 1.0 if samples <= checkpoint else 2.0) for samples in (8, 16, 24, 32)]
    assert lines_of(tmp_path / "metrics.jsonl") == [{"samples": samples, "loss": loss} for samples, loss in expected]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_run_of_an_agent_that_would_not_report_says_so(monkeypatch, caplog, mode):
    require_wandb(LogConfig(wandb=mode))
    assert "agent" not in caplog.text
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    require_wandb(LogConfig(wandb=mode))
    assert f"hears nothing of it with log.wandb={mode}" in caplog.text
