"""Two ways to get a picture of a memorized prompt that is no copy: its embedding adjusted, and random tokens.

    python benchmarks/detection.py && python benchmarks/mitigation.py

The models and the verified prompts are those of benchmarks/detection.py; 20 distinct prompts besides. Every setting generates
the same prompts with the same four noises, always mitigated: the embedding at five targets for the first step's norm, five
numbers of random tokens, and nothing. Copy similarity is the correlation with the training picture, agreement that of picture
and caption by the scenes' scorer (the caption as it was, not as it is shown).

The rows go to docs/results/mitigation.csv; seeds whose rows are there are not done anew. docs/results/mitigation.md has means over
models with 95% intervals (Student's t), docs/results/mitigation.png the curves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from common import call, complete, kept, mean, parser, recipe, write_csv, write_json, write_text
from detection import GUIDANCE, RECIPE, SEEDS, STEPS, fine_tune, verified

# the first step's norms of verified prompts of another model lie between 1.2 and 2.6
SETTINGS = [("none", 0.0)] + [("prompt", t) for t in (0.4, 0.7, 1.0, 1.3, 1.6)] + [("rta", n) for n in (1, 2, 4, 6, 8)]
COLUMNS = ["method", "setting", "seed", "memorization_rate", "copy_similarity", "agreement_duplicates", "agreement_distinct",
           "first_norm", "duplicates", "distinct", "recipe"]  # fmt: skip
DISTINCT, NUMBER = 20, 10_000  # a prompt's number decides its noise, which shall not be that by which copying was verified
MADE_BY = recipe("quickstart.yaml", RECIPE, SETTINGS, DISTINCT, NUMBER)


def job(work: Path, seed: int) -> None:
    """Rows of one model, in this process."""
    import torch

    torch.set_num_threads(1)
    from memfilter.eval.agreement import agreement
    from memfilter.eval.copies import PIXELS, memorized_above
    from memfilter.eval.runs import FinishedRun
    from memfilter.inference.detection import Sampling
    from memfilter.inference.generating import Mitigation, generate_prompt
    from memfilter.pipelines import load_trained

    directory = fine_tune(work, seed)
    run, pipeline, copied = FinishedRun(directory), load_trained(directory), verified(directory)
    prompts = [p for p in run.prompts(DISTINCT) if not p.duplicate or p.text in copied]
    scenes, limit = run.scenes([p.key for p in prompts]), memorized_above()
    sampling, out = Sampling(4, STEPS, GUIDANCE), work / f"mitigation-{seed}-{MADE_BY}.json"
    rows = json.loads(out.read_text()) if out.exists() else []
    for method, setting in SETTINGS:
        if (method, setting) in {(row["method"], row["setting"]) for row in rows}:
            continue
        how = Mitigation(method, None, setting or None, int(setting) or 1)
        made = [generate_prompt(pipeline, p.text, sampling, how, NUMBER + place) for place, p in enumerate(prompts)]
        own = [PIXELS.similarity(m.pictures, run.picture(p.key, 32)[None]) for m, p in zip(made, prompts, strict=True)]
        agree = [agreement(m.pictures, [scene] * 4) for m, scene in zip(made, scenes, strict=True)]
        duplicate = np.array([bool(p.duplicate) for p in prompts])
        own, agree = np.array(own), np.array(agree)  # [P, 4] each
        rows.append({"method": method, "setting": setting, "seed": seed,
                     "memorization_rate": float((own[duplicate] > limit).mean()),
                     "copy_similarity": float(own[duplicate].mean()), "agreement_duplicates": float(agree[duplicate].mean()),
                     "agreement_distinct": float(agree[~duplicate].mean()),
                     "first_norm": float(np.mean([m.norms[:, 0] for m, d in zip(made, duplicate, strict=True) if d])),
                     "duplicates": int(duplicate.sum()), "distinct": int((~duplicate).sum())})  # fmt: skip
        write_json(out, rows)


def table(rows: list[dict]) -> str:
    names = COLUMNS[3:8]
    lines = ["| method | setting | models | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * 8 + "|"]
    for method, setting in SETTINGS:
        if chosen := [row for row in rows if (row["method"], row["setting"]) == (method, setting)]:
            cells = [mean(row[name] for row in chosen) for name in names]
            lines.append(f"| {method} | {setting or ''} | {len(chosen)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict], out: Path) -> None:
    """Copy similarity against agreement, both of memorized prompts; towards the lower right is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.4), layout="constrained")
    axis = figure.subplots()
    for method, colour, label in (("prompt", "#1971c2", "adjusted embedding, by target"), ("rta", "#e8590c", "random tokens, by number"),
                                  ("none", "#212529", "no mitigation")):  # fmt: skip
        settings = [setting for kind, setting in SETTINGS if kind == method]
        means = [[np.mean([r[name] for r in rows if (r["method"], r["setting"]) == (method, s)]) for s in settings]
                 for name in ("agreement_duplicates", "copy_similarity")]  # fmt: skip
        axis.plot(*means, "o-" if len(settings) > 1 else "*", color=colour, label=label, ms=10 if len(settings) == 1 else 6)
        for setting, x, y in zip(settings, *means, strict=True):
            axis.annotate(f"{setting:g}" if setting else "", (x, y), (5, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("agreement of picture and caption, memorized prompts")
    axis.set_ylabel("copy similarity")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(out, dpi=130)


def main() -> None:
    options = parser(__doc__, "runs/detection", SEEDS)
    options.add_argument("--job", type=int, help=argparse.SUPPRESS)
    args = options.parse_args()
    work = args.work_dir.resolve() / RECIPE
    if args.job is not None:
        job(work, args.job)
        return
    table_path = args.out / "mitigation.csv"
    rows = kept(table_path, MADE_BY)

    def make(seed: int) -> list[dict]:
        call(work / "log", __file__, f"--job={seed}", f"--work_dir={args.work_dir.resolve()}")
        return [row | {"recipe": MADE_BY} for row in json.loads((work / f"mitigation-{seed}-{MADE_BY}.json").read_text())]

    def save() -> None:
        rows.sort(key=lambda row: (SETTINGS.index((row["method"], row["setting"])), row["seed"]))
        write_csv(table_path, COLUMNS, rows)

    complete(rows, args.seeds, make, save, args.processes)
    models = len({row["seed"] for row in rows})
    text = f"`python benchmarks/mitigation.py`: {models} models. Means ± half of the 95% interval.\n\n{table(rows)}"
    write_text(args.out / "mitigation.md", text)
    draw(rows, args.out / "mitigation.png")
    print(text)


if __name__ == "__main__":
    main()
