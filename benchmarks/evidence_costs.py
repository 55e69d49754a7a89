"""What filters cost in time: whole runs of the same data that take turns of a second each on one core.

    python benchmarks/evidence_costs.py

Runs on (a) and (d) of benchmarks/evidence.py, of seeds that are not reported there. All settings of a scenario train at once, but
only one at a time is let run, so that whatever else the machine does befalls all of them alike. Compared to no filter are the CPU
seconds of the whole training (time_ratio), which are fewer where samples were passed over, and those of a step (step_ratio):
steps are counted by the samples that were computed, not by those that were seen. docs/results/evidence_costs.csv has a row for
each run; benchmarks/evidence_tables.py holds them against what they spare. About 80 minutes a seed; seeds and scenarios of which
the table has all rows, by the present recipes, are not run again.
"""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from common import ENVIRONMENT, ROOT, parser, write_csv
from evidence import ONLY, prepare, recipe, settings_of

from memfilter.arguments import parse

SEEDS, TURN = (320, 321, 322), 1.0
SCENARIOS = ("a", "d")
COMPARED = [("none", ""), ("tau", "5"), ("evidence", "with savings"), ("evidence", "without savings"), *ONLY["a"]]
COLUMNS = ["scenario", "method", "setting", "seed", "cpu_seconds", "time_ratio", "step_ratio", "passes", "recipe"]


def measure(work: Path, scenario: str, seed: int) -> list[dict]:
    """Rows of a scenario."""
    prepare(work, scenario, seed)
    runs, started, made_by = {}, [], {method: recipe(scenario, method) for method in COMPARED}
    for number, method in enumerate(COMPARED):
        out = work / "costs" / f"{scenario}-{seed}-{number}"
        shutil.rmtree(ROOT / out, ignore_errors=True)
        settings = [word for word in settings_of(work, scenario, seed, method) if not word.startswith("--run_dir=")]
        runs[method] = ROOT / parse([*settings, f"--run_dir={out}"]).run_dir
        log = runs[method].with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "train_filtered.py", *settings, f"--run_dir={out}"]
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log.open("w"), stderr=subprocess.STDOUT)
        process.send_signal(signal.SIGSTOP)
        started.append(process)
    try:
        while waiting := [process for process in started if process.poll() is None]:
            for process in waiting:
                process.send_signal(signal.SIGCONT)
                time.sleep(TURN)
                process.send_signal(signal.SIGSTOP)
            if any(process.returncode for process in started):
                break  # what has failed is named below
    finally:
        for process in started:
            process.kill()
    rows = []
    for method, out in runs.items():
        if not (out / "summary.json").exists():
            raise SystemExit(f"{out} failed, see {out.with_suffix('.log')}")
        summary = json.loads((out / "summary.json").read_text())
        rows.append({"scenario": scenario, "method": method[0], "setting": method[1], "seed": seed,
                     "cpu_seconds": summary["cpu_seconds"], "passes": summary.get("filter/pass_share", 0.0),
                     "recipe": made_by[method]})  # fmt: skip
        rows[-1]["time_ratio"] = rows[-1]["cpu_seconds"] / rows[0]["cpu_seconds"]  # none comes first
        rows[-1]["step_ratio"] = rows[-1]["time_ratio"] / (computed(out) if method[0] == "evidence" else 1.0)
        print(scenario, *method, f"step {rows[-1]['step_ratio']:.3f}, run {rows[-1]['time_ratio']:.3f}", flush=True)
    return rows


def computed(run: Path) -> float:
    """Share of the samples seen that a pass was made for: those that were passed over have no loss."""
    loss = pq.read_table(run / "audit.parquet", columns=["loss"])["loss"]
    return 1 - loss.null_count / len(loss)


def current(table: Path) -> list[dict]:
    """Rows of the scenarios and seeds of which all of `COMPARED` are in the table, by their present recipes."""
    if not table.exists():
        return []
    known = {(scenario, *method): recipe(scenario, method) for scenario in SCENARIOS for method in COMPARED}
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file)
                if known.get((row["scenario"], row["method"], row["setting"])) == row.get("recipe", "")]  # fmt: skip
    there = Counter((row["scenario"], row["seed"]) for row in rows)
    return [row for row in rows if there[row["scenario"], row["seed"]] == len(COMPARED)]


def main() -> None:
    args = parser(__doc__, "runs/clipart", SEEDS, processes=False).parse_args()
    table = args.out / "evidence_costs.csv"
    rows = current(table)
    for seed in args.seeds:
        for scenario in SCENARIOS:
            if (scenario, str(seed)) not in {(row["scenario"], str(row["seed"])) for row in rows}:
                rows += measure(args.work_dir, scenario, seed)
                write_csv(table, COLUMNS, rows)


if __name__ == "__main__":
    main()
