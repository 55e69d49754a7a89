"""What the study says: its table as it is published, and the comparisons that were asked of it before it was run.

    bash launch/study.sh && python benchmarks/study.py

The sweep begins with the rows that docs/results has, those of study.csv and, of evidence.csv, those of the same settings: a run
that was made on another machine is not made again. Reads the sweep's results.csv; writes docs/results/study.csv, study.md (means
over seeds with 95% intervals, and the comparisons, whichever way they fall) and the report's figure of copying against agreement.
How settings are chosen, for every method alike: of those whose agreement on distinct prompts is, in the mean over seeds, at least
98% of that of the opponent, the one that memorizes least. Agreement does not tell what was learnt, since the model could draw such
pictures before, so a choice may drop at most a fifth of the distinct samples; the rows of base say what a method would get that
dropped everything. De-duplication and the oracle are what others are held against as they are. A choice by the seeds that it is
reported on flatters whoever has more settings, so every comparison is also made with the settings chosen, for each seed, on the
other seeds.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import evidence
import numpy as np
import pandas as pd
from common import mean, parser, write_csv, write_text

from memfilter.eval.results import COLUMNS, RESULTS
from memfilter.eval.sweep_report.data import BASE, FIGURES, NONE, ORACLE, least_memorizing, means_of, read_results, settings_of

RUNS = "runs/clipart/runs"  # where the sweep has its runs
FILTERS = ("tau", "timestep", "evidence")
DEDUP = "dedup"
REFERENCES = (ORACLE, DEDUP)

Methods = tuple[str, ...]


class Study:
    """Figures by method, setting and seed."""

    def __init__(self, results: pd.DataFrame):
        self.rows = results.set_index(["method", "setting", "seed"]).sort_index()
        self.means = means_of(results)
        self.settings = [(method, setting) for method, names in settings_of(results).items() for setting in names]
        self.results = results

    def of(self, setting: tuple[str, str], figure: str) -> pd.Series:
        """By seed."""
        return self.rows.loc[setting, figure].dropna()

    def best(self, methods: Methods, opponent: str = NONE) -> tuple[str, str] | None:
        """The setting of some methods that memorizes least, of those that agree as well as the opponent's (none, or the best random
        tokens) and learn enough; a reference has one setting, which need not."""
        if methods[0] in REFERENCES:
            return next((s for s in self.settings if s[0] in methods), None)
        other = (NONE, "") if opponent == NONE else self.best((opponent,))
        if other is None:
            return None
        own = self.means.loc[[s for s in self.settings if s[0] in methods]]
        return least_memorizing(own, self.means.loc[other, "agreement_distinct"])

    def pairs(self, own: tuple[str, str], other: tuple[str, str]) -> np.ndarray:
        """Memorization of two settings by seed, [n, 2]."""
        both = (self.of(setting, "memorization_rate") for setting in (own, other))
        return pd.concat(both, axis=1, join="inner").to_numpy()

    def against(self, methods: Methods, others: Methods, opponent: str = NONE) -> str:
        """Memorization of the best settings of two groups of methods, paired by seed."""
        own, other = self.best(methods, opponent), self.best(others)
        if own is None or other is None:
            return "no setting agrees well enough"
        pair = self.pairs(own, other)
        if len(pair) < 2:
            return "fewer than two seeds in common"
        agree = [" and ".join(f"{self.of(s, f'agreement_{kind}').mean():.3f}" for s in (own, other)) for kind in ("distinct", "duplicates")]
        return (f"{' '.join(own)} {pair[:, 0].mean():.3f}, {' '.join(other)} {pair[:, 1].mean():.3f}; difference by seed "
                f"{mean(pair[:, 1] - pair[:, 0])}; agreement on distinct prompts {agree[0]}, on duplicates' {agree[1]}"
                f"{self._chosen_elsewhere(methods, others, opponent)}")  # fmt: skip

    def _chosen_elsewhere(self, methods: Methods, others: Methods, opponent: str) -> str:
        """The same with the settings chosen, for each seed, on the other seeds."""
        found = []
        for seed in sorted(self.results["seed"].unique()):
            rest = Study(self.results[self.results["seed"] != seed])
            rates = [self.of(s, "memorization_rate") for s in (rest.best(methods, opponent), rest.best(others)) if s]
            if len(rates) == 2 and all(seed in of_seed for of_seed in rates):
                found.append([of_seed[seed] for of_seed in rates])
        if len(found) < 2:
            return ""
        own, other = np.array(found).T
        return f"; with settings chosen on the other seeds {own.mean():.3f} and {other.mean():.3f}, difference {mean(other - own)}"


def table(study: Study) -> list[str]:
    lines = ["| method | setting | seeds | " + " | ".join(f.replace("_", " ") for f in FIGURES) + " |", "|---" * (3 + len(FIGURES)) + "|"]
    for setting in study.settings:
        cells = [mean(values) if len(values := study.of(setting, figure)) else "" for figure in FIGURES]
        lines.append(f"| {setting[0]} | {setting[1]} | {len(study.rows.loc[setting])} | {' | '.join(cells)} |")
    return lines


def comparisons(study: Study) -> list[str]:
    """What was asked (memorization rates; own and opponent)."""
    asked = [
        ("Does the fixed tau beat random tokens at equal agreement?", "tau", "rta"),
        ("Do timestep thresholds beat the fixed tau?", "timestep", "tau"),
        ("Does evidence beat the fixed tau?", "evidence", "tau"),
        ("Does evidence beat random tokens?", "evidence", "rta"),
        ("Does AGC, which is free, beat the fixed tau?", "agc", "tau"),
        ("Does evidence beat counting?", "evidence", "sightings"),
    ]
    methods = [m for m in dict.fromkeys(method for method, _ in study.settings) if m not in (BASE, NONE, *REFERENCES)]
    asked += [(f"How far is {method} from {called}?", method, reference) for reference, called in
              ((ORACLE, "the oracle"), (DEDUP, "de-duplication")) for method in methods]  # fmt: skip
    lines = [f"- {question} {study.against((own,), (other,))}" for question, own, other in asked]
    own, rta = study.best(FILTERS, "rta"), study.best(("rta",))
    lines.append("- Does the best filter reach at most half the memorization of the best random tokens, in every seed? "
                 + study.against(FILTERS, ("rta",), "rta"))  # fmt: skip
    if own and rta:
        pair = study.pairs(own, rta)
        lines[-1] += f"; in {int(np.sum(pair[:, 0] <= pair[:, 1] / 2))} of {len(pair)} seeds"
    return lines


def begin(sweep: Path, results: Path) -> None:
    """Gives a sweep that has no table yet the rows that are published."""
    if (sweep / RESULTS).exists():
        return
    rows = []
    if (published := results / "study.csv").exists():
        with published.open(newline="") as file:
            rows += csv.DictReader(file)
    for row in evidence.read_rows(results / "evidence.csv"):
        if row["scenario"] == "a":
            rows.append({name: row.get(name) for name in COLUMNS} | {"cpu_seconds": row["seconds"], "run": f"{RUNS}/{row['run']}"})
    write_csv(sweep / RESULTS, COLUMNS, rows)


def main() -> None:
    options = parser(__doc__, processes=False)
    options.add_argument("--begin", action="store_true", help="before the sweep: give it the rows that are published")
    options.add_argument("--sweep", type=Path, default=Path("runs/study"), help="directory of the sweep and its report")
    args = options.parse_args()
    if args.begin:
        begin(args.sweep, args.out)
        return
    results = read_results(args.sweep)
    study = Study(results)
    shutil.copy(args.sweep / RESULTS, args.out / "study.csv")
    if (figure := args.sweep / "figures" / "tradeoff_memorization_rate.png").exists():
        shutil.copy(figure, args.out / "study.png")
    hours = results["cpu_seconds"].sum() / 3600
    text = "\n".join(["Means over seeds ± half of the 95% interval. `bash launch/study.sh && python benchmarks/study.py`", "",
                      *table(study), "", f"Training took {hours:.1f} core hours, evaluation not counted. A copy agrees with its caption "
                      "as well as can be: on duplicates' prompts the oracle and base say what is to be expected without copies.", "",
                      *comparisons(study)])  # fmt: skip
    write_text(args.out / "study.md", text)
    print(text)


if __name__ == "__main__":
    main()
