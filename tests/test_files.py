import os
import subprocess
import sys

import pytest

from memfilter.files import atomic, held


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic(path) as partial:
        partial.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    with atomic(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_writers_of_the_same_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with atomic(path) as first:
        first.write_text("first")
        with atomic(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        assert len({first, second}) == 2 and [*tmp_path.glob(".*.partial")] == [first]  # what cleaners look for
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.txt", []

    def fsync(number):
        synced.append((os.path.samestat(os.fstat(number), partial.stat()), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic(path) as partial:
        partial.write_text("new")
    assert synced == [(True, False)]


def test_file_is_held_by_one_process_until_it_ends_whatever_it_has_forked(tmp_path):
    script = "import os, sys, time; from pathlib import Path; from memfilter.files import held\n"
    script += "with held(Path(sys.argv[1])): os.fork() and print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path / "lock"], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match="lock is held by another process"), held(tmp_path / "lock"):
            pass
        other.kill()
        other.wait()
        assert (tmp_path / "lock").exists()
        with held(tmp_path / "lock"):
            assert (tmp_path / "lock").exists()
        assert not (tmp_path / "lock").exists()
    finally:
        os.killpg(other.pid, 9)
