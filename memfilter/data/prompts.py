"""Prompts from a file: a line each, or a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from memfilter.data.shards import MAX_CAPTION


def read_prompts(path: Path) -> list[tuple[str, dict]]:
    """Where each stands, for messages, and what is said of it: ``prompt``, and whatever else the file has.

    Args:
        path: .jsonl (objects), .csv or .parquet (columns), with ``prompt``; of any other name, one prompt a line.

    Raises:
        ValueError: it cannot be read, holds none, or one is too long or no text.
    """
    path = Path(path)
    rows = {".jsonl": _objects, ".csv": _csv, ".parquet": _parquet}.get(path.suffix.lower(), _lines)
    try:
        found = [(f"prompts: {path}, line {number}", row) for number, row in rows(path)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"prompts: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not found:
        raise ValueError(f"prompts: {path} holds none")
    for where, row in found:
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{where}: expected {{"prompt": "..."}}' if path.suffix == ".jsonl" else f"{where}: no prompt")
        require_prompt(row["prompt"], where)
    return found


def require_prompt(prompt: str, where: str) -> None:
    """Raises ValueError, which says where it stands, for a prompt that is too long or that no tokenizer takes."""
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(f"{where}: a prompt with half of a character (a lone surrogate)")
    if len(prompt) > MAX_CAPTION:
        raise ValueError(f"{where}: a prompt of {len(prompt):,} characters, more than {MAX_CAPTION:,}")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _objects(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"prompts: {path}, line {number}: {error}") from error


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    _require_column(path, reader.fieldnames or [])
    for row in reader:
        if None in row:
            raise ValueError(f"prompts: {path}, line {reader.line_num}: more fields than the {len(reader.fieldnames)} columns")
        yield reader.line_num, row


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _require_column(path, file.schema_arrow.names)
            yield from enumerate(file.read().to_pylist(), 1)
    except pa.ArrowInvalid as error:
        raise ValueError(f"prompts: {path} cannot be read ({' '.join(str(error).split())})") from error


def _require_column(path: Path, names: list[str]) -> None:
    if "prompt" not in names:
        raise ValueError(f"prompts: {path} has no column prompt, it has {', '.join(map(str, names)) or 'none'}")
