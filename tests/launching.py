"""Real launches of the training script: one process, several under torchrun (gloo), with and without DeepSpeed."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


def start(settings, processes: int | None = 1, zero: str | Path | None = None, script="train_filtered.py", **environment):
    """Starts the script in a session of its own.

    Args:
        settings: command line of the script.
        processes: under torchrun; None starts the script itself.
        zero: DeepSpeed's configuration, a name in configs/deepspeed or a path.
        environment: variables to add.
    """
    command = [sys.executable, script, *map(str, settings)]
    if processes is not None:
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
        command[1:1] = torchrun
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if zero is None:
        variables["ACCELERATE_USE_CPU"] = "true"
    else:
        file = zero if isinstance(zero, Path) else ROOT / "configs" / "deepspeed" / f"{zero}.json"
        variables |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(settings, *arguments, seconds: float = 300, code: int | None = 0, **named) -> str:
    """Starts the script, waits for its exit code (None: any), and returns what it printed."""
    process = start(settings, *arguments, **named)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"still running after {seconds} s:\n{process.communicate()[0]}") from None
    assert code is None or process.returncode == code, output
    return output


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for all that was started. torchrun's workers have sessions of their own."""
    for left in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()


def wait_until(condition, process: subprocess.Popen, seconds: float = 120, every: float = 0.002):
    """What the condition gives, once that is something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not come about"
        time.sleep(every)
    return found


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
