"""``memfilter cache``: makes what `memfilter.data.cache` reads, by several processes, going on where it was stopped."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from memfilter.config import Config, ConfigError, check
from memfilter.data.cache import COMPLETE, INDEX, PARTS, SCHEMA, SUFFIX, differences, fingerprint, shard_name
from memfilter.data.encode import Encoder
from memfilter.data.sampler import SampleDataset, View, collate
from memfilter.data.shards import ShardError, may_pass
from memfilter.data.sources import open_data
from memfilter.files import atomic, held
from memfilter.processes import from_main

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_OURS = re.compile(r"(pictures|prompts)-\d{5,}\.safetensors|index\.parquet|cache\.json")
LOCK = ".lock"
_PARTIAL = re.compile(r"\.tmp\w+|\..+\.partial")  # safetensors' own, ours


def make_cache(
    config: Config, dtype: Literal["fp32", "fp16"] = "fp32", samples_per_shard: int = 1000, progress: bool = True
) -> Path:
    """Encode every picture and caption once, into data.cache, for training to read.

    Every process of a launch calls; of n processes each writes every n-th shard. Shards that are there are kept. On a
    CPU a process uses one thread, since the last bits of an encoding depend on their number: start one for every core.

    Args:
        config: of the training run.
        dtype: of what is stored.
        samples_per_shard: samples or captions in a file.

    Returns:
        The directory, complete.

    Raises:
        ConfigError, ModelError, ShardError: before anything is written, when something cannot be run or the directory
            holds something else.
        ShardError: more samples than data.max_bad_share cannot be read.
        ValueError: an encoding does not fit into fp16.
        OSError: the disk is full.
    """
    from memfilter.pipelines import load_pipeline
    from memfilter.train.checks import resolution_of
    from memfilter.train.engine import make_accelerator

    check(config)
    if config.data.cache is None:
        raise ConfigError("data.cache must say where the cache is to be")
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard must be above 0, found {samples_per_shard}")
    accelerator = make_accelerator(config)
    shards, experiment = open_data(config)
    experiment = experiment.whole
    pipeline = load_pipeline(config.model.path, variant=config.model.variant, revision=config.model.revision)
    resolution = resolution_of(config, pipeline)
    made_from = fingerprint(config, pipeline, shards, experiment, resolution)
    threads = torch.get_num_threads()
    if accelerator.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        encoder = Encoder(pipeline, accelerator.device, memory=0, rows=config.train.batch_size)
        views = _Views(shards, experiment, None, View(resolution, random_flip=config.data.random_flip))
        writer = _Writer(config, encoder, views, made_from, dtype, samples_per_shard)
        accelerator.wait_for_everyone()  # until all have looked at what is there
        with ExitStack() as holding:
            from_main(accelerator.state, lambda: writer.begin(holding))
            writer.run(accelerator, progress)
    finally:
        torch.set_num_threads(threads)
    return writer.out


class _Views(SampleDataset):
    """Every view of every picture in turn; mirrored ones follow their originals."""

    @cached_property
    def pictures(self) -> dict[str, int]:
        """Name -> number, of every picture once."""
        names = map(self.experiment.picture, range(len(self.experiment.keys)))
        return {name: number for number, name in enumerate(dict.fromkeys(names))}

    @cached_property
    def _names(self) -> list[str]:
        return list(self.pictures)

    def __len__(self) -> int:
        return len(self.pictures) * (1 + self.view.random_flip)

    def __getitem__(self, number: int) -> dict:
        number, flip = divmod(number, 1 + self.view.random_flip)
        key = self._names[number]
        sample = {"view": (key, None, bool(flip)), "pixels": None, "original_size": None, "crop_top_left": None}
        try:
            self.shards.caption(key)
            return sample | {"bad": None, "again": False} | self._picture(sample["view"])
        except ShardError as error:
            reason = str(error).encode("utf-8", "backslashreplace").decode()
            return sample | {"bad": reason, "again": may_pass(error.__cause__)}


class _Writer:
    """The work of one process.

    Raises:
        ConfigError: the directory holds something else.
    """

    def __init__(self, config: Config, encoder: Encoder, views: _Views, made_from: dict, dtype: str, per_shard: int):
        self.out, self.encoder, self.views = Path(config.data.cache), encoder, views
        self.dtype, self.workers, self.batch_size = DTYPES[dtype], config.data.workers, config.train.batch_size
        self.max_bad_share = config.data.max_bad_share
        self.caption_of = {key: _caption(views.shards, key) for key in views.experiment.keys}
        self.captions = [caption for caption in dict.fromkeys(self.caption_of.values()) if caption]
        listed = hashlib.sha256("\0".join(self.captions).encode()).hexdigest()
        # what decides the bytes of the files, beside what decides what they mean
        form = {"dtype": dtype, "samples_per_shard": per_shard, "train.batch_size": self.batch_size, "captions": listed}
        if len(views.pictures) < len(views.experiment.keys):
            form["pictures"] = len(views.pictures)
        self.header = {"fingerprint": made_from, "form": form}
        self.per_shard = {"pictures": per_shard * (1 + views.view.random_flip), "prompts": per_shard}
        self.jobs = [*self._jobs("pictures", len(views)), *self._jobs("prompts", len(self.captions))]
        self.done = self._look()

    def _jobs(self, kind: str, total: int) -> Iterator[_Job]:
        for number, start in enumerate(range(0, total, self.per_shard[kind])):
            yield _Job(kind, shard_name(kind, number), range(start, min(start + self.per_shard[kind], total)))

    def _look(self) -> Set[str]:
        """Names of the shards that are there and whole; not of those where a read failed that may succeed now."""
        there = sorted(path.name for path in self.out.iterdir()) if self.out.is_dir() else []
        if strange := [name for name in there if not (_OURS.fullmatch(name) or _PARTIAL.fullmatch(name) or name == LOCK)]:
            raise ConfigError(f"data.cache: {self.out} holds {strange[0]!r}, not of a cache: choose a directory for "
                              "nothing else")  # fmt: skip
        headers = {name: _read_header(self.out / name) for name in there if name[0] != "." and name.endswith(SUFFIX)}
        whole = {name: header for name, header in headers.items() if header is not None}
        for header in whole.values():
            reasons = [line for part in self.header for line in differences(header.get(part, {}), self.header[part])]
            if reasons:
                raise ConfigError("\n".join(f"data.cache: {self.out} was begun otherwise: {reason}; remove it or choose"
                                            " another directory" for reason in reasons))  # fmt: skip
        return {name for name, header in whole.items() if not header.get("again")}

    def begin(self, holding: ExitStack) -> None:
        """Makes the directory, holds it, and removes what was left half-written.

        Raises:
            ConfigError: another call is at work there.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            holding.enter_context(held(self.out / LOCK))
        except BlockingIOError as error:
            raise ConfigError(f"data.cache: another memfilter cache is at work in {self.out}") from error
        for path in self.out.iterdir():
            if _PARTIAL.fullmatch(path.name):
                path.unlink()

    def run(self, accelerator, progress: bool) -> None:
        """Writes what is missing, after `begin`."""
        processes, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
        samples = self._read([job.rows for job in self.jobs[rank::processes] if self._is_due(job, "pictures")])
        due = [0 if job.name in self.done else len(job.rows) for job in self.jobs]
        with tqdm(total=sum(due), unit="encoding", desc="cache", disable=not (progress and main), mininterval=1) as bar:
            # in rounds, since processes that wait for one that is far behind are given up
            for first in range(0, len(self.jobs), processes):
                for job in self.jobs[first + rank : first + processes : processes]:
                    if self._is_due(job, "pictures"):
                        self._pictures(job, samples, bar.update)
                    if self._is_due(job, "prompts"):
                        self._prompts(job, bar.update)
                accelerator.wait_for_everyone()
                bar.update(sum(due[: first + processes]) - bar.n)
        if main:
            self._finish()
        accelerator.wait_for_everyone()

    def _is_due(self, job: _Job, kind: str) -> bool:
        return job.kind == kind and job.name not in self.done

    def _read(self, shards: list[range]) -> Iterator[dict]:
        """Batches of views, shard by shard."""
        batches = [batch for rows in shards for batch in _batches(rows, self.batch_size)]
        return iter(DataLoader(self.views, batch_sampler=batches, collate_fn=collate, num_workers=self.workers))

    def _pictures(self, job: _Job, samples: Iterator[dict], progress: Callable) -> None:
        tensors, bad, again = {}, {}, False
        for numbers in _batches(job.rows, self.batch_size):
            batch = next(samples)
            reasons = dict(zip(numbers, batch.pop("bad"), strict=True))
            bad |= {number: reason for number, reason in reasons.items() if reason is not None}
            again |= any(batch.pop("again"))
            good = [i for i, reason in enumerate(reasons.values()) if reason is None]
            if good:
                parts = self.encoder.posteriors({name: [values[i] for i in good] for name, values in batch.items()})
                self._fill(tensors, job, [numbers[i] for i in good], parts)
            progress(len(numbers))
        self._save(job, tensors, bad, again)

    def _prompts(self, job: _Job, progress: Callable) -> None:
        tensors = {}
        for numbers in _batches(job.rows, self.batch_size):
            self._fill(tensors, job, numbers, self.encoder.embeddings([self.captions[number] for number in numbers]))
            progress(len(numbers))
        self._save(job, tensors, {})

    def _fill(self, tensors: dict[str, Tensor], job: _Job, numbers: Sequence[int], parts: tuple[Tensor, ...]) -> None:
        for name, part in zip(PARTS[job.kind], parts, strict=False):
            dtype = torch.float32 if name == "time_ids" else self.dtype
            if name not in tensors:
                tensors[name] = torch.zeros(len(job.rows), *part.shape[1:], dtype=dtype)
            part = part.to("cpu", dtype)
            if not part.isfinite().all():
                raise ValueError(f"{name} of {job.name}: not finite in {dtype}; if it is fp16 that is too small, use "
                                 "--dtype=fp32")  # fmt: skip
            tensors[name][[number - job.rows.start for number in numbers]] = part

    def _save(self, job: _Job, tensors: dict[str, Tensor], bad: dict[int, str], again: bool = False) -> None:
        # one entry: safetensors has no order for several
        metadata = {"memfilter": json.dumps(self.header | {"bad": bad, "again": again}, sort_keys=True)}
        try:
            with atomic(self.out / job.name) as partial:
                save_file(tensors, partial, metadata)
                partial.chmod(self.out.stat().st_mode & 0o666)  # safetensors lets nobody else read it
        except (OSError, SafetensorError) as error:
            raise OSError(f"{self.out / job.name} cannot be written ({' '.join(str(error).split())}): make room and run"
                          " memfilter cache again, it goes on where it stopped") from error  # fmt: skip

    def _finish(self) -> None:
        """Index and cache.json, from the shards."""
        bad = {}
        for job in self.jobs:
            if (header := _read_header(self.out / job.name)) is None:
                raise OSError(f"{self.out / job.name} is gone or cut: run memfilter cache again")
            bad |= {int(number): reason for number, reason in header["bad"].items()}
        places = {caption: divmod(number, self.per_shard["prompts"]) for number, caption in enumerate(self.captions)}
        experiment, views, rows = self.views.experiment, 1 + self.views.view.random_flip, []
        for row, key in enumerate(experiment.keys):
            for flip in range(views):
                number = views * self.views.pictures[experiment.picture(row)] + flip
                place = (None, None) if number in bad else divmod(number, self.per_shard["pictures"])
                prompt = places.get(self.caption_of[key], (None, None))
                rows.append((key, flip == 1, *place, self.caption_of[key], *prompt, bad.get(number)))
        lost = sum(reason is not None for *_, reason in rows) // views
        if lost > self.max_bad_share * len(experiment.keys):
            listed = list(dict.fromkeys(bad.values()))
            more = [f"and {len(listed) - 10} more"] if len(listed) > 10 else []
            what = (f"{lost} samples could not be read, more than data.max_bad_share allows: raise it, or "
                    f"mend or remove them and remove {self.out}")  # fmt: skip
            raise ShardError("\n".join([what, *listed[:10], *more]))
        columns = dict(zip(SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))
        with atomic(self.out / INDEX) as partial:
            pq.write_table(pa.table(columns, SCHEMA), partial)
        files = {name: (self.out / name).stat().st_size for name in (*(job.name for job in self.jobs), INDEX)}
        counts = {"samples": len(experiment.keys), "bad": lost, "captions": len(self.captions)}
        with atomic(self.out / COMPLETE) as partial:
            partial.write_text(json.dumps(self.header | {"counts": counts, "files": files}, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class _Job:
    """A shard to be written, and which views or captions are its rows."""

    kind: str
    name: str
    rows: range


def _batches(rows: range, size: int) -> Iterator[range]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _read_header(path: Path) -> dict | None:
    """What a shard says of itself; None where it is not there or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["memfilter"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _caption(shards, key: str) -> str | None:
    """None where it cannot be read: its sample is then found to be bad."""
    try:
        return shards.caption(key)
    except ShardError:
        return None


# the command

USAGE = "memfilter cache --data.cache=DIR [--dtype=fp32|fp16] [--samples_per_shard=1000] [settings of the training run]"
HELP = """Encode every picture and caption once, into data.cache, for training to read.

Takes the settings of the training run. --dtype is of what is stored: fp32, or fp16 for half the space;
--samples_per_shard says how many samples or captions a file has. Several processes share the work: `accelerate launch
-m memfilter.cli cache ...`, on CPUs `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m memfilter.cli cache ...`.
What was interrupted goes on when it is run again.
"""


def main(argv: list[str]) -> Path:
    """``memfilter cache``: see HELP.

    Raises:
        ConfigError: with every setting that is wrong; and like `make_cache`.
    """
    from memfilter.arguments import parse
    from memfilter.processes import end_processes

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--samples_per_shard", type=int, default=1000)
    try:
        own, settings = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    out = make_cache(parse(settings, HELP, USAGE), own.dtype, own.samples_per_shard)
    end_processes()
    return out
