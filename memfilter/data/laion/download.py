"""Runs img2dataset, which has an environment of its own, on a selection; goes on where it was interrupted; counts."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import pyarrow.parquet as pq
from tqdm import tqdm

import memfilter
from memfilter.data.laion import guard
from memfilter.data.laion.select import HEADER
from memfilter.data.laion.settings import Download
from memfilter.data.shards import MAX_PIXELS
from memfilter.files import atomic

STATE = "_download"  # a folder: img2dataset takes every .json beside the shards for its own
LOCK, LOG, SETTINGS, REPORT = "lock", "log.txt", "settings.json", "report.json"
ROOT = Path(memfilter.__file__).parents[1]  # of the project, where it is used from its own directory
ENVIRONMENT = Path(".venv-img2dataset/bin/img2dataset")  # launch/img2dataset.sh makes it there
# columns that img2dataset writes itself, and refuses
RESERVED = frozenset(
    "key caption url width height original_width original_height status error_message exif md5 sha256 sha512".split()
)
FAMILIES = (  # what servers say in many ways
    (re.compile(r"HTTP Error (\d{3})"), r"HTTP \1"),
    (re.compile(r"timed out|longer than"), "too slow"),
    (re.compile(r"larger than"), "too large"),
    (re.compile(r"CV_IO_MAX_IMAGE"), "too many pixels"),
    (re.compile(r"!buf.empty"), "empty"),
    (re.compile(r"OpenCV\("), "Image decoding error"),
    (re.compile(r"IncompleteRead"), "cut off"),
    (re.compile(r"X-Robots-Tag"), "not allowed by X-Robots-Tag"),
    (re.compile(r"<urlopen error (?:\[Errno -?\d+\] )?(.*)>"), r"\1"),
)
KINDS = 20  # of losses that are named
MADE = re.compile(r"(\d+)(\.tar|\.parquet|_stats\.json)")  # what img2dataset writes of a shard
POLL = 1.0  # seconds


def download(selection: Path, out: Path, how: Download = Download()) -> dict:
    """Downloads what `laion.select.select` chose, as webdataset shards in ``out``. Run again after an interruption, it
    goes on: whole shards stay, unfinished ones are made anew.

    Returns:
        ``rows``, ``downloaded``, and ``lost``: reason -> rows, the most frequent first.

    Raises:
        ValueError: ``out`` was begun with other settings, or not all shards could be made.
        FileNotFoundError: there is no img2dataset, or no selection.
    """
    if not (selection / HEADER).is_file():
        raise FileNotFoundError(
            f"selection: {selection} has no {HEADER}: make it with `memfilter prepare laion select`"
        )
    header = json.loads((selection / HEADER).read_text())
    if out.is_dir() and any(out.iterdir()) and not (out / STATE).is_dir():
        raise FileExistsError(f"{out} holds something else: choose another directory")
    quality = how.encode_quality if how.encode_quality is not None else 6 if how.encode_format == "png" else 95
    pictures = {
        "image_size": how.image_size, "resize_mode": how.resize_mode, "resize_only_if_bigger": True,
        "encode_format": how.encode_format, "encode_quality": quality, "number_sample_per_shard": how.samples_per_shard,
    }  # fmt: skip
    work = {
        "timeout": how.timeout, "retries": how.retries, "thread_count": how.threads, "distributor": how.distributor,
        "processes_count": how.processes or os.cpu_count(),
    }  # fmt: skip
    columns = pq.read_schema(selection / header["files"][0]["name"]).names
    form = {
        "url_list": selection.absolute(), "input_format": "parquet", "url_col": "url", "caption_col": "caption",
        "output_folder": out.absolute(), "output_format": "webdataset", "incremental_mode": "incremental",
        "save_additional_columns": json.dumps([name for name in columns if name not in RESERVED]),
    }  # fmt: skip
    options = how.options or {}
    if twice := sorted(options.keys() & (pictures | work | form).keys()):
        raise ValueError(f"options: {', '.join(twice)} cannot be set there")
    environment = {
        "MEMFILTER_MAX_SECONDS": str(how.max_seconds),
        "MEMFILTER_MAX_MEGABYTES": str(how.max_megabytes),
        "MEMFILTER_PRIVATE_ADDRESSES": str(int(how.private_addresses)),
    }
    command = find_command(how.img2dataset)
    command += [f"--{name}={value}" for name, value in (pictures | work | form | options).items()]
    rows = [file["rows"] for file in header["files"]]
    shards = sum(math.ceil(count / how.samples_per_shard) for count in rows)

    (out / STATE).mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _require_same(out / STATE / SETTINGS, pictures | options | {"selection": header["files"]})
        if len(done_shards(out)) < shards:
            _run(command, out, environment, sum(rows))
    if left := shards - len(done_shards(out)):
        raise ValueError(f"{left} of {shards} shards are not done: run the same command again; "
                         f"what img2dataset said is in {out / STATE / LOG}")  # fmt: skip
    report = count(out)
    with atomic(out / STATE / REPORT) as path:
        path.write_text(json.dumps(report, indent=2))
    return report


def find_command(given: str | None) -> list[str]:
    """The command of img2dataset, split as a shell would.

    Raises:
        FileNotFoundError: there is none.
    """
    here = next((shlex.quote(str(place)) for place in (ENVIRONMENT, ROOT / ENVIRONMENT) if place.is_file()), None)
    found = given or os.environ.get("MEMFILTER_IMG2DATASET") or here or shutil.which("img2dataset")
    if found is None:
        raise FileNotFoundError("img2dataset is not installed: bash launch/img2dataset.sh makes an environment for it; "
                                "or name the command by --img2dataset")  # fmt: skip
    command = shlex.split(found)
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"img2dataset: {command[0]} is no command")
    return command


def done_shards(out: Path, known: Mapping[str, dict] = MappingProxyType({})) -> dict[str, dict]:
    """Name -> statistics of the shards that are whole, as img2dataset writes them last; ``known`` are not read again."""
    found = dict(known)
    for path in sorted(out.glob("*_stats.json")):
        name = path.name.partition("_")[0]
        if name not in found:
            with suppress(ValueError):  # cut off, or just being written
                found[name] = json.loads(path.read_text())
    return found


def drop_unfinished(out: Path) -> None:
    """Removes what an interruption left of shards that are not whole; an index that stands beside them is the user's."""
    done = done_shards(out)
    for path in [*out.iterdir()]:
        if (made := MADE.fullmatch(path.name)) and made[1] not in done:
            path.unlink()


