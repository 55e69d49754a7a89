"""What the files of a sweep say, as tables: means and intervals over seeds, drop rates, the filter as a classifier."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from memfilter.eval.charts import BIN, GROUPS
from memfilter.eval.report import FIGURES as OF_A_RUN
from memfilter.eval.report import ReportError, misfit
from memfilter.eval.results import OWN_LIMIT, RESULTS, agreement_figure
from memfilter.text import printable

BASE, NONE, ORACLE = "base", "none", "oracle"  # not trained at all, without any method, without the known duplicates
# a setting that stands for its method agrees at least so well, beside none, and drops at most this share of distinct samples
AGREES, DROPPED = 0.98, 0.2


@dataclass(frozen=True)
class Figure:
    """A column of the results: its name for people, what it means, and how it is written."""

    label: str
    meaning: str
    share: bool = False

    @property
    def form(self) -> str:
        return "{:.1%}" if self.share else "{:.3f}"


FIGURES = {
    "memorization_rate": Figure(
        "Memorization rate", "Of duplicate prompts: share of generations that count as copies.", share=True
    ),
    "copy_similarity": Figure("Copy similarity", "Of duplicate prompts. " + OF_A_RUN["copy_similarity"][1]),
    "agreement_duplicates": Figure("Agreement, duplicates", "Agreement of picture and caption on duplicate prompts."),
    "agreement_distinct": Figure("Agreement, distinct", "The same on prompts of distinct pictures."),
    "seed_agreement": Figure("Seed agreement", "Of duplicate prompts. " + OF_A_RUN["seed_agreement"][1]),
    "distinct_dropped": Figure(
        "Distinct dropped", "Share of the appearances of distinct pictures that were not trained on.", share=True
    ),
    "time_ratio": Figure("Time ratio", "CPU time of training to that of the same seed without any method."),
}
DECISIONS = {
    "precision": Figure("Precision", "Share of duplicates in what was dropped over the whole run.", share=True),
    "recall": Figure("Recall", "Share of the appearances of duplicates that were dropped, of those with a verdict.", share=True),
    "auc": Figure("AUC", "Of the decisions, which have one threshold: (recall + 1 - false positive rate) / 2."),
}


def explained(evaluation: dict | None) -> dict[str, Figure]:
    """`FIGURES`, and what agreement was judged by where `common_evaluation` knows."""
    if not evaluation or not evaluation["agreement"]:
        return FIGURES
    figure, clip = FIGURES["agreement_duplicates"], printable(str(evaluation["clip"]))
    judged = OF_A_RUN[evaluation["agreement"]][1].format(clip=clip)
    return FIGURES | {"agreement_duplicates": replace(figure, meaning=f"{figure.meaning} {judged}")}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file becomes a ReportError of one line that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ReportError(f"{path} is missing") from error
    except ReportError:
        raise
    except KeyError as error:
        raise ReportError(f"{path} lacks {error.args[0]!r}") from error
    except Exception as error:  # each reader has exceptions of its own
        raise ReportError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def read_results(sweep: Path) -> pd.DataFrame:
    """The runs of a sweep: method, setting, seed, run and every one of `FIGURES` (NaN where unknown).

    Raises:
        ReportError: there is no table, it lacks a column, says nothing, or says two things of one run.
    """
    path = sweep / RESULTS
    if not path.is_file():
        raise ReportError(f"{sweep} is not a sweep: it has no {RESULTS}")
    with readable(path):
        # as text, or setting 3 becomes 3.0 and a setting called "NA" nothing
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    names = ["method", "setting", "seed", *FIGURES]
    if missing := [name for name in names if name not in table]:
        raise ReportError(f"{path} lacks the columns {', '.join(missing)}")
    if table.empty:
        raise ReportError(f"{path} has no rows: no run of this sweep is finished")
    table = table[names].assign(run=table.get("run", ""))
    for name in ("seed", *FIGURES):
        with readable(path):
            table[name] = pd.to_numeric(table[name].mask(table[name].str.lower().isin(["", "nan"])))
    if table["seed"].isna().any():
        raise ReportError(f"{path} has rows without a seed")
    if (twice := table.duplicated(["method", "setting", "seed"])).any():
        method, setting, seed = table.loc[twice, ["method", "setting", "seed"]].iloc[0]
        raise ReportError(f"{path} has two rows of method {method!r}, setting {setting!r}, seed {seed:.0f}")
    return table


def over_seeds(table: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Columns seeds, mean and half_width of what is known of ``value``, for each combination of ``by``.

    Half the width of the 95% interval of the mean, by Student's t; NaN for a single seed.
    """
    from scipy import stats

    found = table.dropna(subset=[value]).groupby(by, sort=False)[value].agg(seeds="count", mean="mean", error="sem")
    found["half_width"] = stats.t.ppf(0.975, found["seeds"] - 1) * found.pop("error")
    return found.reset_index()


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """Rows of method, setting, figure, seeds, mean, half_width; a figure that is not known of any seed has no row."""
    tall = results.melt(["method", "setting", "seed"], list(FIGURES), "figure", "value")
    return over_seeds(tall, ["method", "setting", "figure"], "value")


