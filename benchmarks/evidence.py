"""What evidence buys over one threshold, on clipart scenes: memorization, agreement, samples lost, passes and time.

    python benchmarks/evidence.py

Three scenarios, each with 20 duplicates shown 200 times: (a) among 2,000 samples shown once; (b) among 150 shown 20 times;
(c) as (a), each duplicate under 10 keys with slightly different captions and crops, which filters that go by key share by
content (`memfilter prepare groups`); the prompt is the first copy's caption, and a copy of any of the ten counts. And one without
duplicates: (d) 1,000 samples five times, 20 of which are called duplicates in the table and are none. Beside the methods stands
the model before it is trained (base). Settings of evidence that save more or less are in (a), three that flag sooner in (b); these
were thought of after rows of (b) had been seen, so what they show is a hint and no test.
Every run has scenes, duplicates and a training seed of its own, in a process of one thread, and sees the same number of samples.
Each adds its row to docs/results/evidence.csv when it is finished; rows of the same recipe are found there when the command is
repeated, so that it goes on where it was stopped.
Runs are named by their settings, and those of (a) are found by the study (configs/sweeps/study.yaml), as its are here.
benchmarks/evidence_tables.py makes tables, figures and pictures of them.

Columns of the CSV: memorization_rate of duplicate prompts; distinct_dropped, share of the appearances of distinct samples
that were not trained on; passes, null passes for each sample of the stream; time_ratio, CPU seconds of training to those of
the unfiltered run of the same scenario and seed (CPU seconds, because other processes share the machine, which moves them by a
fifth all the same: benchmarks/evidence_costs.py measures time).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import threading
from pathlib import Path

import pyarrow.parquet as pq
from common import ROOT, call, code_of, parser, share, write_csv

from memfilter.arguments import parse
from memfilter.eval.results import read_figures

REPORTED_SEEDS = (311, 312, 313, 314, 315)  # no setting was chosen by looking at them
SCENARIOS = {  # arguments of `memfilter prepare scenes`, samples seen
    "a": (("--repeats=200", "--distinct=2000"), 6000),
    "b": (("--repeats=200", "--distinct=150", "--distinct_repeats=20"), 7000),
    "c": (("--repeats=200", "--distinct=2000", "--near_copies=10"), 6000),
    "d": (("--repeats=5", "--distinct=980", "--distinct_repeats=5"), 5000),
}
EVIDENCE = ("--filter.method=evidence",)
METHODS = {  # (method, setting): settings of the run
    ("base", ""): ("--filter.method=tau", "--filter.tau=null", "--train.samples=0"),
    ("none", ""): ("--filter.method=tau", "--filter.tau=null"),
    ("evidence", "with savings"): EVIDENCE,
    ("oracle", ""): ("--filter.method=oracle",),
    **{("sightings", f"k={k}"): ("--filter.method=sightings", f"--filter.sightings={k}") for k in (10, 30, 100)},
    **{("tau", f"{tau}"): ("--filter.method=tau", f"--filter.tau={tau}") for tau in (3, 4, 5, 6, 7)},
    ("timestep", "2%"): ("--filter.method=timestep", "--filter.false_positive_rate=0.02"),
    ("evidence", "without savings"): (*EVIDENCE, "--filter.gate=-inf", "--filter.replace=false"),
    **{("evidence", f"gate={gate}"): (*EVIDENCE, f"--filter.gate={gate}") for gate in ("-inf", "0.25", "1.5")},
    ("evidence", "loss only"): (*EVIDENCE, "--filter.signals=[loss]"),
    ("evidence", "flags at 10%"): (*EVIDENCE, "--filter.false_flag_rate=0.1"),
    ("evidence", "half life 7"): (*EVIDENCE, "--filter.half_life=7"),
    ("evidence", "below 0.9"): (*EVIDENCE, "--filter.below=0.9"),
}
# savings are weighed on (a); in (b) counting is told a number between 20 and 200, which evidence has to find
ONLY = {"a": [("evidence", f"gate={gate}") for gate in ("-inf", "0.25", "1.5")] + [("evidence", "loss only")],
        "b": [("evidence", name) for name in ("flags at 10%", "half life 7", "below 0.9")]}  # fmt: skip
IN_D = [("none", ""), ("evidence", "with savings"), ("tau", "5"), ("timestep", "2%")]
WANTED = {s: [m for m in METHODS if (m in ONLY.get(s, []) or not any(m in only for only in ONLY.values()))
              and (s != "d" or m in IN_D)] for s in SCENARIOS}  # fmt: skip
BY_KEY = ("evidence", "sightings", "timestep")  # the reference has a vote for each key
EVALUATE = {"distinct": 40, "seeds": 4, "steps": 10, "guidance_scale": 4.0}
COLUMNS = ["scenario", "method", "setting", "seed", "memorization_rate", "distinct_dropped", "agreement_duplicates",
           "agreement_distinct", "passes", "time_ratio", "copy_similarity", "seed_agreement", "memorization_rate_distinct",
           "duplicates_dropped", "seconds", "recipe", "run"]  # fmt: skip
RECIPE = "recipe"  # file of a run: what made it
PARSING = threading.Lock()  # a file of settings is read in its own directory, which is that of all threads meanwhile
TEXT = ("scenario", "method", "setting", "recipe", "run")


def recipe(scenario: str, method: tuple[str, str]) -> str:
    """Names everything that a row depends on but its seed."""
    digest = hashlib.sha256((ROOT / "configs" / "evidence.yaml").read_bytes())
    digest.update(repr((SCENARIOS[scenario], METHODS[method], EVALUATE)).encode())
    assets = sorted((ROOT / "memfilter" / "assets").rglob("*.safetensors"))
    if method[0] in ("evidence", "timestep"):
        assets.append(ROOT / "memfilter" / "assets" / "scenes-base" / "calibration.json")
        for module in ("evidence", "keys", "reference", "calibration"):
            digest.update(code_of(f"memfilter/{module}"))
    for path in assets:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def place(work: Path, scenario: str, seed: int) -> Path:
    """Directory of the scenes of a scenario and seed, with their cache."""
    return work / f"{scenario}-{seed}"


def prepare(work: Path, scenario: str, seed: int) -> None:
    """Scenes of a scenario and seed, with groups of near duplicates, and their encodings."""
    scenes, arguments = place(work, scenario, seed) / "scenes", SCENARIOS[scenario][0]
    log, cache = ROOT / scenes.with_suffix(".log"), scenes.with_name("cache")
    if not (ROOT / scenes).exists():
        call(log, "-m", "memfilter.cli", "prepare", "scenes", scenes, f"--seed={seed}", "--duplicates=20", *arguments)
    if "group" not in pq.read_schema(ROOT / scenes / "index.parquet").names:
        call(log, "-m", "memfilter.cli", "prepare", "groups", scenes, "--processes=1")
    call(log, "-m", "memfilter.cli", "cache", f"--data.path={scenes}", f"--data.cache={cache}")


def settings_of(work: Path, scenario: str, seed: int, method: tuple[str, str]) -> list[str]:
    """Words for the training script."""
    scenes = place(work, scenario, seed) / "scenes"
    shared = ["--filter.key=content"] if scenario == "c" and method[0] in BY_KEY else []
    if (scenario, *method) == ("b", "sightings", "k=10"):
        shared.append("--filter.max_empty_steps=1000")  # it drops all there is from its half on, which is an error otherwise
    return ["--config=configs/evidence.yaml", f"--run_dir={work / 'runs'}/{{digest}}", f"--data.path={scenes}",
            f"--data.cache={scenes.with_name('cache')}", f"--train.seed={seed}",
            f"--train.samples={SCENARIOS[scenario][1]}", "--log.gallery=0", *METHODS[method], *shared]  # fmt: skip


def run(work: Path, scenario: str, seed: int, method: tuple[str, str]) -> dict:
    """Trains and evaluates one setting; its row of the table, without the ratio of times."""
    settings = settings_of(work, scenario, seed, method)
    with PARSING:
        out = ROOT / parse(settings).run_dir
    made_by = recipe(scenario, method)
    if (out / RECIPE).exists() and (out / RECIPE).read_text() != made_by:
        shutil.rmtree(out)  # by other code or weights
    if not (out / "evaluation.json").exists():
        if not (out / "summary.json").exists():
            shutil.rmtree(out, ignore_errors=True)
        asked = json.dumps({"settings": settings, "near_copies": 10 if scenario == "c" else 1})
        call(out.with_suffix(".log"), __file__, "--job", asked)
    (out / RECIPE).write_text(made_by)
    figures = read_figures(out)
    evaluation, summary = (json.loads((out / f"{file}.json").read_text()) for file in ("evaluation", "summary"))
    row = {"scenario": scenario, "method": method[0], "setting": method[1], "seed": seed}
    row |= {name: figures[name] for name in COLUMNS if name in figures}
    row["memorization_rate_distinct"] = evaluation["distinct"]["memorization_rate"]
    row["duplicates_dropped"] = summary.get("filter/drop_rate_duplicates", 0.0 if summary["samples"] else 1.0)
    row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
    print(f"done: {scenario} {seed} {' '.join(method)}: memorized {row['memorization_rate']}, "
          f"distinct dropped {row['distinct_dropped']}, agreement {row['agreement_distinct']}", flush=True)  # fmt: skip
    return row | {"seconds": round(figures["cpu_seconds"], 1), "recipe": made_by, "run": out.name}


def job(settings: list[str], near_copies: int) -> None:
    """One training run and its evaluation, in this process."""
    import torch

    torch.set_num_threads(1)
    from memfilter.eval.evaluate import evaluate_run
    from memfilter.train.loop import Trainer

    config = parse(settings)
    if not (Path(config.run_dir) / "summary.json").exists():
        Trainer(config).run(progress=False)
    evaluate_run(Path(config.run_dir), near_copies=near_copies, progress=False, **EVALUATE)


def read_rows(path: Path) -> list[dict]:
    """Rows of the present recipes that earlier calls left."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{k: v if k in TEXT else float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
    known = {(s, *m): recipe(s, m) for s in SCENARIOS for m in METHODS}
    return [row for row in rows if known.get((row["scenario"], row["method"], row["setting"])) == row["recipe"]]


