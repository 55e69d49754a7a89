"""Real launches of the training script: one process, several under torchrun (gloo), with and without DeepSpeed."""

import atexit
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from multiprocessing import connection
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600  # seconds, for what ends by itself: a busy machine takes ten times as long as an idle one


def start(settings, processes: int | None = 1, zero: str | Path | None = None, script="train_filtered.py", **environment):
    """Starts the script in a session of its own.

    Args:
        settings: command line of the script.
        processes: under torchrun; None starts the script itself, as `run` does.
        zero: DeepSpeed's configuration, a name in configs/deepspeed or a path.
        environment: variables to add.
    """
    if processes is None:
        return Forked(script, settings, _variables(zero) | environment)
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return subprocess.Popen(
        [sys.executable, *torchrun, script, *map(str, settings)],
        cwd=ROOT,
        env=os.environ | _variables(zero) | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _variables(zero: str | Path | None) -> dict[str, str]:
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if zero is None:
        return variables | {"ACCELERATE_USE_CPU": "true"}
    file = zero if isinstance(zero, Path) else ROOT / "configs" / "deepspeed" / f"{zero}.json"
    more = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    return variables | more


def sharded(directory: Path) -> Path:
    """ZeRO-3 as shipped, but that it shards small weights too: those of tests would all be kept whole."""
    settings = json.loads((ROOT / "configs" / "deepspeed" / "zero3.json").read_text())
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    (directory / "zero3.json").write_text(json.dumps(settings))
    return directory / "zero3.json"


def run(
    settings, processes: int | None = 1, zero: str | Path | None = None, script="train_filtered.py",
    seconds: float = PATIENCE, code: int | None = 0, **environment,
) -> str:  # fmt: skip
    """Runs the script to its end, expects an exit code (None: any), and returns what it printed.

    Its processes have the environment that torchrun would give them and are ended when one of them fails, but they are
    forked from one that has imported the libraries: half of a short run is imports.
    """
    variables = _variables(zero) | environment
    ranks = [{}] if processes is None else [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        for rank in range(processes)
    ]  # fmt: skip
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if processes else {}
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        forked = [_fork(script, settings, variables | place | rank, log.name) for rank in ranks]
        end, late = time.monotonic() + seconds, False
        while any(process.is_alive() for process in forked):
            connection.wait([process.sentinel for process in forked if process.is_alive()], 1)
            late = time.monotonic() > end
            if late or any(process.exitcode for process in forked):
                for process in forked:
                    process.kill() if late else process.terminate()
        output = log.read()
    assert not late, f"still running after {seconds} s:\n{output}"
    failed = max((process.exitcode for process in forked if process.exitcode), default=0)  # not that of who was ended for it
    assert code is None or failed == code, output
    return output


# environment of the process that others are forked from, for what is read when a library is imported
_PRELOADED = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["memfilter.cli", "memfilter.arguments", "memfilter.train.loop", "memfilter.data.make_cache",
                               "jsonargparse", "deepspeed", "launching"])  # fmt: skip


def _fork(script: str | Path, settings, variables: dict[str, str], log: str):
    process = _forks.Process(target=_rank, args=(str(script), list(map(str, settings)), variables, log))
    with _environment(**_PRELOADED):
        process.start()
    return process


class Forked:
    """A forked process that does as a subprocess.Popen does."""

    def __init__(self, script: str | Path, settings, variables: dict[str, str]):
        self._log = tempfile.NamedTemporaryFile("r", suffix=".log")
        self._process = _fork(script, settings, variables, self._log.name)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        self._log.seek(0)
        return self._log.read(), None


def _rank(script: str, settings: list[str], variables: dict[str, str], log: str) -> None:
    """The life of a forked process."""
    import torch

    os.setsid()
    os.chdir(ROOT)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(variables)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.path.insert(0, str(ROOT))
    try:
        if script == "-m":
            script, *settings = settings
            sys.argv = [script, *settings]
            sys.modules.pop(script, None)  # it is preloaded, and is to run
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [script, *settings]
            runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process leaves without them


@contextmanager
def _environment(**variables: str):
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for all that was started. torchrun's workers have sessions of their own."""
    for left in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()


def wait_for_end_of(processes: list[psutil.Process], seconds: float = PATIENCE) -> None:
    """Until none of them runs; there may be nobody, or nobody quick, to collect what they leave."""
    end = time.monotonic() + seconds
    while left := [process for process in processes if _runs(process)]:
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.02)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, process: subprocess.Popen, seconds: float = PATIENCE, every: float = 0.002):
    """What the condition gives, once that is something."""
    end = time.monotonic() + seconds
    while True:
        ended = process.poll() is not None  # before the condition, which it may have met at its end
        if found := condition():
            return found
        assert not ended, process.communicate()[0]
        assert time.monotonic() < end, "it did not come about"
        time.sleep(every)


def free_port() -> int:
    """One that is not among those that systems give away, since it is taken only when a process has started."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(1000):
        port = 20_000 + 1000 * worker + next(_ports) % 1000
        with socket.socket() as held, suppress(OSError):
            held.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


_ports = itertools.count(os.getpid())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
