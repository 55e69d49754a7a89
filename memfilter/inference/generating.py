"""Pictures with or without mitigation, and what was done for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from memfilter.eval.generate import Job, arguments_of
from memfilter.files import atomic
from memfilter.inference.calls import first_calls
from memfilter.inference.detection import Sampling
from memfilter.inference.mitigation import add_random_tokens, adjust_prompt
from memfilter.inference.watching import watch


@dataclass(frozen=True)
class Mitigation:
    """What is done for a prompt.

    Args:
        kind: none, ``prompt`` (`adjust_prompt`) or ``rta`` (`add_random_tokens`).
        threshold: of the first step's mean norm, from which it is done; None for always.
        target: of ``prompt``.
        tokens: of ``rta``.
    """

    kind: Literal["none", "prompt", "rta"] = "none"
    threshold: float | None = None
    target: float | None = None
    tokens: int = 4


@dataclass(frozen=True)
class Generated:
    """Pictures of one prompt.

    Args:
        pictures: uint8 [seeds, H, W, 3].
        norms: of the generation that they come from, [seeds, S].
        first_norms: of the first step before anything was done, [seeds].
        changed: whether something was.
        shown: the texts that were generated for, one for each seed.
    """

    pictures: np.ndarray
    norms: np.ndarray
    first_norms: np.ndarray
    changed: bool
    shown: tuple[str, ...]


def generate_prompt(pipeline, prompt: str, sampling: Sampling, how: Mitigation, number: int = 0) -> Generated:
    """All seeds of one prompt; the noise is that of the prompt's number, whatever is done."""
    jobs = [Job(number, prompt, seed) for seed in range(sampling.seeds)]
    form = (sampling.steps, sampling.guidance_scale, sampling.size)
    first, changed, arguments = None, False, arguments_of(jobs, *form)
    if how.kind != "none":
        call = first_calls(pipeline, 1, **arguments_of(jobs, *form))[0]  # which spends its generators
        first = call.norm(pipeline.scheduler).float().cpu().numpy()
        changed = how.threshold is None or float(first.mean()) >= how.threshold
    if changed and how.kind == "rta":
        jobs = [job._replace(prompt=add_random_tokens(pipeline.tokenizer, job, how.tokens)) for job in jobs]
        arguments = arguments_of(jobs, *form)
    elif changed:
        adjusted = adjust_prompt(pipeline, jobs, how.target, sampling)
        arguments = {name: value for name, value in arguments.items() if name != "prompt"} | adjusted.arguments()
    with watch(pipeline) as seen:
        images = pipeline(**arguments).images
    norms = seen.norms.numpy()
    pictures = np.round(images * 255).astype(np.uint8)
    return Generated(pictures, norms, norms[:, 0] if first is None else first, changed, tuple(job.prompt for job in jobs))


def write_pictures(
    pipeline, prompts: list[str], sampling: Sampling, how: Mitigation, out: Path, progress: bool = True
) -> int:
    """A PNG for each prompt and seed, and ``pictures.jsonl``; returns for how many prompts something was changed."""
    out.mkdir(parents=True, exist_ok=True)
    rows, changed = [], 0
    for number, prompt in enumerate(tqdm(prompts, desc="generate", disable=not progress)):
        made = generate_prompt(pipeline, prompt, sampling, how, number)
        changed += made.changed
        for seed, picture in enumerate(made.pictures):
            file = f"{number:05d}-{seed:02d}.png"
            with atomic(out / file) as partial:
                Image.fromarray(picture).save(partial, "PNG")
            rows.append({"file": file, "prompt": prompt, "seed": seed, "mitigation": how.kind if made.changed else "none",
                         "shown": made.shown[seed], "first_norm": round(float(made.first_norms[seed]), 4),
                         "norms": [round(float(norm), 4) for norm in made.norms[seed]]})  # fmt: skip
        with atomic(out / "pictures.jsonl") as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return changed
