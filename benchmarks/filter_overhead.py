"""What the extra pass costs: time of a filtered training step against an unfiltered one, and peak memory.

    python benchmarks/filter_overhead.py

Time: unfiltered step, filtered step and a forward without gradient in turn, in one process on two copies of the same
model and the same batch, nothing dropped; medians of the paired ratios. Memory: peak resident size of fresh processes with and without the filter.
Last line: ratio, f (forward / unfiltered step), verdict; exit 1 when the ratio is above 1 + 1.08 f or the memory
above 1.03 times.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time

TIME_BOUND, MEMORY_BOUND = 1.08, 1.03


def make_step(tau: float | None, batch_size: int):
    """(training step, forward without gradient) of the embedded model; tau None is the loop without the filter."""
    import torch

    from memfilter import MemFilter
    from memfilter.pipelines import load_pipeline

    unet = load_pipeline("scenes").unet.train()
    torch.manual_seed(0)
    config = unet.config
    noisy = torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size)
    target, timesteps = torch.randn_like(noisy), torch.randint(0, 1000, (batch_size,))
    prompt_embeds = torch.randn(batch_size, 32, config.cross_attention_dim)
    if tau is None:
        wrapped, loss_of = unet, torch.nn.functional.mse_loss
    else:
        mem_filter = MemFilter(tau=tau)
        wrapped, loss_of = mem_filter.wrap(unet, null=prompt_embeds[0]), mem_filter.loss
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-5)

    def step() -> None:
        loss_of(wrapped(noisy, timesteps, prompt_embeds).sample, target).backward()
        if tau is not None:
            mem_filter.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward() -> None:
        unet(noisy, timesteps, prompt_embeds)

    return step, forward


def measure_time(rounds: int, batch_size: int) -> tuple[float, float]:
    """Median ratio of filtered to unfiltered step, and median f."""
    plain, forward = make_step(None, batch_size)
    filtered, _ = make_step(math.inf, batch_size)
    ratios, shares = [], []
    for i in range(rounds + 3):
        seconds = []
        for call in (plain, filtered, forward):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        if i >= 3:  # warm-up
            ratios.append(seconds[1] / seconds[0])
            shares.append(seconds[2] / seconds[0])
    return statistics.median(ratios), statistics.median(shares)


def peak_memory(tau: str, batch_size: int) -> int:
    """Peak resident kilobytes of a fresh process that makes five steps."""
    command = [sys.executable, __file__, "--peak", tau, "--batch_size", str(batch_size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--peak", choices=["none", "filter"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        step, _ = make_step(None if args.peak == "none" else math.inf, args.batch_size)
        for _ in range(5):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return 0
    peaks = {kind: statistics.median(peak_memory(kind, args.batch_size) for _ in range(3)) for kind in ("none", "filter")}
    memory = peaks["filter"] / peaks["none"]
    print(f"peak memory: {peaks['none'] / 1024:.0f} MB without, {peaks['filter'] / 1024:.0f} MB with, ratio {memory:.3f}")
    ratio, f = measure_time(args.rounds, args.batch_size)
    bound = 1 + TIME_BOUND * f
    good = ratio <= bound and memory <= MEMORY_BOUND
    print(f"ratio {ratio:.3f} (bound {bound:.3f}), f {f:.3f}, verdict {'holds' if good else 'falls short'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
