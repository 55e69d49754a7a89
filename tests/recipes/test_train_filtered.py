"""The real commands: what they write, and how they refuse."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).resolve().parents[2]


def train_filtered(*arguments):
    return subprocess.run(
        [sys.executable, "train_filtered.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scenes_dir):
    run = tmp_path_factory.mktemp("runs") / "run"
    done = train_filtered(
        f"--run_dir={run}", f"--data.path={scenes_dir}", "--train.samples=64", "--train.accumulation=2",
        "--filter.tau=2.5", "--log.every=16", "--log.wandb=offline",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run


def test_run_leaves_metrics_audit_summary_and_a_pipeline_of_the_stock_class(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows] == [16, 32, 48, 64]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["samples"] == summary["filter/seen"] == 64
    assert summary["filter/checked"] == sum(row["filter/checked"] for row in rows)
    audit = pq.read_table(finished / "audit.parquet")
    assert audit.num_rows == summary["filter/checked"]
    assert sum(not kept for kept in audit["keep"].to_pylist()) == summary["filter/dropped"] > 0
    pipeline = StableDiffusionPipeline.from_pretrained(finished / "pipeline")
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"
    assert list(finished.glob("wandb/offline-run-*/*.wandb"))


def test_second_run_into_the_same_directory_is_refused_and_loses_nothing(finished, scenes_dir):
    before = (finished / "metrics.jsonl").read_bytes()
    done = train_filtered(f"--run_dir={finished}", f"--data.path={scenes_dir}")
    assert done.returncode == 1
    assert "is not empty" in done.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter.tau=0"], "filter.tau must be a positive number"),
        (["--filter.tau=nan"], "filter.tau must be a positive number"),
        (["--filter.taau=3"], "taau"),
        (["--train.batch_size=0", "--data.caption_dropout=2"], "data.caption_dropout must be at least 0"),
        (["--train.seed=-1"], "train.seed must be at least 0"),
        (["--train.samples=30", "--train.batch_size=8"], "must be a multiple of batch_size x accumulation = 8"),
        (["--train.warmup_samples=8"], "use train.lr_schedule=constant_with_warmup"),
        (["--data.path=/nonexistent"], "no shard found"),
        (["--data.index=/nonexistent"], "data.index"),
        (["--model.path=/nonexistent"], "is not a pipeline directory"),
    ],
)
def test_bad_setting_is_named_and_nothing_is_written(tmp_path, scenes_dir, arguments, message):
    run = tmp_path / "run"
    done = train_filtered(f"--run_dir={run}", f"--data.path={scenes_dir}", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not run.exists()


def test_help_names_every_section_within_three_seconds():
    train_filtered("--help")  # the first call compiles and reads from disk
    start = time.perf_counter()
    done = train_filtered("--help")
    assert time.perf_counter() - start < 3
    assert done.returncode == 0
    assert all(f"--{name}" in done.stdout for name in ("model.path", "data.path", "filter.tau", "train.samples", "log.every"))
