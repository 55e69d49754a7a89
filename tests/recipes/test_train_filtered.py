"""The command: what a run leaves. How it refuses is in test_bad_input."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import launching
import pyarrow.parquet as pq
import pytest
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard

from memfilter.arguments import parse

SETTINGS = (
    "--train.samples=64", "--train.accumulation=2", "--filter.tau=2.5", "--log.every=16", "--log.wandb=offline"
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scenes_dir):
    run = tmp_path_factory.mktemp("runs") / "run"
    launching.run([f"--run_dir={run}", f"--data.path={scenes_dir}", *SETTINGS], processes=None)
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
    assert not list(finished.glob(".*"))  # nothing half-written


def test_configuration_of_a_run_is_there_to_be_run_again(finished, scenes_dir):
    again = parse([f"--config={finished / 'config.yaml'}"])
    assert (again.run_dir, again.data.path, again.filter.tau) == (str(finished), str(scenes_dir), 2.5)
    assert again == parse([f"--run_dir={finished}", f"--data.path={scenes_dir}", *SETTINGS])


def test_card_and_page_say_what_the_summary_says(finished):
    summary = json.loads((finished / "summary.json").read_text())
    card = ModelCard.load(finished / "pipeline" / "README.md").text
    for group, words in (("duplicates", "known duplicates"), ("distinct", "known distinct samples")):
        assert f"| share dropped of {words} | {100 * summary[f'filter/drop_rate_{group}']:.1f}% |\n" in card
    dropped = {row["key"] for row in pq.read_table(finished / "audit.parquet").to_pylist() if not row["keep"]}
    assert (finished / "dropped.html").read_text().count("<li>") == min(len(dropped), 50) > 0


def test_second_run_into_the_same_directory_is_refused_and_loses_nothing(finished, scenes_dir):
    before = (finished / "metrics.jsonl").read_bytes()
    output = launching.run([f"--run_dir={finished}", f"--data.path={scenes_dir}"], processes=None, code=1)
    assert "is not empty" in output
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_help_names_every_section_within_three_seconds():
    command = [sys.executable, "train_filtered.py", "--help"]
    subprocess.run(command, cwd=launching.ROOT, capture_output=True)  # the first call compiles and reads from disk
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=launching.ROOT, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    took = time.perf_counter() - start
    others_had = int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9  # the cores, when it wanted one
    assert took - others_had < 3
    assert process.wait() == 0
    assert all(
        f"--{name}" in output for name in ("model.path", "data.path", "filter.tau", "train.samples", "log.every")
    )
