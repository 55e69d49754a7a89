"""Whether AdamW with 8 bits of state learns like AdamW: the quickstart's fine-tune, 500 optimizer steps with each.

    python benchmarks/adamw_8bit.py [--out runs/adamw_8bit] [--tau inf]

Prints the loss of the last 800 samples (the same samples with the same noise in both runs), its ratio to AdamW's, and how
much of the optimizer's state is in 8 bits; exit 1 where the ratio is further than 3% from 1. The filter measures and
drops nothing: with a threshold each run keeps, by its own weights, other samples, and their losses are not comparable.
A finished run is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch

from memfilter.data.experiment import prepare_scenes

STEPS, BOUND = 500, 0.03
OPTIMIZERS = ("adamw", "adamw_8bit")


def fine_tune(out: Path, optimizer: str, tau: float) -> Path:
    run = out / f"{optimizer}-{tau:g}"
    settings = [f"--run_dir={run}", f"--data.path={out / 'scenes'}", f"--train.optimizer={optimizer}"]
    settings += [f"--filter.tau={tau}", f"--train.samples={STEPS * 16}"]
    settings += [f"--checkpoint.every={STEPS * 16}", "--checkpoint.resume=true"]
    subprocess.run([sys.executable, "train_filtered.py", "--config=configs/quickstart.yaml", *settings], check=True)
    return run


def share_in_8_bits(run: Path) -> float:
    """Of the numbers in the optimizer's state."""
    (checkpoint,) = run.glob("checkpoints/*/optimizer.bin")
    state = torch.load(checkpoint, weights_only=True)["state"]
    # bitsandbytes puts its moments into a dict of their own; there are step counts, maps and scales of blocks besides
    entries = [entry.get("__bnb_optimizer_quant_state__", {}) | entry for entry in state.values()]
    moments = [e[name] for e in entries for name in ("exp_avg", "exp_avg_sq", "state1", "state2") if name in e]
    return sum(m.numel() for m in moments if m.dtype == torch.uint8) / sum(m.numel() for m in moments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/adamw_8bit"))
    parser.add_argument("--tau", type=float, default=math.inf)
    arguments = parser.parse_args()
    out = arguments.out
    if not (out / "scenes").exists():
        prepare_scenes(out / "scenes")
    losses, within = {}, True
    for optimizer in OPTIMIZERS:
        run = fine_tune(out, optimizer, arguments.tau)
        losses[optimizer] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
        ratio = losses[optimizer] / losses["adamw"]
        within &= abs(ratio - 1) <= BOUND
        print(f"{optimizer}: loss {losses[optimizer]:.5f}, ratio {ratio:.4f}, "
              f"{share_in_8_bits(run):.1%} of the state in 8 bits", flush=True)  # fmt: skip
    print(f"verdict: {'holds' if within else 'does not hold'} (bound {BOUND:.0%})")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