def count(out: Path) -> dict:
    """Rows of the shards in ``out``, how many became pictures, and reason -> rows for the others."""
    rows, lost = 0, Counter()
    for name, stats in done_shards(out).items():
        table = pq.read_table(out / f"{name}.parquet", columns=["status", "error_message"])
        for group in table.group_by(["status", "error_message"]).aggregate([([], "count_all")]).to_pylist():
            lost[None if group["status"] == "success" else reason(group["error_message"] or "")] += group["count_all"]
        rows += stats["count"]
        # the statistics count as successes what could then not be written
        if stats["count"] > table.num_rows:
            lost["not written by img2dataset"] += stats["count"] - table.num_rows
    downloaded = lost.pop(None, 0)
    named = dict(lost.most_common(KINDS))
    rest = lost.total() - sum(named.values())
    return {"rows": rows, "downloaded": downloaded, "lost": named | ({"other reasons": rest} if rest else {})}


def reason(message: str) -> str:
    """A message of img2dataset, in part a server's words, as a short printable one that others share."""
    for pattern, family in FAMILIES:
        if match := pattern.search(message):
            message = match.expand(family)
            break
    return "".join(c if c.isprintable() else " " for c in " ".join(message.split()))[:80] or "no reason given"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Makes sure that no process of another download still writes to a directory: all of them share its lock."""
    with (out / STATE / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another download still writes to {out}: wait for it or end it") from None
        drop_unfinished(out)
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            yield
        finally:
            drop_unfinished(out)


def _require_same(path: Path, settings: dict) -> None:
    """Raises ValueError if the download was begun with other settings."""
    settings = json.loads(json.dumps(settings))
    begun = json.loads(path.read_text()) if path.is_file() else settings
    if changed := sorted(name for name in begun.keys() | settings.keys() if begun.get(name) != settings.get(name)):
        raise ValueError(f"{path.parent.parent} was begun with another {', '.join(changed)}: "
                         "set it back, or choose another directory")  # fmt: skip
    with atomic(path) as partial:
        partial.write_text(json.dumps(settings, indent=2))


def _run(command: Sequence[str], out: Path, environment: Mapping[str, str], rows: int) -> None:
    """Runs img2dataset to its end; none of its processes outlives this call, unless this process is killed itself."""
    customized = out / STATE / "guard"
    customized.mkdir(exist_ok=True)
    shutil.copy(guard.__file__, customized / "sitecustomize.py")
    environment = os.environ | environment | {
        "MEMFILTER_LOCK": str((out / STATE / LOCK).absolute()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(customized.absolute()), os.environ.get("PYTHONPATH")])),
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(MAX_PIXELS),
        "NO_ALBUMENTATIONS_UPDATE": "1",  # it would ask the package index for a newer version
    }  # fmt: skip
    with (out / STATE / LOG).open("ab") as log, _stopped_by_sigterm(), tqdm(total=rows, desc="download") as bar:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            running, done = True, {}
            while running:
                running = process.poll() is None
                done = done_shards(out, done)
                bar.set_postfix(downloaded=sum(stats["successes"] for stats in done.values()), refresh=False)
                bar.update(sum(stats["count"] for stats in done.values()) - bar.n)
                time.sleep(POLL if running else 0)
        finally:
            _end(process)
    if process.returncode:
        raise ValueError(f"img2dataset ended with code {process.returncode}: what it said is in {out / STATE / LOG}")


def _end(process: subprocess.Popen) -> None:
    """Ends a process and its children, where there are any left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, through what cleans up."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
