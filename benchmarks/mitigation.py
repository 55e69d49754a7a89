"""Two ways to get a picture of a memorized prompt that is no copy: its embedding adjusted, and random tokens.

    python benchmarks/detection.py && python benchmarks/mitigation.py

The models and the verified prompts are those of benchmarks/detection.py; 20 distinct prompts besides. Every setting generates
the same prompts with the same four noises, always mitigated: the embedding at five targets for the first step's norm, five
numbers of random tokens, and nothing. Copy similarity is the correlation with the training picture, agreement that of picture
and caption by the scenes' scorer (the caption as it was, not as it is shown).

The rows, one for each prompt and setting, go to docs/results/mitigation.csv; seeds whose rows are there are not done anew.
docs/results/mitigation.md has means over models with 95% intervals (Student's t), and by how much one way copies less than the
other where both agree as well: where so much agreement is asked for, each way's setting that copies least of those that agree so
well, no mitigation among them, in the mean over what may be asked for, with 95% intervals by bootstrap over models and, within
each, prompts. That is done twice, by the agreement of memorized prompts and by that of distinct ones. docs/results/mitigation.png has
the curves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from common import call, code_of, complete, half_width, kept, mean, parser, recipe, write_csv, write_json, write_text
from detection import GUIDANCE, RECIPE, SEEDS, STEPS, fine_tune, verified

# the first step's norms of verified prompts of another model lie between 1.2 and 2.6
SETTINGS = [("none", 0.0)] + [("prompt", t) for t in (0.4, 0.7, 1.0, 1.3, 1.6)] + [("rta", n) for n in (1, 2, 4, 6, 8)]
COLUMNS = ["method", "setting", "seed", "prompt", "duplicate", "memorization_rate", "copy_similarity", "agreement", "first_norm",
           "recipe"]  # fmt: skip
FIGURES = {"memorization_rate": True, "copy_similarity": True, "agreement duplicates": True, "agreement distinct": False,
           "first_norm": True}  # whether of duplicates  # fmt: skip
DISTINCT, NUMBER = 20, 10_000  # a prompt's number decides its noise, which shall not be that by which copying was verified
CODE = [f"memfilter/{name}" for name in (
    "inference/calls", "inference/generating", "inference/mitigation", "inference/significance", "data/captions", "data/sampler",
    "eval/agreement", "eval/copies", "eval/generate", "functional",
)]  # fmt: skip
OWN = (code_of("benchmarks/detection", "verified"), code_of("benchmarks/mitigation", "job"))
MADE_BY = recipe("quickstart.yaml", RECIPE, SETTINGS, DISTINCT, NUMBER, *map(code_of, CODE), *OWN)


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
    if not copied:
        raise SystemExit(f"{directory} has memorized nothing: there is nothing to mitigate")
    prompts = [p for p in run.prompts(DISTINCT) if not p.duplicate or p.text in copied]
    scenes, limit = run.scenes([p.key for p in prompts]), memorized_above()
    sampling, out = Sampling(4, STEPS, GUIDANCE), work / f"mitigation-{seed}-{MADE_BY}.json"
    rows = json.loads(out.read_text()) if out.exists() else []
    for method, setting in SETTINGS:
        if (method, setting) in {(row["method"], row["setting"]) for row in rows}:
            continue
        how = Mitigation(method, None, setting or None, int(setting) or 1)
        for place, (prompt, scene) in enumerate(zip(prompts, scenes, strict=True)):
            made = generate_prompt(pipeline, prompt.text, sampling, how, NUMBER + place)
            own = PIXELS.similarity(made.pictures, run.picture(prompt.key, 32)[None])  # [4]
            rows.append({"method": method, "setting": setting, "seed": seed, "prompt": place, "duplicate": bool(prompt.duplicate),
                         "memorization_rate": float((own > limit).mean()), "copy_similarity": float(own.mean()),
                         "agreement": float(np.mean(agreement(made.pictures, [scene] * 4))),
                         "first_norm": float(np.mean(made.norms[:, 0]))})  # fmt: skip
        write_json(out, rows)


def by_model(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over prompts, of each method, setting and seed: `FIGURES`."""
    keys = ["method", "setting", "seed"]
    return pd.DataFrame({name: rows[rows["duplicate"] == duplicate].groupby(keys)[name.partition(" ")[0]].mean()
                         for name, duplicate in FIGURES.items()})  # fmt: skip


