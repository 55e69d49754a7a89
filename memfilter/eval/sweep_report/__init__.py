"""One page about a sweep: every method and setting, what it spares and what it costs."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pandas as pd

from memfilter.eval.report import limit_in_words, render, write_page
from memfilter.eval.sweep_report import charts, data, drawing
from memfilter.eval.sweep_report.data import DECISIONS, FIGURES
from memfilter.files import atomic
from memfilter.pictures import thumbnail
from memfilter.text import printable

log = logging.getLogger(__name__)

CHARTS = ("tradeoff_copy_similarity", "tradeoff_memorization_rate", "cost", "drop_rates", "classifier")
PROMPTS, SHOTS = 8, 4  # in the gallery
SIDE = 56  # pixels at which it shows a picture


def write_sweep_report(sweep: Path, out: Path | None = None) -> Path:
    """Writes a page about a sweep that needs no network, ``figures/*.png`` and ``tables/*.csv``.

        write_sweep_report(Path("runs/sweeps/study"))

    Means are over seeds, with 95% intervals by Student's t. What the table or the runs do not say is left out of the page.

    Args:
        sweep: directory with results.csv, a row for each run: method, setting, seed, memorization_rate, copy_similarity,
            agreement_duplicates, agreement_distinct, seed_agreement, distinct_dropped, time_ratio and run, the run's
            directory, from which the drop rates, the audit and the pictures come.
        out: the page; by default report.html in the sweep's directory, where figures and tables are in any case.

    Returns:
        Where the page is.

    Raises:
        ReportError: a file cannot be read, or the runs were not evaluated alike.
    """
    sweep = Path(sweep)
    out = sweep / "report.html" if out is None else Path(out)
    results = data.read_results(sweep)
    there = data.has_directory(results)
    if not there.all():
        log.warning("%d of %d runs are not where %s says, seen from here; what they hold is left out",
                    (~there).sum(), len(results), sweep / data.RESULTS)  # fmt: skip
    summary = data.summarize(results)
    evaluation = data.common_evaluation(results[there])
    chosen = data.representatives(results)
    runs = data.runs_of(results[there], chosen)
    rates, aucs, decisions = data.read_drop_rates(runs), data.read_classifiers(runs), data.read_decisions(runs)
    seed, prompts = data.read_gallery(runs, PROMPTS)

    styles = drawing.styles_of(list(data.settings_of(results)))
    drawn = [
        charts.tradeoff(summary, results, "copy_similarity"),
        charts.tradeoff(summary, results, "memorization_rate"),
        charts.cost(summary, results),
        charts.drop_rate_chart(rates),
        charts.classifier_chart(aucs),
    ]
    drawn = {chart.name: chart for chart in drawn if any(panel.lines for panel in chart.panels)}
    _write_figures(sweep / "figures", drawn, styles)
    tables = {"summary": _with_ends(summary), "drop_rates": rates, "classifier": aucs, "decisions": _with_ends(decisions)}
    _write_tables(sweep / "tables", tables)
    page = render(
        "sweep.html.jinja",
        name=printable(sweep.resolve().name),
        counts={"runs": len(results), "absent": int((~there).sum()), "methods": results["method"].nunique(),
                "seeds": results["seed"].nunique()},
        settings=len(results[["method", "setting"]].drop_duplicates()),
        evaluation=evaluation,
        limit=limit_in_words(evaluation["limits"], evaluation["memorized_above_is"]) if evaluation else None,
        figures=data.explained(evaluation),
        rows=_rows(results, summary),
        decided=DECISIONS,
        decisions=_decided(decisions),
        legend=[(printable(method), style.colour, style.svg_path()) for method, style in styles.items()],
        charts={name: [(panel.title, f"{chart.y.label} against {panel.x.label}", element) for panel, element in
                       zip(chart.panels, drawing.as_plotly(chart, styles), strict=True)] for name, chart in drawn.items()},
        chosen={printable(method): printable(setting) for method, setting in chosen.items()},
        agreement_unknown=bool((results.groupby(["method", "setting"])["agreement_distinct"].count() == 0).any()),
        prompts=gallery(prompts, chosen),
        seed=seed,
        side=SIDE,
    )  # fmt: skip
    write_page(out, page)
    return out


def _rows(results: pd.DataFrame, summary: pd.DataFrame) -> list[dict]:
    """Of the table, the least memorizing first: method, setting, seeds and a cell for each figure."""
    found = summary.set_index(["method", "setting", "figure"])
    rows = []
    for (method, setting), seeds in results.groupby(["method", "setting"], sort=False)["seed"].count().items():
        means = found["mean"].reindex([(method, setting, name) for name in ("memorization_rate", "agreement_distinct")])
        rate, agreement = means.fillna({means.index[0]: math.inf, means.index[1]: 0.0})
        cells = _cells(found, (method, setting), FIGURES, seeds)
        rows.append({"method": printable(method), "setting": printable(setting), "seeds": seeds, "cells": cells,
                     "order": (rate, -agreement)})  # fmt: skip
    return sorted(rows, key=lambda row: row["order"])


def _decided(decisions: pd.DataFrame) -> list[dict]:
    """Of the table of what was dropped: method, setting and a cell for each of `DECISIONS`."""
    found = decisions.set_index(["method", "setting", "figure"])
    return [{"method": printable(method), "setting": printable(setting),
             "cells": _cells(found, (method, setting), DECISIONS, found.loc[(method, setting, "recall"), "seeds"])}
            for method, setting in dict.fromkeys(key[:2] for key in found.index)]  # fmt: skip


def _cells(found: pd.DataFrame, row: tuple[str, str], figures: dict[str, data.Figure], seeds: int) -> list[dict]:
    cells = []
    for name, figure in figures.items():
        mean, half_width, known = math.nan, math.nan, 0
        if (*row, name) in found.index:
            known, mean, half_width = found.loc[(*row, name), ["seeds", "mean", "half_width"]]
        cells.append({"mean": _text(mean, figure), "half_width": _text(half_width, figure),
                      "known": int(known) if 0 < known < seeds else None})  # fmt: skip
    return cells


def _text(value: float, figure: data.Figure) -> str:
    return "" if math.isnan(value) else figure.form.format(value)


def gallery(prompts: list[data.Prompt], chosen: dict[str, str]) -> list[dict]:
    """What the page shows of each prompt."""
    rows = []
    for prompt in prompts:
        tiles = []
        for method, (generations, similarities) in prompt.generations.items():
            limit = prompt.limit
            shots = [{"png": thumbnail(picture, SIDE), "similarity": round(similarity, 2) + 0.0, "memorized": similarity > limit}
                     for picture, similarity in list(zip(generations, similarities, strict=True))[:SHOTS]]  # fmt: skip
            tiles.append({"method": printable(method), "setting": printable(chosen[method]), "shots": shots,
                          "copies": sum(shot["memorized"] for shot in shots)})  # fmt: skip
        rows.append({"key": printable(prompt.key), "caption": printable(prompt.caption), "limit": prompt.limit,
                     "training": thumbnail(prompt.training, 2 * SIDE), "tiles": tiles})  # fmt: skip
    return rows


def _with_ends(summary: pd.DataFrame) -> pd.DataFrame:
    width = summary["half_width"]
    return summary.assign(low=summary["mean"] - width, high=summary["mean"] + width).drop(columns="half_width")


def _write_figures(directory: Path, drawn: dict[str, charts.Chart], styles: dict[str, drawing.Style]) -> None:
    directory.mkdir(exist_ok=True)
    for name in CHARTS:
        path = directory / f"{name}.png"
        if name in drawn:
            drawing.save_png(drawn[name], styles, path)
        else:
            path.unlink(missing_ok=True)  # of an earlier state of the sweep


def _write_tables(directory: Path, tables: dict[str, pd.DataFrame]) -> None:
    directory.mkdir(exist_ok=True)
    for name, table in tables.items():
        with atomic(directory / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)
