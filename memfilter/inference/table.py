"""The table of ``memfilter detect``: prompts, what their file says of them, and what was measured of each."""

from __future__ import annotations

import json
from decimal import ROUND_CEILING, Context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memfilter.data.prompts import read_prompts
from memfilter.files import atomic
from memfilter.inference.clean import CleanNorms
from memfilter.inference.detection import Signals
from memfilter.inference.models import Model
from memfilter.inference.rivals import RIVALS
from memfilter.text import printable

SUFFIXES = (".parquet", ".jsonl")


def asked_prompts(model: Model, file: Path | None, taken: set[str] = frozenset(), others: int = 40) -> list[dict]:
    """``prompt`` and what is known of each, every row with the same names, and values of one kind under each.

    Args:
        file: as `read_prompts` takes it; None for the prompts of the model's run, its duplicates and ``others`` beside them.
        taken: names that the file must not have.

    Raises:
        ValueError: there is neither file nor run, the file cannot be read, or has a name that is taken.
    """
    if file is None:
        if model.run is None:
            raise ValueError(f"prompts: name a file, {model.name} is no run that has its own")
        return [{"prompt": p.text, "key": p.key, "duplicate": p.duplicate} for p in model.run.prompts(others)]
    rows = [row for _, row in read_prompts(file)]
    names = dict.fromkeys(name for row in rows for name in row)
    if both := taken & {*names}:
        raise ValueError(f"prompts: {file} has a column {min(both)}, which is a name of what is measured: call it otherwise")
    columns = {_encodable(name): _of_one_kind(rows, name) for name in names}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _of_one_kind(rows: list[dict], name: str) -> list:
    """Values that Parquet and JSON take: as they are, or as text; None where there is none, or no number."""
    values = [None if (value := row.get(name)) != value else value for row in rows]
    kinds = {type(value) for value in values} - {type(None)}
    mixed = kinds == {int, float}
    largest = 2**53 if mixed else 2**63  # up to there a float, and Parquet, have every whole number
    if all(abs(value) < largest for value in values if isinstance(value, int | float)):
        if mixed:
            return [value if value is None else float(value) for value in values]
        if kinds in ({int}, {float}, {bool}):
            return values
    return [None if value is None else _encodable(str(value)) for value in values]


def _encodable(text: str) -> str:
    """Halves of characters, which JSON has and Parquet has not, are written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def measured_names(first: int) -> set[str]:
    """Columns that a table may have of what was measured."""
    return {"metric_first_step", f"metric_first_{first}", "metric_all", "p_value", "memorized", "norms", *RIVALS}


def measured_rows(
    asked: list[dict], signals: Signals, clean: CleanNorms, threshold: float, p_values: np.ndarray, first: int, whole: bool
) -> list[dict]:
    """Rows of the table: those of `asked_prompts` with what was measured.

    Args:
        threshold, p_values: of `judge`.
        first: steps that these go by; 0 for all.
        whole: whether all steps were made.
    """
    columns = {"metric_first_step": signals.metric(1)}
    if first:
        columns[f"metric_first_{first}"] = signals.metric(first)
    if whole:
        columns["metric_all"] = signals.metric()
    columns["p_value"] = p_values
    columns |= {name: signals.rival(name, clean=clean) for name in signals.raw}
    columns["memorized"] = signals.metric(first or None) >= threshold
    columns["norms"] = signals.norms.mean(1)  # [P, seeds, S] -> [P, S]
    return [known | {name: _plain(values[at]) for name, values in columns.items()} for at, known in enumerate(asked)]


def _plain(value: np.ndarray | np.generic):
    """For JSON and Parquet; None where nothing could be read."""
    if value.ndim:
        return [_plain(one) for one in value]
    value = value.item()
    return None if value != value else value


def write_rows(rows: list[dict], out: Path) -> None:
    """As Parquet or JSON lines, by the name's end, which is one of `SUFFIXES`."""
    with atomic(out) as partial:
        if out.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), partial)
        else:
            partial.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")


def verdict(rows: list[dict], threshold: float, false_positive_rate: float, at_most: int = 20) -> str:
    """For people: which prompts are memorized, and how many."""
    memorized = sorted((row for row in rows if row["memorized"]), key=lambda row: row["p_value"])
    lines = [f"p {row['p_value']:.3g}  {printable(row['prompt'])[:100]}" for row in memorized[:at_most]]
    if len(memorized) > at_most:
        lines.append(f"... and {len(memorized) - at_most} more")
    shown = Context(6, ROUND_CEILING).create_decimal_from_float(threshold)  # or a clean prompt below it would reach what is shown
    lines.append(f"{len(memorized):,} of {len(rows):,} prompts are memorized: a metric of at least {shown}, which "
                 f"{false_positive_rate:.3g} of clean prompts may reach.")  # fmt: skip
    return "\n".join(lines)
