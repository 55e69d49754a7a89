"""Runs whose samples are judged by what all encounters with them say: what is written down, and what ends them."""

import importlib.util
import json
import math
import shutil
import signal
from pathlib import Path

import launching
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file

from memfilter.arguments import parse
from memfilter.cli import main as memfilter
from memfilter.data import sampler
from memfilter.data.experiment import Experiment, prepare_scenes
from memfilter.data.feed import Feed
from memfilter.data.sampler import SampleStream
from memfilter.data.shards import Shards
from memfilter.filter import NonFiniteNorm
from memfilter.keys import KeyTable
from memfilter.train.loop import Trainer, train

SAMPLES, BATCH, EVERY, CAPTION_DROPOUT = 180, 4, 20, 0.05
STREAMED = "--data.streaming=webdataset"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd1", "sd1")


@pytest.fixture(scope="module")
def calibration(base, scenes_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration") / "calibration.json"
    settings = [f"--model.path={base}", f"--data.path={scenes_dir}", f"--out={out}", "--keys=24", "--looks=20"]
    assert memfilter(["calibrate", *settings]) == 0
    return out


@pytest.fixture(scope="module")
def index(scenes_dir, tmp_path_factory):
    """Of six samples that come again and again."""
    out = tmp_path_factory.mktemp("index") / "index.parquet"
    keys, roles = Shards.open(scenes_dir).keys()[:6], ["duplicate"] * 2 + ["distinct"] * 4
    columns = {"key": keys, "role": roles, "repeats": [10] * 6}
    pq.write_table(pa.table(columns), out)
    return out


@pytest.fixture(scope="module")
def settings(base, scenes_dir, index, calibration):
    """Factory: command line of a run under evidence with a low bar."""

    def make(run, *more) -> list[str]:
        given = [
            f"--run_dir={run}", f"--model.path={base}", f"--data.path={scenes_dir}", f"--data.index={index}",
            "--filter.method=evidence", f"--filter.calibration={calibration}", "--filter.false_flag_rate=0.6",
            "--filter.half_life=2", "--filter.window=20", f"--data.caption_dropout={CAPTION_DROPOUT}",
            f"--train.samples={SAMPLES}", f"--train.batch_size={BATCH}", "--train.learning_rate=1e-4",
            "--train.ema_half_life=50", "--log.every=20", "--log.gallery=4",
        ]  # fmt: skip
        replaced = {setting.partition("=")[0] for setting in more} | ({"--data.index"} if STREAMED in more else set())
        return [setting for setting in given if setting.partition("=")[0] not in replaced] + list(more)

    return make


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_filtered", launching.ROOT / "train_filtered.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(script, capfd, monkeypatch):
    """The script without the start of a process: (exit code, what it calls errors). A traceback fails the test."""
    monkeypatch.setenv("WANDB_MODE", "disabled")  # a run sets it for its process

    def run(arguments):
        code = script.main([str(argument) for argument in arguments])
        lines = capfd.readouterr().err.splitlines()
        return code, [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]

    return run


def run(command_line) -> dict:
    return train(parse(command_line), progress=False)


def audit(run) -> list[dict]:
    return pq.read_table(run / "audit.parquet").to_pylist()


def checkpoints(run) -> list[Path]:
    """Oldest first."""
    return sorted((run / "checkpoints").glob("[0-9]*"))


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


# the model learns, and the reference, that of the beginning, finds that it knows everything better and better
UNFOLLOWED = ("--train.learning_rate=1e-3", "--filter.window=100000", "--filter.half_life=4")

# to the end, at once and after a kill

CHECKPOINTS = (f"--checkpoint.every={EVERY}", "--checkpoint.keep=100")


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """Factory: whole(workers) is the directory of a run without interruptions."""
    runs = {}

    def make(workers: int = 0) -> Path:
        if workers not in runs:
            runs[workers] = tmp_path_factory.mktemp("whole") / "run"
            run(settings(runs[workers], *CHECKPOINTS, f"--data.workers={workers}"))
        return runs[workers]

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_run_that_is_killed_and_goes_on_ends_in_the_same_weights_verdicts_and_flags(settings, whole, tmp_path, workers):
    killed, wanted = tmp_path / "run", whole(workers)
    command_line = settings(killed, *CHECKPOINTS, f"--data.workers={workers}")
    process = launching.start(command_line, processes=None)
    launching.wait_until(lambda: len(checkpoints(killed)) >= 4, process)
    launching.kill(process)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed / "summary.json").exists()
    for partial in (killed / "checkpoints").glob(".*"):
        shutil.rmtree(partial)
    state = json.loads((checkpoints(killed)[-1] / "state.json").read_text())
    assert state["samples"] < SAMPLES - EVERY and len(state["drawn"]) == 2 * workers
    run([*command_line, "--checkpoint.resume=true"])

    found, expected = weights(killed), weights(wanted)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert pq.read_table(killed / "audit.parquet").equals(pq.read_table(wanted / "audit.parquet"))
    metrics = [launching.lines(each / "metrics.jsonl") for each in (killed, wanted)]
    assert all(row.pop("samples_per_second") for rows in metrics for row in rows) and metrics[0] == metrics[1]
    assert [path.name for path in checkpoints(killed)] == [path.name for path in checkpoints(wanted)]
    for path in checkpoints(killed):
        tables = [place / path.name / "evidence.safetensors" for place in (path.parent, wanted / "checkpoints")]
        assert tables[0].read_bytes() == tables[1].read_bytes()
    assert load_file(tables[0])["totals"].min() > 0  # flags and re-admissions


