"""What a run has memorized: pictures for duplicate and distinct prompts, held against its training pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from memfilter.data import scenes
from memfilter.eval.agreement import agreement, scorer_features
from memfilter.eval.classifier import judge
from memfilter.eval.clip import Clip
from memfilter.eval.copies import PIXELS, Measure, distinct_above, memorized_above, seed_agreement
from memfilter.eval.frechet import distances
from memfilter.eval.generate import batches, generate_batch
from memfilter.eval.nearest import nearest as find_nearest
from memfilter.eval.parts import Parts, fingerprint, processes
from memfilter.eval.runs import DISTINCT, DUPLICATES, UNKNOWN, FinishedRun, Prompt
from memfilter.files import atomic
from memfilter.pipelines import load_trained

EVALUATION, PICTURES, PARTS = "evaluation.json", "evaluation.npz", "evaluation.parts"
PERCENTILES = (75, 90, 95)
CALIBRATION_PICTURES = 500  # whose pairs say what different pictures have in common, where they are not scenes
SCENES_CAPTIONS = 60  # of the calibration of a measure that takes its time
FRECHET_PICTURES = 10_000  # training pictures at most
SEED = 20261125  # of both choices


def evaluate_run(
    run_dir: Path,
    *,
    distinct: int = 20,
    seeds: int = 4,
    steps: int = 20,
    guidance_scale: float = 4.0,
    near_copies: int = 1,
    progress: bool = True,
    prompts: Path | None = None,
    measure: Measure = PIXELS,
    nearest: bool = False,
    clip: str | None = None,
    frechet: Literal["scorer", "clip", "measure"] | None = None,
    batch_size: int = 16,
) -> dict:
    """Generates for every duplicate and for ``distinct`` distinct samples of a run, and measures.

    Several processes share the work where a launcher has started them; all of them call. What was killed goes on where it
    was when it is called again with the same arguments. Pictures that evaluation.npz already holds are not made again.

    Args:
        run_dir: of a finished run.
        distinct: the first so many samples that are no duplicates; of any, where the run knows no duplicates.
        seeds: pictures for each prompt.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        near_copies: so many keys in a row are near copies of one duplicate, as `prepare_scenes` makes them: the first one's
            caption is the prompt, and what is nearest of all of them counts.
        prompts: file of prompts instead of the run's own, see `FinishedRun.read_prompts`.
        measure: of copy similarity.
        nearest: whether the nearest of all training pictures is looked for too.
        clip: directory or hub id of a CLIP, for the CLIP score.
        frechet: features for the Frechet distance and KID between the pictures for distinct prompts and training pictures:
            the scenes' scorer's, CLIP's, or those of ``measure``.
        batch_size: pictures at a time.

    Writes ``evaluation.json`` (figures for each prompt and for each kind of prompts, and of the filter as a classifier) and
    ``evaluation.npz`` (``generations`` uint8 [P, S, H, W, 3] and ``training`` uint8 [P, H, W, 3], 0 where a prompt has none)
    into the run's directory.

    Returns:
        What is in ``evaluation.json``.

    Raises:
        ValueError: the run is not finished or its pictures cannot be had, there is one seed only, or something that is asked
            for is not there.
    """
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2, found {seeds}: a prompt's generations are compared to each other")
    if min(steps, batch_size) < 1:
        raise ValueError(f"steps and batch_size must be at least 1, found {steps} and {batch_size}")
    run_dir, state = Path(run_dir), processes()
    run = FinishedRun(run_dir)
    asked = run.read_prompts(prompts) if prompts else run.prompts(distinct, near_copies)
    if not asked:
        raise ValueError(f"{run_dir} has no duplicates and distinct is {distinct}: there is nothing to generate")
    wanted = run.scenes([prompt.key for prompt in asked]) if any(prompt.key for prompt in asked) else None
    if frechet:
        if frechet == "clip" and not clip:
            raise ValueError("frechet=clip needs clip: name a CLIP")
        if frechet == "scorer" and not run.of_scenes:
            raise ValueError("frechet=scorer needs a run on clipart scenes: use clip or measure")
        if all(prompt.kind == DUPLICATES for prompt in asked) or not len(run.distinct_rows()):
            raise ValueError("frechet needs prompts and training pictures that are no duplicates, and one kind is missing")
    model = Clip(clip, state.device) if clip and state.is_main_process else None

    settings = {
        "prompts": [prompt.text for prompt in asked],
        "seeds": seeds,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "size": run.config.data.resolution,
        "batch_size": batch_size,
        **run.stamp(),
    }
    generations = _generations(run, settings, state, progress)  # [P, S, H, W, 3]
    closest = None
    if nearest:
        facts = {"generations": settings, "measure": measure.facts(), "samples": run.experiment.fingerprint()}
        parts = Parts(run_dir / PARTS, "nearest", facts, state)
        closest = find_nearest(generations.reshape(-1, *generations.shape[2:]), run, measure, parts, progress)
    if state.is_main_process:
        result = _measured(run, asked, wanted, generations, measure, closest, model)
        result |= {"steps": steps, "guidance_scale": guidance_scale}
        if frechet:
            extract = {"scorer": scorer_features, "clip": model and model.image_features, "measure": measure.features}
            result["frechet"] = {"features": frechet} | _distances(run, asked, generations, extract[frechet])
        _write(run_dir, result, generations, _training(run, asked, generations.shape[2]), fingerprint(settings))
    state.wait_for_everyone()
    return json.loads((run_dir / EVALUATION).read_text(encoding="utf-8"))


def _generations(run: FinishedRun, settings: dict, state, progress: bool) -> np.ndarray:
    """uint8 [P, S, H, W, 3]: made, or found where they were made before."""
    prompts, seeds, before = settings["prompts"], settings["seeds"], run.directory / PICTURES
    if before.is_file():
        with np.load(before) as found:
            if "settings" in found and str(found["settings"]) == fingerprint(settings):
                return found["generations"]

    jobs = batches(prompts, range(seeds), settings["batch_size"])
    form = {name: settings[name] for name in ("steps", "guidance_scale", "size")}
    parts = Parts(run.directory / PARTS, "generate", settings, state)
    pipeline = load_trained(run.directory).to(state.device) if parts.due(len(jobs)) else None

    def work(number: int) -> dict[str, np.ndarray]:
        return {"pictures": generate_batch(pipeline, jobs[number], **form)}

    pictures = np.concatenate([part["pictures"] for part in parts.run(len(jobs), work, progress)])
    return pictures.reshape(len(prompts), seeds, *pictures.shape[1:])


def _measured(
    run: FinishedRun,
    asked: list[Prompt],
    wanted: list[scenes.Scene] | None,
    generations: np.ndarray,
    measure: Measure,
    closest: tuple[np.ndarray, np.ndarray, int] | None,
    clip: Clip | None,
) -> dict:
    """The figures of every prompt, and of every kind of prompts together."""
    shape, side = generations.shape[:2], generations.shape[2]
    limit, basis = _limit(run, measure, side) if closest or any(prompt.key for prompt in asked) else (None, None)
    columns: dict[str, np.ndarray] = {}  # [P, S]
    if keyed := [i for i, prompt in enumerate(asked) if prompt.key]:
        columns["similarity"] = np.full(shape, np.nan, np.float32)
        training = np.stack([run.picture(asked[i].key, side) for i in keyed])
        columns["similarity"][keyed] = measure.similarity(generations[keyed], training[:, None])
        for i in keyed:
            for key in asked[i].copies:
                again = measure.similarity(generations[i], run.picture(key, side)[None])
                columns["similarity"][i] = np.maximum(columns["similarity"][i], again)
    flat = generations.reshape(-1, *generations.shape[2:])
    if wanted and side == scenes.RESOLUTION:
        columns["agreement"] = agreement(flat, [scene for scene in wanted for _ in range(shape[1])]).reshape(shape)
    if clip:
        texts = [prompt.text for prompt in asked for _ in range(shape[1])]
        columns["clip_score"] = clip.score(flat, texts).reshape(shape)
    if closest:
        columns["nearest_similarity"] = closest[0].reshape(shape)
    together = seed_agreement(generations, measure)
    kinds = np.array([prompt.kind for prompt in asked])

    def figures(chosen: np.ndarray) -> dict[str, float]:
        found = {}
        for name, rate, label in (("similarity", "memorization_rate", "copy_similarity"),
                                  ("nearest_similarity", "nearest_memorization_rate", "nearest_similarity")):  # fmt: skip
            if name in columns and len(values := columns[name][chosen][~np.isnan(columns[name][chosen])]):
                found |= {rate: float((values > limit).mean()), label: float(values.mean())}
                found |= {f"{label}_p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
                found |= {f"{label}_above_{above}": float((values > above).mean()) for above in measure.also_above}
        found |= {name: float(columns[name][chosen].mean()) for name in ("agreement", "clip_score") if name in columns}
        return found | {"seed_agreement": float(together[chosen].mean())}

    rows = [
        {"key": prompt.key, "caption": prompt.text, "duplicate": prompt.duplicate}
        | {name: [None if np.isnan(value) else value for value in values[i].tolist()] for name, values in columns.items()}
        | {"seed_agreement": float(together[i])}
        for i, prompt in enumerate(asked)
    ]
    if closest:
        for row, places in zip(rows, closest[1].reshape(shape).tolist(), strict=True):
            row["nearest_key"] = [run.experiment.keys[place] for place in places]
    return (
        measure.facts()
        | {"memorized_above": limit, "memorized_above_is": basis}
        | ({"clip": clip.source} if clip else {})
        | ({"training_unreadable": closest[2]} if closest else {})
        | {kind: figures(kinds == kind) if kind in kinds else {} for kind in (DUPLICATES, DISTINCT, UNKNOWN)}
        | {"filter": _judged(run), "prompts": rows}
    )


def _limit(run: FinishedRun, measure: Measure, side: int) -> tuple[float, str]:
    """From where on a picture counts as memorized, and what that is."""
    if (fixed := measure.memorized_above(side)) is not None:
        return fixed, "the usual one of the measure"
    if run.of_scenes:
        settings = {} if measure is PIXELS else {"measure": measure, "captions": SCENES_CAPTIONS}
        if side != scenes.RESOLUTION:
            settings["resolution"] = side
        return memorized_above(**settings), "99.9% of pairs of scenes of one caption"
    chosen = np.random.default_rng(SEED).permutation(run.distinct_rows())[:CALIBRATION_PICTURES]
    found = [measure.features(pictures) for _, pictures in run.pictures(chosen, side)]
    if sum(map(len, found)) < 2:
        raise ValueError(f"{run.directory} has fewer than two distinct pictures to say from where on one is a copy: use an "
                         "SSCD measure at its full resolution")  # fmt: skip
    return distinct_above(np.concatenate(found)), "99.9% of pairs of distinct training pictures"


def _distances(
    run: FinishedRun, asked: list[Prompt], generations: np.ndarray, extract: Callable[[np.ndarray], np.ndarray]
) -> dict:
    """Of the pictures for all prompts but those of duplicates, from training pictures that are none."""
    chosen = np.array([prompt.kind != DUPLICATES for prompt in asked])
    rows = np.sort(np.random.default_rng(SEED).permutation(run.distinct_rows())[:FRECHET_PICTURES])
    made = generations[chosen].reshape(-1, *generations.shape[2:])
    return distances(extract, made, (pictures for _, pictures in run.pictures(rows, made.shape[1])))


def _judged(run: FinishedRun) -> dict | None:
    audit = run.directory / "audit.parquet"
    return judge(audit, run.summary["samples"]) if audit.is_file() else None


def _training(run: FinishedRun, asked: list[Prompt], side: int) -> np.ndarray:
    nothing = np.zeros((side, side, 3), np.uint8)
    return np.stack([run.picture(prompt.key, side) if prompt.key else nothing for prompt in asked])


def _write(run_dir: Path, result: dict, generations: np.ndarray, training: np.ndarray, settings: str) -> None:
    with atomic(run_dir / PICTURES) as partial, partial.open("wb") as file:
        np.savez(file, generations=generations, training=training, settings=np.array(settings))
    with atomic(run_dir / EVALUATION) as partial:
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    shutil.rmtree(run_dir / PARTS, ignore_errors=True)
