"""One page that compares a run without the filter to the same run with it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import pyarrow.parquet as pq
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from memfilter.eval.charts import GROUPS, KINDS, as_html, by_timestep, drop_rate_chart, norm_chart
from memfilter.files import atomic
from memfilter.pictures import thumbnail
from memfilter.text import printable

FILES = ("metrics.jsonl", "audit.parquet", "summary.json", "evaluation.json", "evaluation.npz")
PROMPTS, SIDE = 20, 72  # of each kind in the gallery, and pixels at which it shows a picture
INERT = {"data.workers", "data.cache_gb", "train.gradient_checkpointing", "train.compile"}  # may differ without changing what is learned

FIGURES = {
    "memorization_rate": ("Memorization rate", "Share of generations that count as copies."),
    "copy_similarity": (
        "Copy similarity",
        "Mean similarity of a generation to the training picture of its prompt; 1 is the same picture.",
    ),
    "agreement": (
        "Agreement of picture and caption",
        "Mean probability that a generation shows the object and exactly the background colours of its caption, "
        "by a small scorer of this project. It is not a CLIP score.",
    ),
    "clip_score": (
        "CLIP score",
        "Mean over generations of 100 times the cosine, at least 0, between picture and caption, by the CLIP {clip}.",
    ),
    "seed_agreement": (
        "Seed agreement",
        "Mean similarity of one prompt's generations to each other; 1 means that every seed gives the same picture.",
    ),
}


class ReportError(ValueError):
    """Runs that cannot be compared, or not read; the message has one line for each reason."""


@dataclass
class Run:
    """What a run directory says."""

    directory: Path
    metrics: list[dict]
    audit: dict[str, np.ndarray]
    summary: dict
    evaluation: dict
    generations: np.ndarray  # uint8 [P, S, H, W, 3]
    training: np.ndarray  # uint8 [P, H, W, 3]

    @classmethod
    def read(cls, directory: Path) -> Run:
        audit = pq.read_table(directory / "audit.parquet", columns=["position", "duplicate", "timestep", "text_norm"])
        with np.load(directory / "evaluation.npz") as pictures:
            generations, training = pictures["generations"], pictures["training"]
        return cls(
            directory,
            [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()],
            {name: audit[name].to_numpy() for name in audit.column_names},
            json.loads((directory / "summary.json").read_text()),
            json.loads((directory / "evaluation.json").read_text()),
            generations,
            training,
        )

    @property
    def filter(self) -> dict:
        return self.summary["config"]["filter"]

    @property
    def method(self) -> str:
        return self.filter.get("method", "tau")

    @property
    def tau(self) -> float | None:
        """None where there is no single threshold."""
        return self.filter["tau"] if self.method == "tau" else None

    @property
    def filtered(self) -> bool:
        return self.method != "tau" or self.tau is not None and math.isfinite(self.tau)


def write_report(off: Path, on: Path, out: Path) -> None:
    """Compares two runs that differ in the filter alone, on one HTML page that needs no network.

        write_report(Path("runs/quickstart/off"), Path("runs/quickstart/on"), Path("runs/quickstart/report.html"))

    Args:
        off: run directory with metrics.jsonl, audit.parquet, summary.json, evaluation.json and evaluation.npz, trained
            with ``filter.tau`` inf (or null, which leaves its norms out of the page).
        on: the same, trained with a finite ``filter.tau`` or another method.
        out: the page; replaced only when all of it is written.

    Raises:
        ReportError: a file is missing, or the runs differ in more than the filter.
    """
    off, on, out = Path(off), Path(on), Path(out)
    missing = [f"{d / name} is missing; train and evaluate this run first"
               for d in (off, on) for name in FILES if not (d / name).is_file()]  # fmt: skip
    if missing:
        raise ReportError("\n".join(missing))
    runs = {"off": Run.read(off), "on": Run.read(on)}
    if errors := _incomparable(runs["off"], runs["on"]):
        raise ReportError("\n".join(errors))
    write_page(out, _render(**runs))


def render(template: str, **values) -> str:
    """A page of this package, with plotly.js inside."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("memfilter", "eval"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(plotlyjs=Markup(get_plotlyjs()), **values)