def test_feed_that_had_come_to_its_end_is_at_its_end_when_it_goes_on():
    flagged = {17}
    settings = {"end": 20, "forward_samples": 4, "passes_over": lambda positions: np.isin(positions, list(flagged))}
    feed = Feed(0, **settings)
    assert len(list(feed)) == 4 and feed.rest == [17]  # all of it read ahead
    for _ in range(3):
        feed.taken()
    flagged.clear()  # meanwhile re-admitted, for which it is too late
    again = Feed(12, **settings, pending=feed.state())
    assert list(again) == [[12, 13, 14, 15]] and again.rest == [17]


def test_audit_has_a_row_for_each_sample_of_the_stream_and_says_why_there_was_no_look(whole, scenes_dir, index):
    rows, stream = audit(whole()), SampleStream(Experiment.read(index).virtual(), seed=0)
    experiment = Experiment.read(index)
    for row in rows:
        position = row["position"]
        assert row["key"] == experiment.keys[stream.row(position)]
        assert row["duplicate"] == experiment.duplicate[stream.row(position)]
        assert row["timestep"] == sampler.timestep(0, position, 1000)
        if row["loss"] is None:  # passed over
            assert (row["skipped"], row["keep"]) == ("flagged", False)
        elif sampler.caption_dropped(0, position, CAPTION_DROPOUT):
            assert row["skipped"] == "caption dropped" and row["evidence"] is None
        elif row["timestep"] >= 700:
            assert row["skipped"] == "high noise"
        elif row["skipped"] is not None:
            assert row["skipped"] == ("no evidence" if row["keep"] else "flagged")
        looked = row["skipped"] is None
        assert [row[name] is not None for name in ("text_norm", "p_value", "cosine", "gain")] == [looked] * 4
    positions = [row["position"] for row in rows]
    assert positions == sorted(set(positions))
    # what is left at the end is too little for a step
    left, shown = set(range(SAMPLES)) - set(positions), [row["position"] for row in rows if row["loss"] is not None]
    assert len(left) < BATCH and min(left, default=SAMPLES) > max(shown)
    assert {row["skipped"] for row in rows} == {None, "flagged", "caption dropped", "high noise", "no evidence"}
    assert launching.lines(whole() / "metrics.jsonl")[-1]["samples"] == SAMPLES


def test_report_in_the_midst_of_a_step_loses_no_row(settings, tmp_path):
    step = ("--train.samples=120", "--train.accumulation=3", f"--log.every={BATCH}")
    run(settings(tmp_path / "run", *step))
    rows = audit(tmp_path / "run")
    shown = [row for row in rows if row["loss"] is not None]
    assert len(shown) % (3 * BATCH) == 0 < len(shown) and len(rows) > 120 - 3 * BATCH
    assert all(row["evidence"] is not None for row in shown if row["skipped"] != "caption dropped")


def test_run_that_fails_in_the_midst_of_a_step_says_why_and_keeps_what_was_weighed(settings, tmp_path):
    trainer = Trainer(parse(settings(tmp_path / "run", "--train.samples=120", "--train.accumulation=3")))
    objective, forwards = trainer.objective, []

    def broken(batch):
        forwards.append(batch)
        if len(forwards) == 5:  # the second of its step
            with torch.no_grad():
                next(trainer.engine.model.parameters()).fill_(math.nan)
        return objective(batch)

    trainer.objective = broken
    with pytest.raises(NonFiniteNorm, match="samples is not finite"):
        trainer.run(progress=False)
    weighed = [position for batch in forwards[:3] for position in batch["position"]]
    assert [row["position"] for row in audit(tmp_path / "run")] == weighed


