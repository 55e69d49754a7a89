"""Tables, figure and pictures of benchmarks/evidence.py, from docs/results/evidence.csv.

    python benchmarks/evidence_tables.py

Means and 95% intervals (Student's t over seeds) of every setting; the paired comparisons that are claimed of evidence; a figure
of what is memorized against what is lost; pictures of one seed, where its runs are still in the work directory.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, half_width, mean

NAMES = {
    "a": "(a) 20 duplicates shown 200 times, 2,000 others once",
    "b": "(b) 20 shown 200 times, 150 others 20 times",
    "c": "(c) as (a), each duplicate under 10 keys",
    "d": "(d) 1,000 samples five times, no duplicates",
}
FIGURES = ("memorization_rate", "distinct_dropped", "duplicates_dropped", "copy_similarity", "seed_agreement",
           "agreement_duplicates", "agreement_distinct", "passes", "time_ratio")  # fmt: skip
COLOURS = {"none": "#868e96", "tau": "#e8590c", "timestep": "#9c36b5", "sightings": "#2f9e44", "evidence": "#1971c2",
           "oracle": "#212529"}  # fmt: skip
MARKERS = {"none": "s", "tau": "o", "timestep": "v", "sightings": "^", "evidence": "D", "oracle": "*"}
EVIDENCE, NONE, ORACLE = ("evidence", "with savings"), ("none", ""), ("oracle", "")


class Table:
    """Rows by scenario and setting, over the seeds that all its settings have."""

    def __init__(self, path: Path):
        with path.open(newline="") as file:
            self.rows = {(r["scenario"], r["method"], r["setting"], int(r["seed"])): r for r in csv.DictReader(file)}
        self.settings = list(dict.fromkeys((m, s) for _, m, s, _ in self.rows))

    def seeds(self, scenario: str, *settings: tuple[str, str]) -> list[int]:
        """Those for which every one of the settings is there."""
        found = [{seed for s, m, x, seed in self.rows if s == scenario and (m, x) == setting} for setting in settings]
        return sorted(set.intersection(*found)) if found else []

    def of(self, scenario: str, setting: tuple[str, str], figure: str, seeds: list[int] | None = None) -> np.ndarray:
        """A figure by seed."""
        seeds = self.seeds(scenario, setting) if seeds is None else seeds
        return np.array([float(self.rows[scenario, *setting, seed][figure]) for seed in seeds])


def overview(table: Table, scenario: str) -> list[str]:
    lines = ["| method | setting | seeds | " + " | ".join(f.replace("_", " ") for f in FIGURES) + " |", "|---" * 12 + "|"]
    for setting in table.settings:
        if seeds := table.seeds(scenario, setting):
            cells = [mean(table.of(scenario, setting, figure)) for figure in FIGURES]
            lines.append(f"| {setting[0]} | {setting[1]} | {len(seeds)} | " + " | ".join(cells) + " |")
    return lines


def best_tau(table: Table, scenario: str, seeds: list[int]) -> tuple[str, str] | None:
    """The fixed tau that memorizes least of those that drop no more distinct samples than evidence does; where there is
    none, the one that drops fewest."""
    taus = [s for s in table.settings if s[0] == "tau" and table.seeds(scenario, s)]
    mean: Callable = lambda s, figure: table.of(scenario, s, figure, seeds).mean()  # noqa: E731
    taus = [s for s in taus if set(seeds) <= set(table.seeds(scenario, s))]
    allowed = [s for s in taus if mean(s, "distinct_dropped") <= mean(EVIDENCE, "distinct_dropped")]
    if allowed:
        return min(allowed, key=lambda s: mean(s, "memorization_rate"))
    return min(taus, key=lambda s: mean(s, "distinct_dropped")) if taus else None


def claims(table: Table, scenario: str) -> list[str]:
    """What is claimed of evidence, with figures, whichever way they fall."""
    lines = []
    taus = [s for s in table.settings if s[0] == "tau"]
    seeds = table.seeds(scenario, EVIDENCE, NONE, ORACLE, *taus)
    if len(seeds) < 2:
        return ["Too few seeds are finished."]
    ours = table.of(scenario, EVIDENCE, "memorization_rate", seeds)
    against = {"the best fixed tau at no more distinct samples dropped": best_tau(table, scenario, seeds)}
    against |= {f"sightings {s[1]}": s for s in table.settings if s[0] == "sightings"}
    against |= {f"timestep threshold {s[1]}": s for s in table.settings if s[0] == "timestep"}
    for name, other in against.items():
        if other is None or not set(seeds) <= set(table.seeds(scenario, other)):
            continue
        theirs = table.of(scenario, other, "memorization_rate", seeds)
        difference, lost = theirs - ours, table.of(scenario, other, "distinct_dropped", seeds).mean()
        lower = f"{1 - ours.mean() / theirs.mean():.0%} lower" if theirs.mean() else "both 0"
        lines.append(f"- against {name} ({other[0]} {other[1]}, distinct dropped {lost:.3f}): memorization {ours.mean():.3f} and "
                     f"{theirs.mean():.3f}, {lower}; paired difference {difference.mean():.3f} ± {half_width(difference):.3f}")  # fmt: skip
    gap = ours - table.of(scenario, ORACLE, "memorization_rate", seeds)
    lines.append(f"- above the oracle by {gap.mean():.3f} ± {half_width(gap):.3f}")
    plain = table.of(scenario, NONE, "agreement_distinct", seeds)
    ratio = table.of(scenario, EVIDENCE, "agreement_distinct", seeds) / plain
    lines.append(f"- agreement on distinct prompts is {ratio.mean():.3f} ± {half_width(ratio):.3f} of that without a filter")
    return [f"Evidence (with savings) over {len(seeds)} seeds:", "", *lines]


def draw(table: Table, out: Path) -> None:
    """Memorization against the share of distinct samples lost, a panel for each scenario, one mark for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scenarios = [s for s in "abc" if any(key[0] == s for key in table.rows)]
    figure, axes = plt.subplots(1, len(scenarios), figsize=(5 * len(scenarios), 4.4), sharey=True, squeeze=False)
    for axis, scenario in zip(axes[0], scenarios, strict=True):
        for method, setting in table.settings:
            x, y = (table.of(scenario, (method, setting), f) for f in ("distinct_dropped", "memorization_rate"))
            if not len(x) or setting.startswith("gate") or setting == "loss only":
                continue
            axis.errorbar(x.mean(), y.mean(), xerr=half_width(x), yerr=half_width(y), fmt=MARKERS[method], color=COLOURS[method],
                          ms=8, capsize=2, lw=1, mfc="white" if setting == "without savings" else None)  # fmt: skip
            if setting:
                axis.annotate(setting.replace("savings", "s."), (x.mean(), y.mean()), (6, 5), textcoords="offset points", fontsize=8)
        axis.set_title(NAMES[scenario], fontsize=9)
        axis.set_xlabel("share of distinct samples not trained on")
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_xlim(-0.002, 1)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("memorization rate of duplicate prompts")
    methods = list(dict.fromkeys(m for m, _ in table.settings))
    handles = [plt.Line2D([], [], ls="", marker=MARKERS[m], color=COLOURS[m], ms=8, label=m) for m in methods]
    figure.legend(handles=handles, loc="lower center", ncols=len(methods), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    _save(figure, out)


def draw_costs(table: Table, out: Path) -> None:
    """What evidence costs and what is left memorized, by its gate: the cost curve, on (a), and the cost on (d)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = [s for s in table.settings if s[0] in ("evidence", "none")]
    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    for scenario, colour in (("a", "#1971c2"), ("d", "#2f9e44")):
        for method, setting in settings:
            x, y = (table.of(scenario, (method, setting), f) for f in ("time_ratio", "memorization_rate"))
            if len(x):
                axis.errorbar(x.mean(), y.mean(), xerr=half_width(x), yerr=half_width(y), fmt="D" if method == "evidence" else "s",
                              color=colour, capsize=2, lw=1)  # fmt: skip
                axis.annotate(setting or "no filter", (x.mean(), y.mean()), (5, 5), textcoords="offset points", fontsize=8)
        axis.plot([], [], "D", color=colour, label=NAMES[scenario])
    axis.set_xlabel("training time, relative to no filter")
    axis.set_ylabel("memorization rate")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    _save(figure, out)


def draw_pictures(table: Table, work: Path, out: Path, scenario: str, seed: int, prompts: int = 8) -> bool:
    """Training pictures of duplicates, and what each run makes of their prompts; False where runs are not there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = {"no filter": NONE, "tau 5": ("tau", "5"), "evidence": EVIDENCE, "oracle": ORACLE}
    rows = {name: table.rows.get((scenario, *setting, seed)) for name, setting in wanted.items()}
    found = {name: work / "runs" / row["run"] / "evaluation.npz" for name, row in rows.items() if row}
    found = {name: path for name, path in found.items() if path.exists()}
    if len(found) < 2:
        return False
    pictures = {name: np.load(path) for name, path in found.items()}
    columns = 1 + 3 * len(pictures)
    figure, axes = plt.subplots(prompts, columns, figsize=(columns * 0.75, prompts * 0.75))
    for row in range(prompts):
        cells = [("training", next(iter(pictures.values()))["training"][row])]
        cells += [(name, data["generations"][row, s]) for name, data in pictures.items() for s in range(3)]
        for column, (name, picture) in enumerate(cells):
            axes[row, column].imshow(picture)
            axes[row, column].axis("off")
            if row == 0 and column % 3 in (0, 2) and (column == 0 or column % 3 == 2):
                axes[row, column].set_title(name, fontsize=8)
    figure.suptitle(f"Scenario {scenario}, seed {seed}: duplicates, and three pictures for the prompt of each", fontsize=9)
    figure.subplots_adjust(wspace=0.05, hspace=0.05, left=0.01, right=0.99, bottom=0.01, top=0.88)
    _save(figure, out)
    return True


def _save(figure, out: Path) -> None:
    partial = out.with_name(f".{out.stem}.partial.png")
    figure.savefig(partial, dpi=130)
    partial.replace(out)


def write(results: Path, work: Path) -> str:
    """Writes all of it; the text of the tables."""
    table = Table(results / "evidence.csv")
    parts = []
    for scenario, name in NAMES.items():
        if any(key[0] == scenario for key in table.rows):
            parts += [f"## {name}", "", *overview(table, scenario), "", *claims(table, scenario), ""]
    text = "\n".join(["Means over seeds ± half of the 95% interval. `python benchmarks/evidence.py` makes the rows.", "", *parts])
    (results / "evidence.md").write_text(text)
    draw(table, results / "evidence.png")
    draw_costs(table, results / "evidence_costs.png")
    for scenario, _, _, seed in sorted(table.rows):
        if draw_pictures(table, work, results / "evidence_pictures.png", scenario, seed):
            break
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/clipart"), help="of benchmarks/evidence.py")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the tables")
    args = parser.parse_args()
    print(write(args.out, args.work_dir))


if __name__ == "__main__":
    main()
