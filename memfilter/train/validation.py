"""Pictures from the model while it trains: the same prompts and noise each time, beside the training pictures."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from memfilter.config import LogConfig
from memfilter.data.sampler import SampleDataset
from memfilter.data.shards import ShardError
from memfilter.eval.generate import generate
from memfilter.files import atomic

SEEDS = (0, 1, 2, 3)


class Validation:
    """A sheet for a few known duplicates and as many distinct samples; of any, where nothing is known.

    Sheets go to ``<samples seen>.png``, one row for every prompt: its training picture, then four seeds; the prompts,
    in that order, to ``prompts.txt``.

    Args:
        unet: the denoiser as training calls it.
        out: None generates and writes nothing: ranks that share a denoiser must all generate.
        batch_size: pictures at a time.
    """

    def __init__(self, config: LogConfig, pipeline, unet, dataset: SampleDataset, out: Path | None, batch_size: int):
        self._config, self._out, self._batch_size = config, out, batch_size
        self._pipeline = copy.copy(pipeline)
        self._pipeline.unet = unet  # as it trains: what runs in half precision does so here too, and nothing else does
        self._side = dataset.view.resolution
        self._rows: list[tuple[str, np.ndarray]] = []
        if config.validation_every:
            self._rows = [row for key in _keys(dataset, config.validation_prompts) if (row := self._row(dataset, key))]

    def _row(self, dataset: SampleDataset, key: str) -> tuple[str, np.ndarray] | None:
        try:
            picture = ImageOps.fit(dataset.shards.image(key), (self._side, self._side), Image.Resampling.LANCZOS)
            return dataset.shards.caption(key), np.asarray(picture)
        except ShardError:
            return None

    def run(self, samples: int) -> list[tuple[str, np.ndarray]]:
        """Generates and writes a sheet; (prompt, its row of the sheet as uint8 [H, 5 W, 3]) for every prompt."""
        if not self._rows:
            return []
        prompts = [prompt for prompt, _ in self._rows]
        generations = generate(
            self._pipeline,
            prompts,
            SEEDS,
            steps=self._config.validation_steps,
            guidance_scale=self._config.validation_guidance_scale,
            batch_size=self._batch_size,
            size=self._side,
            progress=False,
        )
        rows = [np.concatenate([known, *made], 1) for (_, known), made in zip(self._rows, generations, strict=True)]
        if self._out is None:
            return []
        self._out.mkdir(exist_ok=True)
        with atomic(self._out / "prompts.txt") as partial:
            partial.write_text("".join(f"{' '.join(prompt.split())}\n" for prompt in prompts), encoding="utf-8")
        with atomic(self._out / f"{samples:09d}.png") as partial:
            Image.fromarray(np.concatenate(rows)).save(partial, "PNG")
        return list(zip(prompts, rows, strict=True))


def _keys(dataset: SampleDataset, count: int) -> list[str]:
    keys, duplicate = np.array(dataset.experiment.keys), dataset.experiment.duplicate
    if duplicate is None:
        return keys[:count].tolist()
    return [*keys[duplicate][:count], *keys[~duplicate][:count]]