def test_metrics_tell_how_many_are_flagged_readmitted_and_looked_at(whole):
    run_dir, rows = whole(), launching.lines(whole() / "metrics.jsonl")
    found = audit(run_dir)
    assert sum(row["filter/seen"] for row in rows) == len(found)
    assert sum(row["filter/dropped"] for row in rows) == sum(not row["keep"] for row in found)
    passes = sum(row["filter/seen"] * row.get("filter/pass_share", 0) for row in rows)
    assert passes == pytest.approx(sum(row["text_norm"] is not None for row in found))
    for row in rows:
        assert row["filter/keys_flagged"] == row["filter/flags"] - row["filter/readmissions"]
    assert rows[-1]["filter/keys_flagged"] > 0 and rows[-1]["filter/readmissions"] > 0
    tables = {int(path.name): load_file(path / "evidence.safetensors") for path in checkpoints(run_dir)}
    flagged = {samples: table["flagged"].sum() for samples, table in tables.items()}
    both = [row for row in rows if row["samples"] in flagged]
    assert both and all(row["filter/keys_flagged"] == flagged[row["samples"]] for row in both)
    # a key that is trained on again was re-admitted
    keep = {key: [row["keep"] for row in found if row["key"] == key] for key in {row["key"] for row in found}}
    back = sum((~np.array(each[:-1]) & np.array(each[1:])).sum() for each in keep.values())
    assert 0 < back <= rows[-1]["filter/readmissions"]


# other rules


def shown_by(trainer: Trainer) -> tuple[list[int], list[int]]:
    """Positions that are trained on, and the size of every forward of the denoiser; both grow with the run."""
    positions, sizes, objective = [], [], trainer.objective
    trainer.objective = lambda batch: positions.extend(batch["position"]) or objective(batch)
    trainer.objective.noise_scheduler = objective.noise_scheduler
    trainer.pipeline.unet.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    return positions, sizes


def test_sightings_train_on_every_key_so_often_and_make_no_null_pass(settings, tmp_path, index):
    more = ("--filter.method=sightings", "--filter.sightings=3", "--train.samples=80", "--train.batch_size=1")
    trainer = Trainer(parse(settings(tmp_path / "run", *more, "--data.caption_dropout=0")))
    positions, sizes = shown_by(trainer)
    trainer.run(progress=False)
    experiment, seen, kept = Experiment.read(index), {}, []
    stream = SampleStream(experiment.virtual(), seed=0)
    for position in range(80):
        row = stream.row(position)
        seen[row] = seen.get(row, 0) + 1
        kept.append(seen[row] <= 3)
    rows = audit(tmp_path / "run")
    assert [row["position"] for row in rows] == list(range(80))
    assert [row["keep"] for row in rows] == kept
    assert {row["skipped"] for row in rows if not row["keep"]} == {"flagged"}
    assert positions == [position for position in range(80) if kept[position]]
    assert sizes == [1] * len(positions)
    last = launching.lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["filter/keys_flagged"] == sum(count >= 3 for count in seen.values())
    assert "filter/pass_share" not in last


