"""What the study says: its table as it is published, and the comparisons that were asked of it before it was run, all but one.

    bash launch/study.sh && python benchmarks/study.py

The sweep begins with the rows that docs/results has, those of study.csv and, of evidence.csv, those of the same settings: a run
that was made on another machine is not made again. Reads the sweep's results.csv; writes docs/results/study.csv, study.md (means
over seeds with 95% intervals, and the comparisons, whichever way they fall) and the report's figure of copying against agreement.
How settings are chosen, for every method alike: of those whose agreement on distinct prompts is, in the mean over seeds, at least
98% of that of the opponent, the one that memorizes least. Agreement does not tell what was learnt, since the model could draw such
pictures before, so a choice may drop at most a fifth of the distinct samples; the rows of base say what a method would get that
dropped everything. De-duplication and the oracle are what others are held against as they are.

Two things could flatter, and what they make of a comparison stands beside it. A choice by the seeds that it is reported on favours
whoever has more settings: the settings are chosen, for each seed, on the other seeds too. And agreement moves by more than 2% from
one training to the next: a choice among settings that may agree less by that much more is made too (`Study.noise`).

What was added when 61 of the 96 runs were known, by which no number of random tokens agrees as well as any filter, is what random
tokens would memorize at exactly a filter's agreement (`Study.at_equal_agreement`).
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import evidence
import numpy as np
import pandas as pd
from common import ROOT, mean, parser, write_csv, write_text
from scipy import stats

from memfilter.eval.results import COLUMNS, RESULTS
from memfilter.eval.sweep_report.data import (
    BASE,
    DROPPED,
    FIGURES,
    NONE,
    ORACLE,
    least_memorizing,
    means_of,
    read_results,
    settings_of,
)
from memfilter.sweep import read_sweep

RUNS = "runs/clipart/runs"  # where the sweep has its runs
FILTERS = ("tau", "timestep", "evidence")
DEDUP, AGC = "dedup", "agc"
REFERENCES = (ORACLE, DEDUP)
RANDOM_TOKENS = ("rta",)

NO_SETTING = f"no setting agrees well enough and drops at most {DROPPED:.0%} of the distinct samples"
Methods = tuple[str, ...]
Setting = tuple[str, str]  # method, setting


class Study:
    """Figures by method, setting and seed.

    Args:
        slack: by how much more than 2% of the opponent's a setting may agree less.
    """

    def __init__(self, results: pd.DataFrame, slack: float = 0.0):
        self.rows = results.set_index(["method", "setting", "seed"]).sort_index()
        self.means = means_of(results)
        self.settings = [(method, setting) for method, names in settings_of(results).items() for setting in names]
        self.results, self.slack = results, slack

    def of(self, setting: Setting, figure: str) -> pd.Series:
        """By seed."""
        return self.rows.loc[setting, figure].dropna()

    def noise(self) -> float:
        """Half of the 95% interval of the difference of two settings' mean agreement on distinct prompts: by what is left when
        every setting and every seed has its mean, alike for all settings."""
        agreement = self.rows["agreement_distinct"].unstack("seed").drop(index=BASE, level="method", errors="ignore").dropna()
        rest = agreement.sub(agreement.mean(axis=1), axis=0) - agreement.mean() + agreement.to_numpy().mean()
        free = (agreement.shape[0] - 1) * (agreement.shape[1] - 1)
        if free < 1:
            return 0.0
        deviation = np.sqrt((rest**2).to_numpy().sum() / free)
        return float(stats.t.ppf(0.975, free) * deviation * np.sqrt(2 / agreement.shape[1]))

    def best(self, methods: Methods, beside: Setting | None = (NONE, "")) -> Setting | None:
        """The setting of some methods that memorizes least, of those that agree as well as another setting and learn enough; a
        reference has one setting, which need not."""
        if beside is None or beside not in self.means.index:
            return None
        if methods[0] in REFERENCES:
            return next((s for s in self.settings if s[0] in methods), None)
        own = self.means.loc[[s for s in self.settings if s[0] in methods]]
        return least_memorizing(own, self.means.loc[beside, "agreement_distinct"] - self.slack)

    def opposed(self, methods: Methods, others: Methods) -> tuple[Setting | None, Setting | None]:
        """The best settings of two groups of methods: those of ``others`` beside no filter. What is held against random tokens has
        to agree as well as they do, anything else as well as no filter does."""
        other = self.best(others)
        return self.best(methods, other if others == RANDOM_TOKENS else (NONE, "")), other

    def pairs(self, own: Setting, other: Setting) -> np.ndarray:
        """Memorization of two settings by seed, [n, 2]."""
        both = (self.of(setting, "memorization_rate") for setting in (own, other))
        return pd.concat(both, axis=1, join="inner").to_numpy()

    def against(self, methods: Methods, others: Methods) -> str:
        """Memorization of the best settings of two groups of methods, paired by seed."""
        chosen = self.opposed(methods, others)
        text = self._held(*chosen) + self._chosen_elsewhere(methods, others)
        less_strict = Study(self.results, self.noise())
        if (other_choice := less_strict.opposed(methods, others)) != chosen:
            text += f"; where agreement may be less by {less_strict.slack:.3f} more: {self._held(*other_choice)}"
        return text

    def _held(self, own: Setting | None, other: Setting | None) -> str:
        if own is None or other is None:
            return NO_SETTING
        pair = self.pairs(own, other)
        if len(pair) < 2:
            return "fewer than two seeds in common"
        distinct = self.of(own, "agreement_distinct") - self.of(other, "agreement_distinct")
        duplicates = [f"{self.of(setting, 'agreement_duplicates').mean():.3f}" for setting in (own, other)]
        return (f"{_named(own)} {pair[:, 0].mean():.3f}, {_named(other)} {pair[:, 1].mean():.3f}, less by "
                f"{mean(pair[:, 1] - pair[:, 0])}, {_halved(pair)}; agreement on distinct prompts "
                f"{self.of(own, 'agreement_distinct').mean():.3f}, other by {mean(distinct.dropna())}, on duplicates' "
                f"{' and '.join(duplicates)}")  # fmt: skip

    def _chosen_elsewhere(self, methods: Methods, others: Methods) -> str:
        """The same with the settings chosen, for each seed, on the other seeds."""
        found = []
        for seed in sorted(self.results["seed"].unique()):
            rest = Study(self.results[self.results["seed"] != seed])
            rates = [self.of(s, "memorization_rate") for s in rest.opposed(methods, others) if s]
            if len(rates) == 2 and all(seed in of_seed for of_seed in rates):
                found.append([of_seed[seed] for of_seed in rates])
        if len(found) < 2:
            return ""
        pair = np.array(found)
        return (f"; with settings chosen on the other seeds {pair[:, 0].mean():.3f} and {pair[:, 1].mean():.3f}, less by "
                f"{mean(pair[:, 1] - pair[:, 0])}, {_halved(pair)}")  # fmt: skip

    def against_each(self, methods: Methods, others: Methods) -> list[str]:
        """Beside every setting of others, the best setting that agrees as well, and both rates by seed."""
        lines = []
        for other in (s for s in self.settings if s[0] in others):
            own = self.best(methods, other)
            if own is None:
                lines.append(f"{_named(other)}: {NO_SETTING}")
                continue
            pair = self.pairs(own, other)
            agreement = self.means["agreement_distinct"]
            lines.append(f"{_named(other)} (agreement {agreement[other]:.3f}): {_by_seed(pair[:, 1])}; {_named(own)} (agreement "
                         f"{agreement[own]:.3f}): {_by_seed(pair[:, 0])}; {_halved(pair)}")  # fmt: skip
        return lines

    def at_equal_agreement(self, own: Setting, others: Methods, on: str = "distinct") -> str:
        """A setting, and what a setting of others would memorize that agrees exactly as well: by seed, on the straight lines between
        no filter, which is none of what they add, and their settings, over mean agreement on distinct or duplicates' prompts; where
        it agrees better than all of them, the one that agrees best."""
        curve = [(NONE, ""), *(s for s in self.settings if s[0] in others)]
        if not {own, *curve} <= {*self.settings}:
            return "not every run is there"
        rates = pd.concat({setting: self.of(setting, "memorization_rate") for setting in {own, *curve}}, axis=1, join="inner")
        at, *of_curve = (self.of(setting, f"agreement_{on}").mean() for setting in (own, *curve))
        agreement = np.array(of_curve)
        order = np.argsort(agreement)
        between = [np.interp(at, agreement[order], of_seed[order]) for of_seed in rates[curve].to_numpy()]
        pair = np.column_stack([rates[own], between])
        if len(pair) < 2:
            return "fewer than two seeds in common"
        return (f"{_named(own)} (agreement {at:.3f}): {_by_seed(pair[:, 0])}; {' or '.join(others)}: {_by_seed(pair[:, 1])}, less by "
                f"{mean(pair[:, 1] - pair[:, 0])}; {_halved(pair)}")  # fmt: skip


def _named(setting: Setting) -> str:
    return " ".join(setting).strip()


def _by_seed(rates: np.ndarray) -> str:
    return ", ".join(f"{rate:.3f}" for rate in rates)


def _halved(pair: np.ndarray) -> str:
    return f"half or less in {int(np.sum(pair[:, 0] <= pair[:, 1] / 2))} of {len(pair)} seeds"


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
    lines.append("- Does the best filter reach at most half the memorization of the best random tokens, in every seed? "
                 + study.against(FILTERS, RANDOM_TOKENS))  # fmt: skip
    lines.append("- The same beside every number of random tokens, by seed, whether or not it agrees as well as no filter does:")
    lines += [f"  - {line}" for line in study.against_each(FILTERS, RANDOM_TOKENS)]
    own = [setting for setting in study.settings if setting[0] in (*FILTERS, AGC)]
    for on, called in (("distinct", "distinct"), ("duplicates", "duplicates'")):
        lines.append(f"- And the other way round, what random tokens would memorize that agree exactly as well on {called} prompts, on "
                     "the lines between no filter and their settings, by seed:")  # fmt: skip
        lines += [f"  - {study.at_equal_agreement(setting, RANDOM_TOKENS, on)}" for setting in own]
    return lines


def caveats(study: Study) -> list[str]:
    """What the figures do not say themselves."""
    return [
        "*Less by* and *other by* are differences by seed: of memorization, the second setting's rate less the first one's, so that "
        "what is above 0 speaks for the first; of agreement, the first one's less the second one's.",
        f"Agreement of two settings on distinct prompts differs by {study.noise():.3f} by chance alone (half of the 95% interval, "
        f"from what setting and seed do not explain); 2% of no filter's are {0.02 * study.of((NONE, ''), 'agreement_distinct').mean():.3f}.",
        "A copy agrees with its caption as well as can be: on duplicates' prompts the oracle and base say what is to be expected "
        "without copies.",
        "The recipe weighs the loss by min-SNR with gamma 1, so that little of the learning is at low noise, which is where a fixed "
        "tau drops: what it drops spares less than it does where all timesteps weigh alike (docs/results/fixed_tau.md).",
        "What random tokens would memorize at exactly a filter's agreement was asked when 61 of the 96 runs were known, not before.",
        "Here every duplicate has one key, so that de-duplication has no near copies to find: it is an oracle that trains on each "
        "sample three times. The oracle and counting have it as easy.",
        "AGC's running means begin at 0, and 6,000 samples are six to a timestep: with a decay of 0.8 they do not get far, which is "
        "why a decay of 0.5 is among its settings. That one was added after its rule had been replayed on recorded losses of these "
        "seeds, of which it drops more: a choice in its favour.",
        "Time ratios are of CPU seconds of runs on several machines; benchmarks/evidence_costs.py is what measures time.",
    ]  # fmt: skip


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
    points = {point.config.run_dir for point in read_sweep(ROOT / "configs" / "sweeps" / "study.yaml")}  # it refuses others
    known: dict[str, dict] = {}
    for row in rows:  # a run that both tables have is of one row
        known.setdefault(row["run"], row)
    write_csv(sweep / RESULTS, COLUMNS, [row for run, row in known.items() if run in points])


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
    hours = pd.read_csv(args.sweep / RESULTS)["cpu_seconds"].sum() / 3600
    text = "\n".join(["Means over seeds ± half of the 95% interval. `bash launch/study.sh && python benchmarks/study.py`", "",
                      *table(study), "", f"Training took {hours:.1f} core hours, evaluation not counted.", "",
                      *comparisons(study), "", "What to bear in mind:", "", *(f"- {line}" for line in caveats(study))])  # fmt: skip
    write_text(args.out / "study.md", text)
    print(text)


if __name__ == "__main__":
    main()
