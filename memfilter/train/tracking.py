"""Where a run writes down what happens: metrics and pictures, the audit of every checked sample, unreadable samples."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memfilter.config import ConfigError, LogConfig
from memfilter.data.shards import ShardError
from memfilter.files import atomic
from memfilter.filter import Verdict
from memfilter.reference import SIGNALS
from memfilter.stats import HISTOGRAM_EDGES

log = logging.getLogger(__name__)

AUDIT_SCHEMA = pa.schema(
    {
        "position": pa.int64(),  # in the global sample stream
        "key": pa.string(),
        "duplicate": pa.bool_(),
        "timestep": pa.int32(),
        "text_norm": pa.float32(),
        "keep": pa.bool_(),
        # null without evidence, and where not measured
        "p_value": pa.float32(),  # of the norm, among those of ordinary samples
        "evidence": pa.float32(),  # of the sample's key, after this encounter
        "loss": pa.float32(),
        "cosine": pa.float32(),
        "gain": pa.float32(),
        "skipped": pa.string(),  # why there was no check; null: there was one
    }
)


def keep_lines(path: Path, wanted: Callable[[dict], bool], writes: bool = True) -> list[dict]:
    """Drops the lines of a JSONL file that are not wanted, and what was cut short; returns the others.

    Args:
        writes: False leaves the file as it is.
    """
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            facts = json.loads(line)
            if wanted(facts):
                kept.append((line, facts))
    if writes:
        with atomic(path) as partial:
            partial.write_text("".join(f"{line}\n" for line, _ in kept), encoding="utf-8")
    return [facts for _, facts in kept]


class Audit:
    """One row for every checked sample, or, with evidence, for every sample of the stream, passed over or not. Tensors stay on
    their device until `take`.

    Every rank adds and takes; one of them writes, and makes the file when all is there. Until then rows are in
    ``audit/``, in parts that end at checkpoints: a run that goes on from a checkpoint keeps the parts that began before.

    Args:
        start: samples seen before.
        writes: whether this rank is the one.
    """

    def __init__(self, run_dir: Path, start: int = 0, writes: bool = True):
        self._path, self._parts = run_dir / "audit.parquet", run_dir / "audit"
        self._writer: pq.ParquetWriter | None = None
        self._part = self._parts / f"{start:012d}.parquet"
        self._pending: list[tuple[dict, Verdict]] = []
        self._passed_over: list[pa.Table] = []
        self._closed = False
        if writes:
            self._parts.mkdir(exist_ok=True)
            for part in (*self._parts.glob(".*.partial"), *self._parts.glob("*.parquet")):
                if part.suffix == ".partial" or int(part.stem) >= start:
                    part.unlink()

    def add(self, batch: dict, verdict: Verdict) -> None:
        facts = {name: batch[name] for name in ("position", "key", "duplicate")}
        self._pending.append((facts, verdict))

    def add_passed_over(self, facts: dict[str, list], timesteps: list[int]) -> None:
        """Samples in whose place others were taken, see `SampleDataset.facts`."""
        count = len(timesteps)
        constant = {"keep": [False] * count, "skipped": ["flagged"] * count}
        self._passed_over.append(_table(facts | constant | {"timestep": timesteps}))

    def take(self) -> pa.Table:
        """The rows that were added since the last call, but for those whose step has not been weighed yet."""
        tables, self._passed_over = self._passed_over, []
        added, self._pending = self._pending, []
        for facts, verdict in added:
            if verdict.skipped is not None and verdict.p_value is None:  # until `MemFilter.before_step`
                self._pending.append((facts, verdict))
                continue
            columns = facts | {
                "timestep": verdict.timesteps.int().cpu().numpy(),
                "text_norm": verdict.text_norm.float().cpu().numpy(),
                "keep": verdict.keep.cpu().numpy(),
                "skipped": verdict.skipped,
            }
            if verdict.skipped is None:
                tables.append(_table(columns).filter(pa.array(verdict.checked.cpu().numpy())))
                continue
            found = dict(zip(SIGNALS, verdict.signals.numpy().T, strict=True)) | {
                "p_value": verdict.p_value.numpy(),
                "evidence": verdict.evidence.numpy(),
            }
            columns |= {"text_norm": found.pop("norm")} | found
            tables.append(_table(columns))
        return pa.concat_tables(tables) if tables else AUDIT_SCHEMA.empty_table()

    def write(self, tables: list[pa.Table]) -> None:
        """Takes in what the ranks have taken."""
        table = pa.concat_tables(tables)
        if len(table):
            if self._writer is None:
                self._writer = pq.ParquetWriter(_partial(self._part), AUDIT_SCHEMA)
            self._writer.write_table(table.sort_by("position"))

    def cut(self, samples: int) -> None:
        """Ends a part; the next begins after so many samples."""
        if self._writer is not None:
            self._writer.close()
            os.replace(_partial(self._part), self._part)
        self._writer, self._part = None, self._parts / f"{samples:012d}.parquet"

    def close(self) -> None:
        """Makes the file of all parts, once."""
        if self._closed:
            return
        self._closed = True
        self.write([self.take()])
        self.cut(0)
        with atomic(self._path) as partial, pq.ParquetWriter(partial, AUDIT_SCHEMA) as writer:
            for part in sorted(self._parts.glob("*.parquet")):
                with pq.ParquetFile(part) as file:
                    for group in range(file.num_row_groups):
                        writer.write_table(file.read_row_group(group))

    def discard_parts(self) -> None:
        """For when nothing is left that could go wrong."""
        shutil.rmtree(self._parts, ignore_errors=True)


def _table(columns: dict) -> pa.Table:
    """Of some columns of the audit; the others are null, and so is NaN."""
    count = len(columns["position"])
    arrays = []
    for field in AUDIT_SCHEMA:
        values = columns.get(field.name)
        arrays.append(pa.nulls(count, field.type) if values is None else pa.array(values, field.type, from_pandas=True))
    return pa.table(arrays, schema=AUDIT_SCHEMA)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


class BadSamples:
    """Samples that could not be read, one line of JSON for each. The file is made for the first one.

    Every rank adds and takes, and raises when it knows of too many; one of them writes.

    Args:
        allowed: more of them end the run.
        start: samples seen before.
        writes: whether this rank is the one.
    """

    def __init__(self, path: Path, allowed: float, start: int = 0, writes: bool = True):
        self._path, self._allowed, self._writes = path, allowed, writes
        self._found = [facts["bad"] for facts in keep_lines(path, lambda facts: facts["position"] < start, writes)]
        self._pending: list[dict] = []

    def add(self, batch: dict) -> None:
        """Raises ShardError with the list when there are too many."""
        for row, reason in enumerate(batch["bad"]):
            if reason is not None:
                self._pending.append({name: batch[name][row] for name in ("position", "key", "bad")})
        if len(self._found) + len(self._pending) > self._allowed:
            self.write(self.take())

    def take(self) -> list[dict]:
        """What was added since the last call."""
        taken, self._pending = self._pending, []
        return taken

    def write(self, found: list[dict]) -> None:
        """Takes in what the ranks have taken; raises like `add`."""
        if not found:
            return
        if self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(facts) + "\n" for facts in sorted(found, key=lambda facts: facts["position"]))
        self._found += [facts["bad"] for facts in found]
        if len(self._found) > self._allowed:
            listed = list(dict.fromkeys(self._found))
            more = [f"and {len(listed) - 10} more, see {self._path}"] if len(listed) > 10 else []
            raise ShardError("\n".join([f"{len(self._found)} samples could not be read, more than data.max_bad_share "
                                        f"allows: mend or remove them, or raise it", *listed[:10], *more]))  # fmt: skip


def require_wandb(config: LogConfig) -> None:
    """Raises ConfigError where W&B is wanted online and nobody is logged in."""
    os.environ["WANDB_MODE"] = config.wandb  # an environment that says otherwise would win over a login
    if config.wandb != "online":
        if os.environ.get("WANDB_SWEEP_ID"):
            log.warning("W&B's agent has started this run, and its server hears nothing of it with log.wandb=%s: add "
                        "--log.wandb=online to the sweep's command", config.wandb)  # fmt: skip
        return
    import wandb

    try:
        known = wandb.login(prompt=False)
    except (wandb.Error, OSError) as error:
        raise ConfigError(f"log.wandb=online: {' '.join(str(error).split())}") from error
    if not known:
        raise ConfigError("log.wandb=online needs a key: run `wandb login`, set WANDB_API_KEY, or choose offline")


class Tracker:
    """Metrics and pictures by the number of samples seen: metrics.jsonl, and W&B and TensorBoard when asked.

    Args:
        start: samples seen before; what was written after them is written again.
        wandb_id: of the W&B run that goes on, None for a new one.
    """

    def __init__(self, run_dir: Path, config: LogConfig, run_config: dict, start: int = 0, wandb_id: str | None = None):
        keep_lines(run_dir / "metrics.jsonl", lambda facts: facts["samples"] <= start)
        self._file = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self._wandb = self._tensorboard = None
        if config.wandb != "disabled":
            import wandb

            try:
                # its history takes no step twice: what is logged again after a resume is what it has already
                self._wandb = wandb.init(
                    project=config.project,
                    mode=config.wandb,
                    dir=str(run_dir),
                    name=run_dir.name,
                    config=run_config,
                    id=wandb_id,
                    resume=None if wandb_id is None else "allow",
                )
            except (wandb.Error, OSError) as error:
                raise ConfigError(f"log.wandb={config.wandb}: {' '.join(str(error).split())}") from error
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)

    @property
    def wandb_id(self) -> str | None:
        return self._wandb and self._wandb.id

    def log(self, samples: int, metrics: dict[str, float], histograms: dict[str, list[int]]) -> None:
        """One point of every curve; histograms are those of `FilterStats.histograms`."""
        sparse = {
            name: {f"{edge:.4g}": count for edge, count in zip(HISTOGRAM_EDGES, counts, strict=True) if count}
            for name, counts in histograms.items()
        }
        self._file.write(json.dumps({"samples": samples, **metrics, **sparse}) + "\n")
        edges = np.array([*HISTOGRAM_EDGES, 2 * HISTOGRAM_EDGES[-1]])
        if self._wandb:
            import wandb

            drawn = {name: wandb.Histogram(np_histogram=(np.array(c), edges)) for name, c in histograms.items()}
            self._tell_wandb(lambda run: run.log({**metrics, **drawn}, step=samples))
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, samples)
            for name, counts in histograms.items():
                self._tensorboard_histogram(name, np.array(counts), edges, samples)

    def _tensorboard_histogram(self, name: str, counts: np.ndarray, edges: np.ndarray, samples: int) -> None:
        middle = (edges[:-1] + edges[1:]) / 2
        self._tensorboard.add_histogram_raw(
            name,
            min=edges[:-1][counts > 0].min(),
            max=edges[1:][counts > 0].max(),
            num=counts.sum(),
            sum=(counts * middle).sum(),
            sum_squares=(counts * middle**2).sum(),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=samples,
        )

    def images(self, samples: int, name: str, captioned: list[tuple[str, np.ndarray]]) -> None:
        """Pictures, uint8 [H, W, 3], each with its caption."""
        if self._wandb:
            import wandb

            pictures = [wandb.Image(pixels, caption=caption[:500]) for caption, pixels in captioned]
            self._tell_wandb(lambda run: run.log({name: pictures}, step=samples))
        if self._tensorboard:
            for number, (caption, pixels) in enumerate(captioned):
                self._tensorboard.add_image(f"{name}/{number}", pixels, samples, dataformats="HWC")
                self._tensorboard.add_text(f"{name}/{number}", _as_text(caption), samples)

    def dropped(self, samples: int, rows: list[dict]) -> None:
        """The samples that were dropped most often, as a W&B table; rows are those of `write_gallery`."""
        if self._wandb and rows:
            import wandb

            columns = [name for name in rows[0] if name != "picture"]
            table = wandb.Table(columns=["picture", *columns])
            for row in rows:
                picture = None if row["picture"] is None else wandb.Image(row["picture"])
                table.add_data(picture, *(row[name] for name in columns))
            self._tell_wandb(lambda run: run.log({"filter/dropped_most": table}, step=samples))

    def close(self, exit_code: int = 0) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._tell_wandb(lambda run: run.finish(exit_code=exit_code))

    def _tell_wandb(self, what: Callable) -> None:
        """Its service is a process of its own, which a signal to the whole job ends too: the run is worth more."""
        try:
            what(self._wandb)
        except Exception as error:  # noqa: BLE001  wandb's, the connection's and asyncio's
            log.warning("W&B has stopped (%s); metrics.jsonl goes on", type(error).__name__)
            self._wandb = None


def _as_text(caption: str) -> str:
    """TensorBoard renders Markdown: an indented block shows the caption as it is."""
    return "\n".join("    " + line for line in caption[:500].splitlines())
