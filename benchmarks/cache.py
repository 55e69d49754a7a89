"""Samples per second of the loop with `memfilter cache`, against the same loop without it.

    python benchmarks/cache.py

Two runs of `train_filtered.py`'s loop, filter on, take a step in turn, in one process, on copies of the embedded model
and on the same shards; one has a cache. It is the first epoch of samples that are shown once, so that what the loop
remembers by itself is of no help. The shards hold clipart scenes as JPEG of several sizes; the ratio is the median over
steps of times taken side by side. At full size the parts weigh otherwise: the VAE, for one, more than here.
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

from throughput import our_steps

SIZES = (32, 256, 512)  # pixels of the stored pictures
WARM_UP = 3  # steps


def write_data(out: Path, size: int, count: int) -> Path:
    """Clipart scenes, enlarged and stored as JPEG."""
    import webdataset

    from memfilter.data import scenes
    from memfilter.data.experiment import scene_of

    out.mkdir()
    with webdataset.TarWriter(str(out / "00000.tar")) as tar:
        for i in range(count):
            scene, buffer = scene_of(0, scenes.DISTINCT, i), io.BytesIO()
            scenes.render(scene).resize((size, size)).save(buffer, "jpeg", quality=95)
            tar.write({"__key__": f"{i:06d}", "jpg": buffer.getvalue(), "txt": scene.caption})
    return out


def measure(work: Path, size: int, batch_size: int, steps: int, dtype: str) -> str:
    """A row of the table."""
    from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, TrainConfig
    from memfilter.data.make_cache import make_cache
    from memfilter.train.loop import Trainer

    samples = (WARM_UP + steps + 1) * batch_size  # the last step is not taken
    plain = Config(
        run_dir=str(work / "plain"),
        data=DataConfig(path=str(write_data(work / "data", size, samples))),
        filter=FilterConfig(tau=5.0),
        train=TrainConfig(samples=samples, batch_size=batch_size, ema_half_life=0),
        log=LogConfig(every=800, gallery=0),
    )
    cached = copy.deepcopy(plain)
    cached.run_dir, cached.data.cache = str(work / "cached"), str(work / "cache")
    start = time.perf_counter()
    made = make_cache(cached, dtype, progress=False)
    making = samples / (time.perf_counter() - start)
    space = sum(path.stat().st_size for path in made.iterdir()) / samples

    loops = {name: our_steps(Trainer(config)) for name, config in (("plain", plain), ("cached", cached))}
    seconds = {name: [] for name in loops}
    for step in range(WARM_UP + steps):
        for name in sorted(loops, reverse=step % 2):
            start = time.perf_counter()
            next(loops[name])
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: times[WARM_UP:] for name, times in seconds.items()}
    rates = {name: batch_size / statistics.median(times) for name, times in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(seconds["plain"], seconds["cached"], strict=True))
    return (f"| {size} px | {rates['plain']:.1f} | {rates['cached']:.1f} | {ratio:.2f} | {making:.0f} | "
            f"{space / 1000:.1f} |")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="pixels of the stored pictures")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40, help="pairs of steps that count")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the cache")
    args = parser.parse_args()

    from memfilter.cli import quiet_libraries

    quiet_libraries()
    import torch
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as work:
            rows.append(measure(Path(work), size, args.batch_size, args.steps, args.dtype))
    print("| stored pictures | samples/s without | with the cache | ratio | samples/s when it is made | kB a sample |")
    print("|---|---|---|---|---|---|", *rows, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