def table(models: pd.DataFrame) -> str:
    lines = ["| method | setting | models | " + " | ".join(name.replace("_", " ") for name in FIGURES) + " |", "|---" * 8 + "|"]
    for method, setting in SETTINGS:
        chosen = models.loc[method, setting]
        cells = [mean(chosen[name]) for name in FIGURES]
        lines.append(f"| {method} | {setting or ''} | {len(chosen)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def copies_less(models: pd.DataFrame, agreement: str) -> float:
    """Copy similarity under random tokens less that under adjusted embeddings, of the means over models.

    Of either method counts, where so much agreement is asked for, the setting that copies least of those that agree so well, no
    mitigation among them; the mean is over what may be asked for, from the least that a setting of either reaches to that of no
    mitigation.
    """
    means = models.groupby(["method", "setting"]).mean()
    plain = means.loc["none"]
    curves = [pd.concat([plain, means.loc[method]]) for method in ("rta", "prompt")]
    low, high = min(curve[agreement].min() for curve in curves), plain[agreement].item()
    asked = np.linspace(low, high, 51)[1:]
    theirs, ours = (np.array([curve.loc[curve[agreement] >= at, "copy_similarity"].min() for at in asked]) for curve in curves)
    return float((theirs - ours).mean())


def compared(rows: pd.DataFrame, draws: int = 500) -> list[str]:
    """`copies_less` with its interval, by both agreements."""
    rng = np.random.default_rng(0)
    parts = {seed: {key: part for key, part in of_seed.groupby(["duplicate", "prompt"])} for seed, of_seed in rows.groupby("seed")}

    def drawn() -> pd.DataFrame:
        """Of models, and of the memorized and the distinct prompts of each, as many as there are, drawn anew."""
        chosen = []
        for place, seed in enumerate(rng.choice([*parts], len(parts))):
            for duplicate in (True, False):
                prompts = [key for key in parts[seed] if key[0] == duplicate]
                again = [parts[seed][prompts[i]] for i in rng.integers(len(prompts), size=len(prompts))]
                chosen.append(pd.concat(again).assign(seed=place))
        return by_model(pd.concat(chosen))

    again, lines = [drawn() for _ in range(draws)], []
    for name in ("agreement duplicates", "agreement distinct"):
        found = copies_less(by_model(rows), name)
        low, high = np.quantile([copies_less(models, name) for models in again], [0.025, 0.975])
        alone = [f"{copies_less(by_model(of_seed), name):.3f}" for _, of_seed in rows.groupby("seed")]
        lines.append(f"- by {name}: {found:.3f} ({low:.3f} to {high:.3f}); of each model alone {', '.join(alone)}")
    return lines


def gradient_error(directions: int = 3, step: float = 1e-6) -> float:
    """The largest relative error of the embedding's gradient, against central differences in fp64 along random directions, of the
    embedded model."""
    import torch

    from memfilter.eval.generate import Job, arguments_of
    from memfilter.inference.calls import first_calls
    from memfilter.inference.significance import embedding_gradient, frozen
    from memfilter.pipelines import load_pipeline

    pipeline, generator = load_pipeline("scenes", torch.float64), torch.Generator().manual_seed(0)
    jobs = [Job(NUMBER, "a cat on a red background", seed) for seed in range(4)]
    call = first_calls(pipeline, 1, **arguments_of(jobs, STEPS, GUIDANCE, None))[0]
    embeds = call.cond["encoder_hidden_states"]
    errors = []
    with frozen(pipeline.unet), torch.no_grad():
        gradient = embedding_gradient(pipeline, call)[1]
        for _ in range(directions):
            direction = torch.randn(embeds.shape, generator=generator, dtype=embeds.dtype)
            above, below = (call.norm(pipeline.scheduler, call.cond_again(pipeline.unet, embeds + way * step * direction))
                            for way in (1, -1))  # fmt: skip
            expected, found = (above - below) / (2 * step), (gradient * direction).sum((1, 2))
            errors.append(((found - expected).abs() / expected.abs()).max().item())
    return float(np.max(errors))  # one that is not finite stays so


def draw(models: pd.DataFrame, out: Path) -> None:
    """Copy similarity against agreement, both of memorized prompts, with 95% intervals over models; towards the lower right is
    better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.4), layout="constrained")
    axis = figure.subplots()
    for method, colour, label in (("prompt", "#1971c2", "adjusted embedding, by target"), ("rta", "#e8590c", "random tokens, by number"),
                                  ("none", "#212529", "no mitigation")):  # fmt: skip
        settings = [setting for kind, setting in SETTINGS if kind == method]
        values = [[models.loc[method, s][name].to_numpy() for s in settings] for name in ("agreement duplicates", "copy_similarity")]
        (x, y), (wide, high) = ([[f(v) for v in of_axis] for of_axis in values] for f in (np.mean, half_width))
        axis.errorbar(x, y, high, wide, "o-" if len(settings) > 1 else "*", color=colour, label=label, elinewidth=0.6,
                      ms=10 if len(settings) == 1 else 6)  # fmt: skip
        for setting, at in zip(settings, zip(x, y, strict=True), strict=True):
            axis.annotate(f"{setting:g}" if setting else "", at, (5, 4), textcoords="offset points", fontsize=8)
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
        rows.sort(key=lambda row: (SETTINGS.index((row["method"], row["setting"])), row["seed"], row["prompt"]))
        write_csv(table_path, COLUMNS, rows)

    complete(rows, args.seeds, make, save, args.processes)
    found = pd.DataFrame(rows)
    models = by_model(found)
    text = f"`python benchmarks/mitigation.py`: {found['seed'].nunique()} models. Means ± half of the 95% interval.\n\n{table(models)}"
    text += "\n\nBy how much copy similarity is lower with adjusted embeddings than with random tokens, at equal agreement:\n\n"
    text += "\n".join(compared(found))
    text += "\n\nThe interval is by bootstrap over few models, and narrower than one by Student's t; by as many stands each model alone."
    text += f"\n\nGradient of the embedding against finite differences in fp64: relative error {gradient_error():.1e} at most."
    write_text(args.out / "mitigation.md", text)
    draw(models, args.out / "mitigation.png")
    print(text)


if __name__ == "__main__":
    main()
