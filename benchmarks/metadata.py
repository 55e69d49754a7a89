"""Rows per second and memory of selecting from LAION-like metadata, next to reading the same files with pyarrow.

    python benchmarks/metadata.py [--rows 50000000] [--folder DIR]

Writes Parquet files of a million rows (addresses, captions, scores; every twentieth address comes again), 130 bytes a
row on disk, and then, each in a process of its own:

- ours: `memfilter prepare laion select` with a condition that half the rows meet, one row for each address, 300,000
  drawn and written; and the same without a draw, which writes all of them;
- pyarrow: its dataset scanner reads the same columns with the same condition, and counts; nothing is drawn, compared or
  written.

Memory is the largest resident size of a process and its children (pages of the files that are mapped included). Last
line: rows per second, memory, verdict; exit 1 where a selection takes more than 2 GB.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

BOUND = 2e9  # bytes
PER_FILE = 1_000_000
WHERE = "width >= 512 and height >= 256 and punsafe < 0.1 and similarity > 0.28"
DRAWN = 300_000


def words(count: int):
    import numpy as np
    import pyarrow as pa

    rng = np.random.default_rng(0)
    letters = rng.integers(ord("a"), ord("z") + 1, (count, 12), dtype=np.uint8)
    return pa.array([bytes(row[:size]).decode() for row, size in zip(letters, rng.integers(2, 13, count), strict=True)])


def part(start: int, rows: int, vocabulary):
    """A table of rows as LAION-5B has them; a pure function of its arguments."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    rng = np.random.default_rng(start)
    number = np.arange(start, start + rows)
    again = rng.random(rows) < 0.05
    number[again] = rng.integers(0, start + rows, again.sum())

    def word(numbers):
        return vocabulary.take(pa.array(numbers % len(vocabulary)))

    host, folder, name = word(number * 7919), word(number * 104_729), pc.cast(pa.array(number), pa.string())
    return pa.table({
        "SAMPLE_ID": rng.integers(0, 2**62, rows),
        "URL": pc.binary_join_element_wise("https://cdn.", host, ".example/images/", folder, "/", name, ".jpg", ""),
        "TEXT": pc.binary_join_element_wise(*(word(rng.integers(0, 2**31, rows)) for _ in range(8)), " "),
        "WIDTH": rng.lognormal(6.4, 0.6, rows).astype(np.int32),
        "HEIGHT": rng.lognormal(6.3, 0.6, rows).astype(np.int32),
        "similarity": rng.normal(0.31, 0.03, rows).astype(np.float32),
        "hash": rng.integers(-(2**63), 2**63 - 1, rows),
        "pwatermark": rng.beta(0.5, 1.5, rows).astype(np.float32),
        "punsafe": rng.beta(0.2, 3, rows).astype(np.float32),
        "AESTHETIC_SCORE": rng.normal(5, 1, rows).astype(np.float32),
    })  # fmt: skip


def generate(folder: Path, rows: int) -> None:
    import pyarrow.parquet as pq

    vocabulary = words(20_000)
    for number, start in enumerate(range(0, rows, PER_FILE)):
        path = folder / f"part-{number:05d}.parquet"
        pq.write_table(part(start, min(PER_FILE, rows - start), vocabulary), path, compression="snappy")


def read_with_pyarrow(folder: Path) -> int:
    import pyarrow.dataset as ds
    from pyarrow.dataset import field

    met = (field("WIDTH") >= 512) & (field("HEIGHT") >= 256) & (field("punsafe") < 0.1) & (field("similarity") > 0.28)
    return sum(batch.num_rows for batch in ds.dataset(folder).to_batches(filter=met))


def measure(task: str, folder: Path, out: Path) -> tuple[float, float, float, str]:
    """Runs this file's ``task`` in a process: seconds, of processors too, largest resident bytes with its children, what
    it said."""
    import psutil

    command = [sys.executable, __file__, "--task", task, "--folder", str(folder), "--out", str(out)]
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    largest = 0

    def watch():
        nonlocal largest
        main = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                largest = max(largest, sum(p.memory_info().rss for p in (main, *main.children(recursive=True))))
            except psutil.NoSuchProcess:
                continue
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{task} ended with code {process.returncode}")
    processor = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return seconds, processor, largest, output.strip()


def run(task: str, folder: Path, out: Path) -> None:
    if task == "pyarrow":
        print(read_with_pyarrow(folder))
        return
    from memfilter.data.laion.select import select
    from memfilter.data.laion.settings import Selection

    selection = Selection(WHERE, samples=DRAWN if task == "select" else None)
    print(select(str(folder), out, selection)["counts"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--folder", type=Path, help="where to write 130 bytes a row; removed in the end")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        run(arguments.task, arguments.folder, arguments.out)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        free, needed = shutil.disk_usage(place).free, 350 * arguments.rows
        if free < needed:
            raise SystemExit(
                f"{place}: {needed / 1e9:.0f} GB are needed with what is spilled, {free / 1e9:.0f} GB are free"
            )
        folder = Path(place) / "metadata"
        folder.mkdir()
        start = time.perf_counter()
        generate(folder, arguments.rows)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(
            f"{arguments.rows:,} rows, {size / 1e9:.1f} GB, written in {time.perf_counter() - start:.0f} s", flush=True
        )
        speeds, memories = {}, {}
        for task in ("select", "select all", "pyarrow"):
            seconds, processor, memories[task], said = measure(task, folder, Path(place) / task.replace(" ", "-"))
            speeds[task] = arguments.rows / seconds / 1e6
            print(f"{task:10}  {seconds:6.1f} s ({processor:.1f} s of processors)  {speeds[task]:5.2f} million rows/s  "
                  f"{memories[task] / 1e9:.2f} GB  {said}", flush=True)  # fmt: skip
    memory = max(memories["select"], memories["select all"])
    print(f"million rows/s: drawn {speeds['select']:.2f}, all {speeds['select all']:.2f}, pyarrow {speeds['pyarrow']:.2f}; "
          f"memory {memory / 1e9:.2f} GB: {'within' if memory <= BOUND else 'MORE THAN'} {BOUND / 1e9:.0f} GB")  # fmt: skip
    return 0 if memory <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
