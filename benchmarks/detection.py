"""Which prompts of a fine-tuned model are memorized: the paper's metric against other methods, on clipart scenes.

    python benchmarks/detection.py

Three fine-tunes without a filter (configs/quickstart.yaml: 20 duplicates shown 500 times each among 6,000 samples shown once),
each with duplicates of its own. Positive are the duplicates' captions that are verified to be copied: at least one of four
generations is more like the training picture than 99.9% of different pictures of one caption are to each other. Negative are
500 captions that were never duplicated, from scenes that no model has seen, half of them of the specific kind that duplicates
have; about a fifth of these captions is shown once in training too. Every method scores the same generations, which are made
from other noise than those by which copying is verified. The anisotropy score weighs its two parts by their spread among 60
more clean prompts, in means over as many generations, at most four; density_copies goes by pixel correlation, as the
verification does.

Adds rows to docs/results/detection.csv as it goes; seeds whose rows are there are not done anew. docs/results/detection.md has
means over models with 95% intervals (Student's t), by how much the metric is ahead of each other method, paired by model, and
where the paper's order (the norm ahead of both densities at every cost) does not hold. Columns: steps, how many of the sampler's
the score goes by (all: the whole generation); n, generations of each prompt; auc; tpr_at_1pct_fpr, at the last threshold below 1%,
as in the paper's code; seconds of one CPU core for one prompt. n = 32 is of all positives and 60 negatives, among which 1% is none;
rows of fewer generations with as many negatives, to be held against it, are in docs/results/detection_subset.csv.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from common import call, complete, kept, mean, parser, recipe, write_csv, write_json, write_text

SEEDS = (401, 402, 403)  # nothing was chosen by looking at them
STEPS, GUIDANCE = 20, 4.0  # as `memfilter evaluate` has it
RECIPE = recipe("quickstart.yaml", STEPS, GUIDANCE)
NEGATIVE, OF_MANY, MANY, OTHERS = 500, 60, 32, 60
RIVALS = ("density_l2", "density_copies", "anisotropy", "loss")
MADE_BY = recipe("quickstart.yaml", RECIPE, NEGATIVE, OF_MANY, MANY, OTHERS, RIVALS)
COLUMNS = ["method", "steps", "n", "seed", "auc", "tpr_at_1pct_fpr", "seconds", "positive", "negative",
           "recipe"]  # fmt: skip


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


def scores(signals, n: int, clean) -> dict[tuple[str, str], np.ndarray]:
    """(method, steps) -> [P]"""
    found = {("norm", steps): signals.metric(count, n) for steps, count in (("1", 1), ("10", 10), ("all", None))}
    return found | {(name, "all"): signals.rival(name, n, clean) for name in signals.raw if n > 1 or not name.startswith("density")}


def job(work: Path, seed: int) -> None:
    """Scores of one model, in this process; rows to a file of its own."""
    import torch

    torch.set_num_threads(1)
    from memfilter.data import scenes
    from memfilter.eval.classifier import quality
    from memfilter.eval.parts import Parts
    from memfilter.eval.runs import FinishedRun
    from memfilter.inference import Sampling, clean_norms, measure_prompts
    from memfilter.pipelines import load_trained
    from memfilter.processes import processes

    run = fine_tune(work, seed)
    pipeline, positive = load_trained(run), verified(run)
    if not positive:
        raise SystemExit(f"{run} has memorized nothing: there is nothing to detect")
    duplicates = {prompt.text for prompt in FinishedRun(run).prompts(0)}
    drawn = [scenes.draw(seed, scenes.CLEAN, i, specific=0.5).caption for i in range(2 * NEGATIVE)]
    drawn = [caption for caption in drawn if caption not in duplicates]
    negative, others = drawn[:NEGATIVE], drawn[NEGATIVE : NEGATIVE + OTHERS]
    rows, state, facts = [], processes(), Sampling(4, STEPS, GUIDANCE).facts(pipeline)
    parts = Parts(work / "parts", f"clean{seed}", facts | {"prompts": others}, state)
    clean = clean_norms(pipeline, others, Sampling(4, STEPS, GUIDANCE), facts=facts, parts=parts, progress=False)
    for n, count in ((4, NEGATIVE), (MANY, OF_MANY)):
        prompts = negative[:count] + positive  # a prompt's place decides its noise: the positives' is not that of the evaluation
        sampling = Sampling(n, STEPS, GUIDANCE)
        parts = Parts(work / "parts", f"seed{seed}n{n}", facts | {"prompts": prompts, "n": n}, state)
        signals = measure_prompts(pipeline, prompts, sampling, rivals=RIVALS, parts=parts, progress=False)
        label = np.arange(len(prompts)) >= count
        for shown in (1, 4) if n == 4 else (1, 4, n):
            for (method, steps), score in scores(signals, shown, clean).items():
                made = quality(label, score)
                rows.append({"method": method, "steps": steps, "n": shown, "seed": seed, "auc": round(made["auc"], 4),
                             "tpr_at_1pct_fpr": round(made["tpr_at_1pct_fpr"], 4), "positive": int(label.sum()),
                             "negative": int((~label).sum())})  # fmt: skip
    cost = seconds(pipeline, negative[:4])
    for row in rows:
        row["seconds"] = round(cost[row["method"], row["steps"]] * row["n"], 3)
    write_json(work / f"rows-{seed}-{MADE_BY}.json", rows)


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
    lines = ["| negatives | n | method | steps | models | AUC | TPR at 1% FPR | seconds |", "|---" * 8 + "|"]
    names = ("negative", "n", "method", "steps")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        chosen = [row for row in rows if tuple(row[name] for name in names) == key]
        auc, tpr = (mean(row[name] for row in chosen) for name in ("auc", "tpr_at_1pct_fpr"))
        seconds = np.mean([row["seconds"] for row in chosen])
        lines.append(f"| {' | '.join(map(str, key))} | {len(chosen)} | {auc} | {tpr} | {seconds:.2f} |")
    return "\n".join(lines)


def order(rows: list[dict]) -> list[str]:
    """By how much the norm is ahead of each other method, at as many generations, paired by model; then where the paper's order
    does not hold."""
    value = {(row["negative"], row["n"], row["method"], row["steps"], row["seed"]): row for row in rows}
    lines = ["| negatives | n | norm, steps | against | AUC | TPR at 1% FPR |", "|---" * 6 + "|"]
    behind = []
    for negative, n, steps in dict.fromkeys((r["negative"], r["n"], r["steps"]) for r in rows if r["method"] == "norm"):
        for rival in RIVALS:
            seeds = [seed for *at, seed in value if at == [negative, n, rival, "all"]]
            differences = {
                figure: [value[negative, n, "norm", steps, s][figure] - value[negative, n, rival, "all", s][figure] for s in seeds]
                for figure in ("auc", "tpr_at_1pct_fpr")
            }
            if seeds:
                lines.append(f"| {negative} | {n} | {steps} | {rival} | {' | '.join(map(mean, differences.values()))} |")
                if rival.startswith("density"):
                    behind += [f"{figure} at n={n}, steps {steps}, against {rival} ({negative} negatives)"
                               for figure, found in differences.items() if np.mean(found) <= 0]  # fmt: skip
    holds = f"does not hold in: {'; '.join(behind)}" if behind else "holds everywhere"
    return [*lines, "", f"The paper's order, the norm ahead of both densities, {holds}."]


def main() -> None:
    options = parser(__doc__, "runs/detection", SEEDS)
    options.add_argument("--job", type=int, help=argparse.SUPPRESS)
    args = options.parse_args()
    work = args.work_dir.resolve() / RECIPE
    if args.job is not None:
        job(work, args.job)
        return
    table_path, subset_path = (args.out / f"{name}.csv" for name in ("detection", "detection_subset"))
    rows = kept(table_path, MADE_BY)
    rows += [row for row in kept(subset_path, MADE_BY) if row["n"] != MANY and row["seed"] in {other["seed"] for other in rows}]

    def make(seed: int) -> list[dict]:
        made = work / f"rows-{seed}-{MADE_BY}.json"
        if not made.exists():
            call(work / "log", __file__, f"--job={seed}", f"--work_dir={args.work_dir.resolve()}")
        return [row | {"recipe": MADE_BY} for row in json.loads(made.read_text())]

    def save() -> None:
        rows.sort(key=lambda row: (-row["negative"], row["n"], row["seed"]))
        write_csv(subset_path, COLUMNS, [row for row in rows if row["negative"] == OF_MANY])
        # the last to be written, for it says which seeds are there
        write_csv(table_path, COLUMNS, [row for row in rows if row["negative"] == NEGATIVE or row["n"] == MANY])

    complete(rows, args.seeds, make, save, args.processes)
    models = len({row["seed"] for row in rows})
    text = f"`python benchmarks/detection.py`: {models} models. Means ± half of the 95% interval.\n\n{table(rows)}\n\n"
    text += "Norm less other methods, paired by model:\n\n" + "\n".join(order(rows))
    write_text(args.out / "detection.md", text)
    print(text)


if __name__ == "__main__":
    main()
