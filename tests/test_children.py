import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memfilter.children import children

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("numbers", "pause"),
    [
        ([signal.SIGTERM], 0),
        ([signal.SIGHUP], 0),
        ([signal.SIGHUP, signal.SIGTERM], 0.001),  # the second while the first is being told to the children
        ([signal.SIGHUP, signal.SIGTERM, signal.SIGINT], 0.3),  # while they write
    ],
)
def test_what_ends_it_waits_for_the_checkpoints(tmp_path, numbers, pause):
    run = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), open('saved', 'w'), sys.exit())); "
    run += "open('started', 'w'); time.sleep(600)"
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {run!r}]).wait()"  # as accelerate's: no handler
    script = (
        "import signal, sys; from pathlib import Path; from memfilter.children import children\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # whatever nohup the tests were started with
        f"with children() as started: started.call([sys.executable, '-c', {launcher!r}], Path('log'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in numbers:
        process.send_signal(number)
        time.sleep(pause)
    process.wait(timeout=600)
    assert (tmp_path / "saved").exists()


def test_what_cannot_be_started_fails_its_run_alone(tmp_path):
    with children() as started:
        assert started.call(["no-such-launcher"], tmp_path / "log") == 127
    assert "No such file or directory: 'no-such-launcher'" in (tmp_path / "log").read_text()
