"""The table of a sweep: what every run came to."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from memfilter.files import atomic

RESULTS = "results.csv"
# memorized_above_is of an evaluation: a quantile, and where every run has its own
QUANTILE = "the 99.9% quantile of the same measure over pairs of"
OWN_LIMIT = f"{QUANTILE} distinct training pictures"
COLUMNS = (
    "method", "setting", "seed", "memorization_rate", "copy_similarity", "agreement_duplicates", "agreement_distinct",
    "seed_agreement", "distinct_dropped", "passes", "time_ratio", "cpu_seconds", "run", "evaluated",
)  # fmt: skip


def read_figures(run: Path) -> dict[str, float | None]:
    """Figures of a finished and evaluated run; None where a run has none, such as the agreement of pictures without scorer.

    ``memorization_rate``, ``copy_similarity`` and ``seed_agreement`` are of duplicate prompts; ``agreement_duplicates`` and
    ``agreement_distinct`` of picture and caption, by the scenes' scorer or, for other pictures, CLIP; ``distinct_dropped`` is the
    share of distinct samples' appearances that were not trained on, those of samples that de-duplication left out before
    among them, None where samples were seen and nobody knows which of them are distinct; ``passes`` null passes for each sample
    of the stream, ``cpu_seconds`` of the training process.

    Raises:
        ValueError: the run is not finished or not evaluated.
    """
    try:
        summary, evaluation = (json.loads((run / f"{name}.json").read_text()) for name in ("summary", "evaluation"))
        seconds = summary["cpu_seconds"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{run} is no run that was evaluated: {' '.join(str(error).split())}") from error
    duplicates, distinct = evaluation.get("duplicates", {}), evaluation.get("distinct", {})
    left = 1 - summary.get("data/distinct_left_out", 0.0) if summary.get("samples") != 0 else 0.0
    agreed, dropped = agreement_figure(evaluation), summary.get("filter/drop_rate_distinct", 0.0)
    if seen := summary.get("filter/seen_distinct"):  # the rate leaves out what has no verdict: dropped captions
        dropped = summary["filter/dropped_distinct"] / seen
    unknown = summary.get("filter/seen") and not seen and not summary.get("filter/seen_duplicates")  # roles, and so whose drops
    return {
        "memorization_rate": duplicates.get("memorization_rate"),
        "copy_similarity": duplicates.get("copy_similarity"),
        "agreement_duplicates": duplicates.get(agreed),
        "agreement_distinct": distinct.get(agreed),
        "seed_agreement": duplicates.get("seed_agreement"),
        "distinct_dropped": None if unknown else 1 - left * (1 - dropped),
        "passes": summary.get("filter/pass_share", 0.0),
        "cpu_seconds": seconds,
    }


def recorded_figures(out: Path) -> dict[str, dict[str, float | str | None]]:
    """Run -> its figures, as `read_figures` has them, and ``evaluated``, with which words that was (None where nobody knows),
    by the results.csv that an earlier call left; none where there is none.

    Raises:
        ValueError: the table cannot be read.
    """
    others = ("method", "setting", "seed", "run", "time_ratio", "evaluated")
    path, figures = out / RESULTS, [name for name in COLUMNS if name not in others]
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {
                row["run"]: {name: float(row[name]) if row[name] else None for name in figures}
                | {"evaluated": row.get("evaluated") or None}
                for row in csv.DictReader(file)
            }
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} is not the table of a sweep: {' '.join(str(error).split())}") from error


def agreement_figure(evaluation: dict) -> str | None:
    """The figure by which an evaluation tells agreement: the scenes' scorer's, or else CLIP's; None without either."""
    known = {name for kind in ("duplicates", "distinct") for name in evaluation.get(kind, {})}
    return next((name for name in ("agreement", "clip_score") if name in known), None)


def write_results(rows: list[dict], out: Path) -> None:
    """results.csv and results.parquet, with `COLUMNS` first and what was swept after them."""
    more = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    names = [*COLUMNS, *more]
    rounded = [{name: _rounded(row.get(name)) for name in names} for row in rows]
    with atomic(out / RESULTS) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rounded)
    types = {name: {type(row[name]) for row in rounded if row[name] is not None} for name in more}
    texts = [name for name, found in types.items() if len(found) > 1 and found != {int, float}]  # Parquet has one a column
    for row in rounded:
        row.update({name: str(row[name]) for name in texts if row[name] is not None})
    with atomic((out / RESULTS).with_suffix(".parquet")) as partial:
        pq.write_table(pa.Table.from_pylist(rounded), partial)


def _rounded(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value
