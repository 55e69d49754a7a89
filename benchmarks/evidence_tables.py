"""Tables, figure and pictures of benchmarks/evidence.py, from docs/results/evidence.csv.

    python benchmarks/evidence_tables.py

Means and 95% intervals (Student's t over seeds) of every setting; the paired comparisons that are claimed of evidence; figures
of what is memorized against what is lost, and, where benchmarks/evidence_costs.py has been run, of what evidence costs against what
it keeps of its effect; pictures of one seed, where its runs are still in the work directory.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from common import half_width, mean, parser, write_text

NAMES = {
    "a": "(a) 20 duplicates shown 200 times, 2,000 others once",
    "b": "(b) 20 shown 200 times, 150 others 20 times",
    "c": "(c) as (a), each duplicate under 10 keys; evidence by filter.key=content",
    "d": "(d) 1,000 samples five times, no duplicates",
}
FIGURES = ("memorization_rate", "distinct_dropped", "duplicates_dropped", "copy_similarity", "seed_agreement",
           "agreement_duplicates", "agreement_distinct", "passes", "time_ratio")  # fmt: skip
COLOURS = {"base": "#ced4da", "none": "#868e96", "tau": "#e8590c", "timestep": "#9c36b5", "sightings": "#2f9e44", "evidence": "#1971c2",
           "oracle": "#212529"}  # fmt: skip
# set beforehand: time of a step to that of no filter, by scenario, and what is to be left of the effect
LIMITS, KEPT = {"a": 1.03, "d": 1.10}, 0.9
MARKERS = {"base": "X", "none": "s", "tau": "o", "timestep": "v", "sightings": "^", "evidence": "D", "oracle": "*"}
EVIDENCE, UNSAVED, NONE, ORACLE = ("evidence", "with savings"), ("evidence", "without savings"), ("none", ""), ("oracle", "")


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
        return np.array([float(self.rows[scenario, *setting, seed][figure] or "nan") for seed in seeds])


def overview(table: Table, scenario: str) -> list[str]:
    lines = ["| method | setting | seeds | " + " | ".join(f.replace("_", " ") for f in FIGURES) + " |", "|---" * 12 + "|"]
    for setting in table.settings:
        if seeds := table.seeds(scenario, setting):
            cells = [mean(table.of(scenario, setting, figure)) for figure in FIGURES]
            lines.append(f"| {setting[0]} | {setting[1]} | {len(seeds)} | " + " | ".join(cells) + " |")
    return lines


def best_tau(table: Table, scenario: str, seeds: list[int], allowed: float) -> tuple[str, str] | None:
    """The fixed tau that memorizes least of those that drop at most this share of distinct samples, over these seeds; no filter
    is tau = inf."""
    taus = [s for s in taus_of(table, scenario) if set(seeds) <= set(table.seeds(scenario, s))]
    taus = [s for s in taus if table.of(scenario, s, "distinct_dropped", seeds).mean() <= allowed + 1e-9]  # rounding
    return min(taus, key=lambda s: table.of(scenario, s, "memorization_rate", seeds).mean(), default=None)


def taus_of(table: Table, scenario: str) -> list[tuple[str, str]]:
    """Those of which there are rows."""
    return [s for s in table.settings if (s[0] == "tau" or s == NONE) and table.seeds(scenario, s)]


def claims(table: Table, scenario: str, own: tuple[str, str]) -> list[str]:
    """What is claimed of a setting of evidence, with figures, whichever way they fall; every comparison over the seeds that
    both have."""
    seeds = table.seeds(scenario, own)
    if len(seeds) < 2:
        return []
    allowed = table.of(scenario, own, "distinct_dropped").mean()
    others = {
        f"the best fixed tau at no more distinct samples dropped than its own {allowed:.3f}": allowed,
        "the fixed tau of these seeds that memorizes least, whatever it drops": 1.0,
    }
    against = {name: best_tau(table, scenario, seeds, limit) for name, limit in others.items()}
    against |= {f"{s[0]} {s[1]}": s for s in table.settings if s[0] in ("sightings", "timestep")}
    lines = [f"Evidence {own[1]}, {len(seeds)} seeds:", ""]
    few = [" ".join(s).strip() for s in taus_of(table, scenario) if not set(seeds) <= set(table.seeds(scenario, s))]
    left_out = f"; not compared, too few seeds: {', '.join(few)}" if few else ""
    for name, other in against.items():
        if other is None:
            lines.append(f"- against {name}: there is none over the same seeds{left_out}")
            continue
        if len(both := table.seeds(scenario, own, other)) < 2:
            continue
        ours, theirs = (table.of(scenario, s, "memorization_rate", both) for s in (own, other))
        lost, difference = table.of(scenario, other, "distinct_dropped", both).mean(), theirs - ours
        change = ours.mean() / theirs.mean() - 1 if theirs.mean() else None
        lower = "theirs is 0" if change is None else f"{abs(change):.0%} {'higher' if change > 0 else 'lower'}"
        called = "none, tau = inf" if other == NONE else " ".join(other)
        lines.append(f"- against {name} ({called}, distinct dropped {lost:.3f}, {len(both)} seeds): memorization "
                     f"{ours.mean():.3f} and {theirs.mean():.3f}, {lower}; paired difference {mean(difference)}"
                     f"{left_out if name in others else ''}")  # fmt: skip
    if len(both := table.seeds(scenario, own, ORACLE)) > 1:
        gap = table.of(scenario, own, "memorization_rate", both) - table.of(scenario, ORACLE, "memorization_rate", both)
        lines.append(f"- above the oracle by {mean(gap)}")
    if len(both := table.seeds(scenario, own, NONE)) > 1:
        ours, plain = (table.of(scenario, s, "memorization_rate", both) for s in (own, NONE))
        lines.append(f"- memorization is {ours.mean():.3f}, without a filter {plain.mean():.3f}; paired difference {mean(plain - ours)}")
        ratio = table.of(scenario, own, "agreement_distinct", both) / table.of(scenario, NONE, "agreement_distinct", both)
        lines.append(f"- agreement on distinct prompts is {mean(ratio)} of that without a filter")
    return lines


def effects(table: Table, results: Path) -> list[str]:
    """Which share of the effect of evidence without savings each of its settings keeps on (a), what it costs there and on data
    without duplicates, and which settings are within `LIMITS`."""
    ratios = ratios_of(results)
    if not ratios:
        return []
    settings = measured(table)
    if not settings:
        raise SystemExit(f"{results / 'evidence_costs.csv'} has times, and evidence.csv no rows of (a) {' '.join(UNSAVED)}: run "
                         "benchmarks/evidence.py, or give --out the directory of both")  # fmt: skip
    lines = ["## What evidence costs, and what of its effect is left", "",
             "CPU time to that of no filter, by `python benchmarks/evidence_costs.py`: of a step, in turns of a step each, and of the "
             "whole run, which is so many fewer steps where samples are passed over. The effect is the fall of the memorization rate on "
             "(a), as a share of that of evidence without savings, with a 95% interval by bootstrap over seeds.", "",
             "| setting | seeds | share of the effect | passes | step on (a) | step on (d) | run on (a) | run on (d) |",
             "|---" * 8 + "|"]  # fmt: skip
    met: dict[str, list[str]] = {"step_ratio": [], "time_ratio": []}
    for setting, seeds in settings.items():
        share, low, high = share_of_effect(table, setting, seeds)
        times = [mean(found) if (found := ratios.get((s, *setting, kind))) else ""
                 for kind in met for s in "ad"]  # fmt: skip
        passes = table.of("a", setting, "passes", seeds).mean()
        lines.append(f"| {setting[1]} | {len(seeds)} | {share:.2f} ({low:.2f} to {high:.2f}) | {passes:.3f} | {' | '.join(times)} |")
        for kind, names in met.items():
            found = [np.mean(ratios.get((scenario, *setting, kind), [np.nan])) for scenario in LIMITS]
            if share >= KEPT - 1e-9 and all(x <= limit for x, limit in zip(found, LIMITS.values(), strict=True)):  # rounding
                names.append(setting[1])
    asked = ", ".join(f"{limit:.2f} of no filter's time on ({scenario})" for scenario, limit in LIMITS.items())
    met = {kind: ", ".join(names) or "none" for kind, names in met.items()}
    return [*lines, "", f"At most {asked}, and at least {KEPT:.0%} of the effect, has, of a step: {met['step_ratio']}; "
            f"of the whole run, which sees as many samples: {met['time_ratio']}.", ""]  # fmt: skip


def ratios_of(results: Path) -> dict[tuple[str, str, str, str], list[float]]:
    """(scenario, method, setting, step_ratio or time_ratio) -> by seed; empty where nothing is known of times."""
    ratios: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    if (costs := results / "evidence_costs.csv").exists():
        with costs.open(newline="") as file:
            for row in csv.DictReader(file):
                for kind in ("step_ratio", "time_ratio"):
                    ratios[row["scenario"], row["method"], row["setting"], kind].append(float(row[kind]))
    return dict(ratios)


def measured(table: Table) -> dict[tuple[str, str], list[int]]:
    """Settings of evidence of whose effect on (a) something can be said, and the seeds."""
    found = {s: table.seeds("a", s, UNSAVED, NONE) for s in table.settings if s[0] == "evidence"}
    return {setting: seeds for setting, seeds in found.items() if len(seeds) > 1}


def share_of_effect(table: Table, setting: tuple[str, str], seeds: list[int]) -> tuple[float, float, float]:
    """Of evidence without savings, on (a), with its interval."""
    plain, whole, own = (table.of("a", s, "memorization_rate", seeds) for s in (NONE, UNSAVED, setting))
    drawn = np.random.default_rng(0).integers(len(seeds), size=(10_000, len(seeds)))
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (plain - own)[drawn].mean(1) / (plain - whole)[drawn].mean(1)
        share = (plain - own).mean() / (plain - whole).mean()
    return (float(share), *map(float, np.nanquantile(shares, [0.025, 0.975])))


def draw_costs(table: Table, results: Path) -> None:
    """What is left of the effect, against the time of a step, on (a) and on data without duplicates; with `LIMITS`."""
    from matplotlib.figure import Figure

    ratios, settings = ratios_of(results), measured(table)
    if not ratios or not settings:
        return
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axis, (scenario, limit) in zip(figure.subplots(1, len(LIMITS), sharey=True), LIMITS.items(), strict=True):
        for place, (setting, seeds) in enumerate(settings.items()):
            if times := ratios.get((scenario, *setting, "step_ratio")):
                share, low, high = share_of_effect(table, setting, seeds)
                x = np.array(times)
                axis.errorbar(x.mean(), share, [[max(0, share - low)], [max(0, high - share)]], half_width(x), MARKERS["evidence"],
                              color=COLOURS["evidence"], capsize=2, lw=1)  # fmt: skip
                # settings that cost alike are named above each other
                axis.annotate(setting[1], (x.mean(), share), (6, (6, -14, 20, -28, 34)[place % 5]), textcoords="offset points", fontsize=8)
        axis.axvline(limit, color="#868e96", lw=1, ls="--")
        axis.axhline(KEPT, color="#868e96", lw=1, ls="--")
        axis.set_title(NAMES[scenario], fontsize=9)
        axis.set_xlabel("time of a step, to that of no filter")
        axis.margins(x=0.2)  # names are to the right of their points
        axis.grid(alpha=0.25)
    figure.axes[0].set_ylabel("share of the effect on (a)")
    _save(figure, results / "evidence_costs.png")


def against_counting(table: Table) -> list[str]:
    """Every setting of evidence that was tried in (b), against every count after which a key is dropped, paired by seed."""
    counts = [s for s in table.settings if s[0] == "sightings"]
    lines = ["| evidence | " + " | ".join(f"against {k}" for _, k in counts) + " |", "|---" * (1 + len(counts)) + "|"]
    for own in (s for s in table.settings if s[0] == "evidence"):
        cells = []
        for other in counts:
            seeds = table.seeds("b", own, other)
            ours, theirs = (table.of("b", s, "memorization_rate", seeds) for s in (own, other))
            cells.append(f"{ours.mean():.3f} and {theirs.mean():.3f}, difference {mean(theirs - ours)}" if len(seeds) > 1 else "")
        if any(cells):
            lines.append(f"| {own[1]} | {' | '.join(cells)} |")
    about = ("Memorization rates over the seeds that both have. What is neither with nor without savings was thought of after rows of "
             "(b) had been seen: it is a hint and no test.")  # fmt: skip
    return ["## Evidence against counting, in (b)", "", about, "", *lines, ""] if lines[2:] else []


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
            if not len(x) or method == "base" or (method == "evidence" and not setting.endswith("savings")):
                continue
            axis.errorbar(x.mean(), y.mean(), xerr=half_width(x), yerr=half_width(y), fmt=MARKERS[method], color=COLOURS[method],
                          ms=8, capsize=2, lw=1, mfc="white" if setting == "without savings" else None)  # fmt: skip
            if setting:
                axis.annotate(setting, (x.mean(), y.mean()), (6, 5), textcoords="offset points", fontsize=8)
        axis.set_title(NAMES[scenario], fontsize=9)
        axis.set_xlabel("share of the appearances of distinct samples not trained on")
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_xlim(-0.002, 1)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("memorization rate of duplicate prompts")
    methods = [method for method in dict.fromkeys(m for m, _ in table.settings) if method != "base"]
    handles = [plt.Line2D([], [], ls="", marker=MARKERS[m], color=COLOURS[m], ms=8, label=m) for m in methods]
    figure.legend(handles=handles, loc="lower center", ncols=len(methods), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
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
            parts += [f"## {name}", "", *overview(table, scenario), ""]
            for more in (claims(table, scenario, EVIDENCE), claims(table, scenario, UNSAVED)):
                parts += [*more, ""] if more else []
    parts += [*against_counting(table), *effects(table, results)]
    text = "\n".join(["Means over seeds ± half of the 95% interval; a single seed has none. Evidence with savings is what "
                      "configs/evidence.yaml does: null passes only above `filter.gate` and for the reference, flagged samples passed "
                      "over. What is dropped is a share of appearances. `python benchmarks/evidence.py` makes the rows, and says what "
                      "the columns are.", "", *parts])  # fmt: skip
    write_text(results / "evidence.md", text)
    draw(table, results / "evidence.png")
    draw_costs(table, results)
    for scenario, _, _, seed in sorted(table.rows):
        if draw_pictures(table, work, results / "evidence_pictures.png", scenario, seed):
            break
    return text


def main() -> None:
    args = parser(__doc__, "runs/clipart", processes=False).parse_args()
    print(write(args.out, args.work_dir))


if __name__ == "__main__":
    main()
