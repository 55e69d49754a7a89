"""Where a run writes down what happens: metrics and pictures, the audit of every checked sample, unreadable samples."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from memfilter.config import ConfigError, LogConfig
from memfilter.data.shards import ShardError
from memfilter.filter import Verdict
from memfilter.stats import HISTOGRAM_EDGES

AUDIT_SCHEMA = pa.schema(
    {
        "position": pa.int64(),  # in the global sample stream
        "key": pa.string(),
        "duplicate": pa.bool_(),
        "timestep": pa.int32(),
        "text_norm": pa.float32(),
        "keep": pa.bool_(),
    }
)


class Audit:
    """One row for every checked sample. Tensors stay on their device until `flush`; the file appears when closed.

    A run that is killed leaves ``.audit.parquet.partial``.
    """

    def __init__(self, path: Path):
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._writer = pq.ParquetWriter(self._partial, AUDIT_SCHEMA)
        self._pending: list[tuple[dict, Verdict]] = []

    def add(self, batch: dict, verdict: Verdict) -> None:
        facts = {name: batch[name] for name in ("position", "key", "duplicate")}
        self._pending.append((facts, verdict))

    def flush(self) -> None:
        if not self._pending:
            return
        facts, verdicts = zip(*self._pending, strict=True)
        checked = torch.cat([v.checked for v in verdicts]).cpu().numpy()
        columns = {name: [value for fact in facts for value in fact[name]] for name in facts[0]}
        columns["timestep"] = torch.cat([v.timesteps for v in verdicts]).int().cpu().numpy()
        columns["text_norm"] = torch.cat([v.text_norm for v in verdicts]).float().cpu().numpy()
        columns["keep"] = torch.cat([v.keep for v in verdicts]).cpu().numpy()
        self._writer.write_table(pa.table(columns, schema=AUDIT_SCHEMA).filter(pa.array(checked)))
        self._pending.clear()

    def close(self) -> None:
        if self._writer.is_open:
            self.flush()
            self._writer.close()
            os.replace(self._partial, self._path)


class BadSamples:
    """Samples that could not be read, one line of JSON for each, as they come. The file is made for the first one.

    Args:
        allowed: more of them end the run.
    """

    def __init__(self, path: Path, allowed: float):
        self._path, self._allowed = path, allowed
        self._found: list[str] = []

    def add(self, batch: dict) -> None:
        """Raises ShardError with the list when there are too many."""
        rows = [row for row, reason in enumerate(batch["bad"]) if reason is not None]
        if not rows:
            return
        with self._path.open("a") as file:
            for row in rows:
                facts = {name: batch[name][row] for name in ("position", "key", "bad")}
                file.write(json.dumps(facts) + "\n")
                self._found.append(facts["bad"])
        if len(self._found) > self._allowed:
            listed = list(dict.fromkeys(self._found))
            more = [f"and {len(listed) - 10} more, see {self._path}"] if len(listed) > 10 else []
            raise ShardError("\n".join([f"{len(self._found)} samples could not be read, more than data.max_bad_share "
                                        f"allows: mend or remove them, or raise it", *listed[:10], *more]))  # fmt: skip


def require_wandb(config: LogConfig) -> None:
    """Raises ConfigError where W&B is wanted online and nobody is logged in."""
    os.environ["WANDB_MODE"] = config.wandb  # an environment that says otherwise would win over a login
    if config.wandb != "online":
        return
    import wandb

    try:
        known = wandb.login(prompt=False)
    except (wandb.Error, OSError) as error:
        raise ConfigError(f"log.wandb=online: {' '.join(str(error).split())}") from error
    if not known:
        raise ConfigError("log.wandb=online needs a key: run `wandb login`, set WANDB_API_KEY, or choose offline")


class Tracker:
    """Metrics and pictures by the number of samples seen: metrics.jsonl, and W&B and TensorBoard when asked."""

    def __init__(self, run_dir: Path, config: LogConfig, run_config: dict):
        self._file = (run_dir / "metrics.jsonl").open("w", buffering=1)
        self._wandb = self._tensorboard = None
        if config.wandb != "disabled":
            import wandb

            try:
                self._wandb = wandb.init(
                    project=config.project, mode=config.wandb, dir=str(run_dir), name=run_dir.name, config=run_config
                )
            except (wandb.Error, OSError) as error:
                raise ConfigError(f"log.wandb={config.wandb}: {' '.join(str(error).split())}") from error
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"))

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
            self._wandb.log({**metrics, **drawn}, step=samples)
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

            self._wandb.log({name: [wandb.Image(pixels, caption=c[:500]) for c, pixels in captioned]}, step=samples)
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
            self._wandb.log({"filter/dropped_most": table}, step=samples)

    def close(self, failed: bool = False) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))


def _as_text(caption: str) -> str:
    """TensorBoard renders Markdown: an indented block shows the caption as it is."""
    return "\n".join("    " + line for line in caption[:500].splitlines())
