"""Pictures from a pipeline for a list of prompts: the same noise for the same (prompt number, seed) on every model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm


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
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline = copy.copy(pipeline)
        pipeline.register_modules(safety_checker=None)  # it would blacken what is to be looked at and measured
    jobs = [(i, prompt, seed) for i, prompt in enumerate(prompts) for seed in seeds]
    pictures = []
    for start in tqdm(range(0, len(jobs), batch_size), desc="generate", disable=not progress):
        batch = jobs[start : start + batch_size]
        out = pipeline(
            [prompt for _, prompt, _ in batch],
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + i) for i, _, seed in batch],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=size,
            width=size,
            output_type="np",
        )
        pictures.append(np.round(out.images * 255).astype(np.uint8))
    stacked = np.concatenate(pictures)
    return stacked.reshape(len(prompts), len(seeds), *stacked.shape[1:])
