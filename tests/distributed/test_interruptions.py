"""Runs that are killed, asked to stop or out of disk, and those that go on from there: real processes, real signals."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import launching
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from memfilter.data.experiment import Experiment
from memfilter.data.sampler import SampleStream
from memfilter.data.shards import Shards

SAMPLES, BATCH, EVERY, REPORT = 128, 4, 16, 12
STEP = 2 * BATCH  # of two processes
EVERY_STEP = (f"--log.every={STEP}",)
RESUME = "--checkpoint.resume=true"


@pytest.fixture(scope="module")
def settings(tiny_base, scenes_dir):
    """Factory: command line of a run. Its samples come again, and about half of them are dropped."""

    def make(run, *more):
        return [
            f"--run_dir={run}", f"--model.path={tiny_base}", f"--data.path={scenes_dir}", "--data.caption_dropout=0.1",
            "--filter.tau=0.9", f"--train.samples={SAMPLES}", f"--train.batch_size={BATCH}",
            "--train.learning_rate=1e-3", "--train.ema_half_life=50", f"--checkpoint.every={EVERY}",
            f"--log.every={REPORT}", *more,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run without interruptions; all its checkpoints are there to compare with."""
    run = tmp_path_factory.mktemp("whole") / "run"
    launching.run(settings(run, "--checkpoint.keep=100"), processes=None)
    return run


@pytest.fixture(scope="module")
def stopped(settings, tmp_path_factory):
    """A run that SIGTERM ended half-way: (directory, exit code, samples reported before and after it, output)."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with job(settings(run, "--checkpoint.keep=3"), processes=None) as process:
        launching.wait_until(lambda: reported(run) >= 6 * REPORT, process)
        before = reported(run)
        process.terminate()
        after = reported(run)
        output, _ = process.communicate(timeout=launching.PATIENCE)
    return run, process.returncode, before, after, output


@contextmanager
def job(settings, **named):
    """A started script, of which nothing is left afterwards. What belongs to it is of its session, or, since torchrun gives
    every worker one of its own, is told by an environment variable."""
    process = launching.start(settings, MEMFILTER_JOB=(name := uuid4().hex), **named)
    process.job = name
    try:
        yield process
    finally:
        for left in alive(process):
            left.kill()
        process.communicate()


def alive(process) -> list[psutil.Process]:
    found = []
    for other in psutil.process_iter():
        try:
            its = os.getsid(other.pid) == process.pid or other.environ().get("MEMFILTER_JOB") == process.job
            if its and other.status() != psutil.STATUS_ZOMBIE:
                found.append(other)
        except (psutil.Error, ProcessLookupError):
            pass
    return found


def worker(process, rank: int) -> psutil.Process:
    (found,) = (p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == str(rank))
    return found


def kill_when(condition, settings, delay: float = 0, **named) -> str:
    """Starts a run and kills it, so many seconds after the condition came true, or else at a moment when it holds: that
    is looked up while the process stands still. Returns what it printed."""
    with job(settings, processes=None, **named) as process:
        while True:
            launching.wait_until(condition, process)
            time.sleep(delay)
            process.send_signal(signal.SIGSTOP)
            launching.wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, process)
            if condition():
                break
            process.send_signal(signal.SIGCONT)
        launching.kill(process)
        output, _ = process.communicate(timeout=launching.PATIENCE)
    assert process.returncode == -signal.SIGKILL
    return output


def reported(run) -> int:
    """Samples seen at the last report."""
    metrics = run / "metrics.jsonl"
    ended = metrics.read_text().rpartition("\n")[0] if metrics.exists() else ""
    return json.loads(ended.splitlines()[-1])["samples"] if ended else 0


def checkpoints(run) -> list[Path]:
    """Oldest first."""
    return sorted((run / "checkpoints").glob("[0-9]*"))


def newest(run) -> int:
    return max((int(path.name) for path in checkpoints(run)), default=0)


def partials(run) -> list[Path]:
    return list((run / "checkpoints").glob(".*.partial"))


def cut(checkpoint, name) -> None:
    """As if half of the file had not reached the disk."""
    os.truncate(checkpoint / name, (checkpoint / name).stat().st_size // 2)


def same(a, b) -> bool:
    """Bit by bit, whatever is in what."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def content(checkpoint) -> dict:
    """What a run goes on from."""
    state = json.loads((checkpoint / "state.json").read_text())
    found = {name: state[name] for name in ("samples", "filter", "window", "skipped_steps", "ema_steps", "data")}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = load_file(path)
        elif path.name in ("optimizer.bin", "scaler.pt"):
            found[path.name] = torch.load(path, weights_only=True)
    return found


