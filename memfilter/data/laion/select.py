"""Chooses from LAION-style metadata what img2dataset is to download: by conditions, by caption, by a seeded draw.

DuckDB reads the Parquet files and never holds them: first address, caption and what the conditions name, of which two
numbers for each address stay; then, in parts that are sorted one by one, the rows that were chosen. What does not fit into
memory goes to a folder beside the output.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

import memfilter
from memfilter.data.laion.settings import Selection
from memfilter.data.plan import lines

HEADER = "selection.json"
ROWS_PER_FILE = 1_000_000  # img2dataset holds a whole file
ROWS_PER_SORT = 2_000_000  # of some hundred bytes each
MAX_URL = 4096  # bytes; servers refuse longer ones
# what a column is called here -> what it is called in LAION-400M, LAION-5B, Re-LAION, COYO-700M, DataComp; in any case
ALIASES = {
    "url": ("url", "image_url"),
    "caption": ("caption", "text", "alt_text"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "similarity": ("similarity", "clip_similarity_vitb32", "clip_b32_similarity_score"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2"),
    "pwatermark": ("pwatermark", "watermark_score"),
    "punsafe": ("punsafe",),
    "hash": ("hash", "key", "uid"),
}
USABLE = re.compile(r"\w[\w .:-]*")  # names of columns; what else metadata may call one is not worth passing on
PLAIN = re.compile(r"BOOLEAN|U?(TINY|SMALL|BIG)?INT(EGER)?|FLOAT|DOUBLE|VARCHAR")  # the rest is written as text
LEFT_OUT = ("no http(s) address", "no caption", "caption too long")
ROW = '"#row"'  # which row of which file; no column that is USABLE is called so


def select(metadata: str, out: Path, selection: Selection = Selection()) -> dict:
    """Writes the chosen rows, one for each address, as Parquet files into ``out``, which appears when it is complete.

    Their columns: url, caption, prompt (with ``captions``: as the list has it), then what else the metadata has, under
    the names of `ALIASES` where they are known. They stand in the order of the draw, a hash of seed and address: the
    result is the same with any number of threads, and another seed gives another order.

    Args:
        metadata: a Parquet file, a directory (searched in depth) or a pattern such as ``"laion/part-*.parquet"``.

    Returns:
        What also stands in ``out/selection.json``: the conditions, and ``counts`` of rows and of what they were lost to.

    Raises:
        ValueError: the metadata cannot be read or lacks a column, the condition cannot be understood, no row is left.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it or choose another directory")
    if selection.samples is not None and selection.samples < 1:
        raise ValueError(f"samples must be at least 1, found {selection.samples}")
    files, prompts = list_files(metadata), read_captions(Path(selection.captions)) if selection.captions else None
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    spill = partial / "spill"
    spill.mkdir(parents=True)
    try:
        with _database(files, spill, selection.memory, selection.threads) as database:
            columns = _Columns.find(database, selection.url_column, selection.caption_column)
            database.execute(columns.view())
            condition = _condition(database, selection.where, columns)
            query = f"SELECT {columns.output(prompts)} FROM metadata JOIN chosen ON metadata.{ROW} = chosen.row"
            if prompts:
                database.register("listed", pa.table({"prompt": prompts}))
                database.execute(f"CREATE TEMP TABLE prompts AS SELECT {_folded('prompt')} AS folded, min(prompt) AS prompt "
                                 "FROM listed GROUP BY folded")  # fmt: skip
                condition += f" AND {_folded('caption')} IN (SELECT folded FROM prompts)"
                query += f" JOIN prompts ON {_folded('metadata.caption')} = prompts.folded"
            counts = _choose(database, condition, selection)
            written = _write(database, query, partial)
            if prompts:
                (listed,) = database.execute("SELECT count(*) FROM prompts").fetchone()
                found = pyarrow.dataset.dataset([partial / file["name"] for file in written]).to_table(["prompt"])
                counts |= {"captions listed": listed, "captions found": len(found["prompt"].unique())}
        header = {
            "counts": counts,
            "conditions": {"where": selection.where, "samples": selection.samples, "seed": selection.seed,
                           "max_caption": selection.max_caption,
                           "captions": prompts and hashlib.sha256("\0".join(prompts).encode()).hexdigest()},
            "columns": columns.sources,
            "columns left out": columns.unusable,
            "metadata": [{"name": Path(file).name, "bytes": Path(file).stat().st_size} for file in files],
            "files": written,
            "versions": {"duckdb": duckdb.__version__, "memfilter": memfilter.__version__},
        }  # fmt: skip
        shutil.rmtree(spill)
        (partial / HEADER).write_text(json.dumps(header, indent=2))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return header


