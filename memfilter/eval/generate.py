"""Pictures from a pipeline for a list of prompts: the same noise for the same (prompt number, seed) on every model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm


class Job(NamedTuple):
    """One picture."""

    number: int  # of the prompt
    prompt: str
    seed: int


def batches(prompts: Sequence[str], seeds: Sequence[int], batch_size: int) -> list[list[Job]]:
    """Every prompt with every seed, in that order."""
    jobs = [Job(number, prompt, seed) for number, prompt in enumerate(prompts) for seed in seeds]
    return [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]


def generate(
    pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2, 3),
    *,
    steps: int = 20,
    guidance_scale: float = 4.0,
    batch_size: int = 16,
    size: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """uint8 [prompts, seeds, H, W, 3].

    Args:
        pipeline: a StableDiffusionPipeline, or one that is called alike.
        steps: of the pipeline's own scheduler.
        size: height and width in pixels; None for what the model was made for.
    """
    bar = tqdm(batches(prompts, seeds, batch_size), desc="generate", disable=not progress)
    stacked = np.concatenate([generate_batch(pipeline, batch, steps, guidance_scale, size) for batch in bar])
    return stacked.reshape(len(prompts), len(seeds), *stacked.shape[1:])


def generate_batch(
    pipeline, batch: Sequence[Job], steps: int = 20, guidance_scale: float = 4.0, size: int | None = None
) -> np.ndarray:
    """uint8 [B, H, W, 3]; arguments as of `generate`."""
    with unchecked(pipeline):
        out = pipeline(**arguments_of(batch, steps, guidance_scale, size))
    return np.round(out.images * 255).astype(np.uint8)


@contextmanager
def unchecked(pipeline) -> Iterator[None]:
    """Without the safety checker, which would blacken what is to be looked at and measured."""
    checker = getattr(pipeline, "safety_checker", None)
    if checker is None:
        yield
        return
    object.__setattr__(pipeline, "safety_checker", None)  # by its own way diffusers would forget it when the pipeline is saved
    try:
        yield
    finally:
        object.__setattr__(pipeline, "safety_checker", checker)


def arguments_of(batch: Sequence[Job], steps: int, guidance_scale: float, size: int | None) -> dict:
    """What a pipeline is called with."""
    return call_arguments([job.prompt for job in batch], [generator_of(job) for job in batch], steps, guidance_scale, size)


def call_arguments(
    prompts: list[str], generators: list[torch.Generator], steps: int, guidance_scale: float, size: int | None
) -> dict:
    """What a pipeline is called with, for one picture of each prompt."""
    return {
        "prompt": prompts,
        "generator": generators,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": size,
        "width": size,
        "output_type": "np",
    }


def generator_of(job: Job) -> torch.Generator:
    """Of its noise."""
    return torch.Generator().manual_seed(job.seed * 1_000_003 + job.number)