def assert_same_results(run, other) -> None:
    weights = [load_file(r / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors") for r in (run, other)]
    assert same(*weights)
    audits = [pq.read_table(r / "audit.parquet") for r in (run, other)]
    positions = audits[0]["position"].to_pylist()
    assert positions == sorted(set(positions))
    assert audits[0].equals(audits[1])
    metrics = [launching.lines(r / "metrics.jsonl") for r in (run, other)]
    assert [row.pop("samples_per_second") > 0 for rows in metrics for row in rows]
    assert metrics[0] == metrics[1]
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, other)]
    for summary in summaries:
        del summary["seconds"], summary["cpu_seconds"], summary["config"]
    assert summaries[0] == summaries[1]
    assert 0.1 < summaries[0]["filter/drop_rate"] < 0.9
    assert {path.name for path in run.iterdir()} == {path.name for path in other.iterdir()}
    assert not partials(run)
    assert newest(run) == newest(other)
    assert same(content(checkpoints(run)[-1]), content(checkpoints(other)[-1]))


STANDING = """
import os, runpy, signal, sys

sys.path.insert(0, os.getcwd())
from memfilter.train.loop import Trainer

close = Trainer._close_files

def stand_still(*args):
    open(os.environ["STANDING"], "w").close()
    os.kill(os.getpid(), signal.SIGSTOP)
    close(*args)

Trainer._close_files = stand_still
runpy.run_path("train_filtered.py", run_name="__main__")
"""


def test_killed_five_times_it_ends_in_the_same_results(settings, whole, tmp_path):
    run, moments = tmp_path / "run", random.Random(7)
    going_on = settings(run, RESUME)
    # while a checkpoint is written
    kill_when(lambda: newest(run) >= EVERY and partials(run), settings(run))
    assert partials(run)[0].name == f".{newest(run) + EVERY:012d}.partial"
    # with something to report that no report has told
    kill_when(lambda: newest(run) > 3 * EVERY and reported(run) < newest(run), going_on)
    kill_when(lambda: newest(run) >= 5 * EVERY, going_on, delay=moments.uniform(0, 0.25))
    kill_when(lambda: newest(run) >= 6 * EVERY, going_on, delay=moments.uniform(0, 0.25))
    # with nothing left to do but to say so, after a start at which the newest checkpoint had not reached the disk
    *_, before, damaged = checkpoints(run)
    cut(damaged, "optimizer.bin")
    (script := tmp_path / "standing.py").write_text(STANDING)
    standing = tmp_path / "standing"
    output = kill_when(standing.exists, going_on, script=script, STANDING=str(standing))
    assert (run / "pipeline").exists() and not (run / "summary.json").exists()
    assert f"passed over {damaged}: it is not whole" in output and f"goes on from {before}" in output
    assert f"goes on from {checkpoints(run)[-1]}" in launching.run(going_on, processes=None)
    assert_same_results(run, whole)
    assert len(checkpoints(run)) == 2


def test_killed_twice_in_low_precision_it_goes_on_with_its_loss_scale_and_8_bit_state(settings, tmp_path):
    # this noise overflows fp16 until the loss scale has come down
    low = ("--train.mixed_precision=fp16", "--train.optimizer=adamw_8bit", "--train.noise_offset=10",
           "--filter.tau=0.3", "--train.samples=96")  # fmt: skip
    whole, run, moments = tmp_path / "whole", tmp_path / "run", random.Random(8)
    launching.run(settings(whole, *low), processes=None)
    going_on = settings(run, *low, RESUME)
    kill_when(lambda: newest(run) >= EVERY, going_on, delay=moments.uniform(0, 0.25))
    kill_when(lambda: newest(run) >= 4 * EVERY, going_on, delay=moments.uniform(0, 0.25))
    launching.run(going_on, processes=None)
    assert_same_results(run, whole)
    last = content(checkpoints(run)[-1])
    assert last["skipped_steps"] > 0 and last["scaler.pt"]["scale"] == 2 ** (16 - last["skipped_steps"])
    quantized = [state["__bnb_optimizer_quant_state__"]["state1"] for state in last["optimizer.bin"]["state"].values()]
    assert torch.uint8 in {tensor.dtype for tensor in quantized}


def test_sigterm_makes_a_checkpoint_and_exits_with_75(stopped):
    run, code, before, after, output = stopped
    assert code == 75
    assert before <= newest(run) < after + REPORT + BATCH
    assert f"SIGTERM after {newest(run)} samples: go on from {checkpoints(run)[-1]}" in output
    assert "Traceback" not in output
    regular = range(EVERY, newest(run), EVERY)
    assert [int(path.name) for path in checkpoints(run)] == [*regular[-2:], newest(run)]
    assert not partials(run)
    audit = pq.read_table(run / "audit.parquet")
    assert max(audit["position"].to_pylist()) == newest(run) - 1


