"""The charts of a sweep. What is drawn is said once, as a `Chart`; plotly draws it for the page and matplotlib for a file."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup

from memfilter.data.shards import printable
from memfilter.eval.charts import BIN, GROUPS, as_html, blank
from memfilter.eval.sweep_report_data import FIGURES, NONE, ORACLE, over_seeds, settings_of
from memfilter.files import atomic

MARKED = (NONE, ORACLE)
GREY = "#868e96"
# method -> colour, plotly's symbol, matplotlib's marker; both references are grey, and all read well on white and on black
_STYLES = {
    NONE: (GREY, "square", "s"),
    "tau": ("#e8590c", "circle", "o"),
    "timestep": ("#9c36b5", "triangle-down", "v"),
    "evidence": ("#1c7ed6", "diamond", "D"),
    "rta": ("#d6336c", "triangle-up", "^"),
    "repeat": ("#f783ac", "triangle-left", "<"),
    "random_caption": ("#a9743a", "triangle-right", ">"),
    "embedding_noise": ("#d6a400", "cross", "P"),
    "agc": ("#0ca678", "x", "X"),
    "dedup": ("#0b7285", "pentagon", "p"),
    "sightings": ("#74b816", "hexagon", "h"),
    ORACLE: (GREY, "star", "*"),
}
_OTHERS = (("#4263eb", "circle", "o"), ("#e03131", "diamond", "D"), ("#099268", "square", "s"), ("#ae3ec9", "cross", "P"))


@dataclass(frozen=True)
class Style:
    """How a method looks."""

    colour: str
    symbol: str
    marker: str

    def svg_path(self) -> str:
        """The marker as the data of a path within [-1, 1] x [-1, 1], for a legend in HTML."""
        from matplotlib.markers import MarkerStyle

        marker = MarkerStyle(self.marker)
        path = marker.get_path().transformed(marker.get_transform())
        scale = 0.95 / abs(path.to_polygons()[0]).max()
        return " ".join("M" + " L".join(f"{x * scale:.3f} {-y * scale:.3f}" for x, y in polygon) + " Z"
                        for polygon in path.to_polygons())  # fmt: skip


def styles_of(methods: list[str]) -> dict[str, Style]:
    """Each method's style; one that is not known here takes the next free one."""
    others = cycle(_OTHERS)
    return {method: Style(*(_STYLES.get(method) or next(others))) for method in methods}


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
_PRECISE = {"": ".3f", PERCENT: ".1%", COUNT: COUNT}  # for a single figure


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
    ends = [(v - e, v + e) for column, errors in columns for v, e in zip(column, errors, strict=False) if not math.isnan(e)]
    low = max(low - room, min([low, *(end for end, _ in ends)]))
    high = min(high + room, max([high, *(end for _, end in ends)]))
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
    panels = [_scatter(f"{group.removesuffix('s')} prompts", summary, results, f"agreement_{group}", y) for group in GROUPS]
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
            points = own.groupby("point")[["samples", "rate"]].mean()  # seeds pass samples over, and so log at other places
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


def as_plotly(chart: Chart, styles: dict[str, Style]) -> list[Markup | None]:
    """Each panel that has points as an element of the page; None in place of one that has none."""
    drawn = []
    for i, panel in enumerate(chart.panels):
        if not panel.lines:
            drawn.append(None)
            continue
        figure = blank(panel.x.label, chart.y.label)
        figure.update_layout(showlegend=False, margin={"t": 16}, hoverlabel={"align": "left"})
        x_range, y_range = chart.ranges()[i]
        for line in panel.lines:
            trace = _trace(line, styles[line.method], panel.x, chart.y)
            if line.method in MARKED and chart.labelled:
                trace.update(mode="lines+markers+text", text=[trace.name] * len(line.x),
                             textposition=_free_side(line, panel, x_range, y_range))  # fmt: skip
            figure.add_trace(trace)
        for x, y in _guides(chart, panel):
            figure.add_vline(x, line={"dash": "dot", "width": 1, "color": GREY}, layer="below")
            figure.add_hline(y, line={"dash": "dot", "width": 1, "color": GREY}, layer="below")
        figure.update_xaxes(range=x_range, tickformat=panel.x.ticks)
        figure.update_yaxes(range=y_range, tickformat=chart.y.ticks)
        drawn.append(as_html(figure, f"{chart.name}-{i}"))
    return drawn


