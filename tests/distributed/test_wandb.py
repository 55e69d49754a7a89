"""W&B that survives: offline files of a run of two ranks that is killed, asked to stop, and goes on, with no network."""

import json
import signal
import socket
import struct
import time
from contextlib import contextmanager
from types import SimpleNamespace

import launching
import psutil
import pytest
import yaml
from wandb.proto.wandb_internal_pb2 import Record

EVERY, CHECKPOINT = 8, 64


def records(path) -> list[Record]:
    """What an offline file holds, up to where it was cut short. It is a log as LevelDB has it: blocks of 32 KiB, in which
    no header of a record is split."""
    data, found, record = path.read_bytes(), [], b""
    if len(data) < 7:  # it has just been opened
        return []
    assert struct.unpack("<4sHB", data[:7]) == (b":W&B", 0xBEE1, 0)
    at = 7
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            break
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            found.append(Record.FromString(record))
            record = b""
    return found


def of_kind(kind, found) -> list:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def history(found) -> dict[int, dict]:
    """Rows by step; a histogram's counts are at (its name, "values")."""
    rows = {}
    for row in of_kind("history", found):
        values = {}
        for item in row.item:
            name, *part = item.nested_key or [item.key]
            values[(name, *part) if part else name] = json.loads(item.value_json)
        assert values["_step"] not in rows
        rows[values["_step"]] = values
    return rows


@pytest.fixture(scope="module")
def nowhere():
    """Environment in which W&B's server and every proxy is a socket that tells whether anybody came."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        held.setblocking(False)
        address = "http://127.0.0.1:{}".format(held.getsockname()[1])
        names = ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        environment = dict.fromkeys(names, address) | dict.fromkeys(("NO_PROXY", "no_proxy"), "")
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "120"  # as the launch scripts have it: torchrun kills after 30 s
        yield SimpleNamespace(socket=held, environment=environment)


@pytest.fixture(scope="module")
def settings(tiny_base, scenes_dir):
    def make(run, *more, samples=8000):
        return [
            f"--run_dir={run}", f"--model.path={tiny_base}", f"--data.path={scenes_dir}", f"--train.samples={samples}",
            "--train.batch_size=4", "--filter.tau=1.0", f"--log.every={EVERY}", f"--checkpoint.every={CHECKPOINT}",
            "--log.wandb=offline", *more,
        ]  # fmt: skip

    return make


@contextmanager
def job(settings, environment):
    """Two ranks under torchrun; `.processes()` are all of theirs. Nothing of it is left afterwards."""
    process = launching.start(settings, processes=2, **environment)
    known = {}

    def processes():
        if process.poll() is None:
            known.update({p.pid: p for p in psutil.Process(process.pid).children(recursive=True)})
        return list(known.values())

    process.processes = processes
    try:
        yield process
    finally:
        for left in processes():
            if left.is_running():
                left.kill()
        process.kill()
        process.communicate()


def files(run) -> list:
    """W&B's, by the time of their start."""
    return sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)


def newest(run) -> dict:
    return json.loads(max((run / "checkpoints").glob("*/state.json")).read_text())


def reported(run) -> int:
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    return json.loads(text[: text.rindex("\n")].splitlines()[-1])["samples"] if "\n" in text else 0


def is_ahead(run) -> bool:
    """Whether W&B's file has more than the newest checkpoint. It is written late, and what a killed run had told W&B may
    be lost: here it is not."""
    if not any((run / "checkpoints").glob("[0-9]*/state.json")):
        return False
    return max(history(records(files(run)[0])), default=0) > newest(run)["samples"]