def write_page(out: Path, page: str) -> None:
    """Replaces the page only when all of it is written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as partial:
        partial.write_bytes(page.encode("utf-8", "backslashreplace"))  # JSON may hold halves of characters


def limit_in_words(limits: list[float | None], basis: str | None) -> str | None:
    """From where on a generation counts as memorized, and what that is; None where nothing could be compared.

    Args:
        limits: memorized_above of the evaluations, from the lowest to the highest.
        basis: their memorized_above_is.
    """
    if None in limits:
        return None
    said = f"the limit of {limits[0]:.3f}" if len(limits) == 1 else f"its run's limit of {limits[0]:.3f} to {limits[-1]:.3f}"
    return said + (f", {printable(str(basis))}" if basis else "")


def _incomparable(off: Run, on: Run) -> list[str]:
    errors, both = [], f"{off.directory} and {on.directory}"
    if off.filtered:
        found = off.tau if off.method == "tau" else f"filter.method={off.method}"
        errors.append(f"{off.directory} must have trained without filter (filter.tau inf), found {found}")
    if not on.filtered:
        errors.append(f"{on.directory} must have trained with the filter (a finite filter.tau, or another method), "
                      f"found {on.tau}")  # fmt: skip
    settings = [_settings(run.summary["config"]) for run in (off, on)]
    for name in sorted(settings[0].keys() | settings[1].keys()):
        a, b = (s.get(name) for s in settings)
        if a != b:
            errors.append(f"{name} must be the same in {both}, found {a!r} and {b!r}; train one of them again")
    for name, usual in {"measure": None, "sha256": None, "memorized_above": None, "steps": None, "guidance_scale": None, "clip": None,
                        "near_copies": 1}.items():  # fmt: skip
        a, b = (run.evaluation.get(name, usual) for run in (off, on))
        if a != b:
            errors.append(f"evaluation.json: {name} must be the same in {both}, found {a!r} and {b!r}; "
                          "evaluate both again")  # fmt: skip
    asked = [[(p["key"], p["caption"], p["duplicate"]) for p in run.evaluation["prompts"]] for run in (off, on)]
    alike = asked[0] == asked[1] and off.generations.shape == on.generations.shape
    if not alike or not np.array_equal(off.training, on.training):
        errors.append(f"{both} were evaluated on different prompts, seeds or training pictures; evaluate both again")
    for run in (off, on):
        if error := misfit(run.evaluation["prompts"], run.generations, run.training):
            errors.append(f"{run.directory / 'evaluation.npz'} {error}")
    return errors


def misfit(prompts: list[dict], generations: np.ndarray, training: np.ndarray) -> str | None:
    """How pictures do not fit the prompts of their evaluation, of which those without a key may lack similarities."""
    counts = {len(prompt["similarity"]) for prompt in prompts if "similarity" in prompt}
    fits = generations.ndim == 5 and len(generations) == len(training) == len(prompts)
    if fits and counts <= {generations.shape[1]}:
        return None
    return (f"does not fit evaluation.json: {len(prompts)} prompts, found generations {generations.shape[:2]}, "
            f"training {len(training)}; evaluate again")  # fmt: skip


def _settings(config: dict) -> dict:
    """All settings that make the samples, the base or the updates what they are, by dotted name."""
    settings = {f"{section}.{name}": value for section in ("model", "data", "train", "mitigation")
                for name, value in config.get(section, {}).items()}  # fmt: skip
    settings["filter.unit"] = config["filter"].get("unit")  # or tau means nothing to the other run
    return {name: value for name, value in settings.items() if name not in INERT}


def _render(off: Run, on: Run) -> str:
    prompts = off.evaluation["prompts"]
    counts = {kind: sum(p["duplicate"] is known for p in prompts) for kind, known in KINDS.items()}
    counts = {kind: count for kind, count in counts.items() if count}
    panels = {name: by_timestep(run.audit, run.summary["samples"]) for name, run in (("off", off), ("on", on))}
    # one scale, or the two charts cannot be compared by eye
    highest = max([on.tau or 0, *(row[3] for panel in panels.values() for rows in panel.values() for row in rows)])
    unit = on.filter.get("unit", "l2")
    norms = {name: norm_chart(panel, on.tau, highest * 1.08, unit) if panel else None
             for name, panel in panels.items()}  # fmt: skip
    return render(
        "report.html.jinja",
        off=off,
        on=on,
        evaluation=off.evaluation,
        limit=limit_in_words([off.evaluation["memorized_above"]], off.evaluation.get("memorized_above_is")),
        base=off.summary["config"].get("model", {}).get("path"),
        counts=counts,
        seeds=off.generations.shape[1],
        table=_table(off, on, list(counts)),
        gallery=_gallery(off, on, list(counts)),
        px=SIDE,
        drop_rates=as_html(drop_rate_chart(on.metrics), "drop-rates"),
        norms={name: chart and as_html(chart, f"norms-{name}") for name, chart in norms.items()},
    )


def _table(off: Run, on: Run, kinds: list[str]) -> list[dict]:
    """Headline figures that there are: rows of label, meaning and lines of (group, off, on)."""

    def row(label: str, meaning: str, form: str, *lines: tuple) -> dict:
        return {"label": label, "meaning": meaning, "lines": [(g, _text(a, form), _text(b, form)) for g, a, b in lines]}

    table, clip = [], printable(str(off.evaluation.get("clip")))
    for name, (label, meaning) in FIGURES.items():
        a, b = ([run.evaluation.get(kind, {}).get(name) for kind in kinds] for run in (off, on))
        form = "{:.1%}" if name == "memorization_rate" else "{:.2f}"
        if any(value is not None for value in (*a, *b)):
            table.append(row(label, meaning.format(clip=clip), form, *zip(kinds, a, b, strict=True)))
    rates = {group: f"filter/drop_rate_{group}" for group in GROUPS}
    if not any(name in run.summary for run in (off, on) for name in rates.values()):
        rates = {"all samples": "filter/drop_rate"}
    meaning = "Share of the training samples with a verdict that were left out of the loss, over the whole run."
    lines = [(group, off.summary.get(name), on.summary.get(name)) for group, name in rates.items()]
    table.append(row("Drop rate", meaning, "{:.1%}", *lines))
    meaning = ("The run without the filter measures the norm too, so the difference is not what the filter costs."
               if off.tau is not None
               else "Only the run with the filter makes extra passes.")  # fmt: skip
    seconds = ("whole run", off.summary["seconds"], on.summary["seconds"])
    return [*table, row("Training seconds", meaning, "{:,.0f}", seconds)]


def _text(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else form.format(value)


def _gallery(off: Run, on: Run, kinds: list[str]) -> dict[str, list[dict]]:
    """What the page shows of the first prompts of each kind."""
    limit, rows = off.evaluation["memorized_above"], {kind: [] for kind in kinds}
    for i, prompt in enumerate(off.evaluation["prompts"]):
        kind = next(kind for kind in kinds if KINDS[kind] is prompt["duplicate"])
        if len(rows[kind]) == PROMPTS:
            continue
        sides = []
        for run in (off, on):
            similarities = run.evaluation["prompts"][i].get("similarity") or [None] * len(run.generations[i])
            sides.append([{"png": thumbnail(picture, SIDE), "similarity": _text(similarity, "{:z.2f}"),
                           "memorized": similarity is not None and similarity > limit}
                          for picture, similarity in zip(run.generations[i], similarities, strict=True)])  # fmt: skip
        known = None not in prompt.get("similarity", [None])
        training = thumbnail(off.training[i], SIDE) if known else None
        rows[kind].append({"prompt": prompt, "training": training, "sides": sides})
    return rows
