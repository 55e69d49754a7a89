"""What a run has memorized: pictures for duplicate and distinct prompts, held against its training pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from accelerate import PartialState

from memfilter.data import scenes
from memfilter.eval.agreement import scorer_features
from memfilter.eval.classifier import judge
from memfilter.eval.clip import Clip, is_on_hub
from memfilter.eval.copies import PIXELS, Measure
from memfilter.eval.frechet import MOST_FEATURES, distances
from memfilter.eval.generate import batches, generate_batch
from memfilter.eval.measuring import measured, training_pictures
from memfilter.eval.nearest import nearest as find_nearest
from memfilter.eval.parts import CUT, Parts, fingerprint
from memfilter.eval.runs import DUPLICATES, FinishedRun, Prompt
from memfilter.files import atomic, held
from memfilter.pipelines import load_trained
from memfilter.processes import from_main, processes

EVALUATION, PICTURES, PARTS = "evaluation.json", "evaluation.npz", "evaluation.parts"
FRECHET_PICTURES = 10_000  # training pictures at most
SEED = 20261125  # of which they are


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

    Several processes share the work where a launcher has started them; all of them call. What was killed goes on where
    it was when it is called again with the same arguments. Pictures that evaluation.npz holds are not made again.

    Args:
        run_dir: of a finished run.
        distinct: the first so many samples that are no duplicates; of any, where the run knows no duplicates.
        seeds: pictures for each prompt.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        near_copies: so many keys in a row are near copies of one duplicate, as `prepare_scenes` makes them: the first
            one's caption is the prompt, and what is nearest of all of them counts.
        prompts: file of prompts instead of the run's own, see `FinishedRun.read_prompts`.
        measure: of copy similarity.
        nearest: whether the nearest of all training pictures is looked for too.
        clip: directory or hub id of a CLIP, for the CLIP score.
        frechet: features for the Frechet distance and KID between the pictures for prompts that are no duplicates' and
            training pictures that are none: the scenes' scorer's, CLIP's, or those of ``measure``, of which there may be 4,096
            (`MOST_FEATURES`): pixels have as many up to 36 px.
        batch_size: pictures at a time.

    Writes ``evaluation.json`` (figures for each prompt and for each kind of prompts, and of the filter as a classifier)
    and ``evaluation.npz`` (``generations`` uint8 [P, S, H, W, 3] and ``training`` uint8 [P, H, W, 3], 0 where a prompt
    has none that can be read) into the run's directory.

    Returns:
        What is in ``evaluation.json``.

    Raises:
        BlockingIOError: the run is being evaluated by another call.
        ValueError: a number is too small, see `require_sensible`; the run is not finished or its pictures cannot be had;
            or something that is asked for is not there.
    """
    require_sensible(
        distinct=distinct,
        seeds=seeds,
        steps=steps,
        near_copies=near_copies,
        batch_size=batch_size,
        clip=clip,
        frechet=frechet,
    )
    run_dir, state = Path(run_dir), processes()
    run = FinishedRun(run_dir)

    def decided() -> tuple[list[Prompt], dict, bool]:
        """What is asked for, by which settings, and whether pictures that were made by these are there."""
        asked = run.read_prompts(prompts) if prompts else run.prompts(distinct, near_copies)
        if not asked:
            raise ValueError(f"{run_dir} has no duplicates and distinct is {distinct}: there is nothing to generate")
        if frechet:
            if frechet == "scorer" and not run.of_scenes:
                raise ValueError("frechet=scorer needs a run on clipart scenes: use clip or measure")
            if all(prompt.kind == DUPLICATES for prompt in asked) or not len(run.distinct_rows()):
                raise ValueError("frechet needs prompts and training pictures that are no duplicates: one kind is missing")
        settings = {
            "prompts": [prompt.text for prompt in asked],
            "seeds": seeds,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "size": run.config.data.resolution,
            "batch_size": batch_size,
            **run.stamp(),
        }
        return asked, settings, _are_made(run_dir, settings)

    with _alone(run_dir, state):
        asked, settings, there = from_main(state, decided)
        model = Clip(clip, state.device) if clip and state.is_main_process else None
        generations, pipeline = _read_generations(run_dir) if there else None, None
        if generations is None:
            pipeline = load_trained(run_dir)
            side = settings["size"] or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        else:
            side = generations.shape[2]
        if frechet == "scorer" and side != scenes.RESOLUTION:
            raise ValueError(f"frechet=scorer needs pictures of {scenes.RESOLUTION} px, found {side} px")
        if frechet == "measure" and (width := measure.features(np.zeros((1, side, side, 3), np.uint8)).shape[1]) > MOST_FEATURES:
            raise ValueError(f"frechet=measure: {measure.name} has {width:,} features of pictures of {side} px, and with more than "
                             f"{MOST_FEATURES:,} a Frechet distance takes hours: use clip, or a measure of SSCD")  # fmt: skip
        training = training_pictures(run, asked, side) if state.is_main_process else {}
        if generations is None:
            generations = _generations(run_dir, settings, pipeline, state, progress)  # [P, S, H, W, 3]
        del pipeline  # the measure wants its room on the device
        closest = None
        if nearest:
            facts = {"generations": settings, "measure": measure.facts(), "samples": run.experiment.fingerprint(),
                     "flipped": run.config.data.random_flip}  # fmt: skip
            parts = Parts(run_dir / PARTS, "nearest", facts, state)
            closest = find_nearest(generations.reshape(-1, *generations.shape[2:]), run, measure, parts, progress)
        if state.is_main_process:
            result = measure.facts() | {"steps": steps, "guidance_scale": guidance_scale, "near_copies": near_copies}
            result |= {"clip": clip} if clip else {}
            result |= measured(run, asked, generations, training, measure, closest, model)
            result["filter"] = _judged(run)
            if frechet:
                extract = {"scorer": scorer_features, "clip": model and model.image_features, "measure": measure.features}
                result["frechet"] = {"features": frechet} | _distances(run, asked, generations, extract[frechet])
            nothing = np.zeros((side, side, 3), np.uint8)
            known = np.stack([training.get(i, nothing) for i in range(len(asked))])
            _write(run_dir, result, generations, known, fingerprint(settings))
        state.wait_for_everyone()
    return json.loads((run_dir / EVALUATION).read_text(encoding="utf-8"))