@pytest.fixture(scope="module")
def sessions(settings, nowhere, tmp_path_factory):
    """A run in three sessions: killed after its first checkpoint; asked to stop; gone on to its end."""
    run, found = tmp_path_factory.mktemp("wandb") / "run", SimpleNamespace(opened=[], configs=[])
    with job(settings(run), nowhere.environment) as process:
        launching.wait_until(lambda: is_ahead(run), process, every=0.02)
        ranks = [p for p in process.processes() if p.name().startswith("python")]
        for rank in ranks:
            rank.suspend()
        while not is_ahead(run):  # it has made the next checkpoint meanwhile
            for rank in ranks:
                rank.resume()
            launching.wait_until(lambda: is_ahead(run), process, every=0.02)
            for rank in ranks:
                rank.suspend()
        found.opened.append([sum(c.name() == "wandb-core" for c in p.children()) for p in sorted(ranks, key=rank_of)])
        for each in (process, *ranks):
            each.kill()
        launching.wait_for_end_of(process.processes())
    found.configs.append(newest(run)["config"])
    found.from_checkpoint = newest(run)["samples"]
    with job(settings(run, "--checkpoint.resume=true"), nowhere.environment) as process:
        launching.wait_until(lambda: reported(run) >= found.from_checkpoint + 5 * EVERY, process)
        ranks = [p for p in process.processes() if p.name().startswith("python")]
        found.opened.append([sum(c.name() == "wandb-core" for c in p.children()) for p in sorted(ranks, key=rank_of)])
        process.send_signal(signal.SIGTERM)
        found.output, _ = process.communicate(timeout=launching.PATIENCE)
    found.configs.append(newest(run)["config"])
    found.stopped = newest(run)["samples"]
    launching.run(["--help"], processes=None)  # what later processes are forked from has started
    began = time.monotonic()
    last = settings(run, "--checkpoint.resume=true", samples=found.stopped + 3 * EVERY)
    launching.run(last, processes=2, **nowhere.environment)
    found.seconds = time.monotonic() - began
    found.configs.append(yaml.safe_load((run / "config.yaml").read_text()))
    found.run, found.files = run, [records(path) for path in files(run)]
    return found


def rank_of(process: psutil.Process) -> int:
    return int(process.environ()["RANK"])


def test_every_session_opens_one_run_on_one_rank_under_the_same_id(sessions):
    assert sessions.opened == [[1, 0], [1, 0]]
    assert len(files(sessions.run)) == len(list(sessions.run.rglob("*.wandb"))) == 3
    opened = [of_kind("run", found) for found in sessions.files]
    assert [len(runs) for runs in opened] == [1, 1, 1]
    assert {run.run_id for (run,) in opened} == {newest(sessions.run)["wandb_id"]}
    assert [run.resume for (run,) in opened] == [False, True, True]  # which `wandb sync` goes by


def test_history_is_that_of_metrics_jsonl_without_a_gap(sessions):
    rows = {row.pop("samples"): row for row in launching.lines(sessions.run / "metrics.jsonl")}
    assert list(rows) == list(range(EVERY, sessions.stopped + 3 * EVERY + 1, EVERY))
    parts = [history(found) for found in sessions.files]
    assert max(parts[0]) > sessions.from_checkpoint  # what was lost is there twice
    assert min(parts[1]) == sessions.from_checkpoint + EVERY
    assert max(parts[1]) == sessions.stopped and min(parts[2]) == sessions.stopped + EVERY
    union = parts[0] | parts[1] | parts[2]
    assert sorted(union) == list(rows)
    for samples, row in rows.items():
        assert as_reported(union[samples], row) == row
    for samples in parts[0].keys() & parts[1].keys():
        row = {name: value for name, value in rows[samples].items() if name != "samples_per_second"}
        assert as_reported(parts[0][samples], row) == row


def as_reported(logged: dict, row: dict) -> dict:
    """What W&B has of a row of metrics.jsonl."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict):
            counts = [count for count in logged[name, "values"] if count]
            found[name] = dict(zip(value, counts, strict=True))
        else:
            found[name] = logged[name]
    return found


def test_configuration_is_there_in_every_session(sessions):
    for found, config in zip(sessions.files, sessions.configs, strict=True):
        (run,) = of_kind("run", found)
        logged = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert {name: logged[name] for name in config} == config
        assert config["log"]["wandb"] == "offline"


def test_how_a_session_ended_is_there(sessions):
    assert f" after {sessions.stopped} samples: go on from" in sessions.output
    ends = [[end.exit_code for end in of_kind("exit", found)] for found in sessions.files]
    assert ends == [[], [75], [0]]  # killed, asked to stop, done


def test_nobody_asks_the_network(sessions, nowhere):
    with pytest.raises(BlockingIOError):
        nowhere.socket.accept()
    assert sessions.seconds < 60


def test_signal_to_all_processes_of_a_job_ends_wandb_and_not_the_checkpoint(settings, nowhere, tmp_path):
    run = tmp_path / "run"
    with job(settings(run, "--checkpoint.every=0"), nowhere.environment) as process:
        launching.wait_until(lambda: reported(run) >= 3 * EVERY, process)
        for each in (process, *process.processes()):  # as scancel and systemd do
            each.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=launching.PATIENCE)
    stopped = newest(run)["samples"]
    assert f" after {stopped} samples: go on from" in output
    assert reported(run) == stopped
    assert "Traceback" not in output.partition(" samples: go on from")[0]
