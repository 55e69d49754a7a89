"""The experiment at full size: time and memory of building its manifest, and reading by it next to `wids`.

    pip install --no-deps --target runs/wids 'webdataset==0.2.111'
    python benchmarks/experiment.py --wids runs/wids

122,000 generated pictures (64 px JPEG, as img2dataset lays them out, 10,000 a shard), among them known numbers that are
broken, without caption, copies byte for byte and copies saved again. `memfilter prepare experiment` makes 200 x 200 +
120,000 = 160,000 virtual samples of them; then the manifest is opened, and samples are read in a random order, decoding
included, in turns with `wids`, webdataset's indexed reader, on the same shards: webdataset 1 has it no longer, so it
comes from a version that had, while webdataset itself stays as installed. wids is told to keep all shards open, and
decodes with Pillow's plain way what is compared: picture and caption.

Peak memory is the sum over the command and its children, pages they share counted twice. Exit 1 where a bound does not
hold or the report does not name what was planted.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

MINUTES, GIGABYTES, OPENING = 10, 2, 1.0  # of building; seconds of opening
PICTURES, PER_SHARD, SIDE = 122_000, 10_000, 64
PLANTED = {"unreadable": 0.001, "without caption": 0.001, "exact duplicate": 0.004, "near duplicate": 0.004}  # shares
BLOCK = 500  # samples between two turns


def picture(number: int):
    """Coloured clouds: pictures whose perceptual hashes are as good as random."""
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def jpeg(number: int, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()


def write_data(out: Path, pictures: int, per_shard: int) -> dict[str, int]:
    """Writes the shards; returns how many of each kind were planted. Every kind has its place in each thousand."""
    import webdataset

    planted, reached = dict.fromkeys(PLANTED, 0), 0
    places = {}  # place in a thousand -> kind
    for kind, share in PLANTED.items():
        for place in range(reached, reached + round(1000 * share)):
            places[500 + place] = kind
        reached += round(1000 * share)
    with webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=per_shard, verbose=0) as writer:
        for number in range(pictures):
            kind = places.get(number % 1000)
            content = jpeg(number - 100 if kind == "exact duplicate" else number)
            if kind == "near duplicate":
                content = jpeg(number - 100, quality=75)
            elif kind == "unreadable":
                content = content[: len(content) // 2]
            elif kind == "without caption":
                pass
            if kind:
                planted[kind] += 1
            key = f"{number // per_shard:05d}{number % per_shard:04d}"
            facts = {"key": key, "url": f"http://localhost/{number}.jpg", "width": SIDE, "height": SIDE}
            caption = "" if kind == "without caption" else f"clouds number {number}"
            writer.write({"__key__": key, "jpg": content, "txt": caption, "json": json.dumps(facts).encode()})
    return planted


def build(data: Path, out: Path, distinct: int, processes: int) -> tuple[float, float]:
    """Seconds and gigabytes of the command."""
    import psutil

    # the usual duplicates, 200 x 200, of the full size; in proportion of less
    duplicates = round(200 * distinct / 120_000)
    command = [sys.executable, "-m", "memfilter.cli", "prepare", "experiment", str(data), str(out),
               f"--duplicates={duplicates}", f"--distinct={distinct}", f"--processes={processes}"]  # fmt: skip
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    family = psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            members = [family, *family.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in members))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit("memfilter prepare experiment has failed")
    return time.perf_counter() - start, peak / 2**30


def open_wids(data: Path, path: str, per_shard: int, cache: Path):
    """wids' dataset of all shards, and the index of every sample in it."""
    sys.path.append(path)  # after all that is installed
    try:
        import wids
    except ImportError as error:
        raise SystemExit(f"--wids: {error}; see the head of this file") from error
    from PIL import Image

    from memfilter.data.shards import Shards

    def decode(sample: dict):
        return Image.open(sample[".jpg"]).convert("RGB"), sample[".txt"].read().decode()

    shards, places = [], {}
    for tar in sorted(data.glob("*.tar")):
        keys = Shards.open(tar).keys()
        places |= {key: len(places) + at for at, key in enumerate(keys)}
        shards.append({"url": str(tar), "nsamples": len(keys)})
    # a name of its own for every shard, or shards would be copied first
    dataset = wids.ShardListDataset(shards, transformations=decode, lru_size=len(shards), localname=lambda url: url)
    return dataset, places