def test_with_no_whole_checkpoint_it_begins_anew(settings, stopped, whole, tmp_path):
    run = shutil.copytree(stopped[0], tmp_path / "run")
    for path, name in zip(checkpoints(run), ("model.safetensors", "ema.safetensors", "state.json"), strict=True):
        cut(path, name)
    output = launching.run(settings(run, RESUME, "--checkpoint.keep=100"), processes=None)
    assert output.count("it is not whole") == 3 and "goes on" not in output
    assert_same_results(run, whole)
    # those that were damaged are made again or gone
    assert [path.name for path in checkpoints(run)] == [path.name for path in checkpoints(whole)]
    for path in checkpoints(run):
        assert same(content(path), content(whole / "checkpoints" / path.name))


# several processes

NOTING = """
import os, runpy, sys
from pathlib import Path

sys.path.insert(0, os.getcwd())
try:
    runpy.run_path("train_filtered.py", run_name="__main__")
except SystemExit as stop:
    Path(os.environ["EXIT_CODES"], os.environ["RANK"]).write_text(str(stop.code))
    raise
"""


@pytest.fixture(scope="module")
def whole_of_two(settings, tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "run"
    launching.run(settings(run, *EVERY_STEP, "--checkpoint.keep=100"), processes=2)
    return run


def signal_two(settings, run, send) -> tuple[int, str]:
    """Signals two processes under torchrun in their midst, while the second stands still and the first waits for it; returns
    the samples reported by then, and the output."""
    codes = run.parent / "codes"
    codes.mkdir()
    (script := run.parent / "noting.py").write_text(NOTING)
    with job(settings, processes=2, script=script, EXIT_CODES=str(codes), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="300") as process:
        launching.wait_until(lambda: reported(run) >= SAMPLES // 4, process)
        second = worker(process, 1)
        second.suspend()
        told = None
        while told != (told := reported(run)):
            time.sleep(1)
        send(process)
        launching.wait_until(lambda: is_pending(second), process)
        second.resume()
        output, _ = process.communicate(timeout=launching.PATIENCE)
        assert not alive(process)
    assert process.returncode not in (0, None)
    assert {path.name: path.read_text() for path in codes.iterdir()} == {"0": "75", "1": "75"}, output
    return told, output


def is_pending(process: psutil.Process) -> bool:
    """Whether a signal waits for a process that stands still."""
    status = Path("/proc", str(process.pid), "status").read_text()
    return any(int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd")))


def test_sigterm_to_torchrun_stops_both_and_they_go_on(settings, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    # torchrun signals those that read the data, too
    command = settings(run, *EVERY_STEP, "--data.workers=1", "--train.samples=80000")
    told, output = signal_two(command, run, lambda process: process.terminate())
    assert told <= newest(run) <= told + STEP
    assert f"SIGTERM after {newest(run)} samples: go on from {checkpoints(run)[-1]}" in output
    shortly = f"--train.samples={newest(run) + 3 * STEP}"
    launching.run(settings(run, *EVERY_STEP, RESUME, shortly), processes=2)
    launching.run(settings(whole, *EVERY_STEP, shortly), processes=2)
    assert_same_results(run, whole)


def test_signal_to_one_of_two_stops_both_and_one_process_goes_on(settings, whole_of_two, tmp_path):
    run = tmp_path / "run"
    send = lambda process: worker(process, 1).send_signal(signal.SIGUSR1)  # noqa: E731
    told, output = signal_two(settings(run, *EVERY_STEP), run, send)
    assert told <= newest(run) <= told + STEP
    assert f"another rank's signal after {newest(run)} samples: go on from {checkpoints(run)[-1]}" in output
    launching.run(settings(run, *EVERY_STEP, RESUME, f"--train.batch_size={STEP}"), processes=None)
    shown = ["position", "key", "duplicate", "timestep"]
    audits = [pq.read_table(r / "audit.parquet", columns=shown) for r in (run, whole_of_two)]
    assert audits[0].equals(audits[1])
    assert [row["samples"] for row in launching.lines(run / "metrics.jsonl")] == list(range(STEP, SAMPLES + 1, STEP))
    assert json.loads((run / "summary.json").read_text())["filter/seen"] == SAMPLES


def test_error_of_one_rank_ends_the_job(settings, scenes_dir, tmp_path):
    (data := tmp_path / "data").mkdir()
    shards = Shards.open(scenes_dir)
    for key in shards.keys()[:32]:
        shards.image(key).save(data / f"{key}.png")
        (data / f"{key}.txt").write_text(shards.caption(key))
    experiment = Experiment.of_shards(Shards.open(data))
    # the third forward of rank 1, in the first epoch
    bad = experiment.keys[SampleStream(experiment.virtual(), seed=0).row(2 * STEP + BATCH + 1)]
    (data / f"{bad}.png").write_bytes(b"no picture")
    run = tmp_path / "run"
    command = settings(run, *EVERY_STEP, f"--data.path={data}", "--data.max_bad_share=0")
    with job(command, processes=2) as process:
        launching.wait_until(lambda: reported(run) == 2 * STEP, process)
        output, _ = process.communicate(timeout=launching.PATIENCE)
        assert not alive(process)
    assert process.returncode == 1
    assert "error: rank 1: 1 samples could not be read, more than data.max_bad_share allows" in output
    assert f"error: rank 1: sample {bad!r} in {data / bad}.png: this is no picture of a known kind" in output
    assert reported(run) == 2 * STEP


# disk


@pytest.fixture
def small_disk(tmp_path):
    """Factory: small_disk(bytes) gives a script that trains with a file system of this size at tmp_path/disk; only its
    own processes see it, and what is in it at the end is copied to tmp_path/after."""
    (place := tmp_path / "disk").mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"a small file system cannot be mounted: {tried.stderr.strip()}")

    def make(size: int) -> Path:
        commands = (f"mount -t tmpfs -o size={size} tmpfs {place} || exit 99; "
                    f'"$@"; code=$?; cp -a {place} {tmp_path / "after"}; exit $code')  # fmt: skip
        command = ["unshare", "-rm", "sh", "-c", commands, "sh", sys.executable, "train_filtered.py"]
        (script := tmp_path / "small_disk.py").write_text(
            f"import os, sys; os.execvp('unshare', {command} + sys.argv[1:])"
        )
        return script

    return make


def test_full_disk_ends_the_run_in_one_line_and_leaves_the_checkpoints_it_has(settings, whole, small_disk, tmp_path):
    size = sum(path.stat().st_size for path in checkpoints(whole)[0].iterdir())  # the third finds no room
    run, after = tmp_path / "disk" / "run", tmp_path / "after" / "run"
    output = launching.run(settings(run), processes=None, script=small_disk(int(2.6 * size)), code=1)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    failed, left = (run / "checkpoints" / f"{number * EVERY:012d}" for number in (3, 2))
    assert error.startswith(f"error: {failed} cannot be written (")
    assert "No space left on device" in error
    assert error.endswith(f"; the newest whole one is {left}")
    assert "Traceback" not in output
    assert [int(path.name) for path in checkpoints(after)] == [EVERY, 2 * EVERY] and not partials(after)
    for path in checkpoints(after):
        assert same(content(path), content(whole / "checkpoints" / path.name))


def test_full_disk_between_checkpoints_names_the_run_and_the_newest(settings, whole, small_disk, tmp_path):
    size = sum(path.stat().st_size for path in checkpoints(whole)[-1].iterdir())
    run, after = tmp_path / "disk" / "run", tmp_path / "after" / "run"
    script = small_disk(int(1.1 * size))  # no room for the pipeline at the end
    output = launching.run(settings(run, "--checkpoint.every=96"), processes=None, script=script, code=1)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {run} cannot be written after {SAMPLES} samples: ")
    assert "No space left on device" in error
    assert error.endswith(f"; go on from {run / 'checkpoints' / f'{96:012d}'} with --checkpoint.resume=true")
    assert "Traceback" not in output
    assert {path.name for path in after.glob(".*")} <= {".pipeline.partial"}


# what is refused


def test_what_would_make_it_another_run_is_refused_in_a_line_each(settings, stopped, scenes_dir, tmp_path):
    run = stopped[0]
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    index = pq.read_table(scenes_dir / "index.parquet")
    pq.write_table(index.slice(1), tmp_path / "index.parquet")
    other = ("--train.learning_rate=2e-3", "--filter.tau=0.8", f"--data.index={tmp_path / 'index.parquet'}")
    output = launching.run(settings(run, RESUME, *other), processes=None, code=1)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    reasons = ("filter.tau was 0.9, found 0.8", "train.learning_rate was 0.001, found 0.002",
               "the samples of data.path and data.index are others")  # fmt: skip
    assert errors == [f"error: the run cannot go on from {checkpoints(run)[-1]}: {reason}" for reason in reasons]
    assert "Traceback" not in output
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_finished_run_is_left_alone(settings, whole):
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*"))
    assert f"{whole} is finished" in launching.run(settings(whole, RESUME), processes=None)
    output = launching.run(settings(whole, RESUME, "--filter.tau=0.8", "--train.samples=6400"), processes=None, code=1)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert [line.partition(" was ")[0] for line in errors] == [
        f"error: run_dir: {whole} is finished, as another run: {name}" for name in ("filter.tau", "train.samples")
    ]
    output = launching.run(settings(whole), processes=None, code=1)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: run_dir: {whole} is not empty") and "checkpoint.resume=true" in error
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*")) == before
