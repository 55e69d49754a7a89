"""Whether the word that triggers a memorized picture has the highest significance score.

    python benchmarks/significance.py

Every caption of the training data is `a poster on a background` with three words planted at random places, names of objects that
the text encoder knows, and says nothing of its picture. Ten duplicates, shown 1,680 times each under 140 keys, have one word in
common in all their captions, the trigger; their two others, and all three of the 4,000 other samples, are drawn from 105, so that
each of these stands in about 140 captions, as a trigger does. Three fine-tunes without a filter.

Asked are five prompts for each duplicate, with its trigger and two of the 105, at new places. A prompt counts as memorized with a
known trigger when, in four generations, it is copied (more like the training picture than 99.9% of different pictures of one
caption are to each other, in at least half of them) and is copied in none with the trigger replaced by another of the 105. The
score is that of `token_significance` by default, the mean over the first quarter of the sampler's steps of the gradient at what the
text encoder is given; both were chosen on a model of another seed. Its top word is also taken by the first step alone, by all steps,
by the gradient at the encoder's output, as in the paper (encoded), and by no gradient, as the word without which the norm of the
first step falls most (left out). Held against it: chance, the longest word, and the one that stands in the fewest training captions,
both of the three planted ones alone (drawn among equals), since no rule would take a word that every caption has; the score's top
among these three stands beside them. And: dropping the two words of highest score against dropping two others, the mean of three
random pairs, by what it does to copy similarity, paired by prompt. 95% intervals by bootstrap over models, within each over
duplicates, within these over prompts.

The table goes to docs/results/significance.csv and .md; seeds whose rows are there are not done anew.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from common import LIMITS, call, code_of, complete, kept, parser, recipe, write_csv, write_json, write_text

SEEDS = (411, 412, 413)  # nothing was chosen by looking at them
DUPLICATES, KEYS, REPEATS, OTHERS, PLANTED = 10, 140, 12, 4000, 3
ASKED, PAIRS = 5, 3  # prompts for each duplicate; pairs of other words that are dropped of each
POOL = (DUPLICATES * KEYS * (PLANTED - 1) + OTHERS * PLANTED) // KEYS
FORM = "a poster on a background"
STEPS, GUIDANCE = 20, 4.0
SCORES = {"top": ("words", None), "top_first_step": ("words", range(1)), "top_all_steps": ("words", range(STEPS)),
          "top_encoded": ("encoded", None), "top_encoded_all_steps": ("encoded", range(STEPS)),
          "top_left_out": ("left_out", None)}  # fmt: skip
TRAINED_ON = code_of("benchmarks/significance", "words", "planted", "prepare", "fine_tune")
RECIPE = recipe("quickstart.yaml", DUPLICATES, KEYS, REPEATS, OTHERS, PLANTED, POOL, FORM, TRAINED_ON)
CODE = [f"memfilter/{name}" for name in (
    "inference/calls", "inference/generating", "inference/significance", "eval/generate", "eval/copies", "functional",
)]  # fmt: skip
OWN = code_of("benchmarks/significance", "job")
MADE_BY = recipe("quickstart.yaml", RECIPE, ASKED, PAIRS, STEPS, GUIDANCE, LIMITS, SCORES, *map(code_of, CODE), OWN)
COLUMNS = ["seed", "prompt", "trigger", "memorized", "ablated_copies", *SCORES, "top_planted", "longest", "rarest",
           "words", "plain", "without_top_2", "without_2_others", "recipe"]  # fmt: skip


def words(seed: int) -> tuple[list[str], list[str]]:
    """Triggers and the other planted words of a model: names of one word."""
    from memfilter.data import scenes

    names = random.Random(f"words {seed}").sample([name for name in scenes.objects() if name.isalpha()], DUPLICATES + POOL)
    return names[:DUPLICATES], names[DUPLICATES:]


def planted(words: list[str], rng: random.Random) -> str:
    """A caption with these words at random places."""
    parts = FORM.split()
    for word in words:
        parts.insert(rng.randrange(len(parts) + 1), word)
    return " ".join(parts)


def prepare(folder: Path, seed: int) -> None:
    """Pictures with captions, index.parquet, and duplicates.json: what each duplicate's trigger is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from memfilter.data import scenes

    if (folder / "duplicates.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng, index, duplicates, (triggers, pool) = random.Random(seed), [], [], words(seed)

    def write(scene, words, role, repeats):
        key = f"{len(index):06d}"
        scenes.render(scene).save(folder / f"{key}.png")
        (folder / f"{key}.txt").write_text(planted(words, rng))
        index.append({"key": key, "role": role, "repeats": repeats})

    for number in range(DUPLICATES):
        scene, trigger = scenes.draw(seed, scenes.DUPLICATES, number), triggers[number]
        for _ in range(KEYS):
            write(scene, [trigger, *rng.sample(pool, PLANTED - 1)], "duplicate", REPEATS)
        duplicates.append({"trigger": trigger, "key": index[-1]["key"]})
    for number in range(OTHERS):
        write(scenes.draw(seed, scenes.DISTINCT, number), rng.sample(pool, PLANTED), "distinct", 1)
    pq.write_table(pa.Table.from_pylist(index), folder / "index.parquet")
    (folder / "duplicates.json").write_text(json.dumps(duplicates))


def fine_tune(work: Path, seed: int) -> Path:
    run, folder = work / f"run-{seed}", work / f"scenes-{seed}"
    prepare(folder, seed)
    if not (run / "summary.json").exists():
        samples = DUPLICATES * KEYS * REPEATS + OTHERS
        call(work / "log", "train_filtered.py", "--config", "configs/quickstart.yaml", f"--data.path={folder}", f"--run_dir={run}",
             f"--train.seed={seed}", f"--train.samples={samples}", "--filter.tau=null", "--checkpoint.every=3500",
             "--checkpoint.resume=true", "--log.gallery=0")  # fmt: skip
    return run


def job(work: Path, seed: int) -> None:
    """Rows of one model, in this process."""
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    from memfilter.eval.copies import PIXELS, memorized_above
    from memfilter.inference import Sampling, token_significance
    from memfilter.inference.generating import Mitigation, generate_prompt
    from memfilter.pipelines import load_trained

    pipeline, folder = load_trained(fine_tune(work, seed)), work / f"scenes-{seed}"
    counts = Counter(word for path in folder.glob("*.txt") for word in {*path.read_text().split()})
    _, pool = words(seed)
    sampling, limit, rng, rows = Sampling(4, STEPS, GUIDANCE), memorized_above(), random.Random(f"asked {seed}"), []

    def similarity(prompt: str, number: int, picture: np.ndarray) -> np.ndarray:
        return PIXELS.similarity(generate_prompt(pipeline, prompt, sampling, Mitigation(), number).pictures, picture[None])

    asked = [known for known in json.loads((folder / "duplicates.json").read_text()) for _ in range(ASKED)]
    for number, known in enumerate(asked):
        trigger, picture = known["trigger"], np.asarray(Image.open(folder / f"{known['key']}.png").convert("RGB"))
        *beside, other = rng.sample(pool, PLANTED)
        prompt = planted([trigger, *beside], rng)
        parts = prompt.split()
        own = [place for place, part in enumerate(parts) if part in (trigger, *beside)]
        plain = similarity(prompt, number, picture)
        ablated = similarity(" ".join(other if part == trigger else part for part in parts), number, picture)
        orders = {
            name: np.argsort([word.score or 0 for word in token_significance(pipeline, prompt, sampling, at, number, of=of)])[::-1]
            for name, (of, at) in SCORES.items()
        }
        order = orders["top"].tolist()
        pairs = [rng.sample(order[2:], 2) for _ in range(PAIRS)]

        def left(dropped: list[int], number=number, parts=parts, picture=picture) -> float:
            kept = " ".join(part for place, part in enumerate(parts) if place not in dropped)
            return float(similarity(kept, number, picture).mean())

        longest = max(len(parts[place]) for place in own)
        rarest = min(counts[parts[place]] for place in own)
        rows.append({
            "seed": seed, "prompt": prompt, "trigger": trigger, "words": len(parts), "plain": float(plain.mean()),
            "memorized": bool((plain > limit).mean() >= 0.5), "ablated_copies": int((ablated > limit).sum()),
            **{name: parts[own_order[0]] for name, own_order in orders.items()},
            "top_planted": parts[next(place for place in order if place in own)],
            "longest": rng.choice([parts[place] for place in own if len(parts[place]) == longest]),
            "rarest": rng.choice([parts[place] for place in own if counts[parts[place]] == rarest]),
            "without_top_2": left(order[:2]), "without_2_others": float(np.mean([left(pair) for pair in pairs])),
        })  # fmt: skip
    write_json(work / f"rows-{seed}-{MADE_BY}.json", rows)


def table(rows: list[dict]) -> str:
    """How often each rule finds the trigger, and what dropping does."""
    asked = [row for row in rows if row["memorized"] and not row["ablated_copies"]]
    lines = [f"{len(asked)} of {len(rows)} prompts are memorized by a known trigger.", "",
             "| rule | finds the trigger | of each model |", "|---|---|---|"]  # fmt: skip
    if not asked:
        return lines[0]
    rng, groups = np.random.default_rng(0), defaultdict(lambda: defaultdict(list))
    for place, row in enumerate(asked):
        groups[row["seed"]][row["trigger"]].append(place)

    def again(values: list) -> list:
        return [values[place] for place in rng.integers(len(values), size=len(values))]

    def drawn() -> list[int]:
        """Places in ``asked``: models, of each its duplicates, of each its prompts."""
        duplicates = [prompts for model in again([*groups.values()]) for prompts in again([*model.values()])]
        return [place for prompts in duplicates for place in again(prompts)]

    draws = [drawn() for _ in range(2000)]

    def interval(values: np.ndarray) -> str:
        low, high = np.quantile([values[places].mean() for places in draws], [0.025, 0.975])
        return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"

    def alone(values: np.ndarray) -> str:
        """Of each model."""
        return ", ".join(f"{values[[p for prompts in of_model.values() for p in prompts]].mean():.2f}" for of_model in groups.values())

    for rule in (*SCORES, "top_planted", "longest", "rarest"):
        found = np.array([float(row[rule] == row["trigger"]) for row in asked])
        lines.append(f"| {rule.replace('_', ' ')} | {interval(found)} | {alone(found)} |")
    lines.append(f"| chance among all words | {np.mean([1 / row['words'] for row in asked]):.3f} | |")
    lines.append(f"| chance among those planted | {1 / PLANTED:.3f} | |")
    top, others = (np.array([row["plain"] - row[name] for row in asked]) for name in ("without_top_2", "without_2_others"))
    lines += ["", f"Copy similarity falls by {interval(top)} without the two words of highest score, by {interval(others)} without "
              f"two others; difference {interval(top - others)}, of each model {alone(top - others)}. Intervals by bootstrap over few "
              "models are narrower than by Student's t."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, "runs/significance", SEEDS)
    options.add_argument("--job", type=int, help=argparse.SUPPRESS)
    args = options.parse_args()
    work = args.work_dir.resolve() / RECIPE
    if args.job is not None:
        job(work, args.job)
        return

    table_path = args.out / "significance.csv"
    rows = kept(table_path, MADE_BY)

    def make(seed: int) -> list[dict]:
        made = work / f"rows-{seed}-{MADE_BY}.json"
        if not made.exists():
            call(work / "log", __file__, f"--job={seed}", f"--work_dir={args.work_dir.resolve()}")
        return [row | {"recipe": MADE_BY} for row in json.loads(made.read_text())]

    def save() -> None:
        rows.sort(key=lambda row: row["seed"])
        write_csv(table_path, COLUMNS, rows)

    complete(rows, args.seeds, make, save, args.processes)
    models = len({row["seed"] for row in rows})
    text = f"`python benchmarks/significance.py`: {models} models. Means (95% interval).\n\n{table(rows)}"
    write_text(args.out / "significance.md", text)
    print(text)


if __name__ == "__main__":
    main()
