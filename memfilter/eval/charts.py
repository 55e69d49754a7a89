"""The charts of the report."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

GROUPS = ("duplicates", "distinct")
KINDS = {"duplicates": True, "distinct": False, "unknown": None}  # what the audit and evaluations say of each
BIN = 100  # timesteps
# both read well on white and on black, and the colour-blind tell them apart
COLOURS = {"duplicates": "#e8590c", "distinct": "#3b8ad9", "unknown": "#868e96"}
SYMBOLS = {"duplicates": "circle", "distinct": "diamond", "unknown": "square"}


def by_timestep(audit: dict[str, np.ndarray], samples: int) -> dict[str, list[tuple[int, float, float, float, int]]]:
    """Group -> rows of (bin, 10% quantile, median, 90% quantile, samples) over the last half of a run of so many."""
    late = (audit["position"] >= samples / 2) & ~np.isnan(audit["text_norm"])
    duplicate, norm = audit["duplicate"][late], audit["text_norm"][late]
    bins = audit["timestep"][late] // BIN
    panel = {}
    for group, known in KINDS.items():
        inside = duplicate == known
        rows = [(int(b), *np.quantile(norm[inside & (bins == b)], (0.1, 0.5, 0.9)).tolist(),
                 int((inside & (bins == b)).sum())) for b in np.unique(bins[inside])]  # fmt: skip
        if rows:
            panel[group] = rows
    return panel


def norm_chart(panel: dict, tau: float | None, top: float, unit: str) -> go.Figure:
    """Median and 10-90% band of the norm over the timestep, and tau if there is one; ``top`` ends the axis."""
    figure = blank("timestep", f"text norm ({unit})")
    for group, rows in panel.items():
        bins, low, median, high, count = (list(column) for column in zip(*rows, strict=True))
        x = [(b + 0.5) * BIN for b in bins]
        edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "legendgroup": group}
        band = f"rgba({', '.join(str(int(COLOURS[group][i : i + 2], 16)) for i in (1, 3, 5))}, 0.22)"
        figure.add_scatter(x=x, y=high, **edge)
        figure.add_scatter(x=x, y=low, fill="tonexty", fillcolor=band, **edge)
        figure.add_scatter(
            x=x,
            y=median,
            name=group,
            legendgroup=group,
            zorder=1,  # above the other group's band
            customdata=[(b * BIN, (b + 1) * BIN - 1, *rest) for b, *rest in zip(bins, low, high, count, strict=True)],
            hovertemplate="timesteps %{customdata[0]} to %{customdata[1]}<br>median %{y:.2f}, 10–90%: "
            "%{customdata[2]:.2f} to %{customdata[3]:.2f}<br>%{customdata[4]} samples",
            **_line(group),
        )
    if tau is not None:
        figure.add_hline(
            tau, line={"dash": "dash", "width": 1.5, "color": "#888"}, annotation_text=f"tau = {tau:g}",
            annotation_position="top right",
        )  # fmt: skip
    figure.update_xaxes(range=[0, BIN * (1 + max(rows[-1][0] for rows in panel.values()))])
    figure.update_yaxes(range=[0, top])
    return figure


def drop_rate_chart(metrics: list[dict]) -> go.Figure:
    """Drop rate of each group over the samples seen; that of all samples where no group is known."""
    figure = blank("samples seen", "drop rate")
    names = {group: f"filter/drop_rate_{group}" for group in GROUPS}
    if not any(name in line for line in metrics for name in names.values()):
        names = {"unknown": "filter/drop_rate"}
    for group, name in names.items():
        figure.add_scatter(
            x=[line["samples"] for line in metrics],
            y=[line.get(name) for line in metrics],
            name=group,
            hovertemplate="%{y:.1%} up to sample %{x:,}",
            **_line(group),
        )
    figure.update_xaxes(tickformat=",d", rangemode="tozero")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def _line(group: str) -> dict:
    colour = COLOURS[group]
    return {
        "mode": "lines+markers",
        "line": {"color": colour, "width": 2},
        "marker": {"symbol": SYMBOLS[group], "size": 7, "color": colour},
    }


def blank(x: str, y: str) -> go.Figure:
    """A figure with nothing but its axes."""
    # backgrounds are left to the page, which knows light from dark
    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "xaxis": {"title": {"text": x}, "zeroline": False, "fixedrange": True},
            "yaxis": {"title": {"text": y}, "zeroline": False, "fixedrange": True},
            "font": {"family": "system-ui, sans-serif", "size": 13},
        }
    )


def as_html(figure: go.Figure, name: str) -> Markup:
    """The chart as an element of a page that has plotly.js."""
    config = {"displayModeBar": False, "responsive": True}
    return Markup(figure.to_html(config, full_html=False, include_plotlyjs=False, default_height="340px", div_id=name))