def _folded(column: str) -> str:
    """SQL for a caption without the differences in case and white space that lists have, as `prepare experiment` compares."""
    return f"lower(trim(regexp_replace({column}, '[\\s\\p{{Z}}]+', ' ', 'g')))"


def list_files(metadata: str) -> list[str]:
    """Absolute paths of the Parquet files that are meant, in order.

    Raises:
        ValueError: there are none, or DuckDB would take a name for a pattern.
    """
    path = Path(metadata)
    found = path.rglob("*.parquet") if path.is_dir() else glob.glob(metadata, recursive=True)
    files = sorted(str(Path(file).absolute()) for file in found if not Path(file).name.startswith((".", "_")))
    if not files:
        raise ValueError(f"metadata: no Parquet file is at {metadata}")
    if odd := [file for file in files if glob.escape(file) != file]:
        raise ValueError(f"metadata: {odd[0]!r} has one of *?[ in its path: rename it")
    return files


def read_captions(path: Path) -> list[str]:
    """The captions of a text file (one a line), or of JSON (a list) or JSON lines with strings or with objects that have
    a ``caption``, ``prompt`` or ``text``, as the published lists of memorized prompts do.

    Raises:
        ValueError: it cannot be read, an entry is nothing of that, or there is none.
    """
    try:
        match path.suffix:
            case ".json":
                entries = json.loads(path.read_text(encoding="utf-8-sig"))
            case ".jsonl":
                entries = [json.loads(line) for line in lines(path)]
            case _:
                entries = lines(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"captions: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(entries, list):
        raise ValueError(f"captions: {path} is no list")
    captions = []
    for number, entry in enumerate(entries, 1):
        known = {name.lower(): value for name, value in entry.items()} if isinstance(entry, dict) else {"text": entry}
        caption = next((known[name] for name in ("caption", "prompt", "text") if name in known), None)
        if not isinstance(caption, str):
            raise ValueError(f"captions: entry {number} of {path} has no caption, prompt or text")
        captions += [caption] if caption.strip() else []
    if not captions:
        raise ValueError(f"captions: {path} is empty")
    return captions


@contextmanager
def _database(files: list[str], spill: Path, memory: float, threads: int | None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database that opens these files and no others, whatever a condition says. What it finds in them is the view
    ``files``; its errors are ValueErrors of one line."""
    settings = {
        "memory_limit": f"{round(memory * 650)}MB",  # the rest is for Python, Arrow and what DuckDB does not count
        "temp_directory": str(spill.absolute()),
        "preserve_insertion_order": False,
        "python_enable_replacements": False,
    }
    database = duckdb.connect(config=settings | ({} if threads is None else {"threads": threads}))
    try:
        database.execute("SET allowed_paths = $files", {"files": files})
        database.execute("SET enable_external_access = false; SET lock_configuration = true")
        # bytes that are no UTF-8 become question marks
        options = "union_by_name = true, binary_as_string = true, utf8_validation = 'replace'"
        listed = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
        database.execute(f"CREATE TEMP VIEW files AS SELECT *, file_index::UBIGINT << 40 | file_row_number AS {ROW} "
                         f"FROM read_parquet([{listed}], {options})")  # fmt: skip
        yield database
    except duckdb.OutOfMemoryException as error:
        raise ValueError(f"memory: {_first_line(error)}: give more of it, or fewer threads") from error
    except duckdb.ConversionException as error:
        raise ValueError(f"where: {_first_line(error)}: try_cast(... AS DOUBLE) passes over such values") from error
    except duckdb.Error as error:
        raise ValueError(f"metadata: {_first_line(error)}") from error
    finally:
        database.close()


@dataclass(frozen=True)
class _Columns:
    types: dict[str, str]  # DuckDB's, of the columns of the files
    sources: dict[str, list[str]]  # what a column is called here -> in the files
    unusable: list[str]

    @classmethod
    def find(cls, database: duckdb.DuckDBPyConnection, url_column: str | None, caption_column: str | None) -> _Columns:
        found = {name: kind for name, kind, *_ in database.execute("DESCRIBE files").fetchall() if _quoted(name) != ROW}
        types = {name: kind for name, kind in found.items() if USABLE.fullmatch(name)}
        names = {name.lower(): name for name in types}
        aliases = dict(ALIASES)
        for name, column in (("url", url_column), ("caption", caption_column)):
            aliases[name] = aliases[name] if column is None else (column.lower(),)
            if names.keys().isdisjoint(aliases[name]):
                raise ValueError(f"metadata: no column is called {' or '.join(aliases[name])}: set {name}_column. "
                                 f"Columns: {', '.join(types)}")  # fmt: skip
        sources = {name: [names[alias] for alias in known if alias in names] for name, known in aliases.items()}
        return cls(
            types, {name: known for name, known in sources.items() if known}, sorted(found.keys() - types.keys())
        )

    def view(self) -> str:
        """SQL that makes the view ``metadata``: all columns under their own names and under those of `ALIASES`."""
        values = {name: self._value(name) for name in self.types if name.lower() not in self.sources}
        for name, known in self.sources.items():
            text = name in ("url", "caption") or (
                name == "hash" and len(known) > 1
            )  # some hash to numbers, some to text
            parts = [f"{_quoted(part)}::VARCHAR" if text else self._value(part) for part in known]
            values[name] = parts[0] if len(parts) == 1 else f"coalesce({', '.join(parts)})"
        values["url"] = f"trim({values['url']})"
        listed = ", ".join(f"{value} AS {_quoted(name)}" for name, value in values.items())
        return f"CREATE TEMP VIEW metadata AS SELECT {listed}, {ROW} FROM files"

    def output(self, prompts: list[str] | None) -> str:
        """The columns to write, as SQL."""
        done = {*self.sources, *(part.lower() for known in self.sources.values() for part in known)}
        done |= {"prompt"} if prompts else set()
        values = {name: f"metadata.{name}" for name in self.sources}
        values |= {"prompt": "prompts.prompt"} if prompts else {}
        for name, kind in self.types.items():
            if name.lower() not in done:
                values[name] = f"metadata.{_quoted(name)}" + ("" if PLAIN.fullmatch(kind) else "::VARCHAR")
        return ", ".join(f"{value} AS {_quoted(name)}" for name, value in values.items())

    def _value(self, name: str) -> str:
        """A column as conditions see it: to DuckDB, NaN is larger than all numbers."""
        value = _quoted(name)
        return (
            f"CASE WHEN isnan({value}) THEN NULL ELSE {value} END" if self.types[name] in ("FLOAT", "DOUBLE") else value
        )


def _condition(database: duckdb.DuckDBPyConnection, where: str, columns: _Columns) -> str:
    """The condition as one expression in parentheses.

    Raises:
        ValueError: it is none, or names what is not there.
    """
    try:
        condition = f"({duckdb.SQLExpression(where or 'true')})"
        database.execute(f"SELECT 1 FROM metadata WHERE {condition} LIMIT 0")
    except duckdb.Error as error:
        found = ", ".join(sorted({*columns.types, *columns.sources}))
        raise ValueError(f"where: {_first_line(error)}. Columns: {found}") from error
    return condition


def _choose(database: duckdb.DuckDBPyConnection, condition: str, selection: Selection) -> dict[str, int]:
    """Makes the table ``chosen`` of rows and their place in the draw; returns the counts."""
    database.execute(f"""
        CREATE TEMP TABLE addresses AS
        SELECT lost, CASE WHEN lost = 0 THEN md5_number('{int(selection.seed)} ' || url) END AS draw,
               min({ROW}) AS row, count(*) AS rows
        FROM (SELECT url, {ROW}, CASE
                WHEN url IS NULL OR strlen(url) > {MAX_URL} OR NOT regexp_full_match(url, '(?i)https?://[!-~]+') THEN 1
                WHEN caption IS NULL OR trim(caption) = '' THEN 2
                WHEN strlen(caption) > {int(selection.max_caption)} THEN 3
                ELSE 0 END AS lost
              FROM metadata WHERE {condition})
        GROUP BY ALL""")
    draw = "" if selection.samples is None else f"ORDER BY draw LIMIT {int(selection.samples)}"
    database.execute(f"CREATE TEMP TABLE chosen AS SELECT draw, row FROM addresses WHERE lost = 0 {draw}")
    (rows,) = database.execute("SELECT count(*) FROM files").fetchone()
    (chosen,) = database.execute("SELECT count(*) FROM chosen").fetchone()
    (addresses,) = database.execute("SELECT count(*) FROM addresses WHERE lost = 0").fetchone()
    met = dict(database.execute("SELECT lost, sum(rows)::BIGINT FROM addresses GROUP BY lost").fetchall())
    database.execute("DROP TABLE addresses")
    counts = {"rows": rows, "conditions not met": rows - sum(met.values())}
    counts |= {name: met.get(lost, 0) for lost, name in enumerate(LEFT_OUT, 1)}
    counts |= {"address comes again": met.get(0, 0) - addresses, "not drawn": addresses - chosen, "selected": chosen}
    if not chosen:
        raise ValueError("no row is left: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return counts


def _in_order(database: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.RecordBatch]:
    """The rows of a query by ``chosen.draw``. Sorting all at once would take more memory than is allowed: it is done in
    parts, for each of which the files are read again."""
    ((chosen, last),) = database.execute("SELECT count(*), max(draw) FROM chosen").fetchall()
    parts = -(-chosen // ROWS_PER_SORT)
    bounds = [(last + 1) * part // parts for part in range(parts + 1)]
    for low, high in pairwise(bounds):
        part = f"{query} WHERE chosen.draw >= {low}::UHUGEINT AND chosen.draw < {high}::UHUGEINT ORDER BY chosen.draw"
        yield from database.sql(part).to_arrow_reader(10_000)


def _write(database: duckdb.DuckDBPyConnection, query: str, folder: Path) -> list[dict]:
    """Writes the rows of a query, in the order of the draw, as ``00000.parquet``, ...; returns name, rows and sha256 of
    each."""
    rows: dict[Path, int] = {}
    writer, room = None, 0
    for batch in _in_order(database, query):
        while batch.num_rows:
            if not room:
                if writer is not None:
                    writer.close()
                path, room = folder / f"{len(rows):05d}.parquet", ROWS_PER_FILE
                writer = pq.ParquetWriter(path, batch.schema, compression="zstd")
            part, batch = batch.slice(0, room), batch.slice(room)
            writer.write_batch(part)
            rows[path], room = rows.get(path, 0) + part.num_rows, room - part.num_rows
    writer.close()
    return [{"name": path.name, "rows": count, "sha256": _sha256(path)} for path, count in rows.items()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip("!.")
