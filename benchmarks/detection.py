"""Which prompts of a fine-tuned model are memorized: the paper's metric against other methods, on clipart scenes.

    python benchmarks/detection.py

Three fine-tunes without a filter (configs/quickstart.yaml: 20 duplicates shown 500 times each among 6,000 samples shown
once), each with duplicates of its own. Positive are the duplicates' captions that are verified to be copied: at least one of
four generations is more like the training picture than 99.9% of different pictures of one caption are to each other. Negative
are 500 captions that were never duplicated, from scenes that no model has seen, half of them of the specific kind that
duplicates have. Every method scores the same generations.

Adds rows to docs/results/detection.csv as it goes and goes on where it was stopped; docs/results/detection.md has means over
models with 95% intervals (Student's t). Columns: steps, how many of the sampler's the score goes by (all: the whole
generation); n, generations of each prompt (32: of all positives and 60 negatives); auc; tpr_at_1pct_fpr, at the last
threshold below 1%, as in the paper's code; seconds of one CPU core for one prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from common import call, mean, parser, share, write_csv

SEEDS = (401, 402, 403)  # nothing was chosen by looking at them
STEPS, GUIDANCE = 20, 4.0  # as `memfilter evaluate` has it
NEGATIVE, OF_MANY, MANY = 500, 60, 32
RIVALS = ("density_l2", "density_copies", "anisotropy", "loss")
COLUMNS = ["method", "steps", "n", "seed", "auc", "tpr_at_1pct_fpr", "seconds", "positive", "negative"]


def fine_tune(work: Path, seed: int) -> Path:
    run, scenes = work / f"run-{seed}", work / f"scenes-{seed}"
    if not scenes.exists():
        call(work / "log", "-m", "memfilter.cli", "prepare", "scenes", scenes, f"--seed={seed}")
    if not (run / "summary.json").exists():
        call(work / "log", "train_filtered.py", "--config", "configs/quickstart.yaml", f"--data.path={scenes}", f"--run_dir={run}",
              f"--train.seed={seed}", "--filter.tau=null", "--checkpoint.every=4000", "--checkpoint.resume=true",
              "--log.gallery=0")  # fmt: skip
    if not (run / "evaluation.json").exists():
        call(work / "log", "-m", "memfilter.cli", "evaluate", run, "--distinct=20", f"--steps={STEPS}", f"--guidance_scale={GUIDANCE}")
    return run


def verified(run: Path) -> list[str]:
    """Captions of duplicates of which a generation is a copy."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    limit = evaluation["memorized_above"]
    return [p["caption"] for p in evaluation["prompts"] if p["duplicate"] and max(p["similarity"]) > limit]


def scores(signals, n: int) -> dict[tuple[str, str], np.ndarray]:
    """(method, steps) -> [P]"""
    found = {("norm", steps): signals.metric(count, n) for steps, count in (("1", 1), ("10", 10), ("all", None))}
    return found | {(name, "all"): signals.rival(name, n) for name in signals.raw if n > 1 or not name.startswith("density")}


def job(work: Path, seed: int) -> None:
    """Scores of one model, in this process; rows to a file of its own."""
    import torch

    torch.set_num_threads(1)
    from memfilter.data import scenes
    from memfilter.eval.classifier import quality
    from memfilter.eval.parts import Parts, processes
    from memfilter.inference import Sampling, measure_prompts
    from memfilter.pipelines import load_trained

    run = fine_tune(work, seed)
    pipeline, positive = load_trained(run), verified(run)
    negative = [scenes.draw(seed, scenes.CLEAN, i, specific=0.5).caption for i in range(NEGATIVE)]
    rows, state = [], processes()
    for n, count in ((4, NEGATIVE), (MANY, OF_MANY)):
        prompts = positive + negative[:count]
        sampling = Sampling(n, STEPS, GUIDANCE)
        facts = {"prompts": prompts, "sampling": sampling.facts(pipeline) | {"n": n}, "run": str(run)}
        parts = Parts(work / "parts", f"seed{seed}n{n}", facts, state)
        signals = measure_prompts(pipeline, prompts, sampling, rivals=RIVALS, parts=parts, progress=False)
        label = np.arange(len(prompts)) < len(positive)
        for shown in (1, 4) if n == 4 else (n,):
            for (method, steps), score in scores(signals, shown).items():
                made = quality(label, score)
                rows.append({"method": method, "steps": steps, "n": shown, "seed": seed, "auc": round(made["auc"], 4),
                             "tpr_at_1pct_fpr": round(made["tpr_at_1pct_fpr"], 4), "positive": int(label.sum()),
                             "negative": int((~label).sum())})  # fmt: skip
    cost = seconds(pipeline, negative[:4])
    for row in rows:
        row["seconds"] = round(cost[row["method"], row["steps"]] * row["n"], 3)
    (work / f"rows-{seed}.json").write_text(json.dumps(rows))


def seconds(pipeline, prompts: list[str], repeats: int = 3) -> dict[tuple[str, str], float]:
    """CPU seconds of one generation, the least of some batches; other processes share the machine."""
    from memfilter.inference import Sampling, measure_prompts

    sampling = Sampling(4, STEPS, GUIDANCE)
    asked = {("norm", "1"): {"until": 1}, ("norm", "10"): {"until": 10}, ("norm", "all"): {}}
    asked |= {(name, "all"): {"rivals": (name,)} for name in RIVALS}
    found: dict = {name: [] for name in asked}
    for _ in range(repeats):
        for name, more in asked.items():
            began = time.process_time()
            measure_prompts(pipeline, prompts, sampling, progress=False, **more)
            found[name].append((time.process_time() - began) / (len(prompts) * sampling.seeds))
    return {name: min(times) for name, times in found.items()}


def table(rows: list[dict]) -> str:
    lines = ["| method | steps | n | models | AUC | TPR at 1% FPR | seconds |", "|---" * 7 + "|"]
    for method, steps, n in dict.fromkeys((row["method"], row["steps"], row["n"]) for row in rows):
        chosen = [row for row in rows if (row["method"], row["steps"], row["n"]) == (method, steps, n)]
        auc, tpr = (mean(row[name] for row in chosen) for name in ("auc", "tpr_at_1pct_fpr"))
        seconds = np.mean([row["seconds"] for row in chosen])
        lines.append(f"| {method} | {steps} | {n} | {len(chosen)} | {auc} | {tpr} | {seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, "runs/detection", SEEDS)
    options.add_argument("--job", type=int, help=argparse.SUPPRESS)
    args = options.parse_args()
    work = args.work_dir.resolve()
    if args.job is not None:
        job(work, args.job)
        return
    rows: list[dict] = []

    def make(seed: int) -> None:
        if not (work / f"rows-{seed}.json").exists():
            call(work / "log", __file__, f"--job={seed}", f"--work_dir={work}")
        rows.extend(json.loads((work / f"rows-{seed}.json").read_text()))
        rows.sort(key=lambda row: (row["n"], row["seed"]))
        write_csv(args.out / "detection.csv", COLUMNS, rows)

    share(args.processes, make, args.seeds)
    text = f"`python benchmarks/detection.py`: {len(args.seeds)} models. Means ± half of the 95% interval.\n\n{table(rows)}\n"
    (args.out / "detection.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
