"""Pictures with or without mitigation, and what was done for each."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from memfilter.eval.generate import Job, arguments_of, unchecked
from memfilter.files import atomic
from memfilter.inference.calls import Call, first_calls, require_finite
from memfilter.inference.clean import rounded
from memfilter.inference.detection import Sampling, jobs_of, named
from memfilter.inference.mitigation import add_random_tokens, adjusted_call
from memfilter.inference.models import Model
from memfilter.inference.watching import watch

_BEGUN = ".pictures.txt"  # names of the pictures that are being made, until pictures.jsonl lists them


@dataclass(frozen=True)
class Mitigation:
    """What is done for a prompt.

    Args:
        kind: none, ``prompt`` (`adjust_prompt`) or ``rta`` (`add_random_tokens`).
        threshold: of the first step's mean norm, from which it is done; None for always.
        target: of ``prompt``.
        tokens: of ``rta``.

    Raises:
        ValueError: what the kind asks for is out of range.
    """

    kind: Literal["none", "prompt", "rta"] = "none"
    threshold: float | None = None
    target: float | None = None
    tokens: int = 4

    def __post_init__(self):
        if self.kind == "prompt" and not (self.target is not None and self.target > 0):
            raise ValueError(f"target must be above 0, found {self.target}")
        if self.kind == "rta" and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, found {self.tokens}")


@dataclass(frozen=True)
class Generated:
    """Pictures of one prompt.

    Args:
        pictures: uint8 [seeds, H, W, 3].
        norms: of the generation that they come from, [seeds, S].
        first_norms: of the first step that can be read, before anything was done, [seeds].
        iterations: by which the embedding was moved, [seeds]; 0 for other kinds.
        shown: the texts that were generated for, one for each seed.
    """

    pictures: np.ndarray
    norms: np.ndarray
    first_norms: np.ndarray
    iterations: np.ndarray
    shown: tuple[str, ...]


def generate_prompt(
    pipeline, prompt: str, sampling: Sampling, how: Mitigation = Mitigation(), number: int = 0, batch_size: int = 16
) -> Generated:
    """All seeds of one prompt; the noise is that of the prompt's number, whatever is done.

    A safety checker is set aside, as where prompts are detected and runs evaluated: in black pictures nobody sees a copy.

    Args:
        batch_size: pictures at a time.

    Raises:
        ValueError: a norm is not finite; names prompt and seed.
    """
    form, first = (sampling.steps, sampling.guidance_scale, sampling.size), sampling.first_readable(pipeline)
    batches = jobs_of(number, prompt, sampling.seeds, batch_size)
    calls: list[Call | None] = [None] * len(batches)
    acting = how.kind != "none"
    if acting:
        calls = [first_calls(pipeline, first, **arguments_of(jobs, *form))[-1] for jobs in batches]
        norms = torch.cat([call.norm(pipeline.scheduler) for call in calls])
        with named([job for jobs in batches for job in jobs]):
            require_finite(norms)
        before = norms.float().cpu().numpy()
        acting = how.threshold is None or float(before.mean()) >= how.threshold
    found = [_batch(pipeline, jobs, call, form, how if acting else Mitigation()) for jobs, call in zip(batches, calls, strict=True)]
    pictures, norms, iterations, shown = (np.concatenate(values) for values in zip(*found, strict=True))
    return Generated(pictures, norms, before if how.kind != "none" else norms[:, first - 1], iterations, tuple(shown.tolist()))


def _batch(pipeline, jobs: list[Job], call: Call | None, form: tuple, how: Mitigation) -> tuple[np.ndarray, ...]:
    """Pictures, norms, iterations and texts of some jobs."""
    iterations, arguments = np.zeros(len(jobs), int), arguments_of(jobs, *form)
    if how.kind == "rta":
        jobs = [job._replace(prompt=add_random_tokens(pipeline.tokenizer, job, how.tokens)) for job in jobs]
        arguments = arguments_of(jobs, *form)
    elif how.kind == "prompt":
        with named(jobs):
            adjusted = adjusted_call(pipeline, call, how.target)
        iterations = adjusted.iterations.numpy()
        arguments = {name: value for name, value in arguments.items() if name != "prompt"} | adjusted.arguments()
    with named(jobs), unchecked(pipeline), watch(pipeline) as seen:
        images, norms = pipeline(**arguments).images, seen.norms.numpy()
    return np.round(images * 255).astype(np.uint8), norms, iterations, np.array([job.prompt for job in jobs], object)


def write_pictures(model: Model, prompts: list[str], sampling: Sampling, how: Mitigation, out: Path, batch_size: int = 16) -> int:
    """A PNG for each prompt and seed, and at the end ``pictures.jsonl``; what was interrupted goes on where it was. What
    another call had made there goes.

    Returns:
        For how many prompts something was changed.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = model.parts(out / ".parts", "generate", sampling, prompts=prompts, how=asdict(how), batch_size=batch_size)
    if model.state.is_main_process:  # once no other call is at work; what the other processes begin to make stays
        _forget(out, {_name(number, seed) for number in range(len(prompts)) for seed in range(sampling.seeds)})

    def work(number: int) -> dict[str, np.ndarray]:
        made = generate_prompt(model.pipeline, prompts[number], sampling, how, number, batch_size)
        for seed, picture in enumerate(made.pictures):
            with atomic(out / _name(number, seed)) as partial:
                Image.fromarray(picture).save(partial, "PNG")
        return {"norms": made.norms, "first_norms": made.first_norms, "iterations": made.iterations,
                "shown": np.array(json.dumps(made.shown))}  # fmt: skip

    found = parts.run(len(prompts), work, progress=True)
    rows = [row for number, made in enumerate(found) for row in _rows(number, prompts[number], made, how.kind)]
    if model.state.is_main_process:
        with atomic(out / "pictures.jsonl") as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (out / _BEGUN).unlink(missing_ok=True)
    parts.remove()
    return sum(any(row["mitigation"] != "none" for row in rows[at : at + sampling.seeds]) for at in range(0, len(rows), sampling.seeds))


def _forget(out: Path, again: set[str]) -> None:
    """Removes ``pictures.jsonl`` and the pictures of other calls, those that it lists and those that an interrupted one may have
    left, but for those that are made again."""
    listed, begun = out / "pictures.jsonl", out / _BEGUN
    for file in (listed, begun):
        with suppress(FileNotFoundError):
            # the file may come from anywhere: what has no name of a picture is not touched
            names = re.findall(r'^(?:{"file": ")?(\d{5,}-\d{2,}\.png)\b', file.read_text("utf-8", "replace"), re.MULTILINE)
            for name in names:
                if name not in again:
                    (out / name).unlink(missing_ok=True)
    with atomic(begun) as partial:
        partial.write_text("".join(f"{name}\n" for name in sorted(again)), encoding="utf-8")
    listed.unlink(missing_ok=True)


def _name(number: int, seed: int) -> str:
    return f"{number:05d}-{seed:02d}.png"


def _rows(number: int, prompt: str, made: dict[str, np.ndarray], kind: str) -> list[dict]:
    rows = []
    for seed, shown in enumerate(json.loads(str(made["shown"]))):
        iterations = int(made["iterations"][seed])
        rows.append({"file": _name(number, seed), "prompt": prompt, "seed": seed,
                     "mitigation": kind if iterations or shown != prompt else "none", "shown": shown, "iterations": iterations,
                     "first_norm": rounded(made["first_norms"][seed], 6),
                     "norms": [None if math.isnan(norm) else rounded(norm, 6) for norm in made["norms"][seed]]})  # fmt: skip
    return rows