def read_side_by_side(
    shards, dataset, places: dict[str, int], keys: list[str], blocks: int
) -> tuple[float, float, float]:
    """Samples per second by manifest and by wids, and the median of the ratio of neighbouring blocks."""
    import numpy as np

    rng, ours, theirs = random.Random(0), [], []
    for key in rng.sample(keys, min(BLOCK, len(keys))):
        picture, caption = dataset[places[key]]
        if caption != shards.caption(key) or not np.array_equal(np.asarray(picture), np.asarray(shards.image(key))):
            raise SystemExit(f"the two readers give different samples for {key}")
    for block in range(blocks):
        chosen = rng.sample(keys, min(BLOCK, len(keys)))
        turns = [(ours, lambda key: (shards.image(key), shards.caption(key)), chosen),
                 (theirs, dataset.__getitem__, [places[key] for key in chosen])]  # fmt: skip
        for rates, read, which in turns if block % 2 else reversed(turns):
            start = time.perf_counter()
            for name in which:
                read(name)
            rates.append(len(which) / (time.perf_counter() - start))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return statistics.median(ours), statistics.median(theirs), ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="fewer for a quick look; bounds stay")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=40, help=f"turns of {BLOCK} samples each reader takes")
    parser.add_argument("--wids", help="directory that has the package wids; without it reading is not compared")
    args = parser.parse_args()

    from memfilter.data.experiment import Experiment
    from memfilter.data.manifest import MANIFEST, ManifestShards

    per_shard = min(PER_SHARD, max(1, args.pictures // 12))
    distinct = 120_000 * args.pictures // PICTURES
    holds = {}
    with tempfile.TemporaryDirectory() as work:
        data, out = Path(work, "data"), Path(work, "out")
        data.mkdir()
        planted = write_data(data, args.pictures, per_shard)
        print(f"planted among {args.pictures:,} pictures: " + ", ".join(f"{n:,} {kind}" for kind, n in planted.items()))

        seconds, gigabytes = build(data, out, distinct, args.processes)
        print(f"building: {seconds:.0f} s (bound {60 * MINUTES}), {gigabytes:.2f} GB (bound {GIGABYTES}) on "
              f"{args.processes} processes")  # fmt: skip
        holds["building"] = seconds <= 60 * MINUTES and gigabytes <= GIGABYTES

        times = []
        for _ in range(5):
            start = time.perf_counter()
            shards = ManifestShards(out / MANIFEST, data)
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
            experiment = Experiment.read(out / MANIFEST)
            experiment.require(shards)
            times[-1] += time.perf_counter() - start
        virtual = len(experiment.virtual())
        print(f"opening {len(experiment.keys):,} rows, {virtual:,} virtual samples: {statistics.median(times):.2f} s "
              f"(bound {OPENING:.0f})")  # fmt: skip
        holds["opening"] = statistics.median(times) < OPENING

        counts = shards.header["counts"]
        found = {kind: counts[kind.replace(" ", "_")] for kind in planted}
        # the search ends when there is enough, so copies may be left unlooked at, and clouds may resemble by chance
        holds["report"] = all(found[k] == planted[k] for k in ("unreadable", "without caption")) and all(
            found[k] <= planted[k] + counts["candidates"] // 1000 for k in ("exact duplicate", "near duplicate")
        )
        if args.wids:
            dataset, places = open_wids(data, args.wids, per_shard, Path(work))
            ours, theirs, ratio = read_side_by_side(shards, dataset, places, shards.keys(), args.blocks)
            print(f"random access: manifest {ours:,.0f} samples/s, wids {theirs:,.0f}, ratio {ratio:.2f} (bound 1)")
            holds["reading"] = ratio >= 1
    print(", ".join(f"{name} {'holds' if good else 'falls short'}" for name, good in holds.items()))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