def write_rows(path: Path, rows: list[dict]) -> None:
    """With the ratio of times where the unfiltered run of the scenario and seed is there."""
    order = [(s, *m) for s in SCENARIOS for m in METHODS]
    rows.sort(key=lambda row: (order.index((row["scenario"], row["method"], row["setting"])), row["seed"]))
    plain = {(row["scenario"], row["seed"]): row["seconds"] for row in rows if row["method"] == "none"}
    for row in rows:
        base = plain.get((row["scenario"], row["seed"]))
        row["time_ratio"] = round(row["seconds"] / base, 3) if base else ""
        row["seed"] = int(row["seed"])
    write_csv(path, COLUMNS, rows)


def main() -> None:
    options = parser(__doc__, "runs/clipart", REPORTED_SEEDS)
    options.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    options.add_argument("--methods", nargs="+", default=None, help="only these, such as none 'tau 4'")
    options.add_argument("--job", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.job:
        job(**json.loads(args.job))
        return
    work, table_path = args.work_dir, args.out / "evidence.csv"
    rows, lock = read_rows(table_path), threading.Lock()
    known = {(row["scenario"], row["method"], row["setting"], int(row["seed"])) for row in rows}
    methods = [m for m in METHODS if args.methods is None or {m[0], " ".join(m)} & {*args.methods}]
    jobs = [(s, seed, m) for m in methods for seed in args.seeds for s in args.scenarios
            if m in WANTED[s] and (s, *m, seed) not in known]  # fmt: skip
    made: dict[tuple[str, int], threading.Lock] = {(s, seed): threading.Lock() for s, seed, _ in jobs}
    ready: set[tuple[str, int]] = set()

    def finish(scenario: str, seed: int, method: tuple[str, str]) -> None:
        with made[scenario, seed]:
            if (scenario, seed) not in ready:
                prepare(work, scenario, seed)
                ready.add((scenario, seed))
        row = run(work, scenario, seed, method)
        with lock:
            rows.append(row)
            write_rows(table_path, rows)

    share(args.processes, lambda one: finish(*one), jobs)


if __name__ == "__main__":
    main()
