"""The figures of an evaluation: of every prompt, and of each kind of prompts together."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from PIL import Image

from memfilter.data import scenes
from memfilter.data.duplicates import NEAR_BITS, near_pairs, perceptual_hashes
from memfilter.data.shards import ShardError
from memfilter.eval.agreement import agreement
from memfilter.eval.clip import Clip
from memfilter.eval.copies import PIXELS, Measure, distinct_above, memorized_above, seed_agreement
from memfilter.eval.results import OWN_LIMIT, QUANTILE
from memfilter.eval.runs import DISTINCT, DUPLICATES, UNKNOWN, FinishedRun, Prompt

PERCENTILES = (75, 90, 95)
# column -> figures of its mean, and of its share above the limit: of the nearest only where the limit is the measure's own, since
# of so many pictures one is above a quantile of pairs whether it was copied or not
COPYING = {
    "similarity": ("copy_similarity", "memorization_rate"),
    "nearest_similarity": ("nearest_similarity", "nearest_memorization_rate"),
}
SCENES_CAPTIONS = 60  # of the calibration of a measure that takes its time
CALIBRATION_PICTURES = 500  # whose pairs say what different pictures have in common, where they are not scenes
SEED = 20261125  # of which they are


def training_pictures(run: FinishedRun, asked: list[Prompt], side: int) -> dict[int, np.ndarray]:
    """Number of a prompt -> its training picture, uint8 [side, side, 3], for those that have one that can be read."""
    found = {}
    for i, prompt in enumerate(asked):
        with suppress(ShardError):
            if prompt.key:
                found[i] = run.picture(prompt.key, side)
    return found


def measured(
    run: FinishedRun,
    asked: list[Prompt],
    generations: np.ndarray,
    training: dict[int, np.ndarray],
    measure: Measure,
    closest: tuple[np.ndarray, np.ndarray, int] | None = None,
    clip: Clip | None = None,
) -> dict:
    """All figures of some prompts.

    Args:
        generations: uint8 [P, S, side, side, 3].
        training: what `training_pictures` has read for them.
        closest: what `nearest` found for all of them, [P S].

    Returns:
        ``memorized_above`` and what that is; ``training_unreadable``, how many of the training pictures that were asked for;
        ``duplicates``, ``distinct`` and ``unknown``: figures by name, none where there are no prompts of the kind;
        ``prompts``: what there is of each.
    """
    shape, columns = generations.shape[:2], _columns(run, asked, generations, clip)  # [P, S] each
    side, seen = generations.shape[2], measure.seen(generations)
    limit, basis, unreadable = None, None, {}
    if closest or any(prompt.key for prompt in asked):
        limit, basis = _limit(run, measure, side)
    if any(prompt.key for prompt in asked):
        similarity, missed = _own_similarity(run, asked, seen, training, measure, side)
        columns, unreadable = {"similarity": similarity} | columns, {"training_unreadable": missed}
    if closest:
        columns["nearest_similarity"], unreadable = closest[0].reshape(shape), {"training_unreadable": closest[2]}
    together, kinds = seed_agreement(seen, measure), np.array([prompt.kind for prompt in asked])

    def figures(chosen: np.ndarray) -> dict[str, float]:
        found = {}
        for name, values in ((name, values[chosen]) for name, values in columns.items()):
            if name not in COPYING:
                found[name] = float(values.mean())
            elif len(values := values[~np.isnan(values)]):
                found |= _copying(name, values, limit if name == "similarity" else measure.memorized_above(side), measure)
        return found | {"seed_agreement": float(together[chosen].mean())}

    rows = [
        {"key": prompt.key, "caption": prompt.text, "duplicate": prompt.duplicate}
        | {name: [None if np.isnan(v) else v for v in values[i].tolist()] for name, values in columns.items()}
        | {"seed_agreement": float(together[i])}
        for i, prompt in enumerate(asked)
    ]
    if closest:
        for row, places in zip(rows, closest[1].reshape(shape).tolist(), strict=True):
            row["nearest_key"] = [run.experiment.keys[place] for place in places]
    by_kind = {kind: figures(kinds == kind) if kind in kinds else {} for kind in (DUPLICATES, DISTINCT, UNKNOWN)}
    return {"memorized_above": limit, "memorized_above_is": basis} | unreadable | by_kind | {"prompts": rows}


def _own_similarity(
    run: FinishedRun, asked: list[Prompt], seen: np.ndarray, training: dict[int, np.ndarray], measure: Measure, side: int
) -> tuple[np.ndarray, int]:
    """Of every generation to the training picture of its prompt, or the likest of its near copies, mirrored too where the run has
    seen them so, [P, S], NaN without one; and how many of these pictures cannot be read."""
    found, missed = np.full(seen.shape[:2], np.nan, np.float32), 0
    for i, prompt in enumerate(asked):
        pictures = [training[i]] if i in training else []
        for key in prompt.copies:
            with suppress(ShardError):
                pictures.append(run.picture(key, side))
        missed += bool(prompt.key) + len(prompt.copies) - len(pictures)
        if pictures:
            known = measure.seen(np.concatenate(run.views(np.stack(pictures))))
            found[i] = measure.similarity_seen(seen[i][:, None], known[None]).max(1)  # [S, pictures] -> [S]
    return found, missed


def _columns(
    run: FinishedRun, asked: list[Prompt], generations: np.ndarray, clip: Clip | None
) -> dict[str, np.ndarray]:
    """Agreement of picture and caption: by the scenes' own scorer, where all prompts are their captions, and by CLIP."""
    (count, seeds), columns = generations.shape[:2], {}
    flat = generations.reshape(-1, *generations.shape[2:])
    wanted = run.scenes([prompt.key for prompt in asked]) or []
    captions = [scene.caption for scene in wanted]
    if captions == [prompt.text for prompt in asked] and generations.shape[2] == scenes.RESOLUTION:
        columns["agreement"] = agreement(flat, [scene for scene in wanted for _ in range(seeds)]).reshape(count, seeds)
    if clip:
        texts = [prompt.text for prompt in asked for _ in range(seeds)]
        columns["clip_score"] = clip.score(flat, texts).reshape(count, seeds)
    return columns


