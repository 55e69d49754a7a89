"""What a run has memorized: pictures for duplicate and distinct prompts, held against their training pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from memfilter.data import scenes
from memfilter.data.experiment import Experiment, index_beside
from memfilter.data.shards import Shards
from memfilter.eval.agreement import agreement
from memfilter.eval.copies import MEASURE, copy_similarity, memorized_above, seed_agreement
from memfilter.eval.generate import generate
from memfilter.files import atomic
from memfilter.pipelines import load_trained

EVALUATION, PICTURES = "evaluation.json", "evaluation.npz"


def evaluate_run(
    run_dir: Path,
    *,
    distinct: int = 20,
    seeds: int = 4,
    steps: int = 20,
    guidance_scale: float = 4.0,
    near_copies: int = 1,
    progress: bool = True,
) -> dict:
    """Generates for every duplicate and for ``distinct`` distinct samples of a run on clipart scenes.

    Args:
        near_copies: so many keys in a row are near copies of one duplicate, as `prepare_scenes` makes them: the first one's
            caption is the prompt, and what is nearest of all of them counts.

    Writes ``evaluation.json`` (figures for each prompt and for both kinds) and ``evaluation.npz`` (``generations``
    uint8 [P, S, H, W, 3] and ``training`` uint8 [P, H, W, 3]) into the run's directory.

    Returns:
        What is in ``evaluation.json``.

    Raises:
        ValueError: the run is not finished, its samples are not clipart scenes, or there is one seed only.
    """
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2, found {seeds}: a prompt's generations are compared to each other")
    if not (run_dir / "summary.json").is_file():
        raise ValueError(f"{run_dir} has no summary.json: it is not a run, or not finished")
    config = json.loads((run_dir / "summary.json").read_text())["config"]
    shards = Shards.open(config["data"]["path"])
    experiment = Experiment.read(config["data"]["index"] or index_beside(config["data"]["path"]))
    rows = [*np.flatnonzero(experiment.duplicate)[::near_copies], *np.flatnonzero(~experiment.duplicate)[:distinct]]
    keys = [experiment.keys[row] for row in rows]
    wanted = [scene_from(shards.facts(key)) for key in keys]
    training = np.stack([np.asarray(shards.image(key)) for key in keys])

    pipeline = load_trained(run_dir)
    captions = [scene.caption for scene in wanted]
    generations = generate(
        pipeline, captions, range(seeds), steps=steps, guidance_scale=guidance_scale, progress=progress
    )
    similarity = copy_similarity(generations, training[:, None])  # [P, S]
    for place, row in enumerate(rows):
        for other in range(row + 1, row + near_copies if experiment.duplicate[row] else 0):
            picture = np.asarray(shards.image(experiment.keys[other]))
            similarity[place] = np.maximum(similarity[place], copy_similarity(generations[place], picture))
    agreed = agreement(generations.reshape(-1, *training.shape[1:]), [s for s in wanted for _ in range(seeds)])
    agreed = agreed.reshape(similarity.shape)
    together = seed_agreement(generations)
    duplicate = experiment.duplicate[rows]

    def figures(chosen: np.ndarray) -> dict[str, float]:
        return {
            "memorization_rate": float((similarity[chosen] > memorized_above()).mean()),
            "copy_similarity": float(similarity[chosen].mean()),
            "agreement": float(agreed[chosen].mean()),
            "seed_agreement": float(together[chosen].mean()),
        }

    result = {
        "measure": MEASURE,
        "memorized_above": memorized_above(),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "duplicates": figures(duplicate),
        "distinct": figures(~duplicate),
        "prompts": [
            {
                "key": key,
                "caption": caption,
                "duplicate": bool(duplicate[i]),
                "similarity": similarity[i].tolist(),
                "agreement": agreed[i].tolist(),
                "seed_agreement": float(together[i]),
            }
            for i, (key, caption) in enumerate(zip(keys, captions, strict=True))
        ],
    }
    with atomic(run_dir / PICTURES) as partial, partial.open("wb") as file:
        np.savez(file, generations=generations, training=training)
    with atomic(run_dir / EVALUATION) as partial:
        partial.write_text(json.dumps(result, indent=1))
    return result


def scene_from(facts: dict) -> scenes.Scene:
    """The scene that a sample's metadata describes; ValueError where it describes none."""
    names = [field.name for field in dataclasses.fields(scenes.Scene)]
    if missing := [name for name in names if name not in facts]:
        raise ValueError(f"sample {facts.get('key')!r} is not a clipart scene: its .json lacks {', '.join(missing)}")
    return scenes.Scene(**{name: facts[name] for name in names} | {"colours": tuple(facts["colours"])})
