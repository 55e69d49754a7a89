"""Whether the p-values of clean samples are uniform while a model trains.

    python benchmarks/p_values.py --work_dir runs/p_values

Two fine-tunes of clipart scenes (20 duplicates shown 200 times, 5,000 samples once) under the evidence filter, whose reference
follows it: one as it is by default, where a quarter of the keys pays for the reference, and one where all do. At three moments,
after a third, after two thirds and shortly before the end, 3,000 scenes that the run never sees get a p-value for their norm from
the reference of that moment, where it follows: some 2,100, at noise below `filter.below`. By timestep bin a two-sample Kolmogorov-Smirnov test holds them against the reference, which takes
into account that the reference is a sample too; and in each moment the mean of all p-values is held against one half, by its
deviation under both samples' noise. Holm's correction allows for all tests. Also printed: the share of them with p <= 5% and
<= 10%, and the same with the base model's calibration, which does not follow. The table goes to docs/results/p_values.md; exit
code 1 if uniformity is rejected at 5%.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from common import ROOT, call, parser, write_text

SEED, HELD_OUT = 8_000_000, 3000  # 30% of them fall above `filter.below`, where the reference gets no new values
SAMPLES = 9000  # 20 x 200 + 5,000
SIGNIFICANCE = 0.05
SHARES = (0.25, 1.0)  # filter.reference_share


def train(work: Path, share: float) -> Path:
    """The run, with nine checkpoints."""
    run, scenes = work / f"run-{share}", work / "scenes"
    if not scenes.exists():
        call(work / "log", "-m", "memfilter.cli", "prepare", "scenes", scenes, f"--seed={SEED}", "--repeats=200", "--distinct=5000")
    if not (run / "summary.json").exists():
        call(work / "log", "train_filtered.py", "--config", "configs/evidence.yaml", f"--run_dir={run}", f"--data.path={scenes}",
              f"--train.samples={SAMPLES}", f"--train.seed={SEED}", f"--filter.reference_share={share}", "--checkpoint.keep=9",
              f"--checkpoint.every={SAMPLES // 9}", "--checkpoint.resume=true", "--log.gallery=0")  # fmt: skip
    return run


def moments(run: Path) -> list[Path]:
    """Checkpoints: the first beyond each of the first two thirds, and the last."""
    found = sorted((run / "checkpoints").glob("[0-9]*"))
    chosen = [next(c for c in found if int(c.name) >= third * SAMPLES // 3) for third in (1, 2)] + found[-1:]
    if len({*chosen}) < 3 or int(chosen[-1].name) < 0.85 * SAMPLES:
        raise SystemExit(f"{run} has checkpoints at {', '.join(c.name for c in found)}: not at three moments")
    return chosen


def norms(work: Path, checkpoint: Path):
    """Timesteps and signals of the held-out scenes under the weights of a checkpoint."""
    from safetensors.torch import load_file

    from memfilter.calibration import Calibration
    from memfilter.pipelines import load_pipeline

    name = f"{checkpoint.parents[1].name}-{checkpoint.name}"
    out = work / f"held_out-{name}.json"
    if not out.exists():
        scenes, model = work / "held_out", work / f"model-{name}"
        if not scenes.exists():
            call(work / "log", "-m", "memfilter.cli", "prepare", "scenes", scenes, f"--seed={SEED + 1}", "--duplicates=1", "--repeats=1",
                  f"--distinct={HELD_OUT}")  # fmt: skip
        pipeline = load_pipeline("scenes")
        pipeline.unet.load_state_dict(load_file(checkpoint / "model.safetensors"))
        pipeline.save_pretrained(model)
        call(work / "log", "-m", "memfilter.cli", "calibrate", f"--model.path={model}", f"--data.path={scenes}", f"--out={out}",
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
    lines = ["| keys that pay | samples seen | scenes tested | bins | smallest p of KS | by Holm | mean p | its test, by Holm | p <= 5% | "
             "p <= 10% | base's: p <= 5% | p <= 10% |", "|---" * 12 + "|"]  # fmt: skip
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
        # of n p-values of a bin, from m reference values, the mean has the variance (1/n + 1/m) / 12
        p, bins = reference.p_values(timesteps, signals, middle=True)[:, row], reference.bin(timesteps)
        parts = [p[bins == b].double() for b in fresh.nonzero().flatten().tolist()]
        average = sum(part.mean().item() for part in parts) / len(parts)
        deviation = sum((1 / len(part) + 1 / reference.size) / 12 for part in parts) ** 0.5 / len(parts)
        centre = 2 * stats.norm.sf(abs(average - 0.5) / deviation)
        pays = checkpoint.parents[1].name.partition("-")[2]
        results.append((pays, int(checkpoint.name), int(known.sum()), tests, average, centre, shares))
    pooled = sorted(p for _, _, _, tests, _, centre, _ in results for p in (*tests, centre))
    rejected = pooled[0] <= SIGNIFICANCE / len(pooled)  # the first step of Holm: it decides whether anything is rejected
    for pays, samples, tested, tests, average, centre, shares in results:
        cells = [f"{share:.3f}" for share in shares]
        lines.append(f"| {pays} | {samples:,} | {tested:,} | {len(tests)} | {min(tests):.3g} | {min(1, min(tests) * len(pooled)):.2g} | "
                     f"{average:.3f} | {min(1, centre * len(pooled)):.2g} | {' | '.join(cells)} |")  # fmt: skip
    return lines, not rejected


def main() -> int:
    args = parser(__doc__, "runs/p_values", processes=False).parse_args()
    work = args.work_dir.resolve()
    lines, good = test(work, [moment for share in SHARES for moment in moments(train(work, share))])
    text = "\n".join([f"{HELD_OUT:,} held-out scenes at each moment: `python benchmarks/p_values.py`.", "", *lines])
    write_text(args.out / "p_values.md", text)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
