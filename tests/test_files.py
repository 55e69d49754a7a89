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
