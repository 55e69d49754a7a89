"""Whether the p-values of clean samples are uniform while a model trains.

    python benchmarks/p_values.py --work_dir runs/p_values

A fine-tune of clipart scenes (20 duplicates shown 200 times, 5,000 samples once) under the evidence filter, whose reference
follows it. At a third, at two thirds and at the end, 2,000 scenes that it never sees get a p-value for their norm from the
reference of that moment. By timestep bin a two-sample Kolmogorov-Smirnov test holds them against the reference, which takes
into account that the reference is a sample too; Holm's correction allows for all tests. Also printed: the share of the 2,000
with p <= 5% and <= 10%, and the same with the base model's calibration, which does not follow. The table goes to
docs/results/p_values.md; exit code 1 if uniformity is rejected at 5%.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEED, HELD_OUT = 8_000_000, 2000
SAMPLES = 9000  # 20 x 200 + 5,000
SIGNIFICANCE = 0.05


def train(work: Path) -> Path:
    """The run, with checkpoints at each third."""
    run, scenes = work / "run", work / "scenes"
    if not scenes.exists():
        _call("-m", "memfilter.cli", "prepare", "scenes", scenes, f"--seed={SEED}", "--repeats=200", "--distinct=5000")
    if not (run / "summary.json").exists():
        _call("train_filtered.py", "--config", "configs/evidence.yaml", f"--run_dir={run}", f"--data.path={scenes}",
              f"--train.samples={SAMPLES}", f"--train.seed={SEED}", "--filter.reference_share=1", "--checkpoint.keep=9",
              f"--checkpoint.every={SAMPLES // 3}", "--checkpoint.resume=true", "--log.gallery=0")  # fmt: skip
    return run


def _call(*arguments) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)


def moments(run: Path) -> list[Path]:
    """Checkpoints: the first beyond each third."""
    found = sorted((run / "checkpoints").glob("[0-9]*"))
    return [next(c for c in found if int(c.name) >= share * SAMPLES // 3) for share in (1, 2)] + found[-1:]


def norms(work: Path, checkpoint: Path):
    """Timesteps and signals of the held-out scenes under the weights of a checkpoint."""
    from safetensors.torch import load_file

    from memfilter.calibration import Calibration
    from memfilter.pipelines import load_pipeline

    out = work / f"held_out-{checkpoint.name}.json"
    if not out.exists():
        scenes, model = work / "held_out", work / f"model-{checkpoint.name}"
        if not scenes.exists():
            _call("-m", "memfilter.cli", "prepare", "scenes", scenes, f"--seed={SEED + 1}", "--duplicates=1", "--repeats=1",
                  f"--distinct={HELD_OUT}")  # fmt: skip
        pipeline = load_pipeline("scenes")
        pipeline.unet.load_state_dict(load_file(checkpoint / "model.safetensors"))
        pipeline.save_pretrained(model)
        _call("-m", "memfilter.cli", "calibrate", f"--model.path={model}", f"--data.path={scenes}", f"--out={out}",
              f"--keys={HELD_OUT}", "--looks=1", "--train.batch_size=20", f"--train.seed={int(checkpoint.name)}")  # fmt: skip
        shutil.rmtree(model)
    found = Calibration.load(out)
    return found.timesteps.flatten(), found.signals.flatten(0, 1)


def test(work: Path, checkpoints: list[Path]) -> tuple[list[str], bool]:
    """Lines of the table, and whether uniformity stands."""
    from safetensors.torch import load_file
    from scipy import stats

    from memfilter.calibration import Calibration
    from memfilter.reference import SIGNALS, Reference

    row = SIGNALS.index("norm")
    base = Calibration.load(ROOT / "memfilter" / "assets" / "scenes-base" / "calibration.json").reference()
    lines = ["| samples seen | bins tested | smallest p of KS | by Holm | p <= 5% | p <= 10% | base's: p <= 5% | p <= 10% |",
             "|---" * 8 + "|"]  # fmt: skip
    results = []
    for checkpoint in checkpoints:
        timesteps, signals = norms(work, checkpoint)
        state = load_file(checkpoint / "evidence.safetensors")
        reference = Reference(state["reference.values"].shape[2])
        reference.load_state_dict({name.removeprefix("reference."): t for name, t in state.items() if "reference." in name})
        fresh = base.added[row] < reference.added[row]  # bins above `filter.below` get no null pass, and no new values
        tests = [stats.ks_2samp(signals[reference.bin(timesteps) == b, row], reference.values[row, b]).pvalue
                 for b in fresh.nonzero().flatten().tolist()]  # fmt: skip
        known = fresh[reference.bin(timesteps)]
        shares = [(r.p_values(timesteps, signals)[known, row] <= a).double().mean().item()
                  for r in (reference, base) for a in (0.05, 0.1)]  # fmt: skip
        results.append((int(checkpoint.name), tests, shares))
    pooled = sorted(p for _, tests, _ in results for p in tests)
    rejected = pooled[0] <= SIGNIFICANCE / len(pooled)  # the first step of Holm: it decides whether anything is rejected
    for samples, tests, shares in results:
        cells = [f"{share:.3f}" for share in shares]
        lines.append(f"| {samples:,} | {len(tests)} | {min(tests):.3g} | {min(1, min(tests) * len(pooled)):.2g} | {' | '.join(cells)} |")
    return lines, not rejected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/p_values"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="directory of the table")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    lines, good = test(args.work_dir.resolve(), moments(train(args.work_dir.resolve())))
    text = "\n".join([f"{HELD_OUT:,} held-out scenes at each moment: `python benchmarks/p_values.py`.", "", *lines])
    (args.out / "p_values.md").write_text(text + "\n")
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