@contextmanager
def _alone(run_dir: Path, state: PartialState) -> Iterator[None]:
    """As long as no other call evaluates the run.

    Raises:
        BlockingIOError: one does.
    """
    with ExitStack() as holding:
        from_main(state, lambda: holding.enter_context(held(run_dir / ".evaluation.lock")))
        yield


def require_sensible(
    *, distinct: int, seeds: int, steps: int, near_copies: int, batch_size: int, clip: str | None, frechet: str | None
) -> None:
    """What can be said of the arguments of `evaluate_run` before there is a run.

    Raises:
        ValueError: there are fewer than two seeds, fewer than one step, picture at a time or near copy, or less than no
            distinct samples; there is no such CLIP; or none for frechet=clip.
    """
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2, found {seeds}: a prompt's generations are compared to each other")
    for name, value, least in (("distinct", distinct, 0), ("steps", steps, 1), ("near_copies", near_copies, 1),
                               ("batch_size", batch_size, 1)):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")
    if clip:
        is_on_hub(clip)
    if frechet == "clip" and not clip:
        raise ValueError("frechet=clip needs clip: name a CLIP")


def _are_made(run_dir: Path, settings: dict) -> bool:
    """Whether evaluation.npz has, whole, what is made by these settings."""
    try:
        with np.load(run_dir / PICTURES) as found:
            if "settings" not in found or str(found["settings"]) != fingerprint(settings):
                return False
        _read_generations(run_dir)
    except (FileNotFoundError, *CUT):
        return False
    return True


def _read_generations(run_dir: Path) -> np.ndarray:
    """uint8 [P, S, H, W, 3]."""
    with np.load(run_dir / PICTURES) as found:
        return found["generations"]


def _generations(run_dir: Path, settings: dict, pipeline, state, progress: bool) -> np.ndarray:
    """uint8 [P, S, H, W, 3]; what an interrupted call has made is not made again."""
    prompts, seeds = settings["prompts"], settings["seeds"]
    jobs = batches(prompts, range(seeds), settings["batch_size"])
    form = {name: settings[name] for name in ("steps", "guidance_scale", "size")}
    parts = Parts(run_dir / PARTS, "generate", settings, state)
    if parts.due(len(jobs)):
        pipeline.to(state.device)

    def work(number: int) -> dict[str, np.ndarray]:
        return {"pictures": generate_batch(pipeline, jobs[number], **form)}

    pictures = np.concatenate([part["pictures"] for part in parts.run(len(jobs), work, progress)])
    return pictures.reshape(len(prompts), seeds, *pictures.shape[1:])


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


def _write(run_dir: Path, result: dict, generations: np.ndarray, training: np.ndarray, settings: str) -> None:
    with atomic(run_dir / PICTURES) as partial, partial.open("wb") as file:
        np.savez(file, generations=generations, training=training, settings=np.array(settings))
    with atomic(run_dir / EVALUATION) as partial:
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    shutil.rmtree(run_dir / PARTS, ignore_errors=True)
