"""Pipelines in, pipelines out."""

from __future__ import annotations

import copy
import shutil
from importlib.resources import files
from pathlib import Path

import torch

SCENES_BASE = "scenes-base"


class ModelError(ValueError):
    """The model directory is not a pipeline that can be fine-tuned."""


def model_dir(path: str) -> Path:
    """The directory that ``model.path`` means."""
    return Path(str(files("memfilter") / "assets" / SCENES_BASE)) if path == "scenes" else Path(path)


def load_pipeline(path: str, dtype: torch.dtype = torch.float32):
    """A StableDiffusionPipeline with weights in ``dtype``, from safetensors only.

    Raises:
        ModelError: no such directory, or a part is missing.
    """
    from diffusers import StableDiffusionPipeline

    directory = model_dir(path)
    if not (directory / "model_index.json").is_file():
        raise ModelError(f"model.path: {directory} is not a pipeline directory, it has no model_index.json")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {directory} cannot be loaded: {' '.join(str(error).split())}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export_pipeline(pipeline, unet, out: Path) -> None:
    """Writes the pipeline with this denoiser in it; the directory appears when it is complete."""
    exported = copy.copy(pipeline)
    exported.register_modules(unet=unet)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    exported.save_pretrained(partial, safe_serialization=True)
    partial.rename(out)