def _guides(chart: Chart, panel: Panel) -> list[tuple[float, float]]:
    return [(line.x[0], line.y[0]) for line in panel.lines if chart.guides and line.method == NONE]


def _free_side(line: Line, panel: Panel, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    """The corner of a line's first point, for plotly, near which the fewest other points lie."""
    points = [((x - line.x[0]) / (x_range[1] - x_range[0]), (y - line.y[0]) / (y_range[1] - y_range[0]))
              for other in panel.lines if other is not line for x, y in zip(other.x, other.y, strict=True)]  # fmt: skip
    place = [(line.x[0] - x_range[0]) / (x_range[1] - x_range[0]), (line.y[0] - y_range[0]) / (y_range[1] - y_range[0])]
    corners = {"top right": (1, 1), "top left": (-1, 1), "bottom left": (-1, -1), "bottom right": (1, -1)}

    def in_the_way(corner: str) -> int:
        right, up = corners[corner]
        outside = sum(not 0 < at + room < 1 for at, room in zip(place, (0.12 * right, 0.08 * up), strict=True))
        return 100 * outside + sum(-0.02 < x * right < 0.15 and -0.02 < y * up < 0.1 for x, y in points)

    return min(corners, key=in_the_way)


def _trace(line: Line, style: Style, x: Axis, y: Axis) -> go.Scatter:
    errors = {f"error_{axis}": {"type": "data", "array": _gaps(values), "thickness": 1, "width": 0, "color": _faded(style.colour)}
              for axis, values in (("x", line.x_error), ("y", line.y_error)) if values}  # fmt: skip
    name = text_for_plotly(line.method)
    return go.Scatter(
        x=line.x,
        y=line.y,
        name=name,
        mode="lines+markers",
        cliponaxis=False,
        line={"color": style.colour, "width": 1.5},
        marker={"symbol": style.symbol, "color": style.colour, "size": _size(line, 9) + 5 * (line.method == ORACLE)},
        # what is hostile comes as data, in which no fields are filled in
        customdata=[
            (f"{name} {text_for_plotly(note)}", _plus_minus(line.x_error, i, x), _plus_minus(line.y_error, i, y))
            for i, note in enumerate(line.notes)
        ],
        hovertemplate=f"<b>%{{customdata[0]}}</b><br>{x.label}: %{{x:{_PRECISE[x.ticks]}}}%{{customdata[1]}}"
        f"<br>{y.label}: %{{y:{_PRECISE[y.ticks]}}}%{{customdata[2]}}<extra></extra>",
        **errors,
    )


def _size(line: Line, size: float) -> float:
    return size if line.x_error else size * 0.67  # points of a curve over time or timesteps


def _gaps(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _plus_minus(errors: list[float], i: int, axis: Axis) -> str:
    return f" ± {errors[i]:{_PRECISE[axis.ticks]}}" if errors and not math.isnan(errors[i]) else ""


def _faded(colour: str, alpha: float = 0.45) -> str:
    return f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, {alpha})"


def text_for_plotly(text: str, limit: int = 60) -> str:
    """Plotly takes labels for a kind of HTML; what stands there is cut short where it would fill the page."""
    text = printable(text)
    return html.escape(text if len(text) <= limit else text[: limit - 1] + "…", quote=False)


def as_matplotlib(chart: Chart, styles: dict[str, Style]):
    """The chart on white, as a figure of matplotlib that belongs to no window; panels without points are left out."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranges = [both for both, panel in zip(chart.ranges(), chart.panels, strict=True) if panel.lines]
    panels = [panel for panel in chart.panels if panel.lines]
    # or "$" in the name of a setting starts a formula
    with rc_context({"text.parse_math": False, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2 * len(panels), 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel, (x_range, y_range) in zip(axes, panels, ranges, strict=True):
            _draw(axis, chart, panel, styles)
            axis.set(title=panel.title, xlabel=panel.x.label, xlim=x_range, ylim=y_range)
            axis.grid(alpha=0.25)
            for of, ticks in ((axis.xaxis, panel.x.ticks), (axis.yaxis, chart.y.ticks)):
                if ticks:
                    of.set_major_formatter(f"{{x:{ticks}}}")
        axes[0].set_ylabel(chart.y.label)
        shown = dict.fromkeys(line.method for panel in panels for line in panel.lines)
        handles = [axes[0].plot([], [], color=styles[m].colour, marker=styles[m].marker, lw=1.2)[0] for m in shown]
        figure.legend(handles, [printable(m)[:40] for m in shown], loc="outside lower center", ncols=min(len(shown), 6), frameon=False)
        if chart.labelled:
            figure.draw_without_rendering()  # labels need to know where the points have come to lie, and stay
            figure.set_layout_engine("none")
            for axis, panel in zip(axes, panels, strict=True):
                _label(axis, panel, styles)
    return figure


def save_png(chart: Chart, styles: dict[str, Style], path: Path) -> None:
    """The chart as a picture."""
    with atomic(path) as partial:
        as_matplotlib(chart, styles).savefig(partial, format="png", dpi=150)


def _draw(axis, chart: Chart, panel: Panel, styles: dict[str, Style]) -> None:
    for line in panel.lines:
        style = styles[line.method]
        errors = {f"{name}err": values for name, values in (("x", line.x_error), ("y", line.y_error)) if values}
        axis.errorbar(
            line.x, line.y, **errors, color=style.colour, ecolor=_mixed(style.colour), elinewidth=0.8, lw=1.2,
            marker=style.marker, ms=_size(line, 6) + 4 * (line.method == ORACLE and chart.labelled), zorder=3,
        )  # fmt: skip
    for x, y in _guides(chart, panel):
        axis.axvline(x, color=GREY, ls=":", lw=0.8, zorder=1)
        axis.axhline(y, color=GREY, ls=":", lw=0.8, zorder=1)


def _mixed(colour: str) -> tuple[float, ...]:
    """The colour faded on white."""
    return tuple(0.5 + int(colour[i : i + 2], 16) / 510 for i in (1, 3, 5))


def _label(axis, panel: Panel, styles: dict[str, Style]) -> None:
    """Writes notes beside points, where no other note and no point stands; a note without room is left out."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    half = 5 * axis.figure.dpi / 72  # of a mark
    points = [axis.transData.transform(point) for line in panel.lines for point in zip(line.x, line.y, strict=True)]
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in points]
    frame = axis.get_window_extent()
    renderer = axis.figure.canvas.get_renderer()
    for line in panel.lines:
        notes = [line.method] * len(line.notes) if line.method in MARKED else line.notes
        for x, y, note in zip(line.x, line.y, notes, strict=True):
            for dx, dy, ha, va in ((5, 3, "left", "bottom"), (5, -3, "left", "top"), (-5, 3, "right", "bottom"),
                                   (-5, -3, "right", "top"), (0, 6, "center", "bottom"), (0, -6, "center", "top")):  # fmt: skip
                text = axis.annotate(printable(note)[:24], (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va,
                                     fontsize=7, color=styles[line.method].colour, annotation_clip=False, zorder=4,
                                     path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip
                box = text.get_window_extent(renderer)
                if frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) and not box.count_overlaps(taken):
                    taken.append(box)
                    break
                text.remove()