def settings_of(results: pd.DataFrame) -> dict[str, list[str]]:
    """Method -> its settings by the numbers in their names; ``base`` and ``none`` come first, ``oracle`` last."""
    found = results.groupby("method", sort=False)["setting"].unique()
    methods = sorted(found.index, key=lambda method: {BASE: -1, NONE: 0, ORACLE: 2}.get(method, 1))
    return {method: sorted(found[method], key=_natural) for method in methods}


def _natural(setting: str) -> list[tuple]:
    parts = re.split(r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)", setting)
    return [(0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts) if part]


def means_of(results: pd.DataFrame) -> pd.DataFrame:
    """What settings are chosen by, over seeds: a row for each (method, setting)."""
    return results.groupby(["method", "setting"])[["memorization_rate", "agreement_distinct", "distinct_dropped"]].mean()


def least_memorizing(means: pd.DataFrame, agreement: float) -> tuple[str, str] | None:
    """Of some rows of `means_of`, the setting that memorizes least, of those whose agreement on distinct prompts is at least
    `AGREES` of that of another setting, and which drop at most `DROPPED` of the distinct samples; None where there is none such.
    What is not known rules nothing out."""
    poor = (means["agreement_distinct"] < AGREES * agreement) | (means["distinct_dropped"] > DROPPED)
    return _lowest(means.loc[~poor, "memorization_rate"])


def _lowest(column: pd.Series) -> tuple[str, str] | None:
    if column.isna().all():
        return next(iter(column.index), None)
    return column.idxmin()


def representatives(results: pd.DataFrame) -> dict[str, str]:
    """Method -> the setting that stands for it: `least_memorizing` beside none, or the one that drops least."""
    means, settings = means_of(results), settings_of(results)
    plain = settings.get(NONE, [])  # where there are several, none of them is what all others can be held against
    agreement = means["agreement_distinct"].get((NONE, plain[0]), 0.0) if len(plain) == 1 else 0.0
    chosen = {}
    for method, names in settings.items():
        own = means.loc[[(method, name) for name in names]]
        chosen[method] = (least_memorizing(own, agreement) or _lowest(own["distinct_dropped"]))[1]
    return chosen


def runs_of(results: pd.DataFrame, chosen: dict[str, str]) -> pd.DataFrame:
    """The rows of one setting for each method, method by method."""
    rows = [results[(results["method"] == m) & (results["setting"] == s)].sort_values("seed") for m, s in chosen.items()]
    return pd.concat(rows, ignore_index=True)


def has_directory(results: pd.DataFrame) -> pd.Series:
    """Whether the directory of a run is where the table says."""
    return results["run"].map(lambda run: run != "" and Path(run).is_dir()).astype(bool)