def _copying(name: str, values: np.ndarray, limit: float | None, measure: Measure) -> dict[str, float]:
    """Without a limit there is no share above it."""
    label, rate = COPYING[name]
    found = ({} if limit is None else {rate: float((values > limit).mean())}) | {label: float(values.mean())}
    found |= {f"{label}_p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return found | {f"{label}_above_{above}": float((values > above).mean()) for above in measure.also_above}


def _limit(run: FinishedRun, measure: Measure, side: int) -> tuple[float, str]:
    """From where on a picture counts as memorized, and what that is."""
    if (fixed := measure.memorized_above(side)) is not None:
        return fixed, "the usual one of the measure"
    if run.of_scenes:
        settings = {} if measure is PIXELS else {"measure": measure, "captions": SCENES_CAPTIONS}
        if side != scenes.RESOLUTION:
            settings["resolution"] = side
        return memorized_above(**settings), f"{QUANTILE} scenes of one caption"
    chosen = np.random.default_rng(SEED).permutation(run.distinct_rows())[:CALIBRATION_PICTURES]
    features, hashes = [], []
    for _, pictures in run.pictures(chosen, side):
        features += list(measure.features(pictures))
        hashes += [np.frombuffer(perceptual_hashes(Image.fromarray(picture))[0], np.uint8) for picture in pictures]
    # copies that no index tells would set the limit at what a copy is like
    again = set(near_pairs(np.array(hashes), NEAR_BITS)[:, 1].tolist()) if hashes else set()
    found = [seen for row, seen in enumerate(features) if row not in again]
    if len(found) < 2:
        raise ValueError(f"{run.directory} has fewer than two distinct pictures, by which to say from where on one is "
                         "a copy")  # fmt: skip
    return distinct_above(np.stack(found)), OWN_LIMIT
