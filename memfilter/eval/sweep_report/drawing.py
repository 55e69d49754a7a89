"""Draws the charts of a sweep: with plotly for the page, with matplotlib for files."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import Markup

from memfilter.eval.charts import as_html, blank
from memfilter.eval.sweep_report.charts import COUNT, PERCENT, Axis, Chart, Line, Panel
from memfilter.eval.sweep_report.data import BASE, NONE, ORACLE
from memfilter.files import atomic
from memfilter.text import printable

MARKED = (NONE, ORACLE)
GREY = "#868e96"
# method -> colour, plotly's symbol, matplotlib's marker; references are grey, and all read well on white and on black
_STYLES = {
    BASE: (GREY, "diamond-tall", "d"),
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
# of methods that are not known here, combined ones among them: no two pairs are alike, for the lengths have no common divisor
_SPARE_COLOURS = ("#4263eb", "#e03131", "#2f9e44", "#845ef7", "#8d8300")
_SPARE_SYMBOLS = (("circle", "o"), ("diamond", "D"), ("square", "s"), ("triangle-up", "^"), ("x", "X"), ("hexagon", "h"),
                  ("triangle-down", "v"), ("cross", "P"), ("pentagon", "p"))  # fmt: skip
_PRECISE = {"": ".3f", PERCENT: ".1%", COUNT: COUNT}  # how a single figure is written, by the ticks of its axis
# where a note may stand: offset from its point, alignment
_SIDES = (
    (5, 3, "left", "bottom"),
    (5, -3, "left", "top"),
    (-5, 3, "right", "bottom"),
    (-5, -3, "right", "top"),
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
)


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
    pairs = zip(cycle(_SPARE_COLOURS), cycle(_SPARE_SYMBOLS), strict=False)
    spare = ((colour, *symbol) for colour, symbol in pairs)
    return {method: Style(*(_STYLES.get(method) or next(spare))) for method in methods}


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
    return [(line.x[0], line.y[0]) for line in panel.lines if chart.guides and line.method == NONE and len(line.x) == 1]


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
    bar = {"type": "data", "thickness": 1, "width": 0, "color": _faded(style.colour)}
    errors = {f"error_{axis}": {"array": _gaps(values), **bar}
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
        names, columns = [printable(method)[:40] for method in shown], min(len(shown), 6)
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
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
            for dx, dy, ha, va in _SIDES:
                text = axis.annotate(printable(note)[:24], (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va,
                                     fontsize=7, color=styles[line.method].colour, annotation_clip=False, zorder=4,
                                     path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip
                box = text.get_window_extent(renderer)
                if frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) and not box.count_overlaps(taken):
                    taken.append(box)
                    break
                text.remove()
