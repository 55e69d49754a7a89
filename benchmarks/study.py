"""What the study says: its table as it is published, and the comparisons that were asked of it before it was run.

    bash launch/study.sh && python benchmarks/study.py

Reads the sweep's results.csv; writes docs/results/study.csv, study.md (means over seeds with 95% intervals, and the comparisons,
whichever way they fall) and the report's figure of copying against agreement. How settings are chosen, for every method alike: of
those whose agreement on distinct prompts is, in the mean over seeds, at least 98% of that of the opponent, the one that memorizes
least. Agreement does not tell what was learnt, since the model could draw such pictures before, so a choice may drop at most a
fifth of the distinct samples; the rows of base say what a method would get that dropped everything.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from common import mean, parser, write_text

from memfilter.eval.sweep_report.data import BASE, DROPPED, NONE, ORACLE, read_results, settings_of

FIGURES = ["memorization_rate", "copy_similarity", "agreement_duplicates", "agreement_distinct", "seed_agreement",
           "distinct_dropped", "time_ratio"]  # fmt: skip
FILTERS = ("tau", "timestep", "evidence")
TOLERANCE = 0.02


class Study:
    """Figures by method, setting and seed."""

    def __init__(self, results: pd.DataFrame):
        self.rows = results.set_index(["method", "setting", "seed"]).sort_index()
        self.settings = [(method, setting) for method, names in settings_of(results).items() for setting in names]

    def of(self, setting: tuple[str, str], figure: str) -> pd.Series:
        """By seed."""
        return self.rows.loc[setting, figure].dropna()

    def best(self, methods: tuple[str, ...], agreement: float) -> tuple[str, str] | None:
        """The setting of some methods that memorizes least, of those that agree and learn well enough."""
        good = [s for s in self.settings if s[0] in methods and self.of(s, "agreement_distinct").mean() >= (1 - TOLERANCE) * agreement
                and self.of(s, "distinct_dropped").mean() <= DROPPED]  # fmt: skip
        return min(good, key=lambda s: self.of(s, "memorization_rate").mean(), default=None)

    def against(self, own: tuple[str, str] | None, other: tuple[str, str] | None) -> str:
        """Memorization of the two, paired by seed."""
        if own is None or other is None:
            return "no setting agrees well enough"
        pair = pd.concat([self.of(own, "memorization_rate"), self.of(other, "memorization_rate")], axis=1, join="inner").to_numpy()
        if len(pair) < 2:
            return "fewer than two seeds in common"
        kept = [self.of(s, "agreement_distinct").mean() for s in (own, other)]
        return (f"{' '.join(own)} {pair[:, 0].mean():.3f}, {' '.join(other)} {pair[:, 1].mean():.3f}; difference by seed "
                f"{mean(pair[:, 1] - pair[:, 0])}; agreement on distinct prompts {kept[0]:.3f} and {kept[1]:.3f}")  # fmt: skip


def table(study: Study) -> list[str]:
    lines = ["| method | setting | seeds | " + " | ".join(f.replace("_", " ") for f in FIGURES) + " |", "|---" * (3 + len(FIGURES)) + "|"]
    for setting in study.settings:
        cells = [mean(values) if len(values := study.of(setting, figure)) else "" for figure in FIGURES]
        lines.append(f"| {setting[0]} | {setting[1]} | {len(study.rows.loc[setting])} | {' | '.join(cells)} |")
    return lines


def comparisons(study: Study) -> list[str]:
    """What was asked (memorization rates; own and opponent)."""
    plain = study.of((NONE, ""), "agreement_distinct").mean()
    best = {method: study.best((method,), plain) for method in dict.fromkeys(m for m, _ in study.settings)}
    asked = [
        ("Does the fixed tau beat random tokens at equal agreement?", "tau", "rta"),
        ("Do timestep thresholds beat the fixed tau?", "timestep", "tau"),
        ("Does evidence beat the fixed tau?", "evidence", "tau"),
        ("Does evidence beat random tokens?", "evidence", "rta"),
        ("Does AGC, which is free, beat the fixed tau?", "agc", "tau"),
        ("Does evidence beat counting?", "evidence", "sightings"),
        ("How far is evidence from de-duplication?", "evidence", "dedup"),
    ]
    lines = [f"- {question} {study.against(best.get(own), best.get(other))}" for question, own, other in asked]
    oracle = (ORACLE, "") if ORACLE in best else None
    lines += [f"- How far is {method} from the oracle? {study.against(best[method], oracle)}" for method in best
              if method not in (BASE, NONE, ORACLE)]  # fmt: skip
    rta = best.get("rta")
    own = study.best(FILTERS, study.of(rta, "agreement_distinct").mean()) if rta else None
    lines.append("- Does the best filter reach at most half the memorization of the best random tokens, in every seed? "
                 + study.against(own, rta))  # fmt: skip
    if own and rta:
        pair = pd.concat([study.of(own, "memorization_rate"), study.of(rta, "memorization_rate")], axis=1, join="inner").to_numpy()
        lines[-1] += f"; in {int(np.sum(pair[:, 0] <= pair[:, 1] / 2))} of {len(pair)} seeds"
    return lines


def main() -> None:
    options = parser(__doc__, processes=False)
    options.add_argument("--sweep", type=Path, default=Path("runs/study"), help="directory of the sweep and its report")
    args = options.parse_args()
    results = read_results(args.sweep)
    study = Study(results)
    results[["method", "setting", "seed", *FIGURES]].round(4).to_csv(args.out / "study.csv", index=False)
    if (figure := args.sweep / "figures" / "tradeoff_memorization_rate.png").exists():
        shutil.copy(figure, args.out / "study.png")
    text = "\n".join(["Means over seeds ± half of the 95% interval. `bash launch/study.sh && python benchmarks/study.py`", "",
                      *table(study), "", *comparisons(study)])  # fmt: skip
    write_text(args.out / "study.md", text)
    print(text)


if __name__ == "__main__":
    main()