def read_evaluation(run: Path) -> dict:
    """What evaluation.json says: at least measure, memorized_above, steps, guidance_scale and prompts, of which each has
    key, caption and duplicate, and similarity where one of them has a key."""
    path = run / "evaluation.json"
    with readable(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        for name in ("measure", "memorized_above", "steps", "guidance_scale", "prompts"):
            found[name]
        for name in ("key", "caption", "duplicate"):
            [prompt[name] for prompt in found["prompts"]]
    return found


def common_evaluation(runs: pd.DataFrame) -> dict | None:
    """How all runs were evaluated: measure, what memorized_above is and, as ``limits``, which there are, steps, guidance_scale,
    clip, the sum of the measure's file, near_copies, the figure that is their agreement, and how many prompts and pictures with a
    similarity; None where no run says.

    Raises:
        ReportError: they were not evaluated alike, so that their figures mean different things.
    """
    common, limits = None, {}
    for seed, run in runs[["seed", "run"]].itertuples(index=False):
        if not Path(run, "evaluation.json").is_file():
            continue
        read = read_evaluation(Path(run))
        found = {name: read[name] for name in ("measure", "steps", "guidance_scale")} | {
            "memorized_above_is": read.get("memorized_above_is"), "clip": read.get("clip"), "sha256": read.get("sha256"),
            "near_copies": read.get("near_copies", 1),
            "agreement": agreement_figure(read), "prompts": len(read["prompts"]),
            "pictures": sum(len(prompt.get("similarity", [])) for prompt in read["prompts"])}  # fmt: skip
        if common is None:
            first, common = run, found
        for name, value in found.items():
            _require_same(name, "all runs", (common[name], first), (value, run))
        own = seed if found["memorized_above_is"] == OWN_LIMIT else None  # seeds may have data of their own
        limit, where = (read["memorized_above"], run), "all runs" if own is None else "all runs of a seed"
        _require_same("memorized_above", where, limits.setdefault(own, limit), limit)
    return common and common | {"limits": sorted({limit for limit, _ in limits.values()})}


def _require_same(name: str, where: str, one: tuple, other: tuple) -> None:
    """Of two values and the runs that have them."""
    if one[0] != other[0]:
        raise ReportError(f"evaluation.json: {name} must be the same in {where}, found {one[0]!r} in {one[1]} and {other[0]!r} "
                          f"in {other[1]}; evaluate both again")  # fmt: skip


def read_drop_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of method, setting, seed, group, point, samples, rate, of settings of which some run drops something; ``point``
    counts the lines of metrics.jsonl."""
    rows = []
    for method, setting, seed, run in runs[["method", "setting", "seed", "run"]].itertuples(index=False):
        path = Path(run, "metrics.jsonl")
        if not path.is_file():
            continue
        with readable(path):
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            rates = [(group, i, line["samples"], float(line[name])) for i, line in enumerate(lines) for group in GROUPS
                     if (name := f"filter/drop_rate_{group}") in line]  # fmt: skip
        rows += [(method, setting, seed, *point) for point in rates]
    found = pd.DataFrame(rows, columns=["method", "setting", "seed", "group", "point", "samples", "rate"])
    return found[found.groupby(["method", "setting"])["rate"].transform("max") > 0]


def read_decisions(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of method, setting, figure, seeds, mean, half_width of `DECISIONS`, of settings of which some run drops something."""
    rows = []
    for method, setting, run in runs[["method", "setting", "run"]].itertuples(index=False):
        if not Path(run, "evaluation.json").is_file():
            continue
        with readable(Path(run, "evaluation.json")):
            if judged := read_evaluation(Path(run)).get("filter"):
                found = judged["whole"]["decisions"]
                rows.append((method, setting, *(found[name] for name in DECISIONS)))
    found = pd.DataFrame(rows, columns=["method", "setting", *DECISIONS]).astype(dict.fromkeys(DECISIONS, float))
    drops = found.groupby(["method", "setting"])["precision"].transform("count") > 0
    tall = found[drops].melt(["method", "setting"], list(DECISIONS), "figure", "value")
    return over_seeds(tall, ["method", "setting", "figure"], "value")


def read_classifiers(runs: pd.DataFrame) -> pd.DataFrame:
    """The AUC with which runs tell duplicates from distinct samples, in bins of timesteps.

    It is that of what they judge by: the evidence of the sample's key where there is any, else the norm. A sample that was
    passed over counts with the evidence that its key had last, since that is why.

    Returns:
        Rows of method, setting, seed, score, timestep (where the bin begins), auc, over the last half of each run; none of
        bins without samples of both kinds.
    """
    rows = []
    for method, setting, seed, run in runs[["method", "setting", "seed", "run"]].itertuples(index=False):
        path = Path(run, "audit.parquet")
        if not path.is_file():
            continue
        with readable(path):
            columns = ["position", "key", "duplicate", "timestep", "text_norm", "evidence"]
            known = set(pq.read_schema(path).names)
            audit = pq.read_table(path, columns=[name for name in columns if name in known]).to_pandas()
            score, points = _auc_by_timestep(audit)
        rows += [(method, setting, seed, score, *point) for point in points]
    return pd.DataFrame(rows, columns=["method", "setting", "seed", "score", "timestep", "auc"])


def _auc_by_timestep(audit: pd.DataFrame) -> tuple[str, list[tuple[int, float]]]:
    from sklearn.metrics import roc_auc_score

    audit, score = audit.sort_values("position"), "norm"
    audit["score"] = audit["text_norm"]
    if "evidence" in audit and audit["evidence"].notna().any():
        score, audit["score"] = "evidence", audit.groupby("key")["evidence"].ffill()
    late = audit[audit["position"] >= (audit["position"].max() + 1) / 2].dropna(subset=["score", "duplicate"])
    points = []
    for number, part in late.groupby(late["timestep"] // BIN):
        if part["duplicate"].nunique() == 2:
            points.append((int(number) * BIN, float(roc_auc_score(part["duplicate"].astype(bool), part["score"]))))
    return score, points


@dataclass
class Prompt:
    """A duplicate, and what the runs made of its caption."""

    key: str
    caption: str
    training: np.ndarray  # uint8 [H, W, 3]
    limit: float  # from where on a generation counts as memorized
    generations: dict[str, tuple[np.ndarray, list[float]]]  # method -> uint8 [S, H, W, 3], copy similarity of each


def read_gallery(runs: pd.DataFrame, prompts: int) -> tuple[float, list[Prompt]]:
    """The seed at which the most methods have pictures, and the first ``prompts`` duplicates that all of these share, of those
    whose training picture could be read."""
    runs = runs[[Path(run, "evaluation.npz").is_file() for run in runs["run"]]]
    if runs.empty:
        return float("nan"), []
    counts = runs["seed"].value_counts()
    seed = counts[counts == counts.max()].index.min()
    found = {method: _pictures(Path(run)) for method, run in runs.loc[runs["seed"] == seed, ["method", "run"]].values}
    first = next(iter(found.values()))
    shared = [name for name in first if all(name in other for other in found.values())][:prompts]
    return seed, [Prompt(*name, *first[name][:2], {method: pictures[name][2:] for method, pictures in found.items()})
                  for name in shared]  # fmt: skip


def _pictures(run: Path) -> dict[tuple[str, str], tuple[np.ndarray, float, np.ndarray, list[float]]]:
    """(key, caption) of each duplicate -> training picture, limit, generations, similarities."""
    evaluation = read_evaluation(run)
    asked, limit = evaluation["prompts"], evaluation["memorized_above"]
    with readable(run / "evaluation.npz"), np.load(run / "evaluation.npz") as pictures:
        generations, training = pictures["generations"], pictures["training"]
    if error := misfit(asked, generations, training):
        raise ReportError(f"{run / 'evaluation.npz'} {error}")
    with readable(run / "evaluation.json"):
        return {(prompt["key"], prompt["caption"]): (training[i], limit, generations[i], prompt["similarity"])
                for i, prompt in enumerate(asked) if prompt["duplicate"] and None not in prompt["similarity"]}  # fmt: skip