def test_oracle_trains_on_no_duplicate_and_makes_no_null_pass(settings, tmp_path, index):
    trainer = Trainer(parse(settings(tmp_path / "run", "--filter.method=oracle")))
    positions, sizes = shown_by(trainer)
    summary = trainer.run(progress=False)
    experiment = Experiment.read(index)
    stream = SampleStream(experiment.virtual(), seed=0)
    duplicates = {position for position in range(SAMPLES) if experiment.duplicate[stream.row(position)]}
    distinct = [position for position in range(SAMPLES) if position not in duplicates]
    assert positions == distinct[: len(positions)] and len(distinct) - len(positions) < BATCH
    assert sizes == [BATCH] * (len(positions) // BATCH)
    rows = audit(tmp_path / "run")
    assert {row["position"] for row in rows} == duplicates
    assert all((row["keep"], row["skipped"], row["duplicate"]) == (False, "flagged", True) for row in rows)
    drop_rates = [summary.get(f"filter/drop_rate{group}") for group in ("_duplicates", "_distinct", "")]
    assert drop_rates == [1, 0, pytest.approx(len(duplicates) / (len(duplicates) + len(positions)))]


def test_timestep_rule_drops_what_is_improbable_at_its_timestep(settings, tmp_path):
    rate, still = 0.33, "--train.learning_rate=1e-5"
    run(settings(tmp_path / "run", "--filter.method=timestep", f"--filter.false_positive_rate={rate}", still))
    rows = audit(tmp_path / "run")
    assert [row["position"] for row in rows] == list(range(SAMPLES))
    looked = [row for row in rows if row["text_norm"] is not None]
    assert [row["p_value"] is not None for row in rows] == [row["text_norm"] is not None for row in rows]
    assert [not row["keep"] for row in looked] == [row["p_value"] <= rate for row in looked]
    assert 0.1 < np.mean([not row["keep"] for row in looked]) < 0.6
    others = [row for row in rows if row["text_norm"] is None]
    assert others and all(row["keep"] and row["skipped"] == "caption dropped" for row in others)


def test_tau_writes_down_what_it_checked_and_nothing_of_evidence(settings, tmp_path):
    run(settings(tmp_path / "run", "--filter.method=tau", "--filter.tau=1.2", "--train.samples=80"))
    rows = audit(tmp_path / "run")
    checked = [position for position in range(80) if not sampler.caption_dropped(0, position, CAPTION_DROPOUT)]
    assert [row["position"] for row in rows] == checked and len(checked) < 80
    assert [row["keep"] for row in rows] == [row["text_norm"] < np.float32(1.2) for row in rows]
    assert {row["keep"] for row in rows} == {True, False}
    of_evidence = ("p_value", "evidence", "loss", "cosine", "gain", "skipped")
    assert all(row[name] is None for row in rows for name in of_evidence)


# what shares evidence


@pytest.mark.parametrize("key", ["sample", "caption", "content"])
def test_two_samples_of_one_caption_or_one_group_share_evidence(settings, scenes_dir, tmp_path, key):
    shards, data = Shards.open(scenes_dir), tmp_path / "data"
    data.mkdir()
    names = ["left", "right", "other"]
    captions = ["a cat", "a cat" if key == "caption" else "a dog", "a cow"]
    for name, caption, source in zip(names, captions, shards.keys(), strict=False):
        shards.image(source).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text(caption)
    columns = {"key": names, "role": ["distinct"] * 3, "repeats": [10] * 3, "group": ["both", "both", "other"]}
    pq.write_table(pa.table(columns), data / "index.parquet")
    more = (f"--filter.key={key}", f"--data.path={data}", f"--data.index={data / 'index.parquet'}")
    one_by_one = ("--train.batch_size=1", "--train.samples=75", "--filter.replace=false", "--data.caption_dropout=0")
    run(settings(tmp_path / "run", *more, *one_by_one))
    rows = [row for row in audit(tmp_path / "run") if row["key"] != "other"]
    # a sample at high noise adds nothing: what its key has is what the sample before it left
    after = [(before, row) for before, row in zip(rows, rows[1:], strict=False) if row["timestep"] >= 700]
    pairs = [(before["evidence"], row["evidence"]) for before, row in after if before["key"] != row["key"]]
    assert len({evidence for evidence, _ in pairs}) > 2
    assert all(before == found for before, found in pairs) == (key != "sample")


# what is not judged


def test_picture_that_cannot_be_read_is_excluded_and_adds_no_evidence(settings, scenes_dir, tmp_path):
    shards, data = Shards.open(scenes_dir), tmp_path / "data"
    data.mkdir()
    keys = shards.keys()[:6]
    for key in keys:
        shards.image(key).save(data / f"{key}.png")
        (data / f"{key}.txt").write_text(shards.caption(key))
    (data / f"{keys[2]}.png").write_bytes(b"no picture")
    columns = {"key": keys, "role": ["distinct"] * 6, "repeats": [10] * 6}
    pq.write_table(pa.table(columns), data / "index.parquet")
    more = (f"--data.path={data}", f"--data.index={data / 'index.parquet'}", "--data.max_bad_share=0.5")
    summary = run(settings(tmp_path / "run", *more, "--train.samples=120", "--checkpoint.every=40"))
    bad = [row for row in audit(tmp_path / "run") if row["key"] == keys[2]]
    assert len(bad) > 10 and summary["filter/excluded"] == len(bad)
    assert all((row["keep"], row["skipped"], row["evidence"]) == (False, "excluded", None) for row in bad)
    assert all(row[name] is None for row in bad for name in ("text_norm", "p_value", "cosine", "gain"))
    used = load_file(checkpoints(tmp_path / "run")[-1] / "evidence.safetensors")["used"].tolist()
    assert set(used) == set(KeyTable().slots([key for key in keys if key != keys[2]]).tolist())
    assert all(row["loss"] is None for row in bad)  # that of what stands in its place is none of its own


def test_stream_that_cannot_be_looked_ahead_in_masks_what_is_flagged(settings, tmp_path):
    data = prepare_scenes(tmp_path / "scenes", seed=6, duplicates=0, distinct=6)
    summary = run(settings(tmp_path / "run", f"--data.path={data}", STREAMED, *UNFOLLOWED))
    rows = audit(tmp_path / "run")
    assert [row["position"] for row in rows] == list(range(SAMPLES))
    assert all(row["loss"] is not None for row in rows)
    flagged = [row for row in rows if row["skipped"] == "flagged"]
    assert len(flagged) > 20 and not any(row["keep"] for row in flagged)
    # a row without its caption changes nothing of its key: it is kept if the key's rows around it are, and only then
    silent, masked = [row for row in rows if row["skipped"] == "caption dropped"], []
    for row in silent:
        others = [other for other in rows if other["key"] == row["key"] and other not in silent]
        before = [other["keep"] for other in others if other["position"] < row["position"]][-1]
        after = [other["keep"] for other in others if other["position"] > row["position"]][0]
        assert row["keep"] == before or before != after
        masked += [row] if not (before or after) else []
    assert 0 < len(masked) < len(silent)
    assert summary["filter/seen"] == SAMPLES and summary["filter/dropped"] >= len(flagged)


# what ends a run


@pytest.mark.parametrize("rule", ["evidence", "sightings"])
def test_run_in_which_everything_is_flagged_ends_and_says_what_to_do(command, settings, tmp_path, rule):
    more = {
        "evidence": UNFOLLOWED,
        "sightings": ("--filter.method=sightings", "--filter.sightings=2"),
    }[rule]
    code, errors = command(settings(tmp_path / "run", *more, "--train.samples=2000", "--filter.max_empty_steps=20"))
    assert code == 1
    (error,) = errors
    assert "everything is flagged" in error and "audit.parquet" in error
    assert {"evidence": "filter.false_flag_rate", "sightings": "filter.sightings"}[rule] in error
    assert any(row["skipped"] == "flagged" for row in audit(tmp_path / "run"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--filter.calibration=null"], "filter.method=evidence needs filter.calibration: make one with `memfilter "),
        (["--filter.calibration=nowhere.json"], "filter.calibration: nowhere.json is no calibration ("),
        (["--data.resolution=32"], "filter.calibration was made with resolution 16, the run has 32: make another one"),
        (["--filter.unit=rms"], "filter.calibration was made with unit 'l2', the run has 'rms': make another one"),
        (["--filter.false_flag_rate=0.001"], "filter.false_flag_rate=0.001 needs at least 999 clean keys"),
        (["--filter.method=timestep", "--filter.false_positive_rate=0.001"], "filter.false_positive_rate=0.001 needs"),
        (["--filter.key=content"], "filter.key=content needs a column group in the index"),
        (["--filter.key=content", STREAMED], "data.streaming=webdataset and filter.key=content exclude each other"),
        (["--filter.method=oracle", STREAMED], "data.streaming=webdataset and filter.method=oracle exclude each other"),
    ],
)
def test_what_cannot_be_judged_is_told_in_one_line_before_the_run(command, settings, tmp_path, more, message):
    code, errors = command(settings(tmp_path / "run", *more))
    assert code == 1
    (error,) = errors
    assert error.startswith(message)
    assert not (tmp_path / "run").exists()


def test_calibration_of_another_prediction_type_is_refused(command, settings, tmp_path):
    other = tiny.save_pipeline(tmp_path / "v", "sd1", "v_prediction")
    code, errors = command(settings(tmp_path / "run", f"--model.path={other}"))
    assert code == 1
    found = "prediction_type 'epsilon', the run has 'v_prediction'"
    assert errors == [f"filter.calibration was made with {found}: make another one"]


def test_calibration_of_other_weights_is_refused(command, settings, tmp_path):
    other = tiny.save_pipeline(tmp_path / "other", "sd1", seed=1)
    code, errors = command(settings(tmp_path / "run", f"--model.path={other}"))
    assert code == 1
    (error,) = errors
    assert error.startswith("filter.calibration was made with weights '") and error.endswith(": make another one")


def test_oracle_without_an_index_is_refused(command, settings, tmp_path, scenes_dir):
    shutil.copytree(scenes_dir, tmp_path / "data", ignore=shutil.ignore_patterns("index.parquet"))
    arguments = settings(tmp_path / "run", "--filter.method=oracle", f"--data.path={tmp_path / 'data'}")
    code, errors = command([setting for setting in arguments if not setting.startswith("--data.index")])
    assert (code, errors) == (1, ["filter.method=oracle needs an index that tells the duplicates"])
