"""Caches written by several processes, and by processes that are killed: the files are always the same."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import launching
import psutil
import pytest

SHARDS = 104  # of two samples or captions each


@pytest.fixture(scope="module")
def command(tiny_base, scenes_dir):
    """Factory: command line that makes a cache."""

    def make(out, *more):
        return [
            "memfilter.cli", "cache", f"--model.path={tiny_base}", f"--data.path={scenes_dir}", f"--data.cache={out}",
            "--train.batch_size=4", "--data.random_flip=true", "--samples_per_shard=2", *more,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """Files of a cache that one process wrote at once, with as many threads as it liked."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    assert launching.run(command(out), processes=None, script="-m", OMP_NUM_THREADS="2").strip().endswith(str(out))
    assert len(shards(out)) == SHARDS
    return contents(out)


def contents(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def shards(out) -> set[str]:
    return {path.name for path in out.glob("*.safetensors")}


def family(process) -> list[psutil.Process]:
    """The process and all that it started, which torchrun gives sessions of their own."""
    try:
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:  # ended and collected
        return []


def kill(processes: list[psutil.Process]) -> None:
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def kill_at(moment, out, settings, processes: int | None, choose=family) -> None:
    """Starts a job and sends SIGKILL to what ``choose`` picks, so many shards and seconds after it began to write."""
    count, seconds = moment
    process = launching.start(settings, processes=processes, script="-m")
    try:
        began = len(shards(out))
        launching.wait_until(lambda: out.is_dir() and len(shards(out)) >= min(began + count, SHARDS - 1), process)
        time.sleep(seconds)
        everyone = family(process)
        kill(choose(process))
        process.communicate(timeout=launching.PATIENCE)
        launching.wait_for_end_of(everyone)
    finally:
        with suppress(psutil.NoSuchProcess):
            kill(family(process))
    assert process.returncode != 0 and not (out / "cache.json").exists()


def moments(number: int) -> list[tuple[int, float]]:
    """The first is as soon as there is a directory."""
    rng = random.Random(number)
    return [(0, 0.0), *((rng.randrange(2, SHARDS // (number + 1)), rng.random() / 50) for _ in range(number - 1))]


def test_process_that_is_killed_anywhere_is_made_good(command, whole, tmp_path):
    out, kept = tmp_path / "cache", {}
    for moment in moments(3):
        kill_at(moment, out, command(out), processes=None)
        found = contents(out)
        assert kept.items() <= {name: content for name, content in found.items() if name in kept}.items()
        kept = {name: found[name] for name in shards(out)}
        assert all(whole[name] == content for name, content in kept.items())
    assert 0 < len(kept) < SHARDS
    launching.run(command(out), processes=None, script="-m")
    assert contents(out) == whole


def test_two_processes_that_are_killed_anywhere_are_made_good(command, whole, tmp_path):
    out = tmp_path / "cache"
    for moment in moments(2):
        kill_at(moment, out, command(out), processes=2)
        assert all(whole[name] == (out / name).read_bytes() for name in shards(out))
    assert 0 < len(shards(out)) < SHARDS
    output = launching.run(command(out), processes=2, script="-m")
    assert contents(out) == whole
    assert output.count(str(out)) == 1  # one of them says where it is


def test_what_two_processes_leave_one_completes(command, whole, tmp_path):
    def one_worker(process):
        workers = [p for p in family(process) if p.environ().get("RANK") == "1"]
        assert len(workers) == 1
        return workers

    out = tmp_path / "cache"
    kill_at((5, 0.0), out, command(out), 2, one_worker)  # torchrun ends the other
    numbers = {int(name[9:14]) % 2 for name in shards(out) if name.startswith("pictures")}
    assert numbers == {0, 1}  # both had written
    launching.run(command(out), processes=None, script="-m")
    assert contents(out) == whole


def test_processes_that_find_something_else_there_refuse(command, whole, tmp_path):
    (out := tmp_path / "cache").mkdir()
    for name in ("pictures-00000.safetensors", "prompts-00003.safetensors"):
        (out / name).write_bytes(whole[name])
    before = contents(out)
    output = launching.run(command(out, "--data.random_flip=false"), processes=2, script="-m", code=1)
    # torchrun may end one before it says the same
    assert f"data.cache: {out} was begun otherwise: data.random_flip was True, found False; remove it or" in output
    assert contents(out) == before


@pytest.fixture
def small_disk(tmp_path):
    """Factory: small_disk(bytes) gives a script that runs the command with a file system of this size at tmp_path/disk;
    only its own processes see it, and what is in it at the end is copied to tmp_path/after."""
    (place := tmp_path / "disk").mkdir()
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", place]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted")

    def make(size: int):
        commands = (f"mount -t tmpfs -o size={size} tmpfs {place} || exit 99; "
                    f'"$@"; code=$?; cp -a {place} {tmp_path / "after"}; exit $code')  # fmt: skip
        line = ["unshare", "-rm", "sh", "-c", commands, "sh", sys.executable, "-m"]
        script = tmp_path / "small_disk.py"
        script.write_text(f"import os, sys; os.execvp('unshare', {line} + sys.argv[1:])")
        return script

    return make


def test_full_disk_is_said_in_one_line_and_what_is_there_is_kept(command, whole, small_disk, tmp_path):
    out, after = tmp_path / "disk" / "cache", tmp_path / "after" / "cache"
    output = launching.run(command(out), processes=None, script=small_disk(600_000), code=1)
    (error,) = (line for line in output.splitlines() if "error: " in line)
    assert re.search(rf"error: {out}/[\w-]+\.safetensors cannot be written \(.*No space left on device", error)
    assert error.endswith("make room and run memfilter cache again, it goes on where it stopped")
    assert "Traceback" not in output
    assert 0 < len(shards(after)) < SHARDS and all(whole[name] == (after / name).read_bytes() for name in shards(after))


def test_counts_are_those_of_the_data(whole):
    facts = json.loads(whole["cache.json"])
    assert facts["counts"] == {"samples": 104, "bad": 0, "captions": 104}
    assert facts["files"] == {name: len(content) for name, content in whole.items() if name != "cache.json"}
