"""What benchmarks share: processes of one thread, rows that survive an interruption, means with their intervals."""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from memfilter.files import atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
LIMITS = (ROOT / "memfilter" / "assets" / "limits.json").read_bytes()  # from where on a scene is a copy

# of processes that benchmarks start: one thread, this project, no network
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}  # fmt: skip


def parser(
    doc: str, work_dir: str | None = None, seeds: Sequence[int] | None = None, processes: bool = True
) -> argparse.ArgumentParser:
    """--out, which all have, and what is asked for of --work_dir, --seeds and --processes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS, help="directory of the tables")
    if work_dir is not None:
        made.add_argument("--work_dir", type=Path, default=Path(work_dir), help="of what is kept to go on from")
    if processes:
        made.add_argument("--processes", type=int, default=os.cpu_count(), help="at a time")
    if seeds is not None:
        made.add_argument("--seeds", type=int, nargs="+", default=seeds)
    return made


def call(log: Path, *words) -> None:
    """Runs Python with these words from the project's directory, in one thread; what it prints is added to the log.

    Raises:
        SystemExit: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words[:4]))} failed, see {log}")


def share(processes: int, work: Callable, jobs: Iterable) -> list:
    """Does every job, so many at a time; each is to spend its time in a process of its own."""
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(work, jobs))


def kept(table: Path, recipe: str) -> list[dict]:
    """Rows that an earlier call by the same recipe left in a table, their numbers as numbers; none where there is no table."""
    if not table.exists():
        return []
    # text may be empty, numbers may be missing; a recipe without letters is no number
    found = pd.read_csv(table, keep_default_na=False, na_values=["nan"], dtype={"recipe": str})
    return found[found["recipe"] == recipe].to_dict("records") if "recipe" in found else []


def complete(
    rows: list[dict], seeds: Iterable[int], make: Callable[[int], list[dict]], save: Callable[[], None], processes: int
) -> None:
    """Adds the rows of every seed that has none yet, and saves after each."""
    known, lock = {row["seed"] for row in rows}, threading.Lock()

    def add(seed: int) -> None:
        made = make(seed)
        with lock:
            rows.extend(made)
            save()

    share(processes, add, [seed for seed in seeds if seed not in known])


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Four digits after the point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        partial.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def recipe(config: str, *facts) -> str:
    """Names what results depend on beside the seed: a file of configs/, the embedded models, and other facts."""
    digest = hashlib.sha256((ROOT / "configs" / config).read_bytes() + repr(facts).encode())
    for path in sorted((ROOT / "memfilter" / "assets").rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def code_of(module: str, *names: str) -> bytes:
    """What a module does, such as memfilter/inference/calls: its syntax tree without docstrings; of these functions and classes
    alone, if any are named."""
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    if names:
        tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
        assert len(tree.body) == len(names), f"{module} has not all of {', '.join(names)}"
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
    return ast.dump(tree).encode()


def write_json(path: Path, content) -> None:
    with atomic(path) as partial:
        partial.write_text(json.dumps(content))


def half_width(values: np.ndarray) -> float:
    """Of the 95% interval of the mean, by Student's t; NaN of one value."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def mean(values: Iterable[float], digits: int = 3) -> str:
    """With half of its interval, which one value does not have."""
    values = np.array([float(value) for value in values])
    return f"{values.mean():.{digits}f}" + (f" ± {half_width(values):.{digits}f}" if len(values) > 1 else "")
