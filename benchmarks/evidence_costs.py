"""What filters cost in time: runs of the same data that take turns, a step each, on one core.

    python benchmarks/evidence_costs.py

Runs on (a) and (d) of benchmarks/evidence.py, of seeds that are not reported there. All settings of a scenario train at once, each
in a process of its own, but only one at a time makes a step, so that whatever else the machine does befalls all of them alike. A
step is everything from one batch to the next: samples passed over, reading, both passes, update, audit. Compared to no filter are
the CPU seconds of a step (step_ratio), over the steps that every setting has made, since a run that is left alone with few others
has the machine's caches to itself and makes its steps in less time; and those of the whole run (time_ratio), which are so many
fewer steps where samples are passed over. docs/results/evidence_costs.csv has a row for each run; benchmarks/evidence_tables.py
holds them against what they spare. Seeds and scenarios of which the table has all rows, by the present recipes, are not run again.
"""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import evidence
from common import ENVIRONMENT, ROOT, code_of, parser, write_csv
from tqdm import tqdm

from memfilter.arguments import parse

SEEDS = (320, 321, 322)
WARM_UP = 10  # steps that are not counted
SCENARIOS = ("a", "d")
COMPARED = [("none", ""), ("tau", "5"), ("evidence", "with savings"), ("evidence", "without savings"), *evidence.ONLY["a"]]
COLUMNS = ["scenario", "method", "setting", "seed", "step_seconds", "steps", "step_ratio", "time_ratio", "recipe"]


def recipe(scenario: str, method: tuple[str, str]) -> str:
    """Names what is measured, and how."""
    how = code_of("benchmarks/evidence_costs", "train_in_turns", "Run")
    return hashlib.sha256(evidence.recipe(scenario, method).encode() + how).hexdigest()[:12]


def train_in_turns(words: list[str], log: Path, turns: Connection) -> None:
    """A run that makes a step when it is told to. Before the first and after each it tells its clock, in CPU seconds, and whether
    there is another to come."""
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    from memfilter.train.loop import Trainer

    class InTurns(Trainer):
        def batches(self):
            with closing(super().batches()) as batches:
                for batch in batches:
                    turns.send((time.process_time(), True))
                    turns.recv()
                    yield batch
                turns.send((time.process_time(), False))

    InTurns(parse(words)).run(progress=False)


class Run:
    """One of the runs that take turns."""

    def __init__(self, words: list[str], out: Path):
        self.config, self.log, self.clock = parse([*words, f"--run_dir={out}"]), out.with_suffix(".log"), []
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        own = multiprocessing.get_context("spawn")
        self._turns, theirs = own.Pipe()
        self.process = own.Process(target=train_in_turns, args=([*words, f"--run_dir={out}"], self.log, theirs))
        self.process.start()
        theirs.close()
        self._hear()

    def step(self) -> None:
        self._turns.send(None)
        self._hear()

    def _hear(self) -> None:
        with suppress(EOFError):
            clock, self.goes_on = self._turns.recv()
            self.clock.append(clock)
            return
        raise SystemExit(f"{self.config.run_dir} failed, see {self.log}")

    @property
    def most(self) -> int:
        """Steps that it makes where nothing is passed over."""
        return self.config.train.samples // self.config.train.batch_size

    @property
    def passes_over(self) -> bool:
        return self.config.filter.method == "evidence" and self.config.filter.replace

    @property
    def steps(self) -> int:
        return len(self.clock) - 1 if self.passes_over else self.most

    def seconds(self, steps: int) -> float:
        """Of one step, mean over the first ones without `WARM_UP`."""
        return (self.clock[steps] - self.clock[WARM_UP]) / (steps - WARM_UP)


def measure(work: Path, scenario: str, seed: int) -> list[dict]:
    """Rows of a scenario."""
    evidence.prepare(work, scenario, seed)
    runs: dict[tuple[str, str], Run] = {}
    made_by = {method: recipe(scenario, method) for method in COMPARED}
    try:
        for number, method in enumerate(COMPARED):
            words = [word for word in evidence.settings_of(work, scenario, seed, method) if not word.startswith("--run_dir=")]
            runs[method] = Run(words, ROOT / work / "costs" / f"{scenario}-{seed}-{number}")
        with tqdm(desc=f"{scenario} {seed}", unit="round", total=runs[COMPARED[0]].most) as progress:
            # how many steps the others make is known
            while any(run.goes_on and run.passes_over for run in runs.values()):
                for run in runs.values():
                    if run.goes_on:
                        run.step()
                progress.update()
    finally:
        for run in runs.values():
            run.process.kill()
            run.process.join()
    rows = rows_of(runs)
    for method, row in zip(runs, rows, strict=True):
        row |= {"scenario": scenario, "seed": seed, "recipe": made_by[method]}
        print(scenario, *method, f"step {row['step_ratio']:.3f}, run {row['time_ratio']:.3f}", flush=True)
    return rows


def rows_of(runs: dict[tuple[str, str], Run]) -> list[dict]:
    """What the clocks of all runs say; the first is without a filter."""
    together, none = min(len(run.clock) - 1 for run in runs.values()), next(iter(runs.values()))
    rows = []
    for (method, setting), run in runs.items():
        step = run.seconds(together)
        ratio = step / none.seconds(together)
        rows.append({"method": method, "setting": setting, "step_seconds": step, "steps": run.steps, "step_ratio": ratio,
                     "time_ratio": ratio * run.steps / none.steps})  # fmt: skip
    return rows


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
    table = args.out.resolve() / "evidence_costs.csv"
    os.environ.update(ENVIRONMENT)
    os.chdir(ROOT)  # settings name files from there
    rows = current(table)
    for scenario in SCENARIOS:
        for seed in args.seeds:
            if (scenario, str(seed)) not in {(row["scenario"], str(row["seed"])) for row in rows}:
                rows += measure(args.work_dir, scenario, seed)
                write_csv(table, COLUMNS, rows)


if __name__ == "__main__":
    main()
