"""Where a run writes down what happens: metrics.jsonl always, W&B when asked, and the audit of every checked sample."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from memfilter.config import LogConfig
from memfilter.filter import Verdict

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

    A run that is cut off leaves ``.audit.parquet.partial``.
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
        self.flush()
        self._writer.close()
        os.replace(self._partial, self._path)


class Tracker:
    """Metrics by the number of samples seen."""

    def __init__(self, run_dir: Path, config: LogConfig, run_config: dict):
        self._file = (run_dir / "metrics.jsonl").open("w", buffering=1)
        self._wandb = None
        if config.wandb != "disabled":
            import wandb

            self._wandb = wandb.init(
                project=config.project, mode=config.wandb, dir=str(run_dir), name=run_dir.name, config=run_config
            )

    def log(self, samples: int, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps({"samples": samples, **metrics}) + "\n")
        if self._wandb:
            self._wandb.log(metrics, step=samples)

    def close(self, failed: bool = False) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))
