"""What the paper's fixed tau buys on clipart scenes: memorization, agreement and drop rates over seeds.

    python benchmarks/fixed_tau.py --work_dir runs/fixed_tau

Every run is the quickstart's, with scenes, duplicates and training seed of its own, in a process of one thread. Each
adds its row to docs/results/fixed_tau.csv when it is finished; rows of the same recipe (settings, base model, scorer)
are found there when the command is repeated. Mean and spread (standard deviation over seeds) go to
docs/results/fixed_tau.md and are printed.
"""

from __future__ import annotations

import csv
import json
import shutil
import threading
from pathlib import Path

import numpy as np
from common import call, parser, recipe, share, write_csv, write_text

REPORTED_SEEDS = (101, 102, 103)  # no setting was chosen by looking at them
TAUS = ("3", "4", "5", "6", "7")
KINDS = ("duplicates", "distinct")
FIGURES = ("memorization_rate", "copy_similarity", "agreement", "seed_agreement")
COLUMNS = ["recipe", "setting", "seed", *(f"{f}_{k}" for f in FIGURES for k in KINDS), "dropped_duplicates", "dropped_distinct",
           "seconds"]  # fmt: skip
PREPARE = ("--duplicates=20", "--repeats=500", "--distinct=6000")
EVALUATE = ("--distinct=40", "--seeds=4", "--steps=20", "--guidance_scale=4")
RECIPE = recipe("quickstart.yaml", PREPARE, EVALUATE)


def run(work: Path, seed: int, tau: str) -> dict:
    """Trains and evaluates one setting; its row of the table."""
    out = work / f"seed{seed}" / ("none" if tau == "null" else f"tau{tau}")
    log = out.with_name(f"{out.name}.log")
    if not (out / "summary.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        call(log, "train_filtered.py", "--config", "configs/quickstart.yaml", f"--run_dir={out}",
              f"--data.path={_scenes(work, seed)}", f"--filter.tau={tau}", f"--train.seed={seed}")  # fmt: skip
    if not (out / "evaluation.json").exists():
        call(log, "-m", "memfilter.cli", "evaluate", out, *EVALUATE)
    summary, evaluation = (json.loads((out / f"{name}.json").read_text()) for name in ("summary", "evaluation"))
    row = {"recipe": RECIPE, "setting": setting(tau), "seed": seed}
    row |= {f"{f}_{k}": round(evaluation[k][f], 4) for f in FIGURES for k in KINDS}
    row |= {f"dropped_{k}": round(summary.get(f"filter/drop_rate_{k}", 0.0), 4) for k in KINDS}
    print(f"done: {row['setting']}, seed {seed}", flush=True)
    return row | {"seconds": round(summary["seconds"])}


def setting(tau: str) -> str:
    return "none" if tau == "null" else f"tau={tau}"


def _scenes(work: Path, seed: int) -> Path:
    return work / f"seed{seed}" / "scenes"


def read_rows(path: Path) -> list[dict]:
    """Rows of this recipe that earlier calls left."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["recipe"] == RECIPE]
    return [{k: v if k in ("recipe", "setting") else float(v) for k, v in row.items()} for row in rows]


def table(rows: list[dict]) -> str:
    """Markdown: mean and standard deviation over seeds of every figure, one line per setting."""
    shown = [c for c in COLUMNS if c not in ("recipe", "setting", "seed", "seconds")]  # of a machine that others share
    lines = ["| setting | seeds | " + " | ".join(c.replace("_", " ") for c in shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        of = [row for row in rows if row["setting"] == setting]
        cells = []
        for column in shown:
            values = np.array([row[column] for row in of])
            cells.append(f"{values.mean():.3f} ± {values.std(ddof=1) if len(of) > 1 else 0:.3f}")
        lines.append(f"| {setting} | {len(of)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, "runs/fixed_tau", REPORTED_SEEDS)
    options.add_argument("--taus", nargs="+", default=TAUS)
    args = options.parse_args()
    work, table_path = args.work_dir.resolve() / RECIPE, args.out / "fixed_tau.csv"
    order = [setting(tau) for tau in ("null", *args.taus)]
    rows, lock = read_rows(table_path), threading.Lock()
    known = {(row["setting"], int(row["seed"])) for row in rows}
    jobs = [(s, t) for s in args.seeds for t in ("null", *args.taus) if (setting(t), s) not in known]
    for seed in {seed for seed, _ in jobs}:
        if not _scenes(work, seed).exists():
            call(work / "scenes.log", "-m", "memfilter.cli", "prepare", "scenes", _scenes(work, seed), f"--seed={seed}", *PREPARE)

    def finish(job: tuple[int, str]) -> None:
        row = run(work, *job)
        with lock:
            rows.append(row)
            rows.sort(key=lambda r: (order.index(r["setting"]) if r["setting"] in order else -1, r["seed"]))
            write_csv(table_path, COLUMNS, [row | {"seed": int(row["seed"]), "seconds": int(row["seconds"])} for row in rows])

    share(args.processes, finish, jobs)
    text = f"`python benchmarks/fixed_tau.py`: mean ± standard deviation over seeds.\n\n{table(rows)}"
    write_text(args.out / "fixed_tau.md", text)
    print(text)


if __name__ == "__main__":
    main()
