"""The charts of a sweep: what is drawn is said here, once; drawing.py draws it for the page and for files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from memfilter.eval.charts import BIN, GROUPS
from memfilter.eval.sweep_report.data import FIGURES, over_seeds, settings_of


@dataclass
class Line:
    """Points of one method, joined in their order."""

    method: str
    x: list[float]
    y: list[float]
    notes: list[str]  # what each point is, for people
    x_error: list[float] = field(default_factory=list)  # half widths, NaN where unknown
    y_error: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """What is measured.

    Args:
        label: for people.
        ticks: how its figures are written, as Python and d3 both understand it.
        share: nothing lies below 0 or above 1.
    """

    label: str
    ticks: str = ""
    share: bool = False


PERCENT, COUNT = ".0%", ",.0f"


@dataclass
class Panel:
    """One pair of axes."""

    title: str
    x: Axis
    lines: list[Line]


@dataclass
class Chart:
    """Panels side by side, on one vertical axis.

    Args:
        name: of its file, and of its elements on the page.
        same_x: panels share the horizontal range as well.
        labelled: notes of points are written beside them, where there is room, in files, which cannot be pointed at.
        guides: dotted lines through the point of ``none``.
        y_range: by default as the points ask for.
    """

    name: str
    y: Axis
    panels: list[Panel]
    same_x: bool = False
    labelled: bool = False
    guides: bool = False
    y_range: tuple[float, float] | None = None

    def ranges(self) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """Of both axes, for each panel."""
        everything = [line for panel in self.panels for line in panel.lines]
        y = self.y_range or _range([(line.y, line.y_error) for line in everything], self.y)
        return [
            (_range([(line.x, line.x_error) for line in (everything if self.same_x else panel.lines)], panel.x), y)
            for panel in self.panels
        ]


def _range(columns: list[tuple[list[float], list[float]]], axis: Axis) -> tuple[float, float]:
    """Room for all points, and for their intervals as far as these do not dwarf them."""
    values = [value for column, _ in columns for value in column]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = 0.5 * (high - low) or 0.1 * abs(high) or 1.0
    pairs = [pair for column in columns for pair in zip(*column, strict=False) if not math.isnan(pair[1])]
    low = max(low - room, min([low, *(value - error for value, error in pairs)]))
    high = min(high + room, max([high, *(value + error for value, error in pairs)]))
    if axis.share:
        low, high = max(low, 0.0), min(high, 1.0)
    margin = 0.06 * (high - low or room)
    return low - margin, high + margin


def _scatter(title: str, summary: pd.DataFrame, results: pd.DataFrame, x: str, y: str) -> Panel:
    """A point for every setting of every method: means of two figures with their intervals."""
    found = {name: summary[summary["figure"] == name].set_index(["method", "setting"]) for name in (x, y)}
    lines = []
    for method, settings in settings_of(results).items():
        known = [s for s in settings if all((method, s) in of.index for of in found.values())]
        if known:
            points = {name: of.loc[[(method, s) for s in known]] for name, of in found.items()}
            values = [points[name][column].tolist() for name, column in
                      ((x, "mean"), (y, "mean"), (x, "half_width"), (y, "half_width"))]  # fmt: skip
            lines.append(Line(method, values[0], values[1], known, *values[2:]))
    return Panel(title, _axis(x), lines)


def _axis(figure: str) -> Axis:
    labels = {
        "agreement_duplicates": "agreement of picture and caption",
        "agreement_distinct": "agreement of picture and caption",
        "distinct_dropped": "share of distinct pictures not trained on",
        "time_ratio": "training time, relative to none",
    }
    share = FIGURES[figure].share
    return Axis(labels.get(figure, FIGURES[figure].label.lower()), PERCENT if share else "", share)


def tradeoff(summary: pd.DataFrame, results: pd.DataFrame, y: str) -> Chart:
    """What is memorized against how well pictures agree with captions, on duplicate and on distinct prompts."""
    panels = [_scatter(f"{kind} prompts", summary, results, f"agreement_{group}", y)
              for kind, group in zip(("duplicate", "distinct"), GROUPS, strict=True)]  # fmt: skip
    return Chart(f"tradeoff_{y}", _axis(y), panels, same_x=True, labelled=True, guides=True)


def cost(summary: pd.DataFrame, results: pd.DataFrame) -> Chart:
    """What is memorized against what that costs: time, and samples that are not learnt."""
    panels = [_scatter("time", summary, results, "time_ratio", "memorization_rate"),
              _scatter("data", summary, results, "distinct_dropped", "memorization_rate")]  # fmt: skip
    return Chart("cost", _axis("memorization_rate"), panels, labelled=True, guides=True)


def drop_rate_chart(rates: pd.DataFrame) -> Chart:
    """Drop rates over time, of duplicates and of distinct samples: means over seeds."""
    panels = []
    for group in GROUPS:
        lines = []
        for (method, setting), own in rates[rates["group"] == group].groupby(["method", "setting"], sort=False):
            # not by samples: seeds that pass samples over log at other places
            points = own.groupby("point")[["samples", "rate"]].mean()
            lines.append(Line(method, points["samples"].tolist(), points["rate"].tolist(), [setting] * len(points)))
        panels.append(Panel(group, Axis("samples seen", COUNT), lines))
    return Chart("drop_rates", Axis("drop rate", PERCENT, share=True), panels, same_x=True, y_range=(-0.03, 1.03))


def classifier_chart(aucs: pd.DataFrame) -> Chart:
    """AUC by timestep bin: means over seeds with their intervals."""
    lines = []
    for (method, setting, score), own in aucs.groupby(["method", "setting", "score"], sort=False):
        points = over_seeds(own, ["timestep"], "auc").sort_values("timestep")
        notes = [f"{setting}, {score}" if setting else score] * len(points)
        middles = [start + BIN / 2 for start in points["timestep"]]
        lines.append(Line(method, middles, points["mean"].tolist(), notes, [], points["half_width"].tolist()))
    panel = Panel("duplicates against distinct samples", Axis("timestep"), lines)
    lowest = min((value for line in lines for value in line.y), default=0.5)
    return Chart("classifier", Axis("AUC", share=True), [panel], y_range=(min(0.47, lowest - 0.03), 1.03))
